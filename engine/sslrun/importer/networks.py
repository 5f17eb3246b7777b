"""Converts backbones, necks, heads and norms."""

from typing import Any

from sslrun.config.merge import kind
from sslrun.config.node import Node
from sslrun.importer.defaults import MMPRETRAIN, OF_1X
from sslrun.importer.old import OldTable, node
from sslrun.importer.ours import Part, component, names, value_at

_NORMS = {"BN": "BN", "BN1d": "BN", "BN2d": "BN", "BatchNorm2d": "BN", "SyncBN": "SyncBN", "MMSyncBN": "SyncBN"}
_RESNETS = ("ResNet", "ResNeXt", "ResNetSobel", "ResNet_CIFAR")
_VITS = ("VisionTransformer", "MoCoV3ViT")

# The old frameworks' names of sizes, and our arguments; "small" of MMPretrain is not that of DeiT.
_SIZES: list[tuple[str, Part]] = [
    ("s small", {"embed_dim": 768, "depth": 8, "num_heads": 8, "mlp_ratio": 3.0}),
    ("b base deit-b deit-base", {"arch": "base"}),
    ("l large", {"arch": "large"}),
    ("h huge", {"embed_dim": 1280, "depth": 32, "num_heads": 16}),
    ("deit-t deit-tiny", {"arch": "tiny", "num_heads": 3}),
    ("deit-s deit-small dinov2-s dinov2-small", {"arch": "small", "num_heads": 6}),
    ("mocov3-s mocov3-small", {"arch": "small"}),
]
_ARCHS = {name: arguments for sizes, arguments in _SIZES for name in sizes.split()}

_LAST_OF_V2 = {"with_bias": True, "with_last_bn": False, "with_last_bias": True}
# Necks with other names in OpenSelfSup: ours, and what they are besides.
_OLDEST_NECKS: dict[str, tuple[str, Part]] = {
    "AvgPoolNeck": ("AvgPool2dNeck", {}),
    "NonLinearNeckV0": ("ODCNeck", {}),
    "NonLinearNeckV1": ("MoCoV2Neck", {}),
    "NonLinearNeckV2": ("NonLinearNeck", {**_LAST_OF_V2, "norm_cfg": {"type": "BN"}}),
    "NonLinearNeckSimCLR": ("NonLinearNeck", {}),
    "SwAVNeck": ("NonLinearNeck", {"num_layers": 2, "with_last_bn": False}),
}
_FIXED_NORMS: dict[str, Part] = {  # what the code of a neck adds to the norm that the config names
    "ODCNeck": {"momentum": 0.001, "affine": False},
    "RelativeLocNeck": {"momentum": 0.003},
}
_POOLED = "feature maps are averaged here, and vectors left alone"
# Head -> its loss, which stands in it or beside it.
_LOSSES = {
    "ContrastiveHead": "CrossEntropyLoss",
    "ClsHead": "CrossEntropyLoss",
    "LatentPredictHead": "CosineSimilarityLoss",
    "MoCoV3Head": "CrossEntropyLoss",
    "LatentCrossCorrelationHead": "CrossCorrelationLoss",
    "SwAVHead": "SwAVLoss",
}
_OF_SWAV = ("feat_dim", "num_prototypes", "temperature", "epsilon", "sinkhorn_iterations", "crops_for_assign")
_LAYERS = ["_BatchNorm", "GroupNorm"]
_USUAL_WEIGHTS = [{"type": "Constant", "val": 1, "layer": layer} for layer in (_LAYERS, _LAYERS[:1], _LAYERS[0])]


def norm(old: OldTable, fixed: Part) -> Node | None:
    """Converts a `norm_cfg`; `fixed` are the arguments that the old code adds to it."""
    if not old:
        return None
    name = old.type()
    if name not in _NORMS:
        old.give_up(f"there is no norm {name or 'without a type'} here; the default stands")
        return None
    return component(old, "norms", _NORMS[name], fixed)


def backbone(old: OldTable, with_sobel: bool) -> Node | None:
    """Converts a backbone; it stands behind a Sobel filter where the method or the type has one."""
    name = old.type()
    first_weights(old)
    if name in _VITS:
        return component(old, "backbones", "VisionTransformer", vit(old, name))
    if name not in _RESNETS:
        old.give_up(f"there is no backbone {name or 'without a type'} here")
        return None
    made = _resnet(old, name)
    with_sobel = with_sobel or name == "ResNetSobel"
    if with_sobel:
        made["in_channels"] = old.take("in_channels") or 2
    network = component(old, "backbones", "ResNet", made)
    return node({"type": "Sobel", "backbone": network}, old.where) if with_sobel else network


def _resnet(old: OldTable, name: str) -> Part:
    made: Part = {"norm_cfg": norm(old.table("norm_cfg"), {}), "stem": "small" if name == "ResNet_CIFAR" else None}
    indices = old.take("out_indices")
    if indices is not None:
        listed = indices.value if isinstance(indices.value, list) else [indices]
        first = 1 if old.framework == MMPRETRAIN or name == "ResNet_CIFAR" else 0  # whose 0 is the first stage
        made["out_indices"] = [i.value + first if isinstance(i.value, int) else i for i in listed]
    if name == "ResNeXt":
        made["width_per_group"] = old.first("base_width", "width_per_group")  # the first in OpenSelfSup
    made["base_width"] = old.take("base_channels")
    old.expect("the stem is as wide as the first stage here", stem_channels=value_at(made, "base_width") or 64)
    return made


