"""Transforms of MMSelfSup, mmcls and torchvision in our words."""

from collections.abc import Callable
from typing import Any

from sslrun.config.importer.parts import Part, component, node, value_at
from sslrun.config.importer.table import OldTable, tables_in
from sslrun.config.node import Node, plain

# Steps of an old pipeline that are done here without being named.
IMPLIED = (
    "LoadImageFromFile",
    "ToTensor",
    "ImageToTensor",
    "Collect",
    "PackInputs",
    "PackSelfSupInputs",
    "RotationWithLabels",  # RotationPred rotates
    "RandomPatchWithLabels",  # RandomGridPatch, made of the whole pipeline
)
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}
_GRAY = [0.114, 0.587, 0.2989]  # the weights of PIL, in the order of OpenCV's channels


def transform(old: OldTable, is_1x: bool) -> Node | None:
    """One transform; None where it is implied or we have none like it, which is reported.

    Args:
        old: its table.
        is_1x: whether defaults are those of MMSelfSup 1.x.
    """
    name = old.type()
    if name in IMPLIED:
        _implied(old)
        return None
    if name in _GROUPS:
        return _group(old, is_1x)
    if name not in _CONVERTERS:
        old.report.lost(old.where, old.key, f"there is no transform {name or 'without a type'} here")
        return None
    ours, convert = _CONVERTERS[name]
    made = convert(old, is_1x)
    if "prob" in old and "p" not in made:
        made["p"] = old.rest.pop("prob")
    return component(old, "transforms", ours, made)


def normalize(mean: Any, std: Any, old: OldTable) -> Node | None:
    """Normalize, of numbers between 0 and 1 or 0 and 255; None where they are no numbers."""
    lists: list[list[Any]] = [mean, std] if isinstance(mean, list) and isinstance(std, list) else [[None]]
    if not all(_is_number(number) for numbers in lists for number in numbers) or not all(lists):
        old.report.lost(old.where, old.key, "mean and std are three numbers each")
        return None
    scale = 255 if max(map(max, lists)) > 2 else 1
    mean, std = ([round(number / scale, 5) for number in numbers] for numbers in lists)
    return node({"type": "Normalize", "mean": mean, "std": std}, old.where)


def _group(old: OldTable, is_1x: bool) -> Node | None:
    """RandomAppliedTrans: of a single member it is the member's own `p`."""
    inner = old.take("transforms")
    members = tables_in(inner, (*old.key, "transforms"), old.report) if inner is not None else []
    made = [found for member in members if (found := transform(member, is_1x)) is not None]
    share = old.take("p") or old.take("prob") or node(0.5, old.where)
    old.finish("RandomAppliedTrans has nothing like it here")
    if not made:
        return None
    own = value_at(made[0].value, "p")
    own = 1.0 if own is None and value_at(made[0].value, "type") in _CERTAIN else own
    if len(made) == 1 and _is_number(own) and _is_number(share.value):
        members_ = {key: value for key, value in made[0].value.items() if key not in ("type", "p")}
        combined = {"type": made[0].value["type"], "p": node(own * share.value, share.where), **members_}
        return Node(combined, made[0].origins)
    return node({"type": "RandomAppliedTrans", "p": share, "transforms": made}, old.where)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _implied(old: OldTable) -> None:
    """A step that is done anyway, in its usual form."""
    old.expect("color_type", "color", "images are read in color")
    file_client(old)
    old.leave("images are decoded by DALI", "imdecode_backend", "to_float32", "ignore_empty")
    for key in ("keys", "meta_keys", "algorithm_keys", "pseudo_label_keys"):
        old.take(key)  # what the old loader hands on beside the images
    old.finish("this step has no options here")


def file_client(old: OldTable) -> None:
    """`file_client_args`, in a data source or a step: files come from the disk here."""
    for name in ("file_client_args", "backend_args"):
        args = old.table(name)
        if args is not None:
            for key in ("backend", "type"):
                known = args.peek(key) in ("disk", "local", "HardDiskBackend", "LocalBackend")
                args.expect(key, args.peek(key) if known else "disk", "images are files here")
            args.finish("images are files here")


def _random_resized_crop(old: OldTable, is_1x: bool) -> Part:
    made = _resampling(old, is_1x)
    scale = old.peek("scale")
    if "size" not in old and (isinstance(scale, int) or "crop_ratio_range" in old):  # mmcls has other names
        names = {"scale": "size", "crop_ratio_range": "scale", "aspect_ratio_range": "ratio"}
        made |= {ours: old.rest.pop(key) for key, ours in names.items() if key in old}
    old.expect("max_attempts", 10, "ten boxes are tried here")
    old.expect("efficientnet_style", False, "our RandomResizedCrop has no such variant")
    return made


def _resampling(old: OldTable, is_1x: bool) -> Part:
    made: Part = {}
    old.leave("images are always filtered before they shrink", "antialias")
    backend = old.take("backend")
    if backend.value != "pillow" if backend is not None else is_1x:
        where = backend.where if backend is not None else old.where
        text = "resized as PIL does, which filters before it shrinks; OpenCV does not"
        old.report.changed(where, (*old.key, "backend"), text)
    given = old.take("interpolation")
    if given is not None:
        ours = _INTERPOLATIONS.get(given.value) if isinstance(given.value, int | str) else None
        if ours is None:
            old.report.lost(given.where, (*old.key, "interpolation"), 'there are "bilinear" and "bicubic" here')
        elif ours != "bilinear":
            made["interpolation"] = node(ours, given.where)
    return made


