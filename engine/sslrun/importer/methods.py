"""Converts the model, and the hooks that are arguments of the method here."""

from collections.abc import Callable
from typing import NamedTuple

from sslrun.config.node import Node
from sslrun.importer.defaults import MMPRETRAIN
from sslrun.importer.networks import backbone, first_weights, head, neck
from sslrun.importer.old import OldTable, node
from sslrun.importer.ours import Part, component, is_class, known, present, steps, value_at

# Channels of the last stage of a ResNet by its depth.
_STAGE = {18: 512, 34: 512, 50: 2048, 101: 2048, 152: 2048}
_RENAMED = {"MOCO": "MoCo"}  # of OpenSelfSup


class Around(NamedTuple):
    """The facts outside of `model` that its conversion depends on.

    Attributes:
        hooks: the old `custom_hooks` by their types; those that belong to the method are taken.
        frozen: the `frozen_layers_cfg` of the optimizer's hook.
        accumulation: backward passes for one optimizer step, of which old iterations are one each.
        num_views: views of each image, where that is known.
    """

    hooks: dict[str, OldTable]
    frozen: OldTable
    accumulation: int
    num_views: int | None


def model(old: OldTable, around: Around) -> Node | None:
    """Converts `model`; None if sslrun has no such method."""
    title = old.type()
    name = _RENAMED.get(title, title)
    if not is_class("methods", name):
        old.give_up(f"there is no method {name or 'without a type'} here")
        return None
    made = _networks(old, around.num_views)
    for key in ("base_momentum", "momentum"):
        momentum = old.peek(key)
        if old.framework == MMPRETRAIN and isinstance(momentum, int | float) and not isinstance(momentum, bool):
            made[key] = node(round(1 - momentum, 12), old.rest.pop(key).where)  # MMPretrain states 1 minus it
    made |= _memory_bank(old, name)
    is_slow = name in ("BYOL", "MoCoV3")  # their momentum follows a schedule, which a hook of 0.x steps
    if is_slow and around.accumulation > 1 and not {"MomentumUpdateHook", "BYOLHook"} & set(around.hooks):
        old.changed(
            f"the teacher moves once in a step here, not {around.accumulation} times, once for each backward pass"
        )
    made |= _hooks(name, around, made)
    if around.frozen:
        made |= _frozen_prototypes(around.frozen, name, around.accumulation)
    first_weights(old)
    return component(old, "methods", name, made)


def _networks(old: OldTable, num_views: int | None) -> Part:
    made: Part = {}
    old.take("data_preprocessor")  # its mean and std become Normalize, with the images
    tables = {key: old.table(key) for key in ("backbone", "neck", "head", "loss")}
    sees_map, channels = True, None
    sees_edges = tables["backbone"].peek("in_channels") == 2
    with_sobel = bool(old.get("with_sobel", "true or false", sees_edges))  # 0.x's DeepCluster has it by default
    found = backbone(tables["backbone"], with_sobel) if tables["backbone"] else None
    if found is not None:
        made["backbone"] = found
        sees_map = value_at(found, "type") != "VisionTransformer"
        inner = ("backbone",) if value_at(found, "type") == "Sobel" else ()
        depth = value_at(found, *inner, "depth")
        channels = _STAGE.get(depth) if isinstance(depth, int) else None
    if tables["neck"]:
        made |= present(neck=neck(tables["neck"], sees_map, channels))
    if tables["head"]:
        after_map, width = sees_map and not tables["neck"], value_at(made, "neck", "out_channels")
        made |= present(head=head(tables["head"], tables["loss"], after_map, num_views, width))
    return made


def _memory_bank(old: OldTable, name: str) -> Part:
    """Converts the bank of NPID or ODC, whose arguments are the method's own here; its size follows from the data."""
    bank = old.table("memory_bank")
    if not bank:
        return {}
    kept = {"feat_dim", "momentum", "min_cluster"} & set(known("methods", name))
    made = bank.renamed(**{key: key for key in kept})
    return made


def _hooks(name: str, around: Around, made: Part) -> Part:
    """Converts the hooks of a method to its arguments."""
    found: Part = {}
    for title, hook in list(around.hooks.items()):
        if (title, name) in _HOOKS:
            hook.why = f"{name} has nothing like it here"
            hook.notes.append(f"{title} of {name}")
            names, numbers, convert = _HOOKS[title, name]
            found |= hook.renamed(**names)
            found |= present(**{ours: steps(hook, key, around.accumulation) for ours, key in numbers.items()})
            found |= convert(hook, around, made) if convert is not None else {}
            del around.hooks[title]
    return found


