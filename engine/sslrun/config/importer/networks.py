"""Backbones, necks, heads and norms of MMSelfSup in our words."""

from sslrun.config.importer.files import kind_of
from sslrun.config.importer.parts import Part, component, node, value_at
from sslrun.config.importer.table import OldTable
from sslrun.config.node import Node, plain

_FIRST_WEIGHTS = "first weights are those that our class draws"
_NORMS = {"BN": "BN", "BN1d": "BN", "BN2d": "BN", "BatchNorm2d": "BN", "SyncBN": "SyncBN", "MMSyncBN": "SyncBN"}
_RESNETS = ("ResNet", "ResNeXt", "ResNetSobel", "ResNet_CIFAR")
_VITS = ("VisionTransformer", "MoCoV3ViT")

# Old name of a size of ViT -> ours, and the number of heads where it is another.
_ARCHS = {
    "mocov3-small": ("small", 12),
    "s": ("small", 12),
    "small": ("small", 12),
    "deit-s": ("small", 6),
    "deit-small": ("small", 6),
    "deit-t": ("tiny", 3),
    "deit-tiny": ("tiny", 3),
    "b": ("base", 12),
    "base": ("base", 12),
    "deit-b": ("base", 12),
    "deit-base": ("base", 12),
    "l": ("large", 16),
    "large": ("large", 16),
}


def norm(old: OldTable | None, **fixed: float | bool) -> Node | None:
    """A `norm_cfg`; `fixed` is what the old code adds to it."""
    if old is None:
        return None
    name = old.type()
    old.expect("requires_grad", True, "norms are trained here")
    if name not in _NORMS:
        old.report.lost(old.where, old.key, f"there is no norm {name or 'without a type'} here; the default stands")
        return None
    return component(old, "norms", _NORMS[name], {key: node(value, old.where) for key, value in fixed.items()})


def backbone(old: OldTable, with_sobel: bool) -> Node | None:
    """A backbone; behind a Sobel filter where the method or the type asks for one."""
    name = old.type()
    if name in _RESNETS:
        made = _resnet(old, name, with_sobel or name == "ResNetSobel")
        if with_sobel or name == "ResNetSobel":
            made = Node({"type": node("Sobel", old.where), "backbone": made}, made.origins)
        return made
    if name in _VITS:
        return _vit(old)
    old.report.lost(old.where, old.key, f"there is no backbone {name or 'without a type'} here")
    return None


def _resnet(old: OldTable, name: str, behind_sobel: bool) -> Node:
    made: Part = {}
    norm_cfg = norm(old.table("norm_cfg"))
    if norm_cfg is not None:
        made["norm_cfg"] = norm_cfg
    if behind_sobel:
        made["in_channels"] = old.take("in_channels") or node(2, old.where)
    indices = old.take("out_indices")
    if indices is not None and isinstance(indices.value, int):
        indices = node([indices.value], indices.where)
    if indices is not None:
        made["out_indices"] = indices
    base, stem = old.take("base_channels"), old.take("stem_channels")
    width = base or stem
    if width is not None and width.value != 64:
        made["base_width"] = width
    if base is not None and stem is not None and base.value != stem.value:
        old.report.lost(stem.where, (*old.key, "stem_channels"), "the stem is as wide as the first stage here")
    if name == "ResNeXt":
        made["groups"] = old.take("groups") or node(32, old.where)
        made["width_per_group"] = old.take("width_per_group") or node(4, old.where)
    if name == "ResNet_CIFAR":
        made["stem"] = node("small", old.where)
    for key, usual in (("num_stages", 4), ("strides", [1, 2, 2, 2]), ("dilations", [1, 1, 1, 1])):
        old.expect(key, usual, f"this is {usual} here")
    old.expect("style", "pytorch", "the stride is in the 3x3 convolution here")
    for key in ("deep_stem", "avg_down"):
        old.expect(key, False, "our ResNet has no such variant")
    old.expect("drop_path_rate", 0, "our ResNet drops no paths")
    old.leave("it only trades memory for time; memory is engine.micro_batch here", "with_cp")
    first_weights(old)
    return component(old, "backbones", "ResNet", made)


