"""`sslrun import-weights`: a foreign checkpoint becomes weights that `load_from` takes."""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslrun.errors import UsageError, printable
from sslrun.export.architecture import Architecture, VitArchitecture, architecture_of, shapes_of
from sslrun.export.export import make_way, verified
from sslrun.export.foreign_file import CONFIG, ForeignFile, open_foreign
from sslrun.export.foreign_network import built, deduce, order_of_waves
from sslrun.export.tensor_files import KEY, read_safetensors
from sslrun.export.tensor_names import (
    Names,
    modules_between_norm_and_layers,
    networks,
    with_joined_attention,
    with_our_parts,
)
from sslrun.export.verify import NotTheSame
from sslrun.nn.vit import resized_positions
from sslrun.runtime.safetensors_file import write_tensors

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
    (r"model\.module\.backbone\.", "the Barlow Twins or VICReg authors'"),
    (r"classy_state_dict\.base_model\.model\.trunk\.(_feature_blocks\.)?", "VISSL's"),
    (r"target_encoder\.(module\.)?", "the I-JEPA or MSN authors', target encoder"),
    (r"(vit|resnet|deit|vit_msn)\.", "a network of transformers"),
    (r"(state_dict\.)?module\.", "a network under module., such as the SwAV authors'"),
    (r"model\.", "a network under model., such as the MAE authors'"),
    (r"state_dict\.", "a network alone, such as MMSelfSup extracts"),
    (r"", "a network alone, such as torchvision's, timm's and the DINO authors'"),
    (r"backbone\.", "a network under backbone., such as ours"),
]
# Names that no head or decoder has, only a backbone: if ours does not have them, it is another network.
_OF_THE_NETWORK = re.compile(
    r"(layer\d|layers|blocks|conv\d|bn\d|norm|norm_pre|patch_embed|cls_token|pos_embed|\w*reg\w*_tokens?|dist_token"
    r"|rel_pos_\w+|rope\w*|encoder\.stages\.\d+\.layers|embeddings\.(?!mask_token)\w+)(\..*)?"
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


def import_weights(
    path: Path, prefix: str | None = None, heads: int | None = None, img_size: int | None = None
) -> Imported:
    """Find the backbone in a checkpoint.

    Args:
        path: the checkpoint, or a Hugging Face folder.
        prefix: prefix of the network to import, if the checkpoint holds several; None for the one that its authors
            evaluate.
        heads: attention heads of a transformer, where neither the checkpoint nor its width
            determines them.
        img_size: side of the images, in pixels, that a transformer's positions are interpolated to; None keeps them.

    Raises:
        UsageError: the checkpoint cannot be read, holds no network that we have, or holds several unknown ones.
    """
    if heads is not None and heads < 1:
        raise UsageError(f"--heads is {heads}, expected 1 or more")
    foreign = open_foreign(path)
    tensors = with_our_parts(with_joined_attention(foreign.tensors))
    candidates = networks(tensors)
    if not candidates:
        raise UsageError(f"{path} holds no ResNet and no vision transformer whose names are known here{_seen(tensors)}")
    place, origin = _choice(path, candidates, prefix)
    origin = origin or _whose(foreign.content, candidates[place])
    if foreign.config:
        kind = foreign.config.get("model_type") or foreign.config.get("architecture")
        origin = f"a Hugging Face folder, {kind}"
    theirs = {own: place + name for name, own in candidates[place].items()}
    ours = {own: tensors[name] for own, name in theirs.items()}
    try:
        architecture, notes = _architecture(foreign, candidates[place], ours, place, origin, heads)
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
    if img_size is not None:
        architecture, taken["pos_embed"] = _resized(path, architecture, taken, img_size, notes)
    return Imported(
        tensors={name: _converted(tensor) for name, tensor in taken.items()},
        architecture=architecture,
        origin=origin,
        place=place,
        dropped=_grouped([name for name in tensors if name not in used], used),
        missing=[name for name in missing if name not in counters],
        unread=foreign.unread,
        notes=notes,
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


def _architecture(
    foreign: ForeignFile, names: Names, tensors: Mapping[str, Tensor], place: str, origin: str, wanted: int | None
) -> tuple[Architecture, list[str]]:
    """The network that tensors by our names belong to, and notes on what their shapes do not tell.

    Raises:
        UsageError: it is none of ours, or the number of its heads is not known.
    """
    architecture = deduce(shapes_of(tensors))
    _require_computed_alike(foreign.config, architecture)
    if isinstance(architecture, VitArchitecture):
        heads, why = _heads(foreign, architecture, tensors, place, origin, wanted)
        eps = foreign.config.get("layer_norm_eps", architecture.norm_eps)
        adds = f"its norms add {eps:g} to the variance, ours {architecture.norm_eps:g}"
        rounding = [] if eps == architecture.norm_eps else [adds]
        return replace(architecture, num_heads=heads), [f"{heads} attention heads: {why}", *rounding]
    if wanted is not None:
        raise UsageError(f"--heads is for transformers, and this is a {architecture}")
    between = modules_between_norm_and_layers(names)
    if between == 0:
        raise UsageError(
            "this Sequential was cut out of a ResNet whose ReLU is a function and not a module, as lightly's own: it "
            "has no ReLU behind its first norm, and computes other features than a ResNet"
        )
    if between == 1 and architecture.stem == "imagenet":
        raise UsageError("this Sequential has no max-pool behind its 7x7 convolution, as our ResNet has")
    if architecture.stem == "small":
        padding = "; solo-learn pads it by 2 pixels, ours by 1" if origin.startswith("solo") else ""
        return architecture, [f"its 3x3 stem is taken to have a stride of 1 and no max-pool behind it{padding}"]
    if architecture.in_channels == 2:
        note = "it sees two channels: in a recipe it is the backbone of a Sobel, and its names begin with that one's"
        return architecture, [note]
    return architecture, []


def _require_computed_alike(config: Mapping[str, Any], architecture: Architecture) -> None:
    """Raises UsageError where a Hugging Face folder's config.json says that the network computes something that ours
    does not."""
    is_vit = isinstance(architecture, VitArchitecture)
    ours = {
        "hidden_act": "gelu" if is_vit else "relu",
        "downsample_in_bottleneck": False,
        "downsample_in_first_stage": False,
    }
    for key, value in ours.items():
        if key in config and config[key] != value:
            raise UsageError(
                f"{key} is {config[key]!r} in {CONFIG}; our {'VisionTransformer' if is_vit else 'ResNet'} "
                f"computes as with {value!r}"
            )
    if is_vit and config.get("global_pool", "token") != "token":
        raise UsageError(
            f"global_pool is {config['global_pool']!r} in {CONFIG}; the feature of our VisionTransformer is the output "
            "of its class token"
        )


def _heads(
    foreign: ForeignFile,
    architecture: VitArchitecture,
    tensors: Mapping[str, Tensor],
    place: str,
    origin: str,
    wanted: int | None,
) -> tuple[int, str]:
    """The number of a transformer's heads, and how it is known."""
    said, where = _heads_said(foreign)
    if said is not None and wanted not in (None, said):
        raise UsageError(f"--heads is {wanted}, but {where} says {said}")
    if said is not None:
        return said, f"as {where} says"
    if wanted is not None:
        return wanted, "as --heads says"
    width = architecture.embed_dim
    order = order_of_waves(tensors["pos_embed"]) if "pos_embed" in tensors else None
    of_mocov3 = re.search(r"\b(base|momentum)_encoder\.", place) or origin.startswith("MMSelfSup") or order == "rows"
    if width == 384 and of_mocov3:
        return 12, "as in the small transformer of MoCo v3; --heads sets another number"
    if architecture.num_heads == 0 or (order is not None and width < 768):
        known = f"; published ones of this width have {architecture.num_heads} or 12" if architecture.num_heads else ""
        raise UsageError(
            f"how many attention heads this transformer of width {width} has, its weights do not tell{known}: "
            "set --heads N"
        )
    return architecture.num_heads, f"as published transformers of width {width}; --heads sets another number"


def _heads_said(foreign: ForeignFile) -> tuple[int | None, str]:
    """The number of heads that a checkpoint states, None if it states none; and what states it."""
    with contextlib.suppress(LookupError, TypeError, ValueError):  # any table may stand there
        architecture = architecture_of(foreign.backbone)
        if isinstance(architecture, VitArchitecture):
            return architecture.num_heads, "the metadata of the file"
    arguments = foreign.config.get("model_args")
    in_timm = arguments.get("num_heads") if isinstance(arguments, Mapping) else None
    for heads in (foreign.config.get("num_attention_heads"), in_timm):
        if type(heads) is int and heads > 0:
            return heads, CONFIG
    return None, ""


def _resized(
    path: Path, architecture: Architecture, tensors: Mapping[str, Tensor], img_size: int, notes: list[str]
) -> tuple[Architecture, Tensor]:
    """A transformer for images of another size and its positions, interpolated; a note says so."""
    if not isinstance(architecture, VitArchitecture):
        raise UsageError(f"{path}: --img-size is for transformers, and this is a {architecture}")
    if "pos_embed" not in tensors:
        raise UsageError(f"{path}: --img-size is for fixed and learned positions, and these are rotary, for any size")
    if img_size < 1 or img_size % architecture.patch_size:
        raise UsageError(f"{path}: --img-size is {img_size}, expected a multiple of {architecture.patch_size} pixels")
    old, new = architecture.img_size // architecture.patch_size, img_size // architecture.patch_size
    notes.append(f"its positions are interpolated from {old} x {old} patches to {new} x {new}")
    return replace(architecture, img_size=img_size), resized_positions(tensors["pos_embed"], new)


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
