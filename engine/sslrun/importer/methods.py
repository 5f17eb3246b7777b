"""Converts the model, and the hooks that are arguments of the method here."""

from collections.abc import Callable

from sslrun.config.node import Node
from sslrun.importer.defaults import MMPRETRAIN
from sslrun.importer.masked import MASKED, NOT_HERE, masked_model
from sslrun.importer.networks import backbone, first_weights, head, neck
from sslrun.importer.old import OldTable
from sslrun.importer.ours import Part, component, known, names, value_at

# Channels of the last stage of a ResNet by its depth.
_STAGE = {18: 512, 34: 512, 50: 2048, 101: 2048, 152: 2048}
_RENAMED = {"MOCO": "MoCo", "InterCLRMoCo": "InterCLR"}  # the first in OpenSelfSup
_OF_HEAD = ("crops_for_assign", "feat_dim")  # arguments of SwAV's head that stand in its hook


def model(old: OldTable, hooks: dict[str, OldTable], frozen: OldTable, num_views: int | None) -> Node | None:
    """Converts `model`; None if sslrun has no such method.

    Args:
        old: its table.
        hooks: the old `custom_hooks` by their types; those that belong to the method are taken.
        frozen: the `frozen_layers_cfg` of the optimizer's hook.
        num_views: views of each image, where that is known.
    """
    title = old.type()
    name = _RENAMED.get(title, title)
    if name in MASKED:
        return masked_model(old, name)
    if name not in names("methods"):
        old.give_up(NOT_HERE.get(name, f"there is no method {name or 'without a type'} here"))
        return None
    made = _networks(old, num_views)
    for key in ("base_momentum", "momentum"):
        momentum = old.peek(key)
        if old.framework == MMPRETRAIN and isinstance(momentum, float):
            made[key] = round(1 - old.get(key), 12)  # MMPretrain states 1 minus it
    bank = old.table("memory_bank")  # its arguments are the method's own here; its size follows from the data
    if name == "InterCLR":
        made |= _interclr(old, bank)
    else:
        made |= bank.renamed(**{key: key for key in known("methods", name) if key != "type"})
    passes = old.report.accumulation
    is_slow = name in ("BYOL", "MoCoV3")  # their momentum follows a schedule, which a hook of 0.x steps
    if is_slow and passes > 1 and not {"MomentumUpdateHook", "BYOLHook"} & set(hooks):
        old.changed(f"the teacher moves once in a step here, not {passes} times, once for each backward pass")
    for title in [title for title in hooks if (title, name) in _HOOKS]:
        made |= _hook(hooks.pop(title), title, name, made)
    if frozen:
        made |= _frozen_prototypes(frozen, name)
    first_weights(old)
    return component(old, "methods", name, made)


def _interclr(old: OldTable, bank: OldTable) -> Part:
    """Converts the names of InterCLR's numbers, and checks that its loss is the one that is here."""
    made: Part = {**bank.renamed(bank_momentum="momentum", min_cluster="min_cluster"), **old.renamed(**_OF_INTERCLR)}
    if not old.get("inter_cos_marign_loss", "true or false", True):
        made["margin"] = 0.0
    old.expect("negatives are drawn from the most similar rows of other clusters here", neg_sampling="semihard")
    old.expect("the only margin here is that of the positive between images", intra_cos_marign_loss=False)
    old.expect("margins are those of the cosine here", intra_arc_marign_loss=False, inter_arc_marign_loss=False)
    old.expect("one neck serves both losses here", share_neck=True)
    old.expect("labels follow after every step here", online_labels=True)
    return made


def _networks(old: OldTable, num_views: int | None) -> Part:
    made: Part = {}
    old.take("data_preprocessor")  # its mean and std become Normalize, with the images
    tables = {key: old.table(key) for key in ("backbone", "neck", "head", "loss")}
    sees_map, channels = True, None
    sees_edges = tables["backbone"].peek("in_channels") == 2
    with_sobel = bool(old.get("with_sobel", "true or false", sees_edges))  # 0.x's DeepCluster has it by default
    if tables["backbone"] and (found := backbone(tables["backbone"], with_sobel)):
        made["backbone"] = found
        sees_map = value_at(found, "type") != "VisionTransformer"
        inner = ("backbone",) if value_at(found, "type") == "Sobel" else ()
        depth = value_at(found, *inner, "depth")
        channels = _STAGE.get(depth) if isinstance(depth, int) else None
    if tables["neck"]:
        made["neck"] = neck(tables["neck"], sees_map, channels)
    if tables["head"]:
        after_map, width = sees_map and not tables["neck"], value_at(made, "neck", "out_channels")
        made["head"] = head(tables["head"], tables["loss"], after_map, num_views, width)
    return made


def _frozen_prototypes(frozen: OldTable, method: str) -> Part:
    """Converts `frozen_layers_cfg`, which freezes SwAV's prototypes for some iterations."""
    frozen.why = "only SwAV's prototypes can be frozen for some time; [[optimizer.paramwise]] has freeze_iters"
    return {"freeze_prototypes_iters": frozen.steps("prototypes")} if method == "SwAV" else {}