def _vit(old: OldTable) -> Node:
    made: Part = {}
    arch = old.take("arch")
    if arch is not None and isinstance(arch.value, dict):
        sizes = OldTable(arch, (*old.key, "arch"), old.report)
        names = {"embed_dims": "embed_dim", "num_layers": "depth", "num_heads": "num_heads"}
        for key, ours in names.items():
            value = sizes.take(key, "a whole number")
            if value is not None:
                made[ours] = value
        hidden, width = sizes.get("feedforward_channels", "a whole number"), value_at(made, "embed_dim")
        if hidden and width:
            made["mlp_ratio"] = node(hidden / width, arch.where)
        sizes.finish("our VisionTransformer has nothing like it")
    elif arch is not None:
        ours, heads = _ARCHS.get(arch.value, ("", 0)) if isinstance(arch.value, str) else ("", 0)
        if ours:
            made["arch"] = node(ours, arch.where)
            if (ours, heads) in (("small", 6), ("tiny", 3)):
                made["num_heads"] = node(heads, arch.where)
        else:
            old.report.lost(arch.where, (*old.key, "arch"), f"{kind_of(arch.value)} is no size of our ViT")
    made["frozen_patch_embed"] = old.take("stop_grad_conv1", "true or false") or node(False, old.where)
    for key, usual in (("frozen_stages", -1), ("norm_eval", False), ("drop_rate", 0), ("drop_path_rate", 0)):
        old.expect(key, usual, "our VisionTransformer has nothing like it")
    old.expect("out_indices", -1, "the class token after the last block is the feature here")
    first_weights(old)
    return component(old, "backbones", "VisionTransformer", made)


def neck(old: OldTable, sees_map: bool, channels: int | None) -> Node | None:
    """A neck, or a predictor.

    Args:
        old: its table.
        sees_map: whether a feature map comes in, which is averaged.
        channels: how many channels come in, where that is known.
    """
    name = old.type()
    made: Part = {}
    if name != "MoCoV2Neck":
        why = "feature maps are averaged here, and vectors left alone"
        old.expect("with_avg_pool", sees_map, why)
    old.expect("vit_backbone", not sees_map, "the feature of a ViT is the class token here")
    if name in ("ODCNeck", "RelativeLocNeck"):  # whose code adds to the norm that the configuration names
        fixed = {"momentum": 0.001, "affine": False} if name == "ODCNeck" else {"momentum": 0.003}
        norm_cfg = norm(old.table("norm_cfg"), **fixed)
    else:
        norm_cfg = norm(old.table("norm_cfg"))
    if norm_cfg is not None and name != "SwAVNeck":
        made["norm_cfg"] = norm_cfg
    match name:
        case "AvgPool2dNeck":
            old.expect("output_size", 1, "the whole map is averaged here")
            width = old.take("in_channels") or (node(channels, old.where) if channels else None)
            made |= {"in_channels": width} if width is not None else {}
        case "SwAVNeck":
            name = "NonLinearNeck"
            old.expect("with_l2norm", True, "embeddings are normalized here")
            with_bias = old.take("with_bias") or node(True, old.where)
            made |= {"num_layers": node(2, old.where), "with_bias": with_bias}
            made |= {"with_last_bn": node(False, old.where), "with_last_bias": with_bias}
            made |= {"norm_cfg": norm_cfg} if norm_cfg is not None else {}
        case "DenseCLNeck":
            old.lose("num_grid", "the dense branch keeps all cells of the map here")
        case "NonLinearNeck":
            if old.peek("with_last_bn") is False:
                old.take("with_last_bn_affine")  # there is none that could have it
        case "LinearNeck" | "MoCoV2Neck" | "ODCNeck" | "RelativeLocNeck":
            pass
        case _:
            old.report.lost(old.where, old.key, f"there is no neck {name or 'without a type'} here")
            return None
    first_weights(old)
    return component(old, "necks", name, made)