def vit(old: OldTable, name: str) -> Part:
    """The arguments of our ViT that have other names or values there; `name` is the old class."""
    made: Part = {"frozen_patch_embed": old.get("stop_grad_conv1", "true or false", False)}
    arch = old.get("arch")
    if isinstance(arch, str) and arch in _ARCHS:
        made |= _ARCHS[arch]
    elif arch is not None:
        old.lost(f"{kind(arch)} is no size of our ViT", "arch")
    if name == "VisionTransformer" and old.framework in OF_1X:
        old.changed("positions are fixed sines and cosines here, as in MoCo v3; there they are learned")
    return made


def neck(old: OldTable, sees_map: bool, channels: int | None) -> Node | None:
    """Converts a neck, or a predictor.

    Args:
        old: its table.
        sees_map: whether a feature map comes in, which is averaged.
        channels: how many channels come in, where that is known.
    """
    title = old.type()
    first_weights(old)
    name, extra = _OLDEST_NECKS.get(title, (title, {}))
    if name not in names("necks"):
        old.give_up(f"there is no neck {title or 'without a type'} here")
        return None
    if name != "MoCoV2Neck":
        old.expect(_POOLED, with_avg_pool=sees_map)
    old.expect("the feature of a ViT is the class token here", vit_backbone=not sees_map)
    made = dict(extra)
    is_sync = old.take("sync_bn")  # of OpenSelfSup
    if is_sync is not None and "norm_cfg" not in old:
        old.rest["norm_cfg"] = node({"type": "SyncBN" if is_sync.value else "BN"}, is_sync.where)
    if "norm_cfg" in old:
        made["norm_cfg"] = norm(old.table("norm_cfg"), _FIXED_NORMS.get(name, {}))
    if name == "AvgPool2dNeck":
        made["in_channels"] = old.take("in_channels") or channels
    if title == "SwAVNeck":
        made["with_bias"] = made["with_last_bias"] = old.take("with_bias") or True
    if title == "NonLinearNeckSimCLR":
        made["with_last_bias"] = old.rest.get("with_bias")
    if old.peek("with_last_bn") is False:
        old.take("with_last_bn_affine")  # there is none that could have it
    return component(old, "necks", name, made)


def head(old: OldTable, loss: OldTable, sees_map: bool, num_views: int | None, width: int | None) -> Node | None:
    """Converts a head with its loss.

    Args:
        old: its table.
        loss: the loss beside it, if any.
        sees_map: whether a feature map comes in, which is averaged.
        num_views: views of each image, where that is known.
        width: how many channels come in, where that is known.
    """
    name = old.type()
    first_weights(old)
    if name not in _LOSSES:
        old.give_up(f"there is no head {name or 'without a type'} here")
        return None
    loss = old.table("loss") or loss
    made: Part = {}
    weight: Any = 1.0
    if name == "ClsHead":
        old.expect(_POOLED, with_avg_pool=sees_map, vit_backbone=False)
        made["init_std"] = _init_std(old)
    elif name == "MoCoV3Head":
        temperature = old.peek("temperature") or 1.0
        weight = 2 * temperature if isinstance(temperature, int | float) else None
    elif name == "LatentCrossCorrelationHead":
        old.expect(f"the neck gives {width} channels", in_channels=width or old.peek("in_channels"))
        made |= loss.renamed(lambd="lambd")
    elif name == "SwAVHead":
        for table in (old, loss):  # its arguments stand in it in 0.x, in its loss in 1.x
            crops = table.get("num_crops", "a list", [num_views])
            if num_views is not None and sum(crop for crop in crops if isinstance(crop, int)) != num_views:
                table.lost(f"the loss takes all views, which are {num_views}", "num_crops")
            made |= table.renamed(**{key: key for key in _OF_SWAV})
    predictor = old.table("predictor") if name in ("LatentPredictHead", "MoCoV3Head") else None
    made["predictor"] = neck(predictor, sees_map=False, channels=None) if predictor else None
    if loss:
        if loss.type() not in ("", _LOSSES[name]):
            loss.lost(f"the loss of this head is {_LOSSES[name]} here")
        if _LOSSES[name] == "CrossEntropyLoss":
            loss.expect(f"the weight of this loss is {weight} here", loss_weight=weight)
        first_weights(loss)
    return component(old, "heads", name, made)


def _init_std(old: OldTable) -> Any:
    """`std` of an `init_cfg` that draws linear layers from a normal distribution, and says nothing else."""
    entries = old.peek("init_cfg")
    match [entry for entry in (entries if isinstance(entries, list) else [entries]) if entry not in _USUAL_WEIGHTS]:
        case [{"type": "Normal", "layer": "Linear", "std": std, **others}] if not others:
            old.take("init_cfg")
            return std
    return None


def first_weights(old: OldTable) -> None:
    """Takes an `init_cfg` that says what holds here anyway; any other, and `pretrained`, will be reported."""
    entries = old.peek("init_cfg")
    if all(entry in _USUAL_WEIGHTS for entry in (entries if isinstance(entries, list) else [entries])):
        old.take("init_cfg")
    old.notes.append("first_weights")
