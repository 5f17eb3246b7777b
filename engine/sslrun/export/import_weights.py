"""`sslrun import-weights`: a foreign checkpoint becomes weights that `load_from` takes.

A checkpoint is read with torch's restricted reader, which calls only torch's own functions that make tensors. Other
objects beside the weights (argparse.Namespace, numpy's numbers, omegaconf's tables) are neither imported nor called: an
inert object takes the place of each.
"""

import contextlib
import json
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from sslrun.errors import UsageError, printable
from sslrun.export.architecture import Architecture, VitArchitecture, shapes_of
from sslrun.export.export import make_way, verified
from sslrun.export.foreign_network import built, deduce
from sslrun.export.tensor_files import KEY, read_safetensors
from sslrun.export.tensor_names import Names, networks
from sslrun.export.verify import NotTheSame
from sslrun.runtime.safetensors_file import read_tensors, write_tensors

OURS = "backbone."

# Prefixes of a backbone in checkpoints, in order of preference, and whose checkpoint has it there.
_PLACES = [
    (r"state_dict\.module\.encoder_q\.", "the MoCo authors', query encoder"),
    (r"state_dict\.module\.base_encoder\.", "the MoCo v3 authors', base encoder"),
    (r"teacher\.(module\.)?backbone\.", "the DINO authors', teacher"),
    (r"student\.(module\.)?backbone\.", "the DINO authors', student"),
    (r"state_dict\.backbone\.", ""),  # several have it there
    (r"state_dict\.backbone\.vit\.", "lightly's"),
    (r"state_dict\.teacher_backbone\.(vit\.)?", "lightly's, teacher"),
    (r"state_dict\.student_backbone\.(vit\.)?", "lightly's, student"),
    (r"state_dict\.encoder\.", "solo-learn's, of 2021"),
    (r"state_dict\.encoder_q\.0\.", "MMSelfSup's, query encoder"),
    (r"state_dict\.module\.encoder\.", "the SimSiam authors'"),
    (r"model\.module\.backbone\.", "the Barlow Twins authors'"),
    (r"(state_dict\.)?module\.", "a network under module., such as the SwAV authors'"),
    (r"model\.", "a network under model., such as the MAE authors'"),
    (r"state_dict\.", "a network alone, such as MMSelfSup extracts"),
    (r"", "a network alone, such as torchvision's, timm's and the DINO authors'"),
    (r"backbone\.", "a network under backbone., such as ours"),
]
# Names that no head or decoder has, only a backbone: if ours does not have them, it is another network.
_OF_THE_NETWORK = re.compile(
    r"(layer\d|layers|blocks|conv\d|bn\d|norm|norm_pre|patch_embed|cls_token|pos_embed|\w*reg\w*_tokens?|dist_token"
    r"|rel_pos_\w+)(\..*)?"
)


@dataclass(frozen=True)
class Imported:
    """The backbone of a foreign checkpoint.

    Attributes:
        tensors: its tensors by our names, without "backbone.".
        architecture: the network that they belong to.
        origin: whose checkpoint it is.
        place: the prefix of their names in the checkpoint.
        dropped: number of tensors that were not imported, by prefix.
        missing: names that the network has and the checkpoint does not have.
        unread: names of the classes of objects in the checkpoint that are not tensors.
        notes: properties of the network that cannot be deduced from its weights.
    """

    tensors: dict[str, Tensor]
    architecture: Architecture
    origin: str
    place: str
    dropped: dict[str, int]
    missing: list[str]
    unread: list[str]
    notes: list[str]

    def report(self, new: str) -> list[str]:
        """The lines for the terminal; `new` is the file that was written."""
        dropped = [f"{prefix} ({number})" for prefix, number in self.dropped.items()]
        keys = ", ".join(f"{key} = {json.dumps(value)}" for key, value in self.architecture.arguments().items())
        place = self.place or "no prefix"
        lines = [
            f"recognized: {self.origin} ({place}): {self.architecture}, {len(self.tensors)} tensors",
            f"dropped: {_some(dropped)}",
            f"missing: {_some(self.missing)}",
            *([f"not read, not executed: {_some(self.unread)}"] if self.unread else []),
            *(f"note: {note}" for note in self.notes),
            "in a recipe:",
            f"  load_from = {json.dumps(new)}",
            "  load_strict = false",
            f"  model.backbone = {{ {keys} }}",
        ]
        return [printable(line) for line in lines]