def _interval(hook: OldTable, around: Around, made: Part) -> Part:
    """Checks how often the teacher moves, which is once in a step here."""
    interval = hook.take("update_interval", "a whole number")
    if (interval.value if interval is not None else 1) != around.accumulation:
        text = f"the teacher moves once in a step here: every {around.accumulation} backward passes"
        hook.changed(text, "update_interval", at=interval)
    return {}


def _momentum(hook: OldTable, around: Around, made: Part) -> Part:
    _interval(hook, around, made)
    return {} if hook.peek("end_momentum") == 1 else hook.renamed(end_momentum="end_momentum")


def _swav(hook: OldTable, around: Around, made: Part) -> Part:
    for key in ("crops_for_assign", "feat_dim"):
        if key in hook and "head" in made and key not in made["head"].value:
            made["head"] = Node({**made["head"].value, key: hook.rest.pop(key)}, made["head"].origins)
        hook.expect("the head says something else", **{key: value_at(made, "head", key)})
    frozen = hook.table("frozen_layers_cfg")
    return _frozen_prototypes(frozen, "SwAV", around.accumulation)


def _frozen_prototypes(frozen: OldTable, method: str, accumulation: int) -> Part:
    """Converts `frozen_layers_cfg`, which freezes SwAV's prototypes for some iterations."""
    frozen.why = "only SwAV's prototypes can be frozen for some time; [[optimizer.paramwise]] has freeze_iters"
    count = steps(frozen, "prototypes", accumulation) if method == "SwAV" else None
    return present(freeze_prototypes_iters=count)


def _clustering(hook: OldTable, around: Around, made: Part) -> Part:
    """Returns `pca_dim` of the clustering; the number of clusters is an argument of the head."""
    clustering = hook.table("clustering")
    if not clustering:
        return {}
    if (title := clustering.type()) != "Kmeans":
        clustering.lost(f"there is no clustering {title} here, only k-means")
    clusters = value_at(made, "head", "num_classes")
    clustering.expect(f"the head has {clusters} classes, one for each cluster", k=clusters)
    return clustering.renamed(pca_dim="pca_dim")


def _first_clusters(hook: OldTable, around: Around, made: Part) -> Part:
    """Checks ODC's first clustering, which has no options here: k-means of the features themselves."""
    pca_dim = _clustering(hook, around, made).get("pca_dim")
    if pca_dim is not None and pca_dim.value not in (-1, 0):
        hook.lost("the first clusters are those of the features themselves", "clustering", "pca_dim", at=pca_dim)
    interval = hook.take("interval", "a whole number")
    if interval is not None and interval.value < 1_000_000:
        hook.lost("ODC makes its clusters from scratch only once", "interval", at=interval)
    return {}


def _reweight(hook: OldTable, around: Around, made: Part) -> Part:
    power, reweight = hook.take("reweight_pow"), hook.take("reweight", "true or false")
    if reweight is not None and not reweight.value:
        power = node(0.0, reweight.where)  # every weight is 1
    return present(reweight_power=power)


# Old hook and our method -> {argument here: there}, {argument in steps here: in iterations there}, all else.
_Conversion = tuple[dict[str, str], dict[str, str], Callable[[OldTable, Around, Part], Part] | None]
_CENTROIDS, _SMALL = "centroids_update_interval", "deal_with_small_clusters_interval"
_WEIGHTS = {"uniform_sampling": "unif_sampling", "reweight": "reweight", "reweight_power": "reweight_pow"}
_HOOKS: dict[tuple[str, str], _Conversion] = {
    ("MomentumUpdateHook", "BYOL"): ({}, {}, _momentum),
    ("BYOLHook", "BYOL"): ({}, {}, _momentum),
    ("MomentumUpdateHook", "MoCoV3"): ({}, {}, _interval),
    ("SwAVHook", "SwAV"): ({key: key for key in ("queue_length", "epoch_queue_starts")}, {}, _swav),
    ("DenseCLHook", "DenseCL"): ({}, {"loss_lambda_start_iters": "start_iters"}, None),
    ("DeepClusterHook", "DeepCluster"): (_WEIGHTS, {}, _clustering),
    ("DeepClusterHook", "ODC"): ({}, {}, _first_clusters),
    ("ODCHook", "ODC"): ({}, {_CENTROIDS: _CENTROIDS, _SMALL: _SMALL}, _reweight),
}
