"""Methods of MMSelfSup in our words: the model, and the hooks that are arguments of the method here."""

from sslrun.config.importer.networks import backbone, first_weights, head, neck
from sslrun.config.importer.parts import Part, component, is_class, known, node, steps, value_at
from sslrun.config.importer.table import OldTable
from sslrun.config.node import Node

# Channels of the last stage of a ResNet by its depth.
_STAGE = {18: 512, 34: 512, 50: 2048, 101: 2048, 152: 2048}

_SLOW_TEACHERS = ("BYOL", "MoCoV3")  # their momentum follows a schedule, which a hook of 0.x steps


def model(
    old: OldTable,
    hooks: dict[str, OldTable],
    frozen: OldTable | None,
    accumulation: int,
    num_views: int | None,
    inverse_momentum: bool,
) -> Node | None:
    """`[model]`, or None where we have no such method.

    Args:
        old: the old `model`.
        hooks: the old `custom_hooks` by their types; those that belong to the method are taken.
        frozen: the `frozen_layers_cfg` of the optimizer's hook.
        accumulation: backward passes for one optimizer step, of which old iterations are one each.
        num_views: views of each image, where that is known.
        inverse_momentum: whether a momentum is stated as 1 minus what it is, as mmpretrain does.
    """
    name = old.type()
    if not is_class("methods", name):
        old.report.lost(old.where, old.key, f"there is no method {name or 'without a type'} here")
        return None
    made = _networks(old, num_views)
    for key in ("base_momentum", "momentum"):
        if inverse_momentum and name != "NPID" and isinstance(old.peek(key), float):
            momentum = old.rest.pop(key)
            made[key] = node(round(1 - momentum.value, 12), momentum.where)
    made |= _memory_bank(old, name)
    if name in _SLOW_TEACHERS and accumulation > 1 and not {"MomentumUpdateHook", "BYOLHook"} & set(hooks):
        text = f"the teacher moves once in a step here, not {accumulation} times, once for each backward pass"
        old.report.changed(old.where, old.key, text)
    made |= _hooks(hooks, name, accumulation, made)
    if frozen is not None:
        made |= _frozen_prototypes(frozen, name, accumulation)
    first_weights(old)
    for key in ("train_cfg", "test_cfg"):
        if not old.peek(key):
            old.take(key)
    return component(old, "methods", name, made)


def _networks(old: OldTable, num_views: int | None) -> Part:
    made: Part = {}
    with_sobel = bool(old.get("with_sobel", "true or false", False))
    old.take("data_preprocessor")  # its mean and std become Normalize, with the images
    tables = {key: old.table(key) for key in ("backbone", "neck", "head", "loss")}
    found, sees_map, channels = None, True, None
    if tables["backbone"] is not None:
        found = backbone(tables["backbone"], with_sobel)
    if found is not None:
        made["backbone"] = found
        sees_map = value_at(made, "backbone", "type") != "VisionTransformer"
        inner = ("backbone", "backbone") if value_at(made, "backbone", "type") == "Sobel" else ("backbone",)
        depth = value_at(made, *inner, "depth")
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
    """NPID's and ODC's bank: some of its arguments are the method's own here, its size follows from the data."""
    bank = old.table("memory_bank")
    if bank is None:
        return {}
    bank.expect_type("there is no such bank here", "SimpleMemory", "ODCMemory")
    bank.leave("the bank has a row for every sample of the data set", "length")
    bank.expect("debug", False, "there is no such switch here")
    made: Part = {}
    for key in ("feat_dim", "momentum", "min_cluster"):
        value = bank.take(key) if key in known("methods", name) else None
        if value is not None:
            made[key] = value
    if name == "ODC":
        bank.leave("features are those of the neck, clusters those of the head", "feat_dim", "num_classes")
    bank.finish("the bank has nothing like it here")
    return made


