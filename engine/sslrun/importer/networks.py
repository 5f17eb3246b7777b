"""Converts backbones, necks, heads and norms."""

from typing import Any, NamedTuple

from sslrun.config.merge import kind
from sslrun.config.node import Node
from sslrun.importer.defaults import MMPRETRAIN, MMSELFSUP_1X
from sslrun.importer.old import OldTable, node
from sslrun.importer.ours import Part, component, is_class, present, value_at

_NORMS = {"BN": "BN", "BN1d": "BN", "BN2d": "BN", "BatchNorm2d": "BN", "SyncBN": "SyncBN", "MMSyncBN": "SyncBN"}
_RESNETS = ("ResNet", "ResNeXt", "ResNetSobel", "ResNet_CIFAR")
_VITS = ("VisionTransformer", "MoCoV3ViT")


class Size(NamedTuple):
    """Width, depth, heads and hidden width of a vision transformer."""

    embed_dim: int
    depth: int
    num_heads: int
    hidden: int


# The old frameworks' names of sizes, and ours; "small" of MMPretrain is not that of DeiT.
_ARCHS = {
    **dict.fromkeys(("s", "small"), Size(768, 8, 8, 2304)),
    **dict.fromkeys(("b", "base", "deit-b", "deit-base"), Size(768, 12, 12, 3072)),
    **dict.fromkeys(("l", "large"), Size(1024, 24, 16, 4096)),
    **dict.fromkeys(("h", "huge"), Size(1280, 32, 16, 5120)),
    **dict.fromkeys(("deit-t", "deit-tiny"), Size(192, 12, 3, 768)),
    **dict.fromkeys(("deit-s", "deit-small", "dinov2-s", "dinov2-small"), Size(384, 12, 6, 1536)),
    **dict.fromkeys(("mocov3-s", "mocov3-small"), Size(384, 12, 12, 1536)),
    **dict.fromkeys(("eva-g", "eva-giant"), Size(1408, 40, 16, 6144)),
    **dict.fromkeys(("dinov2-g", "dinov2-giant"), Size(1536, 40, 24, 6144)),
}
_OUR_ARCHS = {(192, 12): ("tiny", 12), (384, 12): ("small", 12), (768, 12): ("base", 12), (1024, 24): ("large", 16)}

