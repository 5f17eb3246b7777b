"""Converts the model, and the hooks that are arguments of the method here."""

from typing import NamedTuple

from sslrun.config.node import Node
from sslrun.importer.defaults import MMPRETRAIN
from sslrun.importer.networks import backbone, first_weights, head, neck
from sslrun.importer.old import OldTable, node
from sslrun.importer.ours import Part, component, is_class, known, steps, value_at

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
    frozen: OldTable | None
    accumulation: int
    num_views: int | None


def model(old: OldTable, around: Around) -> Node | None:
    """Converts `model`; None where there is no such method here."""
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
    if around.frozen is not None:
        made |= _frozen_prototypes(around.frozen, name, around.accumulation)
    first_weights(old)
    return component(old, "methods", name, made)


def _networks(old: OldTable, num_views: int | None) -> Part:
    made: Part = {}
    old.take("data_preprocessor")  # its mean and std become Normalize, with the images
    tables = {key: old.table(key) for key in ("backbone", "neck", "head", "loss")}
    sees_map, channels = True, None
    sees_edges = tables["backbone"] is not None and tables["backbone"].peek("in_channels") == 2
    with_sobel = bool(old.get("with_sobel", "true or false", sees_edges))  # 0.x's DeepCluster has it by default
    found = backbone(tables["backbone"], with_sobel) if tables["backbone"] is not None else None
    if found is not None:
        made["backbone"] = found
        sees_map = value_at(found, "type") != "VisionTransformer"
        inner = ("backbone",) if value_at(found, "type") == "Sobel" else ()
        depth = value_at(found, *inner, "depth")
        channels = _STAGE.get(depth) if isinstance(depth, int) else None
    if tables["neck"] is not None:
        converted = neck(tables["neck"], sees_map, channels)
        made |= {"neck": converted} if converted is not None else {}
    if tables["head"] is not None:
        after_map = sees_map and tables["neck"] is None
        converted = head(tables["head"], tables["loss"], after_map, num_views, value_at(made, "neck", "out_channels"))
        made |= {"head": converted} if converted is not None else {}
    return made


def _memory_bank(old: OldTable, name: str) -> Part:
    """Converts the bank of NPID or ODC, whose arguments are the method's own here; its size follows from the data."""
    bank = old.table("memory_bank")
    if bank is None:
        return {}
    kept = {"feat_dim", "momentum", "min_cluster"} & set(known("methods", name))
    made = bank.renamed(**{key: key for key in kept})
    return made


def _hooks(name: str, around: Around, made: Part) -> Part:
    """Converts the hooks of a method to its arguments."""
    found: Part = {}
    hooks, accumulation = around.hooks, around.accumulation
    clusters = value_at(made, "head", "num_classes")
    for title, hook in list(hooks.items()):
        hook.why = f"{name} has nothing like it here"
        match title, name:
            case (("MomentumUpdateHook" | "BYOLHook"), ("BYOL" | "MoCoV3")):
                found |= _momentum(hook, name, accumulation)
            case "SwAVHook", "SwAV":
                found |= _swav(hook, made, accumulation)
            case "DenseCLHook", "DenseCL":
                count = steps(hook, "start_iters", accumulation)
                found |= {"loss_lambda_start_iters": count} if count is not None else {}
            case "DeepClusterHook", "DeepCluster":
                found |= _deepcluster(hook, clusters)
            case "DeepClusterHook", "ODC":
                _first_clusters(hook, clusters)
            case "ODCHook", "ODC":
                found |= _odc(hook, accumulation)
            case _:
                continue
        del hooks[title]
    return found


def _momentum(hook: OldTable, name: str, accumulation: int) -> Part:
    interval = hook.take("update_interval", "a whole number")
    if (interval.value if interval is not None else 1) != accumulation:
        text = f"the teacher moves once in a step here: every {accumulation} backward passes"
        hook.changed(text, "update_interval", at=interval)
    if name == "MoCoV3":
        hook.expect("the momentum ends at 1 here", end_momentum=1)
        return {}
    end = hook.take("end_momentum")
    return {} if end is None or end.value == 1 else {"end_momentum": end}


def _swav(hook: OldTable, made: Part, accumulation: int) -> Part:
    found = hook.renamed(queue_length="queue_length", epoch_queue_starts="epoch_queue_starts")
    for key in ("crops_for_assign", "feat_dim"):
        if key in hook and "head" in made and key not in made["head"].value:
            made["head"] = Node({**made["head"].value, key: hook.rest.pop(key)}, made["head"].origins)
        hook.expect("the head says something else", **{key: value_at(made, "head", key)})
    frozen = hook.table("frozen_layers_cfg")
    return found | (_frozen_prototypes(frozen, "SwAV", accumulation) if frozen is not None else {})


def _frozen_prototypes(frozen: OldTable, method: str, accumulation: int) -> Part:
    """Converts `frozen_layers_cfg`, which freezes SwAV's prototypes for some iterations."""
    frozen.why = "only SwAV's prototypes can be frozen for some time; [[optimizer.paramwise]] has freeze_iters"
    count = steps(frozen, "prototypes", accumulation) if method == "SwAV" else None
    return {} if count is None else {"freeze_prototypes_iters": count}


def _clustering(hook: OldTable, clusters: object) -> Node | None:
    """Returns `pca_dim` of the clustering; the number of clusters is an argument of the head."""
    clustering = hook.table("clustering")
    if clustering is None:
        return None
    if (title := clustering.type()) != "Kmeans":
        clustering.lost(f"there is no clustering {title} here, only k-means")
    clustering.expect(f"the head has {clusters} classes, one for each cluster", k=clusters)
    pca_dim = clustering.take("pca_dim")
    return pca_dim


def _deepcluster(hook: OldTable, clusters: object) -> Part:
    pca_dim = _clustering(hook, clusters)
    found: Part = {} if pca_dim is None else {"pca_dim": pca_dim}
    found |= hook.renamed(uniform_sampling="unif_sampling", reweight="reweight", reweight_power="reweight_pow")
    hook.expect("clusters are made anew before every epoch here", interval=1)
    hook.expect("DeepCluster has no bank", init_memory=False)
    return found


def _first_clusters(hook: OldTable, clusters: object) -> None:
    """Checks ODC's first clustering, which has no options here: k-means of the features themselves."""
    pca_dim = _clustering(hook, clusters)
    if pca_dim is not None and pca_dim.value not in (-1, 0):
        hook.lost("the first clusters are those of the features themselves", "clustering", "pca_dim", at=pca_dim)
    hook.expect("every epoch sees every sample once", unif_sampling=False)
    hook.expect("ODC's bank begins with these clusters", init_memory=True)
    for key in ("reweight", "reweight_pow"):
        hook.leave("ODCHook says it again", key)
    interval = hook.take("interval", "a whole number")
    if interval is not None and interval.value < 1_000_000:
        hook.lost("ODC makes its clusters from scratch only once", "interval", at=interval)


def _odc(hook: OldTable, accumulation: int) -> Part:
    names = ("centroids_update_interval", "deal_with_small_clusters_interval")
    found = {key: value for key in names if (value := steps(hook, key, accumulation)) is not None}
    power, reweight = hook.take("reweight_pow"), hook.take("reweight", "true or false")
    if reweight is not None and not reweight.value:
        power = node(0.0, reweight.where)  # every weight is 1
    return found | ({} if power is None else {"reweight_power": power})