def _hooks(hooks: dict[str, OldTable], name: str, accumulation: int, made: Part) -> Part:
    """What the hooks of a method say, as its arguments."""
    found: Part = {}
    clusters = value_at(made, "head", "num_classes")
    for title, hook in list(hooks.items()):
        match title, name:
            case (("MomentumUpdateHook" | "BYOLHook"), ("BYOL" | "MoCoV3")):
                found |= _momentum(hook, name, accumulation)
            case "SwAVHook", "SwAV":
                found |= _swav(hook, made, accumulation)
            case "DenseCLHook", "DenseCL":
                count = steps(hook, "start_iters", accumulation) or node(-(-1000 // accumulation), hook.where)
                found["loss_lambda_start_iters"] = count
            case "DeepClusterHook", "DeepCluster":
                found |= _deepcluster(hook, clusters)
            case "DeepClusterHook", "ODC":
                _first_clusters(hook, clusters)
            case "ODCHook", "ODC":
                found |= _odc(hook, accumulation)
            case _:
                continue
        hook.finish(f"{name} has nothing like it here")
        del hooks[title]
    return found


def _momentum(hook: OldTable, name: str, accumulation: int) -> Part:
    interval = hook.take("update_interval", "a whole number")
    if (interval.value if interval is not None else 1) != accumulation:
        where = interval.where if interval is not None else hook.where
        key = (*hook.key, "update_interval")
        text = f"the teacher moves once in a step here: every {accumulation} backward passes"
        hook.report.changed(where, key, text)
    if name == "MoCoV3":
        hook.expect("end_momentum", 1, "the momentum ends at 1 here")
        return {}
    end = hook.take("end_momentum")
    return {} if end is None or end.value == 1 else {"end_momentum": end}


def _swav(hook: OldTable, made: Part, accumulation: int) -> Part:
    found: Part = {}
    hook.take("batch_size")  # the loader says it
    hook.leave("the queue is part of every checkpoint", "interval")
    for key in ("queue_length", "epoch_queue_starts"):
        value = hook.take(key)
        if value is not None:
            found[key] = value
    for key in ("crops_for_assign", "feat_dim"):
        if key in hook and "head" in made and key not in made["head"].value:
            value = hook.take(key)
            assert value is not None
            made["head"] = Node({**made["head"].value, key: value}, made["head"].origins)
        hook.expect(key, value_at(made, "head", key), "the head says something else")
    frozen = hook.table("frozen_layers_cfg")
    return found | (_frozen_prototypes(frozen, "SwAV", accumulation) if frozen is not None else {})


def _frozen_prototypes(frozen: OldTable, method: str, accumulation: int) -> Part:
    """`frozen_layers_cfg`: SwAV's prototypes can be kept as they are for some iterations."""
    count = steps(frozen, "prototypes", accumulation) if method == "SwAV" else None
    frozen.finish("only SwAV's prototypes can be frozen for some time; [[optimizer.paramwise]] has freeze_iters")
    return {} if count is None else {"freeze_prototypes_iters": count}


def _clustering(hook: OldTable, clusters: object) -> Node | None:
    """`pca_dim` of the clustering; the number of clusters is the head's."""
    hook.leave("features are those of center crops of the training images", "extractor", "extract_dataloader")
    hook.leave("a clustering follows from the seed of the run", "seed")
    hook.expect("initial", True, "the first clusters come before the first epoch")
    hook.expect("dist_mode", True, "all ranks take part")
    clustering = hook.table("clustering")
    if clustering is None:
        return None
    if (title := clustering.type()) != "Kmeans":
        clustering.report.lost(clustering.where, clustering.key, f"there is no clustering {title} here, only k-means")
    clustering.expect("k", clusters, f"the head has {clusters} classes, one for each cluster")
    pca_dim = clustering.take("pca_dim")
    clustering.finish("k-means has no such argument here")
    return pca_dim


def _deepcluster(hook: OldTable, clusters: object) -> Part:
    found: Part = {}
    pca_dim = _clustering(hook, clusters)
    if pca_dim is not None:
        found["pca_dim"] = pca_dim
    for key, ours in (("unif_sampling", "uniform_sampling"), ("reweight", ""), ("reweight_pow", "reweight_power")):
        value = hook.take(key)
        if value is not None:
            found[ours or key] = value
    hook.expect("interval", 1, "clusters are made anew before every epoch here")
    hook.expect("init_memory", False, "DeepCluster has no bank")
    return found


def _first_clusters(hook: OldTable, clusters: object) -> None:
    """ODC's first clusters, which k-means makes of the features as they are."""
    pca_dim = _clustering(hook, clusters)
    if pca_dim is not None and pca_dim.value not in (-1, 0):
        why = "the first clusters are those of the features themselves"
        hook.report.lost(pca_dim.where, (*hook.key, "clustering", "pca_dim"), why)
    hook.expect("unif_sampling", False, "every epoch sees every sample once")
    hook.expect("init_memory", True, "ODC's bank begins with these clusters")
    hook.leave("ODCHook says it again", "reweight", "reweight_pow")
    interval = hook.take("interval", "a whole number")
    if interval is not None and interval.value < 1_000_000:
        hook.report.lost(interval.where, (*hook.key, "interval"), "ODC makes its clusters from scratch only once")


def _odc(hook: OldTable, accumulation: int) -> Part:
    found: Part = {}
    for key in ("centroids_update_interval", "deal_with_small_clusters_interval"):
        value = steps(hook, key, accumulation)
        if value is not None:
            found[key] = value
    hook.leave("the sizes of clusters are written with the other metrics", "evaluate_interval")
    hook.expect("dist_mode", True, "all ranks take part")
    power, reweight = hook.take("reweight_pow"), hook.take("reweight", "true or false")
    if reweight is not None and not reweight.value:
        power = node(0.0, reweight.where)  # every weight is 1
    return found | ({} if power is None else {"reweight_power": power})