# Necks of OpenSelfSup: ours, and what they are besides.
_OLDEST_NECKS: dict[str, tuple[str, dict[str, Any]]] = {
    "AvgPoolNeck": ("AvgPool2dNeck", {}),
    "NonLinearNeckV0": ("ODCNeck", {}),
    "NonLinearNeckV1": ("MoCoV2Neck", {}),
    "NonLinearNeckV2": (
        "NonLinearNeck",
        {"with_bias": True, "with_last_bn": False, "with_last_bias": True, "norm_cfg": {"type": "BN"}},
    ),
    "NonLinearNeckSimCLR": ("NonLinearNeck", {}),
}
_FIXED_NORMS: dict[str, dict[str, Any]] = {  # what the code of a neck adds to the norm that the config names
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


def norm(old: OldTable, **fixed: float | bool) -> Part:
    """Converts a `norm_cfg`; `fixed` are the arguments that the old code adds to it."""
    if not old:
        return {}
    name = old.type()
    if name not in _NORMS:
        old.give_up(f"there is no norm {name or 'without a type'} here; the default stands")
        return {}
    extra = {key: node(value, old.where) for key, value in fixed.items()}
    return {"norm_cfg": component(old, "norms", _NORMS[name], extra)}


def backbone(old: OldTable, with_sobel: bool) -> Node | None:
    """Converts a backbone; it stands behind a Sobel filter where the method or the type has one."""
    name = old.type()
    if name in _VITS:
        return _vit(old, name)
    if name not in _RESNETS:
        old.give_up(f"there is no backbone {name or 'without a type'} here")
        return None
    with_sobel = with_sobel or name == "ResNetSobel"
    made = _resnet(old, name, with_sobel)
    return Node({"type": node("Sobel", old.where), "backbone": made}, made.origins) if with_sobel else made


def _resnet(old: OldTable, name: str, behind_sobel: bool) -> Node:
    made: Part = norm(old.table("norm_cfg"))
    if behind_sobel:
        made["in_channels"] = old.take("in_channels") or node(2, old.where)
    indices = old.take("out_indices")
    if indices is not None:
        listed = indices.value if isinstance(indices.value, list) else [indices]
        first = 1 if old.framework == MMPRETRAIN or name == "ResNet_CIFAR" else 0  # whose 0 is the first stage
        numbers = [node(i.value + first, i.where) if isinstance(i.value, int) else i for i in listed]
        made["out_indices"] = Node(numbers, indices.origins)
    if name == "ResNeXt" and "base_width" in old:  # of OpenSelfSup
        made["width_per_group"] = old.rest.pop("base_width")
        old.take("width_per_group")
    made |= old.renamed(base_width="base_channels")
    old.expect("the stem is as wide as the first stage here", stem_channels=value_at(made, "base_width") or 64)
    if name == "ResNet_CIFAR":
        made["stem"] = node("small", old.where)
    first_weights(old)
    return component(old, "backbones", "ResNet", made)


def _vit(old: OldTable, name: str) -> Node:
    arch = old.take("arch")
    made: Part = {}
    if arch is not None:
        size = _ARCHS.get(arch.value) if isinstance(arch.value, str) else None
        if size is None:
            old.lost(f"{kind(arch.value)} is no size of our ViT", "arch", at=arch)
        else:
            made = {key: node(value, arch.where) for key, value in _arch(size).items()}
    made["frozen_patch_embed"] = old.take("stop_grad_conv1", "true or false") or node(False, old.where)
    if name == "VisionTransformer" and old.framework in (MMSELFSUP_1X, MMPRETRAIN):
        old.changed("positions are fixed sines and cosines here, as in MoCo v3; there they are learned")
    if old.peek("out_indices") == [-1]:
        old.take("out_indices")
    first_weights(old)
    return component(old, "backbones", "VisionTransformer", made)


def _arch(size: Size) -> dict[str, Any]:
    """The arguments for a size: its name, where there is one here, else its numbers."""
    name, heads = _OUR_ARCHS.get((size.embed_dim, size.depth), (None, 0))
    made: dict[str, Any] = {"arch": name} if name else {"embed_dim": size.embed_dim, "depth": size.depth}
    if size.num_heads != heads:
        made["num_heads"] = size.num_heads
    if size.hidden != 4 * size.embed_dim:
        made["mlp_ratio"] = size.hidden / size.embed_dim
    return made


def neck(old: OldTable, sees_map: bool, channels: int | None) -> Node | None:
    """Converts a neck, or a predictor.

    Args:
        old: its table.
        sees_map: whether a feature map comes in, which is averaged.
        channels: how many channels come in, where that is known.
    """
    title = old.type()
    name, extra = _OLDEST_NECKS.get(title, (title, {}))
    made = {key: node(value, old.where) for key, value in extra.items()}
    if name != "MoCoV2Neck":
        old.expect(_POOLED, with_avg_pool=sees_map)
    old.expect("the feature of a ViT is the class token here", vit_backbone=not sees_map)
    is_sync = old.take("sync_bn")  # of OpenSelfSup
    if is_sync is not None and "norm_cfg" not in old:
        old.rest["norm_cfg"] = node({"type": "SyncBN" if is_sync.value else "BN"}, is_sync.where)
    made |= norm(old.table("norm_cfg"), **_FIXED_NORMS.get(name, {}))
    match name:
        case "AvgPool2dNeck":
            width = old.take("in_channels") or (node(channels, old.where) if channels else None)
            made |= present(in_channels=width)
        case "SwAVNeck":
            name = "NonLinearNeck"
            bias = old.take("with_bias") or node(True, old.where)
            made |= {"num_layers": node(2, old.where), "with_bias": bias, "with_last_bias": bias}
            made["with_last_bn"] = node(False, old.where)
        case "NonLinearNeck":
            if old.peek("with_last_bn") is False:
                old.take("with_last_bn_affine")  # there is none that could have it
            if title == "NonLinearNeckSimCLR" and "with_bias" in old:
                made["with_last_bias"] = old.rest["with_bias"]
    if not is_class("necks", name):
        old.give_up(f"there is no neck {title or 'without a type'} here")
        return None
    first_weights(old)
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
    loss = old.table("loss") or loss
    if name not in _LOSSES:
        old.give_up(f"there is no head {name or 'without a type'} here")
        return None
    made: Part = {}
    weight: float | None = 1.0
    match name:
        case "ClsHead":
            old.expect(_POOLED, with_avg_pool=sees_map, vit_backbone=False)
            made |= _normal(old)
        case "MoCoV3Head":
            temperature = old.peek("temperature") or 1.0
            weight = 2 * temperature if isinstance(temperature, int | float) else None
        case "LatentCrossCorrelationHead":
            old.expect(f"the neck gives {width} channels", in_channels=width or old.peek("in_channels"))
            made |= loss.renamed(lambd="lambd")
        case "SwAVHead":
            made |= _swav((old, loss), num_views)
    if name in ("LatentPredictHead", "MoCoV3Head") and (predictor := old.table("predictor")):
        made |= present(predictor=neck(predictor, sees_map=False, channels=None))
    if loss:
        _finish_loss(loss, _LOSSES[name], weight)
    first_weights(old)
    return component(old, "heads", name, made)


def _swav(tables: tuple[OldTable, ...], num_views: int | None) -> Part:
    """Converts the arguments of SwAV's head, which stand in it (0.x) or in its loss (1.x)."""
    names = ("feat_dim", "num_prototypes", "temperature", "epsilon", "sinkhorn_iterations", "crops_for_assign")
    made: Part = {}
    for table in tables:
        crops = table.take("num_crops", "a list")
        counts = [crop.value for crop in crops.value if isinstance(crop.value, int)] if crops is not None else []
        if crops is not None and num_views is not None and sum(counts) != num_views:
            table.lost(f"the loss takes all views, which are {num_views}", "num_crops", at=crops)
        made |= table.renamed(**{name: name for name in names})
    return made


def _finish_loss(loss: OldTable, name: str, weight: float | None) -> None:
    """Reports a loss that is not the one that the head has here."""
    given = loss.type()
    if given and given != name:
        loss.lost(f"the loss of this head is {name} here")
    if name == "CrossEntropyLoss":
        loss.expect(f"the weight of this loss is {weight} here", loss_weight=weight)
    first_weights(loss)


def _normal(old: OldTable) -> Part:
    """`init_std` of an `init_cfg` that draws linear layers from a normal distribution, and says nothing else."""
    entries = old.peek("init_cfg")
    entries = entries if isinstance(entries, list) else [entries]
    normal = [e for e in entries if isinstance(e, dict) and e.get("type") == "Normal" and e.get("layer") == "Linear"]
    others = [e for e in entries if e is not None and e not in normal and not _is_usual(e)]
    if len(normal) != 1 or others or set(normal[0]) != {"type", "std", "layer"}:
        return {}
    return {"init_std": node(normal[0]["std"], old.rest.pop("init_cfg").where)}


def _is_usual(entry: object) -> bool:
    """Whether an entry of `init_cfg` says what holds anyway: norms begin with a scale of 1."""
    layers = ["_BatchNorm", "GroupNorm"]
    return entry in [{"type": "Constant", "val": 1, "layer": names} for names in (layers, layers[:1], layers[0])]


def first_weights(old: OldTable) -> None:
    """Reports `init_cfg` and `pretrained`, unless they say what holds here anyway."""
    entries = old.peek("init_cfg")
    if isinstance(entries, list | dict) and all(map(_is_usual, entries if isinstance(entries, list) else [entries])):
        old.take("init_cfg")
    old.notes.append("first weights")
