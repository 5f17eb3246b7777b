"""Converts transforms of the old frameworks, of mmcv and of torchvision."""

from collections.abc import Callable
from typing import Any

from sslrun.config.node import Node, plain
from sslrun.importer.defaults import MMPRETRAIN, MMSELFSUP_1X
from sslrun.importer.old import OldTable, node
from sslrun.importer.ours import Part, component, value_at

# Steps of an old pipeline that are done here without being named.
IMPLIED = (
    "LoadImageFromFile", "ToTensor", "ImageToTensor", "Collect", "PackInputs", "PackSelfSupInputs",
    "RotationWithLabels",  # RotationPred rotates
    "RandomPatchWithLabels",  # RandomGridPatch, made of the whole pipeline
)  # fmt: skip
_GROUPS = ("RandomAppliedTrans", "RandomApply")
_CERTAIN = ("ColorJitter", "RandomResizedCrop", "Resize", "CenterCrop", "RandomCrop")  # which have p = 1 by default
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}
_GRAY = [0.114, 0.587, 0.2989]  # the weights of PIL, in the order of OpenCV's channels


def transform(old: OldTable) -> Node | None:
    """Converts a transform; None where it is implied here, or where there is none like it, which is reported."""
    name = old.type()
    if name in IMPLIED:
        old.notes.append("implied")
        return None
    if name in _GROUPS:
        return _group(old)
    if name not in _TRANSFORMS:
        old.give_up(f"there is no transform {name or 'without a type'} here")
        return None
    ours, names, convert = _TRANSFORMS[name]
    made = convert(old) if convert is not None else {}
    made |= old.renamed(**names)
    if "p" not in made and "prob" in old:
        made["p"] = old.rest.pop("prob")
    return component(old, "transforms", ours, made)


def normalize(mean: Any, std: Any, old: OldTable) -> Node | None:
    """Makes Normalize of numbers from 0 to 1 or from 0 to 255; None where they are not numbers."""
    lists: list[list[Any]] = [mean, std] if isinstance(mean, list) and isinstance(std, list) else [[None]]
    if not all(_is_number(number) for numbers in lists for number in numbers) or not all(lists):
        old.lost("mean and std are three numbers each")
        return None
    scale = 255 if max(map(max, lists)) > 2 else 1
    mean, std = ([round(number / scale, 5) for number in numbers] for numbers in lists)
    return node({"type": "Normalize", "mean": mean, "std": std}, old.where)


def _group(old: OldTable) -> Node | None:
    """Converts RandomAppliedTrans; that of a single member becomes the `p` of the member."""
    made = [found for member in old.tables("transforms") if (found := transform(member)) is not None]
    share = old.first("p", "prob")
    if not made or share is None:
        return None
    own = value_at(made[0], "p")
    own = 1.0 if own is None and value_at(made[0], "type") in _CERTAIN else own
    if len(made) > 1 or not _is_number(own) or not _is_number(share.value):
        return node({"type": "RandomAppliedTrans", "p": share, "transforms": made}, old.where)
    others = {key: value for key, value in made[0].value.items() if key not in ("type", "p")}
    return Node({"type": made[0].value["type"], "p": node(own * share.value, share.where), **others}, made[0].origins)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _resampling(old: OldTable) -> Part:
    backend = old.take("backend")
    if backend is not None and backend.value != "pillow":
        old.changed("resized as PIL does, which filters before it shrinks; OpenCV does not", "backend", at=backend)
    given = old.take("interpolation")
    ours = _INTERPOLATIONS.get(given.value) if given is not None and isinstance(given.value, int | str) else None
    if given is not None and ours is None:
        old.lost('there are "bilinear" and "bicubic" here', "interpolation", at=given)
    return {"interpolation": node(ours, given.where)} if given is not None and ours == "bicubic" else {}


def _random_resized_crop(old: OldTable) -> Part:
    made = _resampling(old)
    is_mmcls = old.framework == MMPRETRAIN or isinstance(old.peek("scale"), int) or "crop_ratio_range" in old
    if is_mmcls and "size" not in old:  # which has other names
        made |= old.renamed(size="scale", scale="crop_ratio_range", ratio="aspect_ratio_range")
    return made


def _resize(old: OldTable) -> Part:
    """torchvision's `size` is the shorter side or (height, width), mmcv's `scale` a square or (width, height)."""
    made = _resampling(old)
    scale, keep = old.take("scale"), old.take("keep_ratio", "true or false")
    if scale is not None and keep is not None and keep.value:
        why = "an image is not fitted into a frame here: size = PIXELS is the shorter side, [height, width] both"
        old.lost(why, "scale", at=scale)
    elif scale is not None and isinstance(scale.value, int):
        made["size"] = node([scale.value, scale.value], scale.where)
    elif scale is not None:
        made["size"] = node(plain(scale)[::-1] if isinstance(scale.value, list) else scale, scale.where)
    return made


def _gray(old: OldTable) -> Part:
    weights = old.take("channel_weights")
    if old.framework in (MMSELFSUP_1X, MMPRETRAIN) and (weights is None or plain(weights) != _GRAY):
        text = f"gray is weighed as PIL does: {_GRAY} of blue, green and red"
        old.changed(text, "channel_weights", at=weights)
    return {}


def _blur(old: OldTable) -> Part:
    span = old.take("magnitude_range", "a list")  # mmcls: a radius drawn from the range
    is_pair = span is not None and len(span.value) == 2
    return {"sigma_min": span.value[0], "sigma_max": span.value[1]} if span is not None and is_pair else {}


def _normalize(old: OldTable) -> Part:
    found = normalize(old.get("mean", "a list"), old.get("std", "a list"), old)
    return {} if found is None else {key: found.value[key] for key in ("mean", "std")}


# Old transform -> ours, {our argument: the old one}, and the conversion of the arguments that mean something else.
_Conversion = tuple[str, dict[str, str], Callable[[OldTable], Part] | None]
_CROP: dict[str, str] = {"size": "crop_size"}
_TRANSFORMS: dict[str, _Conversion] = {
    "RandomResizedCrop": ("RandomResizedCrop", {}, _random_resized_crop),
    "Resize": ("Resize", {}, _resize),
    "ResizeEdge": ("Resize", {"size": "scale"}, _resampling),
    "CenterCrop": ("CenterCrop", _CROP, None),
    "RandomCrop": ("RandomCrop", _CROP, None),
    "RandomFlip": ("RandomHorizontalFlip", {}, None),
    "RandomHorizontalFlip": ("RandomHorizontalFlip", {}, None),
    "RandomRotation": ("RandomRotation", {}, None),
    "ColorJitter": ("ColorJitter", {}, None),
    "RandomGrayscale": ("RandomGrayscale", {}, _gray),
    "GaussianBlur": ("GaussianBlur", {}, _blur),
    "RandomGaussianBlur": ("GaussianBlur", {}, _blur),
    "Solarization": ("Solarization", {}, None),
    "RandomSolarize": ("Solarization", {}, None),
    "Solarize": ("Solarization", {"threshold": "thr"}, None),
    "Normalize": ("Normalize", {}, _normalize),
}
