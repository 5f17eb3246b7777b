"""One file of tensors: under our own names, or held against torchvision's and timm's published ones."""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sslrun.errors import UsageError
from sslrun.export import published
from sslrun.export.architecture import ResNetShape, Shapes, shapes_of
from sslrun.export.encoder import ELSEWHERE, Encoder
from sslrun.export.verify import NotTheSame, difference, require_names, require_same
from sslrun.runtime.safetensors_file import write_tensors

KEY = "sslrun"  # of our metadata among a file's


class TensorFile:
    """Tensors by name, and metadata.

    Args:
        encoder: what to write.
        path: its suffix says how: .safetensors, or .pth for what `torch.load(path, weights_only=True)` reads.
    """

    suffixes: tuple[str, ...] = (".safetensors", ".pth")
    note: str | None = None

    def __init__(self, encoder: Encoder, path: Path) -> None:
        if path.suffix not in self.suffixes:
            raise UsageError(f"{path} must end in {' or '.join(self.suffixes)}")
        self.encoder, self.suffix = encoder, path.suffix
        self.names = self.published()
        self.metadata = encoder.metadata(**self.extra())
        wrong = difference(shapes_of(encoder.backbone), self.names)
        if wrong is not None:
            raise UsageError(f"these weights are not laid out as published: {wrong}")

    def published(self) -> Shapes:
        """The names and shapes that the file must have; UsageError: there are none for this encoder."""
        raise NotImplementedError

    def extra(self) -> dict[str, Any]:
        """Metadata of this format."""
        raise NotImplementedError

    def write(self, path: Path) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in self.encoder.tensors().items()}
        if self.suffix == ".pth":
            _write_pth(path, tensors, self.metadata)
        else:
            write_tensors(path, tensors, {"format": "pt", KEY: self.metadata})

    def verify(self, path: Path) -> None:
        tensors, metadata = (_read_pth if self.suffix == ".pth" else read_safetensors)(path)
        if metadata != self.metadata:
            raise NotTheSame("its metadata did not read back")
        require_names(tensors, self.names)
        require_same(self.encoder.backbone, tensors, self.encoder.images())


class SafetensorsFile(TensorFile):
    """Any backbone, under our own names."""

    suffixes = (".safetensors",)

    def published(self) -> Shapes:
        return shapes_of(self.encoder.backbone)

    def extra(self) -> dict[str, Any]:
        return {"target": "safetensors"}


class TorchvisionFile(TensorFile):
    """A ResNet of torchvision, without its classifier."""

    def published(self) -> Shapes:
        self.name = _resnet_name(self.encoder, "torchvision")
        return _without_classifier(published.resnet(self.name))

    def extra(self) -> dict[str, Any]:
        return {"target": "torchvision", "architecture": self.name, "classifier": "none: set fc to torch.nn.Identity()"}


class TimmFile(TensorFile):
    """A ResNet or a vision transformer of timm, without its classifier (num_classes = 0)."""

    def published(self) -> Shapes:
        shape = self.encoder.shape("timm")
        self.arguments: dict[str, Any] = {"num_classes": 0}
        if isinstance(shape, ResNetShape):
            self.name = _resnet_name(self.encoder, "timm")
            return _without_classifier(published.resnet(self.name))
        size = f"vit_{shape.arch}_patch{shape.patch_size}_{shape.img_size}"
        if size not in published.VITS or shape.mlp_ratio != 4.0:
            raise UsageError(f"timm has no {shape} for images of {shape.img_size} px: {ELSEWHERE}")
        self.name = size
        if published.VITS[size][2] != shape.num_heads:
            self.arguments["num_heads"] = shape.num_heads
            self.note = f"timm's {size} has {published.VITS[size][2]} heads: create it with num_heads={shape.num_heads}"
        return _without_classifier(published.vit(size))

    def extra(self) -> dict[str, Any]:
        architecture = {"architecture": self.name, "model_args": self.arguments}
        return {"target": "timm", **architecture, "pretrained_cfg": self.encoder.preprocessing.for_timm()}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors by name, and our metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, (file.metadata() or {}).get(KEY, "")  # noqa: SIM118
    except SafetensorError as error:
        raise NotTheSame(f"it cannot be read back ({error})") from error


def _resnet_name(encoder: Encoder, program: str) -> str:
    shape = encoder.shape(program)
    if not isinstance(shape, ResNetShape):
        raise UsageError(f"{program}'s vision transformers have names of their own: --to timm takes this one")
    known = {sizes: name for name, sizes in published.RESNETS.items()}
    name = known.get((shape.depth, shape.groups, shape.width_per_group))
    if name is None or (shape.base_width, shape.stages) != (64, 4):
        raise UsageError(f"{program} has no {shape}: {ELSEWHERE}")
    return name


def _without_classifier(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name not in published.CLASSIFIERS}


def _write_pth(path: Path, tensors: dict[str, Tensor], metadata: str) -> None:
    """As `torch.save(module.state_dict(), path)`, with ours among the metadata that a state dict has."""
    state: Any = OrderedDict(tensors)
    state._metadata = OrderedDict({"": {"version": 1, KEY: metadata}})
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's, about what became of its file when the disk was full
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(str(error).partition("\n")[0]) from error
        os.fsync(file.fileno())


def _read_pth(path: Path) -> tuple[dict[str, Tensor], str]:
    with open(path, "rb") as file:
        state = torch.load(file, weights_only=True)
    return dict(state), state._metadata[""][KEY]
