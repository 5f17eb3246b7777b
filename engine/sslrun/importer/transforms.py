"""Converts transforms of the old frameworks, of mmcv and of torchvision."""

from collections.abc import Callable
from typing import Any

from sslrun.config.node import Node
from sslrun.importer.defaults import MMPRETRAIN, OF_1X
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
    made |= old.renamed(p="p") or old.renamed(p="prob")
    return component(old, "transforms", ours, made)


def mean_and_std(old: OldTable) -> Part:
    """Takes mean and std of numbers from 0 to 1, or from 0 to 255, and returns them for numbers from 0 to 1."""
    given = [old.get(key, "a list") for key in ("mean", "std")]
    if given == [None, None]:
        return {}
    if not all(numbers and all(map(_is_number, numbers)) for numbers in given):
        old.lost("mean and std are three numbers each")
        return {}
    scale = 255 if max(map(max, given)) > 2 else 1
    mean, std = ([round(number / scale, 5) for number in numbers] for numbers in given)
    return {"mean": mean, "std": std}


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
    first = {"type": made[0].value["type"], "p": own * share.value}
    return node({**first, **{key: value for key, value in made[0].value.items() if key not in first}}, made[0].where)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _resampling(old: OldTable) -> Part:
    if old.get("backend", "", "pillow") != "pillow":
        old.changed("resized as PIL does, which filters before it shrinks; OpenCV does not", "backend")
    given = old.get("interpolation")
    ours = _INTERPOLATIONS.get(given) if isinstance(given, int | str) else None
    if given is not None and ours is None:
        old.lost('there are "bilinear" and "bicubic" here', "interpolation")
    return {"interpolation": ours} if ours == "bicubic" else {}


def _random_resized_crop(old: OldTable) -> Part:
    made = _resampling(old)
    is_mmcls = old.framework == MMPRETRAIN or isinstance(old.peek("scale"), int) or "crop_ratio_range" in old
    if is_mmcls and "size" not in old:  # which has other names
        made |= old.renamed(size="scale", scale="crop_ratio_range", ratio="aspect_ratio_range")
    return made


def _resize(old: OldTable) -> Part:
    """torchvision's `size` is the shorter side or (height, width), mmcv's `scale` a square or (width, height)."""
    made = _resampling(old)
    scale, keep = old.get("scale"), old.get("keep_ratio", "true or false", False)
    if scale is not None and keep:
        why = "an image is not fitted into a frame here: size = PIXELS is the shorter side, [height, width] both"
        old.lost(why, "scale")
    elif scale is not None:
        made["size"] = scale[::-1] if isinstance(scale, list) else [scale, scale]
    return made


def _gray(old: OldTable) -> Part:
    if old.get("channel_weights") != _GRAY and old.framework in OF_1X:
        old.changed(f"gray is weighed as PIL does: {_GRAY} of blue, green and red", "channel_weights")
    return {}


def _blur(old: OldTable) -> Part:
    span = old.get("magnitude_range", "a list", [])  # mmcls: a radius drawn from the range
    return dict(zip(("sigma_min", "sigma_max"), span, strict=True)) if len(span) == 2 else {}


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
    "Normalize": ("Normalize", {}, mean_and_std),
}