def _hook(hook: OldTable, title: str, name: str, made: Part) -> Part:
    """Converts a hook of a method to its arguments; `made` are those so far."""
    renamed, numbers, convert = _HOOKS[title, name]
    hook.why = f"{name} has nothing like it here"
    hook.notes.append(f"{title}/{name}")
    found: Part = {**hook.renamed(**renamed), **{ours: hook.steps(key) for ours, key in numbers.items()}}
    return found | (convert(hook, made) if convert is not None else {})


def _momentum(hook: OldTable, made: Part) -> Part:
    """Checks how often the teacher moves, which is once in a step here."""
    passes = hook.report.accumulation
    if hook.get("update_interval", "a whole number", 1) != passes:
        hook.changed(f"the teacher moves once in a step here: every {passes} backward passes", "update_interval")
    return {}


def _byol(hook: OldTable, made: Part) -> Part:
    _momentum(hook, made)
    return {} if hook.peek("end_momentum") == 1 else hook.renamed(end_momentum="end_momentum")


def _swav(hook: OldTable, made: Part) -> Part:
    head = made.get("head")
    for key in _OF_HEAD:
        if head is not None and key not in head.value:
            head.value.update(hook.renamed(**{key: key}))
        hook.expect("the head says something else", **{key: value_at(head, key)})
    return _frozen_prototypes(hook.table("frozen_layers_cfg"), "SwAV")


def _clustering(hook: OldTable, made: Part) -> Part:
    """Returns `pca_dim` of the clustering; the number of clusters is an argument of the head."""
    clustering = hook.table("clustering")
    if clustering and (title := clustering.type()) != "Kmeans":
        clustering.lost(f"there is no clustering {title} here, only k-means")
    clusters = value_at(made, "head", "num_classes")
    clustering.expect(f"the head has {clusters} classes, one for each cluster", k=clusters)
    return {"pca_dim": clustering.take("pca_dim")}


def _first_clusters(hook: OldTable, made: Part) -> Part:
    """Checks ODC's first clustering, which has no options here: k-means of the features themselves."""
    pca_dim = _clustering(hook, made)["pca_dim"]
    if pca_dim is not None and pca_dim.value not in (-1, 0):
        hook.lost("the first clusters are those of the features themselves", "clustering", "pca_dim")
    if hook.get("interval", "a whole number", 1_000_000) < 1_000_000:
        hook.lost("ODC makes its clusters from scratch only once", "interval")
    return {}


def _inter_clusters(hook: OldTable, made: Part) -> Part:
    """Checks InterCLR's first clustering, which has no options here."""
    clustering = hook.table("clustering")
    if clustering and (title := clustering.type()) != "Kmeans":
        clustering.lost(f"there is no clustering {title} here, only k-means")
    clusters = value_at(made, "num_clusters")
    clustering.expect(f"num_classes of the model says {clusters}", k=clusters)
    clustering.expect("the first clusters are those of the features themselves", pca_dim=-1)
    hook.expect('inter_weight may have a schedule here: { schedule = "step", ... }', warmup_epochs=0)
    return {}


def _reweight(hook: OldTable, made: Part) -> Part:
    power = hook.take("reweight_pow")
    return {"reweight_power": power if hook.get("reweight", "true or false", True) else 0.0}  # 0: every weight is 1


# Old hook and our method -> {argument here: there}, {argument in steps here: in iterations there}, all else.
_Conversion = tuple[dict[str, str], dict[str, str], Callable[[OldTable, Part], Part] | None]
_WEIGHTS = {"uniform_sampling": "unif_sampling", "reweight": "reweight", "reweight_power": "reweight_pow"}
_QUEUE = {key: key for key in ("queue_length", "epoch_queue_starts")}
_OF_INTERCLR = {
    "neg_pool": "semihard_neg_pool_num", "margin": "inter_cos_margin", "num_clusters": "num_classes",
    "intra_weight": "intra_loss_weight", "inter_weight": "inter_loss_weight",
}  # fmt: skip
_INTERVALS = {key: key for key in ("centroids_update_interval", "deal_with_small_clusters_interval")}
_HOOKS: dict[tuple[str, str], _Conversion] = {
    ("MomentumUpdateHook", "BYOL"): ({}, {}, _byol),
    ("BYOLHook", "BYOL"): ({}, {}, _byol),
    ("MomentumUpdateHook", "MoCoV3"): ({}, {}, _momentum),
    ("SwAVHook", "SwAV"): (_QUEUE, {}, _swav),
    ("DenseCLHook", "DenseCL"): ({}, {"loss_lambda_start_iters": "start_iters"}, None),
    ("DeepClusterHook", "DeepCluster"): (_WEIGHTS, {}, _clustering),
    ("DeepClusterHook", "ODC"): ({}, {}, _first_clusters),
    ("ODCHook", "ODC"): ({}, _INTERVALS, _reweight),
    ("InterCLRHook", "InterCLR"): ({}, _INTERVALS, _inter_clusters),
}