def import_weights(path: Path, prefix: str | None = None) -> Imported:
    """Find the backbone in a checkpoint.

    Args:
        path: the checkpoint.
        prefix: prefix of the network to import, if the checkpoint holds several; None for the one that its authors
            evaluate.

    Raises:
        UsageError: the checkpoint cannot be read, holds no network that we have, or holds several unknown ones.
    """
    content, unread = read(path)
    tensors = _flat(content)
    candidates = networks(tensors)
    if not candidates:
        raise UsageError(f"{path} holds no ResNet and no vision transformer whose names are known here{_seen(tensors)}")
    place, origin = _choice(path, candidates, prefix)
    origin = origin or _whose(content, candidates[place])
    theirs = {own: place + name for name, own in candidates[place].items()}
    ours = {own: tensors[name] for own, name in theirs.items()}
    try:
        architecture = _architecture(ours, place, origin)
        expected = shapes_of(built(architecture).state_dict())
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    for own, tensor in ours.items():
        if own not in expected and _OF_THE_NETWORK.fullmatch(own):
            raise UsageError(f"{path}: {theirs[own]} is part of a network that is not ours")
        if own in expected and tuple(tensor.shape) != expected[own]:
            wrong = f"{tuple(tensor.shape)} instead of {expected[own]}"
            raise UsageError(f"{path}: {theirs[own]} is {wrong}, which {architecture} has")
        if own in expected and not _is_plain(tensor):
            raise UsageError(f"{path}: {theirs[own]} does not hold plain numbers")
    missing = [name for name in expected if name not in ours]
    counters = [name for name in missing if name.endswith("num_batches_tracked")]  # of no use to a trained network
    taken = {name: ours[name] for name in expected if name in ours}
    used = {theirs[name] for name in taken}
    taken |= {name: torch.tensor(0) for name in counters}
    return Imported(
        tensors={name: _converted(tensor) for name, tensor in taken.items()},
        architecture=architecture,
        origin=origin,
        place=place,
        dropped=_grouped([name for name in tensors if name not in used], used),
        missing=[name for name in missing if name not in counters],
        unread=unread,
        notes=_notes(architecture, origin),
    )


def write(imported: Imported, path: Path, force: bool = False) -> None:
    """Write an imported backbone for `load_from`, and read it back.

    Raises:
        UsageError: something exists at `path`.
        RunFailed: the file could not be written; nothing is left of it.
    """
    if path.suffix != ".safetensors":
        raise UsageError(f"{path} must end in .safetensors")
    make_way(path, force)
    tensors = {OURS + name: tensor for name, tensor in imported.tensors.items()}
    about = {"origin": imported.origin, "place": imported.place, "missing": imported.missing}
    metadata = json.dumps({"target": "load_from", **about, "backbone": imported.architecture.arguments()})
    with verified(path) as beside:
        write_tensors(beside, tensors, {"format": "pt", KEY: metadata})
        back, _ = read_safetensors(beside)
        if back.keys() != tensors.keys() or not all(back[name].equal(tensors[name]) for name in back):
            raise NotTheSame("it did not read back as it was written")


