"""Formats that are one file of tensors: under our own names, or checked against torchvision's and timm's."""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sslrun.errors import UsageError
from sslrun.export import library_shapes
from sslrun.export.architecture import ResNetArchitecture, Shapes, VitArchitecture, shapes_of
from sslrun.export.encoder import ELSEWHERE, Encoder
from sslrun.export.export_format import ExportFormat
from sslrun.export.transformer_forms import from_timm, timm_form, to_timm
from sslrun.export.verify import NotTheSame, difference, features, require_equal, require_names, require_same
from sslrun.runtime.safetensors_file import read_tensors, write_tensors

KEY = "sslrun"  # of our metadata, among the metadata of a file


class TensorFile(ExportFormat, listed=False):
    """Tensors by name, and metadata. PATH's suffix chooses between .safetensors and .pth, which
    `torch.load(path, weights_only=True)` reads."""

    suffixes: ClassVar[tuple[str, ...]] = (".safetensors", ".pth")

    prefix = ""
    """What our names have and those in the file do not."""

    def prepare(self, encoder: Encoder, path: Path) -> None:
        self.suffix = path.suffix
        self.shapes, about = self.layout(encoder)
        self.metadata = encoder.metadata(**about)
        wrong = difference(shapes_of(self.written(encoder)), self.shapes)
        if wrong is not None:
            raise UsageError(f"these weights are not laid out as published: {wrong}")

    def layout(self, encoder: Encoder) -> tuple[Shapes, dict[str, Any]]:
        """The names and shapes that the file must have, and metadata of this format.

        Raises:
            UsageError: the library has no such network.
        """
        raise NotImplementedError

    def written(self, encoder: Encoder) -> dict[str, Tensor]:
        """The encoder's tensors by the names in the file."""
        return {name.removeprefix(self.prefix): tensor for name, tensor in encoder.tensors().items()}

    def ours(self, tensors: dict[str, Tensor], encoder: Encoder) -> dict[str, Tensor]:
        """The inverse of `written`, for the tensors of a file."""
        return {self.prefix + name: tensor for name, tensor in tensors.items()}

    def write(self, encoder: Encoder, path: Path) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in self.written(encoder).items()}
        if self.suffix == ".pth":
            _write_pth(path, tensors, self.metadata)
        else:
            write_tensors(path, tensors, {"format": "pt", KEY: self.metadata})

    def verify(self, encoder: Encoder, path: Path) -> None:
        tensors, metadata = (_read_pth if self.suffix == ".pth" else read_safetensors)(path)
        if metadata != self.metadata:
            raise NotTheSame("its metadata did not read back")
        require_names(tensors, self.shapes)
        require_same(encoder.backbone, self.ours(tensors, encoder), encoder.images())


class Safetensors(TensorFile):
    """Any backbone, under our own names."""

    suffixes = (".safetensors",)

    def layout(self, encoder: Encoder) -> tuple[Shapes, dict[str, Any]]:
        return shapes_of(encoder.tensors()), {"target": "safetensors"}


class LibraryFile(TensorFile, listed=False):
    """A network of a library under its names. Of a backbone that the library itself has made, a new one takes the file
    and has to give the same outputs."""

    library: ClassVar[str]

    def layout(self, encoder: Encoder) -> tuple[Shapes, dict[str, Any]]:
        backbone: Any = encoder.backbone
        if not self._has_made(backbone):
            return self.layout_of_ours(encoder)
        self.prefix, self.note = "net.", backbone.export_note()
        about = {"target": self.library, "architecture": backbone.name, **backbone.making()}
        return shapes_of(backbone.network().state_dict()), about

    def layout_of_ours(self, encoder: Encoder) -> tuple[Shapes, dict[str, Any]]:
        """`layout` of a network of our own that the library has too."""
        raise NotImplementedError

    def verify(self, encoder: Encoder, path: Path) -> None:
        super().verify(encoder, path)
        backbone: Any = encoder.backbone
        if self._has_made(backbone):
            network = backbone.network().eval()
            network.load_state_dict((_read_pth if self.suffix == ".pth" else read_safetensors)(path)[0])
            theirs = features(_Outputs(backbone, network))
            require_equal(features(backbone), theirs, encoder.images())

    def _has_made(self, backbone: nn.Module) -> bool:
        return type(backbone).__name__ == self.library


