"""Data of MMSelfSup in our words: sources, groups of views, batches."""

import posixpath
from typing import NamedTuple

from sslrun.config.importer.parts import Part, component, node, value_at
from sslrun.config.importer.table import OldTable, tables_in
from sslrun.config.importer.transforms import file_client, normalize, transform
from sslrun.config.node import Node

_SOURCES = {
    "ImageNet": "ImageNet",
    "DeepClusterImageNet": "ImageNet",
    "ImageNet21k": "ImageList",
    "ImageList": "ImageList",
    "CustomDataset": "ImageList",
    "Places205": "Places205",
    "CIFAR10": "CIFAR10",
    "CIFAR100": "CIFAR100",
}
_DATASETS = ("MultiViewDataset", "SingleViewDataset", "DeepClusterDataset", "RelativeLocDataset", "RotationPredDataset")
_SPLIT = ("ImageNet", "mmcls.ImageNet", "mmpretrain.ImageNet")  # whose splits are folders
_GEOMETRIC = ("RandomResizedCrop", "Resize", "CenterCrop", "RandomCrop", "RandomHorizontalFlip")
_PATCHES = 3  # rows and columns of Relative-Loc's grid
_JITTER = 21  # pixels by which a patch is smaller than its cell
_LOADER = "the loader decides it: threads of its own that live as long as the run"


class Images(NamedTuple):
    """`[data]`, and what the rest of the recipe needs of it.

    Attributes:
        part: the table.
        samples_per_gpu: batch on one GPU, where it is stated.
        num_views: views of each image in all groups, where that is known.
    """

    part: Part
    samples_per_gpu: int | None
    num_views: int | None


def images_0x(old: OldTable, top: OldTable) -> Images:
    """`data` of MMSelfSup 0.x; batches that its loader prefetches are normalized by the top-level `img_norm_cfg`."""
    made: Part = {}
    batch = old.first("samples_per_gpu", "imgs_per_gpu", kind="a whole number")
    if validation_interval(top) is not None:
        made |= _holdout(old)
    old.leave("[monitor] measures on data.holdout", "val", "test", "val_dataloader", "test_dataloader")
    old.leave(_LOADER, "persistent_workers", "pin_memory", "prefetch_factor", "dist", "shuffle")
    _batches(old, made, batch, "workers_per_gpu")
    old.expect("replace", False, "every epoch sees every sample once here, as in the paper")
    train = old.table("train")
    num_views = None
    if train is not None:
        title = train.type()
        if title not in _DATASETS:
            train.report.lost(train.where, train.key, f"there is no data set {title or 'without a type'} here")
        is_prefetched = bool(train.get("prefetch", "true or false", False))
        found = train.table("data_source")
        origin = _source(found, found.get("data_prefix", "a string"), "") if found is not None else None
        made |= {"source": origin} if origin is not None else {}
        groups = _groups_0x(train)
        prefetched = top.table("img_norm_cfg") if is_prefetched else None
        mean_and_std = _mean_and_std(prefetched) if prefetched is not None else None
        num_views = _views(made, groups, mean_and_std, title == "RelativeLocDataset", train)
        train.finish("data has nothing like it here")
    old.finish("data has nothing like it here")
    return Images(made, batch.value if batch is not None else None, num_views)


def images_1x(old: OldTable, preprocessor: OldTable | None) -> Images:
    """`train_dataloader` of MMSelfSup 1.x, and the `data_preprocessor` that normalizes."""
    made: Part = {}
    batch = old.take("batch_size", "a whole number")
    collate = old.table("collate_fn")
    if collate is not None:
        collate.expect_type("batches are made as always", "default_collate", "pseudo_collate")
        collate.finish("batches are made as always")
    old.leave(_LOADER, "persistent_workers", "pin_memory", "prefetch_factor")
    _batches(old, made, batch, "num_workers")
    sampler = old.table("sampler")
    if sampler is not None:
        sampler.expect_type("there is no such order here", "DefaultSampler", "DeepClusterSampler", "InfiniteSampler")
        sampler.expect("shuffle", True, "the order of an epoch is random")
        sampler.expect("replace", False, "every epoch sees every sample once here, as in the paper")
        sampler.leave("batches are filled by data.drop_last = false", "round_up")
        sampler.finish("the order has no such option here")
    num_views = None
    dataset = old.table("dataset")
    if dataset is not None:
        pipeline = dataset.take("pipeline", "a list")
        root = dataset.get("data_root", "a string", "")
        folder = _prefix(dataset)
        split = dataset.take("split", "a string")
        if split is not None and not folder and dataset.peek("type") in _SPLIT:
            folder = split.value
        origin = _source(dataset, posixpath.join(root, folder), root)
        made |= {"source": origin} if origin is not None else {}
        if pipeline is not None:
            groups, is_grid = _groups_1x(dataset, pipeline)
            mean_and_std = _mean_and_std(preprocessor) if preprocessor is not None else None
            num_views = _views(made, groups, mean_and_std, is_grid, dataset, is_1x=True)
    old.finish("data has nothing like it here")
    return Images(made, batch.value if batch is not None else None, num_views)