def _resize(old: OldTable, is_1x: bool) -> Part:
    """torchvision's `size` is the shorter side or (height, width), mmcv's `scale` a square or (width, height)."""
    made = _resampling(old, is_1x)
    scale = old.take("scale")
    if scale is None:
        return made
    keep = old.take("keep_ratio", "true or false")
    if keep is not None and keep.value:
        why = "an image is not fitted into a frame here: size = PIXELS is the shorter side, [height, width] both"
        old.report.lost(scale.where, (*old.key, "scale"), why)
    elif isinstance(scale.value, int):
        made["size"] = node([scale.value, scale.value], scale.where)
    else:
        made["size"] = node(plain(scale)[::-1] if isinstance(scale.value, list) else scale, scale.where)
    return made


def _resize_edge(old: OldTable, is_1x: bool) -> Part:
    made = _resampling(old, is_1x)
    old.expect("edge", "short", "a single number is the shorter side here")
    return made | _renamed(old, {"scale": "size"})


def _crop(old: OldTable, is_1x: bool) -> Part:
    old.expect("padding", 0, "images are not padded here")
    old.expect("pad_if_needed", False, "images that are too small get a black border")
    return _renamed(old, {"crop_size": "size"})


def _flip(old: OldTable, is_1x: bool) -> Part:
    old.expect("direction", "horizontal", "images are only flipped left to right")
    return {"p": old.take("p") or old.take("prob") or node(0.5, old.where)}


def _gray(old: OldTable, is_1x: bool) -> Part:
    old.expect("keep_channels", True, "a gray image keeps its three channels here")
    weights = old.take("channel_weights")
    if "prob" in old or is_1x:
        if weights is None or plain(weights) != _GRAY:
            where = weights.where if weights is not None else old.where
            text = f"gray is weighed as PIL does: {_GRAY} of blue, green and red"
            old.report.changed(where, (*old.key, "channel_weights"), text)
        old.leave("images are RGB here", "color_format")
        return {"p": old.take("prob") or old.take("p") or node(0.5, old.where)}
    return {}


def _blur(old: OldTable, is_1x: bool) -> Part:
    made = {"p": old.take("p") or old.take("prob") or node(0.5, old.where)}
    span = old.take("magnitude_range", "a list")  # mmcls: a radius drawn from the range
    if span is not None and len(span.value) == 2:
        made |= {"sigma_min": span.value[0], "sigma_max": span.value[1]}
        old.expect("magnitude_std", "inf", "the radius is drawn evenly here")
    return made


def _solarize(old: OldTable, is_1x: bool) -> Part:
    return {"p": old.take("p") or old.take("prob") or node(0.5, old.where), **_renamed(old, {"thr": "threshold"})}


def _jitter(old: OldTable, is_1x: bool) -> Part:
    old.leave("it follows PIL", "backend", "color_format")
    return {}


def _rotation(old: OldTable, is_1x: bool) -> Part:
    for key in ("interpolation", "resample"):  # as words or as PIL's numbers
        old.expect(key, "nearest" if isinstance(old.peek(key), str) else 0, "pixels are the nearest ones here")
    for key, usual in (("expand", False), ("fill", 0)):
        old.expect(key, usual, "a turned image keeps its size, with black corners")
    return {}


def _normalize(old: OldTable, is_1x: bool) -> Part:
    old.expect("to_rgb", True, "images are RGB here")
    old.leave("pixels are not written to", "inplace")
    found = normalize(old.get("mean", "a list"), old.get("std", "a list"), old)
    return {} if found is None else {key: found.value[key] for key in ("mean", "std")}


def _renamed(old: OldTable, names: dict[str, str]) -> Part:
    return {ours: old.rest.pop(key) for key, ours in names.items() if key in old}


_Converter = Callable[[OldTable, bool], Part]
_GROUPS = ("RandomAppliedTrans", "RandomApply")
_CERTAIN = ("ColorJitter", "RandomResizedCrop", "Resize", "CenterCrop", "RandomCrop")  # which have p = 1 by default
_CONVERTERS: dict[str, tuple[str, _Converter]] = {
    "RandomResizedCrop": ("RandomResizedCrop", _random_resized_crop),
    "Resize": ("Resize", _resize),
    "ResizeEdge": ("Resize", _resize_edge),
    "CenterCrop": ("CenterCrop", _crop),
    "RandomCrop": ("RandomCrop", _crop),
    "RandomFlip": ("RandomHorizontalFlip", _flip),
    "RandomHorizontalFlip": ("RandomHorizontalFlip", _flip),
    "RandomRotation": ("RandomRotation", _rotation),
    "ColorJitter": ("ColorJitter", _jitter),
    "RandomGrayscale": ("RandomGrayscale", _gray),
    "GaussianBlur": ("GaussianBlur", _blur),
    "RandomGaussianBlur": ("GaussianBlur", _blur),
    "Solarization": ("Solarization", _solarize),
    "RandomSolarize": ("Solarization", _solarize),
    "Solarize": ("Solarization", _solarize),
    "Normalize": ("Normalize", _normalize),
}
