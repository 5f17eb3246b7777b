"""Converts methods that predict hidden patches (MAE, SimMIM, MaskFeat), and what hides them."""

import math

from sslrun.config.node import Node
from sslrun.importer.networks import vit
from sslrun.importer.old import OldTable, node
from sslrun.importer.ours import Part, component, value_at

MASKED = ("MAE", "SimMIM", "MaskFeat")

_OF_OTHERS = "which others trained and this engine does not have"
# Methods that are not built here, and why.
NOT_HERE = {
    "BEiT": f"BEiT predicts the tokens of a tokenizer (DALL-E's, or VQ-KD's in BEiT v2), {_OF_OTHERS}",
    "CAE": f"CAE predicts the tokens of DALL-E's tokenizer, {_OF_OTHERS}",
    "MILAN": f"MILAN predicts the features of CLIP, {_OF_OTHERS}",
    "EVA": f"EVA predicts the features of CLIP, {_OF_OTHERS}",
}

_FIRST_WEIGHTS = "first weights are those of the authors"
_PATCH_TOKENS: Part = {"positions": "learned", "mask_token": True, "patch_tokens": True, "global_pool": "avg"}
_MASKS = {
    "BEiTMaskGenerator": "BlockMask",
    "MaskFeatMaskGenerator": "BlockMask",
    "SimMIMMaskGenerator": "RandomMask",
    "BlockwiseMaskGenerator": "RandomMask",
}


def masked_model(old: OldTable, name: str) -> Node | None:
    """Converts `model`; None, which is reported, if its backbone is no vision transformer.

    Args:
        old: its table.
        name: of the method.
    """
    parts = {key: old.table(key) for key in ("backbone", "neck", "head", "target_generator", "hog_para")}
    title = parts["backbone"].type()
    if not title.endswith("ViT") and title != "VisionTransformer":
        for part in parts.values():
            part.rest.clear()
        kind = "a Swin transformer" if "Swin" in title else "no vision transformer"
        old.give_up(f"{name} has a vision transformer here, and {title or 'its backbone'} is {kind}")
        return None
    old.take("data_preprocessor")  # its mean and std become Normalize, with the images
    old.leave(_FIRST_WEIGHTS, "init_cfg")
    network = _network(parts["backbone"], title, name)
    made: Part = {"backbone": network}
    loss = parts["head"].table("loss")
    head = parts["head"].type()
    if name == "MAE":
        made["decoder"] = _decoder(parts["neck"], network)
        made |= parts["head"].renamed(norm_pix="norm_pix")
        made.setdefault("norm_pix", False)
    else:
        _layer(parts["neck"])
    if name == "MaskFeat":
        hog = parts["target_generator"] or parts["hog_para"]
        hog.expect("targets are histograms of gradients", type="HOGGenerator")
        made |= hog.renamed(bins="nbins", cell="pool", window="gaussian_window")
        parts["head"].take("hog_dim")  # follows from the others
        parts["head"].take("embed_dim")
    parts["head"].expect("it is that of the backbone", patch_size=value_at(network, "patch_size") or 16)
    if loss:
        title = loss.type()
        loss.expect(f"{head or name} has another loss here", criterion="L1" if name == "SimMIM" else "L2")
        loss.expect("the images have three channels", channel=3)
    return component(old, "methods", name, made)


def _network(old: OldTable, title: str, name: str) -> Node:
    old.notes.append("VisionTransformer")
    old.leave(_FIRST_WEIGHTS, "init_cfg")
    made = vit(old, title)
    if name == "MAE":
        old.take("mask_ratio")  # becomes the mask of the view
        made["initialization"] = "mae"
    else:
        del made["frozen_patch_embed"]  # learned positions train it
        made |= _PATCH_TOKENS
    for ours, theirs in (("drop_path", "drop_path_rate"), ("layer_scale", "layer_scale_init_value")):
        number = old.take(theirs)
        if number is not None and number.value:
            made[ours] = number
    return component(old, "backbones", "VisionTransformer", made)


def _decoder(old: OldTable, network: Node) -> Node | None:
    """Converts MAE's neck."""
    title = old.type()
    if title != "MAEPretrainDecoder":
        old.give_up(f"there is no decoder {title or 'without a type'} here")
        return None
    old.leave(_FIRST_WEIGHTS, "init_cfg")
    own = {"embed_dim": "decoder_embed_dim", "depth": "decoder_depth", "num_heads": "decoder_num_heads"}
    made: Part = old.renamed(in_channels="embed_dim", img_channels="in_chans", patch_size="patch_size", **own)
    made["img_size"] = value_at(network, "img_size") or 224
    sides = made["img_size"], value_at(made, "patch_size") or 16
    if all(type(side) is int and side > 0 for side in sides):
        old.expect("it follows from img_size and patch_size", num_patches=(sides[0] // sides[1]) ** 2)
    return component(old, "decoders", "MAEDecoder", made)


def _layer(old: OldTable) -> None:
    """Checks the neck of SimMIM or MaskFeat, which is one linear layer, part of the method here."""
    if not old:
        return
    title = old.type()
    if title not in ("SimMIMNeck", "SimMIMLinearDecoder", "LinearNeck"):
        old.give_up(f"one linear layer predicts here, not {title}")
        return
    old.expect("the outputs of patches are not averaged", with_avg_pool=False)
    old.leave(_FIRST_WEIGHTS, "init_cfg")
    old.leave("they follow from the backbone and the target", "in_channels", "out_channels", "encoder_stride")
    if title == "LinearNeck":
        old.expect("there is no norm behind the layer", norm_cfg=None)


def is_mask(title: str) -> bool:
    """Whether a step of an old pipeline makes a mask."""
    return title in _MASKS


def mask(old: OldTable, size: int | None) -> Node | None:
    """Converts a step that makes a mask; None, which is reported, if that cannot be.

    Args:
        old: its table.
        size: height and width of the view in pixels, where they are known and equal.
    """
    title = old.type()
    ours = _MASKS[title]
    if ours == "RandomMask":
        old.expect("it is the size of the view", input_size=size)
        return component(
            old,
            "masks",
            ours,
            old.renamed(ratio="mask_ratio", patch_size="model_patch_size", cell_size="mask_patch_size"),
        )
    grid = old.first("input_size", "mask_window_size", kind="a whole number")
    count, ratio = old.take("num_masking_patches", "a whole number"), old.get("mask_ratio", default=0.4)
    if grid is None or not size or size % grid.value:
        old.lost("a mask needs the size of the view and the number of patches along it")
        return None
    total = grid.value**2
    hidden = count.value if count is not None else int(total * ratio)
    old.expect("a rectangle is as large as what is left to hide, at most", max_num_patches=hidden)
    made: Part = {
        "ratio": math.ceil(1000 * hidden / total) / 1000,  # rounded up, which the mask rounds down to the same number
        "min_patches": old.take("min_num_patches"),
        "patch_size": size // grid.value,
    }
    return component(old, "masks", ours, made)


def with_ratio(data: Part, ratio: Node, patch_size: int) -> None:
    """Gives the views the mask of MAE, whose share of hidden patches is an argument of the old backbone."""
    views = data.get("views")
    if isinstance(views, list):
        mask = node({"type": "RandomMask", "ratio": ratio, "patch_size": patch_size}, ratio.where)
        views[:] = [{"num_views": view["num_views"], "mask": mask, "transforms": view["transforms"]} for view in views]