class _Outputs(nn.Module):
    """What a backbone gives, of another network of its library."""

    def __init__(self, backbone: Any, network: nn.Module) -> None:
        super().__init__()
        self.backbone, self.network = backbone, network

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.backbone.outputs(self.network, images)


class Torchvision(LibraryFile):
    """A network of torchvision, without its classifier."""

    library = "torchvision"

    def layout_of_ours(self, encoder: Encoder) -> tuple[Shapes, dict[str, Any]]:
        name = _resnet_name(encoder, "torchvision")
        about = {"target": "torchvision", "architecture": name, "classifier": "none: set fc to torch.nn.Identity()"}
        return _without_classifier(library_shapes.resnet(name)), about


class Timm(LibraryFile):
    """A network of timm, without its classifier (num_classes = 0)."""

    library = "timm"

    def written(self, encoder: Encoder) -> dict[str, Tensor]:
        tensors = super().written(encoder)
        architecture = encoder.architecture
        return to_timm(tensors, architecture) if isinstance(architecture, VitArchitecture) else tensors

    def ours(self, tensors: dict[str, Tensor], encoder: Encoder) -> dict[str, Tensor]:
        is_vit = isinstance(encoder.architecture, VitArchitecture)
        return from_timm(tensors, encoder.tensors()) if is_vit else super().ours(tensors, encoder)

    def layout(self, encoder: Encoder) -> tuple[Shapes, dict[str, Any]]:
        shapes, about = super().layout(encoder)
        return shapes, {**about, "pretrained_cfg": encoder.preprocessing.for_timm()}

    def layout_of_ours(self, encoder: Encoder) -> tuple[Shapes, dict[str, Any]]:
        architecture = encoder.architecture_for("timm")
        arguments: dict[str, Any] = {"num_classes": 0}
        if isinstance(architecture, ResNetArchitecture):
            name = _resnet_name(encoder, "timm")
            shapes = library_shapes.resnet(name)
        elif not architecture.is_plain:
            name, arguments = timm_form(architecture)
            shapes = library_shapes.timm_vit(arguments, "giant" in name)
            self.note = "create it with the model_args of the metadata: other sizes than those of its name"
        else:
            name = f"vit_{architecture.arch}_patch{architecture.patch_size}_{architecture.img_size}"
            if name not in library_shapes.VITS or architecture.mlp_ratio != 4.0:
                raise UsageError(f"timm has no {architecture} for images of {architecture.img_size} px: {ELSEWHERE}")
            *_, heads = library_shapes.VITS[name]
            if heads != architecture.num_heads:
                arguments["num_heads"] = architecture.num_heads
                self.note = f"timm's {name} has {heads} heads: create it with num_heads={architecture.num_heads}"
            shapes = library_shapes.vit(name)
        about = {"target": "timm", "architecture": name, "model_args": arguments}
        return _without_classifier(shapes), about


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors by name, and our metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get(KEY, "")
        return read_tensors(path), metadata
    except SafetensorError as error:
        raise NotTheSame(f"it cannot be read back ({error})") from error


def _resnet_name(encoder: Encoder, program: str) -> str:
    architecture = encoder.architecture_for(program)
    if not isinstance(architecture, ResNetArchitecture):
        raise UsageError(f"{program}'s vision transformers have names of their own: --to timm takes this one")
    known = {sizes: name for name, sizes in library_shapes.RESNETS.items()}
    name = known.get((architecture.depth, architecture.groups, architecture.width_per_group))
    if name is None or (architecture.base_width, architecture.stages) != (64, 4):
        raise UsageError(f"{program} has no {architecture}: {ELSEWHERE}")
    return name


def _without_classifier(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name not in library_shapes.CLASSIFIERS}


def _write_pth(path: Path, tensors: dict[str, Tensor], metadata: str) -> None:
    """As `torch.save(module.state_dict(), path)`, with our metadata beside that of a state dict."""
    state: Any = OrderedDict(tensors)
    state._metadata = OrderedDict({"": {"version": 1, KEY: metadata}})
    save_pth(path, state)


def save_pth(path: Path, state: Any) -> None:
    """`torch.save`, and wait until the file is on the disk.

    Raises:
        OSError: it cannot be written.
    """
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's, about what became of its file when the disk was full
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(str(error).partition("\n")[0]) from error
        file.flush()
        os.fsync(file.fileno())


def _read_pth(path: Path) -> tuple[dict[str, Tensor], str]:
    with open(path, "rb") as file:
        state = torch.load(file, weights_only=True)
    return dict(state), state._metadata[""][KEY]