def validation_interval(top: OldTable) -> int | None:
    """Epochs of training between two of validation, of a `workflow` that has both."""
    match top.peek("workflow"):
        case [["train", int(interval)], ["val", 1]] if interval > 0:
            return interval
    return None


def _holdout(old: OldTable) -> Part:
    """The images that the old `workflow` validates on; how they are prepared is the views' business here."""
    val = old.peek("val")
    table = old.table("val") if isinstance(val, dict) and isinstance(val.get("data_source"), dict) else None
    found = table.table("data_source") if table is not None else None
    if table is None or found is None:
        return {}
    table.leave("the loss is taken on the views of training", *list(table.rest))
    made = _source(found, found.get("data_prefix", "a string"), "")
    return {} if made is None else {"holdout": made}


class _Group(NamedTuple):
    """Steps of one old pipeline, and for how many views."""

    num_views: Node
    steps: list[OldTable]


def _batches(old: OldTable, made: Part, batch: Node | None, workers: str) -> None:
    """Keys that both forms have. Both keep an incomplete last batch unless they are told to drop it."""
    if batch is not None:
        made["samples_per_gpu"] = batch
    threads = old.take(workers)
    if threads is not None:
        made["workers_per_gpu"] = threads
    made["drop_last"] = old.take("drop_last") or node(False, old.where)


def _prefix(dataset: OldTable) -> str:
    """The folder of the images, as mmengine has it: a path, or a table of paths by what they are of."""
    if isinstance(dataset.peek("data_prefix"), dict):
        table = dataset.table("data_prefix")
        assert table is not None
        folder = table.first("img_path", "img", "img_prefix", kind="a string")
        table.finish("only images are read")
    else:
        folder = dataset.take("data_prefix", "a string")
    return folder.value if folder is not None else ""


def _source(old: OldTable, folder: str | None, root: str) -> Node | None:
    """A data source: `folder` is where images are, `root` what an annotation file is relative to."""
    title = old.type()
    file_client(old)
    old.expect("color_type", "color", "images are read in color")
    old.expect("channel_order", "rgb", "images are RGB here")
    old.expect("test_mode", False, "training takes the training images")
    old.leave("labels are not read for training", "metainfo", "classes", "with_label")
    if title not in _SOURCES:
        where = f"there is no source {title or 'without a type'} here; one's own is made known by custom_imports"
        old.report.lost(old.where, old.key, where)
        old.rest.clear()
        return None
    made: Part = {}
    if folder:
        made["data_prefix"] = node(folder.rstrip("/") or "/", old.where)
    listed = old.take("ann_file", "a string")
    if listed is not None and listed.value:
        made["ann_file"] = node(posixpath.join(root, listed.value), listed.where)
    ours = _SOURCES[title]
    if ours == "ImageList" and "ann_file" not in made:
        ours = "ImageFolder"
    return component(old, "sources", ours, made)


def _groups_0x(train: OldTable) -> list[_Group]:
    """`pipelines` with `num_views`, or one `pipeline`."""
    one = node(1, train.where)
    single = train.take("pipeline", "a list")
    if single is not None:
        last = train.take("format_pipeline", "a list")  # what is done to each patch of Relative-Loc
        steps = tables_in(single, (*train.key, "pipeline"), train.report)
        if last is not None:
            steps += tables_in(last, (*train.key, "format_pipeline"), train.report)
        return [_Group(one, steps)]
    return _paired(train, train.take("num_views"), train.take("pipelines", "a list"), "pipelines")


def _paired(old: OldTable, counts: Node | None, pipelines: Node | None, name: str) -> list[_Group]:
    """Pipelines with a number of views each."""
    if pipelines is None:
        return []
    each = counts.value if counts is not None and isinstance(counts.value, list) else [counts]
    if len(each) != len(pipelines.value):
        text = f"{len(pipelines.value)} pipelines for {len(each)} numbers of views"
        old.report.lost(pipelines.where, (*old.key, name), text)
    groups = []
    for index, (count, pipeline) in enumerate(zip(each, pipelines.value, strict=False)):
        key = (*old.key, name, index)
        groups.append(_Group(count or node(1, old.where), tables_in(pipeline, key, old.report)))
    return groups