def head(old: OldTable, loss: OldTable | None, sees_map: bool, num_views: int | None, width: int | None) -> Node | None:
    """A head with its loss, which stands in it or beside it.

    Args:
        old: its table.
        loss: the loss beside it, if any.
        sees_map: whether a feature map comes in, which is averaged.
        num_views: views of each image, where that is known.
        width: how many channels come in, where that is known.
    """
    name = old.type()
    loss = old.table("loss") or loss
    made: Part = {}
    match name:
        case "ContrastiveHead":
            _cross_entropy(loss)
        case "ClsHead":
            _cross_entropy(loss)
            why = "feature maps are averaged here, and vectors left alone"
            old.expect("with_avg_pool", sees_map, why)
            old.expect("vit_backbone", False, why)
            for key, usual in (("in_channels", 2048), ("num_classes", 1000)):
                made[key] = old.take(key) or node(usual, old.where)
            std = _normal(old)
            if std is not None:
                made["init_std"] = std
        case "LatentPredictHead":
            _finish_loss(loss, "CosineSimilarityLoss")
            made |= _predictor(old)
        case "MoCoV3Head":
            temperature = old.peek("temperature") or 1.0
            twice = 2 * temperature if isinstance(temperature, int | float) else None
            _cross_entropy(loss, twice)
            made |= _predictor(old)
        case "LatentCrossCorrelationHead":
            old.expect("in_channels", width or old.peek("in_channels"), f"the neck gives {width} channels")
            made |= _lambda(loss)
        case "SwAVHead":
            made |= _swav(old, loss, num_views)
        case _:
            old.report.lost(old.where, old.key, f"there is no head {name or 'without a type'} here")
            return None
    first_weights(old)
    return component(old, "heads", name, made)


def _predictor(old: OldTable) -> Part:
    predictor = old.table("predictor")
    made = neck(predictor, sees_map=False, channels=None) if predictor is not None else None
    return {} if made is None else {"predictor": made}


def _lambda(loss: OldTable | None) -> Part:
    weight = loss.take("lambd") if loss is not None else None
    _finish_loss(loss, "CrossCorrelationLoss")
    return {} if weight is None else {"lambd": weight}


def _swav(old: OldTable, loss: OldTable | None, num_views: int | None) -> Part:
    """The arguments of SwAV's head stand in it (0.x) or in its loss (1.x)."""
    made: Part = {}
    for table in (old, loss):
        if table is None:
            continue
        crops = table.take("num_crops", "a list")
        if crops is not None and num_views is not None and sum(map(_whole, plain(crops))) != num_views:
            why = f"the loss takes all views, which are {num_views}"
            table.report.lost(crops.where, (*table.key, "num_crops"), why)
        for key in ("feat_dim", "num_prototypes", "temperature", "epsilon", "sinkhorn_iterations", "crops_for_assign"):
            value = table.take(key)
            if value is not None:
                made[key] = value
    _finish_loss(loss, "SwAVLoss")
    return made


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


def _cross_entropy(loss: OldTable | None, weight: float | None = 1.0) -> None:
    if loss is not None:
        loss.expect("loss_weight", weight, f"the weight of this loss is {weight} here")
    _finish_loss(loss, "CrossEntropyLoss")


def _finish_loss(loss: OldTable | None, name: str) -> None:
    """A loss is part of its head here; all but its usual form is reported."""
    if loss is None:
        return
    given = loss.type()
    if given and given != name:
        loss.report.lost(loss.where, loss.key, f"the loss of this head is {name} here")
    first_weights(loss)
    loss.finish("the loss has no such argument here")


def _normal(old: OldTable) -> Node | None:
    """The `std` of an `init_cfg` that draws linear layers from a normal distribution, and nothing else of note."""
    entries = old.peek("init_cfg")
    entries = entries if isinstance(entries, list) else [entries]
    normal = [e for e in entries if isinstance(e, dict) and e.get("type") == "Normal" and e.get("layer") == "Linear"]
    others = [e for e in entries if e is not None and e not in normal and not _is_usual(e)]
    if len(normal) != 1 or others or set(normal[0]) != {"type", "std", "layer"}:
        return None
    init = old.take("init_cfg")
    assert init is not None
    return node(normal[0]["std"], init.where)


def _is_usual(entry: object) -> bool:
    """Whether an entry of `init_cfg` says what holds anyway: norms begin with a scale of 1."""
    layers = ["_BatchNorm", "GroupNorm"]
    return entry in [{"type": "Constant", "val": 1, "layer": names} for names in (layers, layers[:1], layers[0])]


def first_weights(old: OldTable) -> None:
    """`init_cfg` and `pretrained`: nothing but what holds anyway can be said here."""
    entries = old.peek("init_cfg")
    if isinstance(entries, list | dict) and all(map(_is_usual, entries if isinstance(entries, list) else [entries])):
        old.take("init_cfg")
    for key in ("init_cfg", "pretrained"):
        old.lose(key, f"{_FIRST_WEIGHTS}; load_from takes those of a checkpoint")