class _Inert:
    """Takes the place of an object that is not a tensor: accepts whatever a pickle does to it, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read(path: Path) -> tuple[Any, list[str]]:
    """The content of a checkpoint, and the names of the classes in it that were not constructed.

    Raises:
        UsageError: it is not a checkpoint, is damaged, or needs more than tensors, containers and inert objects.
    """
    unknown: list[str] = []
    try:
        if path.suffix == ".safetensors":
            return read_tensors(path), unknown
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about pickles of other versions
            return _unpickled(path, unknown), unknown
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # arbitrary bytes make the reader raise anything
        raise UsageError(f"{path} cannot be read: it is damaged, or holds more than weights") from error


def _unpickled(path: Path, unknown: list[str]) -> Any:
    """What torch saved; adds the names of the classes that torch refuses to `unknown`."""
    with contextlib.suppress(ValueError, RuntimeError):  # newer files list them
        unknown += sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    while True:
        names = [name for cls in unknown for name in (cls, f"builtins.{cls}")]
        try:
            with torch.serialization.safe_globals([(_Inert, name) for name in names]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            refused = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            if refused is None or refused[1] in unknown:
                raise
            unknown.append(refused[1])


def _flat(content: Any) -> dict[str, Tensor]:
    """Every tensor by its path, keys joined by dots; a dict that is reached by several paths counts by the first."""
    tensors: dict[str, Tensor] = {}
    visited: set[int] = set()

    def visit(content: Any, place: str) -> None:
        if isinstance(content, Tensor):
            tensors[place] = content
        elif isinstance(content, Mapping) and id(content) not in visited and place.count(".") < 100:
            visited.add(id(content))
            for key, value in content.items():
                visit(value, f"{place}.{key}" if place else str(key))

    visit(content, "")
    return tensors


def _choice(path: Path, candidates: Mapping[str, Names], wanted: str | None) -> tuple[str, str]:
    """The prefix of the network to import, and whose checkpoint it is ("" if `_whose` must decide)."""
    if wanted is not None:
        ends = [place for place in candidates if place.removesuffix(".").endswith(wanted.removesuffix("."))]
        exact = [place for place in ends if place.removesuffix(".") == wanted.removesuffix(".")]
        if len(exact or ends) != 1:
            raise UsageError(f"{path} has no one network {wanted!r}: {_listed(candidates)}")
        return (exact or ends)[0], "chosen by --prefix"
    for pattern, origin in _PLACES:
        for place in candidates:
            if re.fullmatch(pattern, place):
                return place, origin
    if len(candidates) > 1:
        raise UsageError(f"{path} holds several networks, --prefix says which: {_listed(candidates)}")
    return next(iter(candidates)), "of unknown origin"


def _whose(content: Mapping[str, Any], names: Names) -> str:
    """Whose checkpoint it is, of those that have a network at `state_dict.backbone.`."""
    keys = content["state_dict"]
    if "pytorch-lightning_version" in content:
        is_solo = any(key.startswith("classifier.") for key in keys)
        return "solo-learn's" if is_solo else "lightly's, or another Lightning module"
    meta = content.get("meta")
    if isinstance(meta, Mapping):
        version = "1.x" if "mmengine_version" in meta or "experiment_name" in meta else "0.x"
        return f"MMSelfSup's, {version}"
    return "a network under backbone."


def _architecture(tensors: Mapping[str, Tensor], place: str, origin: str) -> Architecture:
    architecture = deduce(shapes_of(tensors))
    of_mocov3 = "base_encoder" in place or origin.startswith("MMSelfSup")
    if isinstance(architecture, VitArchitecture) and architecture.embed_dim == 384 and of_mocov3:
        return replace(architecture, num_heads=12)
    return architecture


def _notes(architecture: Architecture, origin: str) -> list[str]:
    if isinstance(architecture, VitArchitecture):
        return [f"how many heads it has, no weight tells: {architecture.num_heads} are taken for granted"]
    if architecture.stem == "small":
        padding = "; solo-learn pads it by 2 pixels, ours by 1" if origin.startswith("solo") else ""
        return [f"its 3x3 stem is taken to have a stride of 1 and no max-pool behind it{padding}"]
    if architecture.in_channels == 2:
        return ["it sees two channels: in a recipe it is the backbone of a Sobel, and its names begin with that one's"]
    return []


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds real numbers in strided memory."""
    is_special = tensor.is_meta or tensor.is_quantized or tensor.is_complex()
    return tensor.layout == torch.strided and not is_special


def _converted(tensor: Tensor) -> Tensor:
    """The tensor in float32 (int64 for counters), contiguous, without gradient."""
    return tensor.detach().to(torch.float32 if tensor.is_floating_point() else torch.int64).contiguous()


def _grouped(names: list[str], used: set[str]) -> dict[str, int]:
    """Number of the tensors in `names` by the shortest prefix that no used tensor has."""
    inner = {name[:end] for name in used for end in _ends(name)}
    return dict(Counter(next((name[:end] for end in _ends(name) if name[:end] not in inner), name) for name in names))


def _ends(name: str) -> list[int]:
    """Positions where the dotted parts of a name end."""
    return [*(dot.start() for dot in re.finditer(r"\.", name)), len(name)]


def _listed(candidates: Mapping[str, Names]) -> str:
    return _some(sorted(place.removesuffix(".") or "(no prefix)" for place in candidates))


def _some(names: list[str], most: int = 20) -> str:
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more]) or "nothing"


def _seen(tensors: Mapping[str, Tensor]) -> str:
    return f"; its names begin like {next(iter(tensors))}" if tensors else ": it holds no tensors by name"