def _groups_1x(dataset: OldTable, pipeline: Node) -> tuple[list[_Group], bool]:
    """The pipeline of 1.x: in it a MultiView with pipelines of its own; and whether patches of a grid are made."""
    steps = tables_in(pipeline, (*dataset.key, "pipeline"), dataset.report)
    titles = [step.peek("type") for step in steps]
    is_grid = any(isinstance(title, str) and title.endswith("RandomPatchWithLabels") for title in titles)
    for index, title in enumerate(titles):
        if isinstance(title, str) and title.rpartition(".")[2] == "MultiView":
            view = steps[index]
            view.type()
            groups = _paired(view, view.take("num_views"), view.take("transforms", "a list"), "transforms")
            view.finish("groups of views have nothing like it here")
            before, after = steps[:index], steps[index + 1 :]
            if len(groups) > 1 and any(_is_random(step) for step in before):
                text = "what stands before MultiView is drawn for each group of views here"
                dataset.report.changed(view.where, view.key, text)
            whole = [[*_copies(before), *group.steps, *_copies(after)] for group in groups]
            return [_Group(group.num_views, steps) for group, steps in zip(groups, whole, strict=True)], False
    return [_Group(node(1, pipeline.where), steps)], is_grid


def _copies(steps: list[OldTable]) -> list[OldTable]:
    return [OldTable(step.node, step.key, step.report) for step in steps]


def _is_random(step: OldTable) -> bool:
    title = step.peek("type")
    return isinstance(title, str) and "Random" in title


def _views(
    made: Part,
    groups: list[_Group],
    mean_and_std: Node | None,
    is_grid: bool,
    old: OldTable,
    is_1x: bool = False,
) -> int | None:
    """`[[data.views]]`, and how many views they are in all; None where that is not known."""
    views: list[Node] = []
    total: int | None = 0
    for group in groups:
        steps = [found for step in group.steps if (found := transform(step, is_1x)) is not None]
        if is_grid:
            steps = _grid(steps, old)
        if mean_and_std is not None and not any(_title(step) == "Normalize" for step in steps):
            steps.append(mean_and_std)
        count = node(_PATCHES**2, group.num_views.where) if is_grid else group.num_views
        views.append(node({"num_views": count, "transforms": steps}, group.num_views.where))
        total = total + count.value if isinstance(count.value, int) and total is not None else None
    if views:
        made["views"] = node(views, old.where)
    return total or None


def _grid(steps: list[Node], old: OldTable) -> list[Node]:
    """Relative-Loc: crops and resizes are shared by all nine patches, then come the patches, then shared colors."""
    geometric = [step for step in steps if _title(step) in _GEOMETRIC]
    colors = [step for step in steps if _title(step) not in (*_GEOMETRIC, "Normalize")]
    sizes = [size for step in geometric if isinstance(size := value_at(step.value, "size"), int | list)]
    size = sizes[-1] if sizes else None
    pair = [pixels for pixels in (size if isinstance(size, list) else [size, size]) if isinstance(pixels, int)]
    if len(pair) != 2:
        old.report.lost(old.where, old.key, "the size of the patches follows from the last crop, which is not known")
        return steps
    patch = [pixels // _PATCHES - _JITTER for pixels in pair]
    if any(_title(step) in ("ColorJitter", "GaussianBlur", "RandomAppliedTrans") for step in colors):
        text = "patches are jittered and blurred one by one here, the whole image there"
        old.report.changed(old.where, old.key, text)
    shared = [node({"type": "SharedTrans", "transforms": part}, old.where) for part in (geometric, colors) if part]
    of_cells = node({"type": "RandomGridPatch", "size": patch[0] if patch[0] == patch[1] else patch}, old.where)
    of_cells.value["grid"] = node(_PATCHES, old.where)
    rest = [step for step in steps if _title(step) == "Normalize"]
    return [*shared[: bool(geometric)], of_cells, *shared[bool(geometric) :], *rest]


def _title(step: Node) -> str:
    title: str = value_at(step.value, "type")
    return title


def _mean_and_std(old: OldTable) -> Node | None:
    """Normalize, of a `data_preprocessor` or an `img_norm_cfg`."""
    usual = ("SelfSupDataPreprocessor", "RelativeLocDataPreprocessor", "RotationPredDataPreprocessor")
    old.expect_type("images are normalized here, and no more", *usual)
    for key in ("bgr_to_rgb", "to_rgb"):
        old.expect(key, True, "images are RGB here")
    old.leave("batches are made by the loader", "non_blocking", "pad_size_divisor", "pad_value")
    mean, std = old.get("mean", "a list"), old.get("std", "a list")
    old.finish("Normalize has nothing like it here")
    return normalize(mean, std, old) if mean is not None or std is not None else None
