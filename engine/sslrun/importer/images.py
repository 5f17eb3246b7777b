"""Converts the data of an old config: source, groups of views, batch on one GPU."""

import posixpath
from typing import NamedTuple

from sslrun.config.node import Node
from sslrun.importer.old import OldTable, node
from sslrun.importer.ours import Part, component, present, value_at
from sslrun.importer.transforms import normalize, transform

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
_IN_MEMORY = ("CIFAR10", "CIFAR100")  # sources of fixed files, without a list of images
_DATASETS = (
    "MultiViewDataset", "SingleViewDataset", "DeepClusterDataset", "RelativeLocDataset", "RotationPredDataset",
    "ContrastiveDataset", "BYOLDataset", "NPIDDataset",  # of OpenSelfSup
)  # fmt: skip
_GEOMETRIC = ("RandomResizedCrop", "Resize", "CenterCrop", "RandomCrop", "RandomHorizontalFlip")
_PATCHES = 3  # rows and columns of Relative-Loc's grid
_JITTER = 21  # pixels by which a patch is smaller than its cell


class Images(NamedTuple):
    """The table `[data]`, and the facts that other tables depend on.

    Attributes:
        part: the table.
        samples_per_gpu: batch on one GPU, where it is stated.
        num_views: views of each image in all groups, where that is known.
    """

    part: Part
    samples_per_gpu: int | None
    num_views: int | None


class _Group(NamedTuple):
    """The steps of one old pipeline, and the number of views that it makes."""

    num_views: Node
    steps: list[OldTable]


def images_0x(old: OldTable, top: OldTable) -> Images:
    """Converts `data` of 0.x and OpenSelfSup, whose loader normalizes prefetched batches by `img_norm_cfg`."""
    made: Part = {}
    batch = old.first("samples_per_gpu", "imgs_per_gpu", kind="a whole number")
    made |= _batches(old, batch, "workers_per_gpu")
    num_views = None
    if train := old.table("train"):
        title = train.type()
        if title not in _DATASETS:
            train.lost(f"there is no data set {title or 'without a type'} here")
        is_prefetched = bool(train.get("prefetch", "true or false", False))
        found = train.table("data_source")
        made |= _source(found) if found else {}
        groups = _groups_0x(train, title)
        mean_and_std = _mean_and_std(top.table("img_norm_cfg")) if is_prefetched else None
        num_views = _views(made, groups, mean_and_std, title == "RelativeLocDataset", train)
    return Images(made, batch.value if batch is not None else None, num_views)


def images_1x(old: OldTable, preprocessor: OldTable) -> Images:
    """Converts `train_dataloader` of MMSelfSup 1.x and MMPretrain, and the `data_preprocessor`, which normalizes."""
    batch = old.take("batch_size", "a whole number")
    made = _batches(old, batch, "num_workers")
    num_views = None
    if dataset := old.table("dataset"):
        pipeline = dataset.take("pipeline", "a list")
        made |= _source(dataset)
        if pipeline is not None:
            groups, is_grid = _groups_1x(dataset, pipeline)
            num_views = _views(made, groups, _mean_and_std(preprocessor), is_grid, dataset)
    return Images(made, batch.value if batch is not None else None, num_views)


def _batches(old: OldTable, batch: Node | None, workers: str) -> Part:
    """Converts the keys that all forms have. All keep an incomplete last batch by default."""
    return (
        present(samples_per_gpu=batch)
        | old.renamed(workers_per_gpu=workers)
        | {"drop_last": old.take("drop_last") or node(False, old.where)}
    )


def _source(old: OldTable) -> Part:
    """Converts a data source of 0.x, or a data set of 1.x, whose paths are relative to its `data_root`."""
    title = old.type()
    root = old.get("data_root", "a string", "")
    folder = _prefix(old)
    if title == "ImageNet":  # whose splits are folders
        folder = folder or old.get("split", "a string", "")
        old.take("split")
    old.notes.append("sources")
    if title not in _SOURCES:
        old.give_up(f"there is no source {title or 'without a type'} here; one's own is made known by custom_imports")
        return {}
    made: Part = {}
    path = posixpath.join(root, folder)
    if path:
        made["data_prefix"] = node(path.rstrip("/") or "/", old.where)
    if title in _IN_MEMORY:
        for key in ("ann_file", "list_file"):
            old.leave("its files have fixed names, and it reads no list of images", key)
    listed = old.first("ann_file", "list_file", kind="a string")
    if listed is not None and listed.value:
        made["ann_file"] = node(posixpath.join(root, listed.value), listed.where)
    ours = _SOURCES[title]
    ours = "ImageFolder" if ours == "ImageList" and "ann_file" not in made else ours
    return {"source": component(old, "sources", ours, made)}


def _prefix(old: OldTable) -> str:
    """The folder of the images, which is a path, or a path in a table of several."""
    if isinstance(old.peek("data_prefix"), dict):
        folder = old.table("data_prefix").first("img_path", "img", "img_prefix", kind="a string")
    else:
        folder = old.first("data_prefix", "root", kind="a string")
    return folder.value if folder is not None else ""


def _groups_0x(train: OldTable, title: str) -> list[_Group]:
    """Reads `pipelines` with `num_views`, or one `pipeline`, or `pipeline1` and `pipeline2` of OpenSelfSup."""
    one = node(1, train.where)
    pair = [train.take(name, "a list") for name in ("pipeline1", "pipeline2")]
    if title == "BYOLDataset":
        names = ("pipeline1", "pipeline2")
        both = zip(names, pair, strict=True)
        return [_Group(one, train.tables_in(steps, name)) for name, steps in both if steps is not None]
    single = train.take("pipeline", "a list")
    if single is not None:
        last = train.take("format_pipeline", "a list")  # what is done to each patch of Relative-Loc
        steps = train.tables_in(single, "pipeline")
        steps += train.tables_in(last, "format_pipeline") if last is not None else []
        return [_Group(node(2, train.where) if title == "ContrastiveDataset" else one, steps)]
    return _paired(train, train.take("num_views"), train.take("pipelines", "a list"), "pipelines")


def _paired(old: OldTable, counts: Node | None, pipelines: Node | None, name: str) -> list[_Group]:
    """Pairs pipelines with their numbers of views."""
    if pipelines is None:
        return []
    each = counts.value if counts is not None and isinstance(counts.value, list) else [counts]
    if len(each) != len(pipelines.value):
        old.lost(f"{len(pipelines.value)} pipelines for {len(each)} numbers of views", name, at=pipelines)
    pairs = enumerate(zip(each, pipelines.value, strict=False))
    return [_Group(count or node(1, old.where), old.tables_in(steps, name, index)) for index, (count, steps) in pairs]


def _groups_1x(dataset: OldTable, pipeline: Node) -> tuple[list[_Group], bool]:
    """Reads a pipeline of 1.x, which may hold a MultiView; also returns whether it makes the patches of a grid."""
    steps = dataset.tables_in(pipeline, "pipeline")
    titles = [str(step.peek("type")).rpartition(".")[2] for step in steps]
    if "MultiView" not in titles:
        return [_Group(node(1, pipeline.where), steps)], "RandomPatchWithLabels" in titles
    index = titles.index("MultiView")
    view = steps[index]
    view.type()
    groups = _paired(view, view.take("num_views"), view.take("transforms", "a list"), "transforms")
    if len(groups) > 1 and any("Random" in title for title in titles[:index]):
        view.changed("what stands before MultiView is drawn for each group of views here")
    whole = []
    for group in groups:
        before, after = ([step.again() for step in part] for part in (steps[:index], steps[index + 1 :]))
        whole.append(_Group(group.num_views, [*before, *group.steps, *after]))
    for step in [*steps[:index], *steps[index + 1 :]]:
        step.rest.clear()  # its copies are converted
    return whole, False


def _views(made: Part, groups: list[_Group], mean_and_std: Node | None, is_grid: bool, old: OldTable) -> int | None:
    """Adds `[[data.views]]`, and returns how many views they are in all; None where that is not known."""
    views: list[Node] = []
    total: int | None = 0
    for group in groups:
        steps = [found for step in group.steps if (found := transform(step)) is not None]
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
    sizes = [size for step in geometric if isinstance(size := value_at(step, "size"), int | list)]
    size = sizes[-1] if sizes else None
    pair = [pixels for pixels in (size if isinstance(size, list) else [size, size]) if isinstance(pixels, int)]
    if len(pair) != 2:
        old.lost("the size of the patches follows from the last crop, which is not known")
        return steps
    patch = [pixels // _PATCHES - _JITTER for pixels in pair]
    if any(_title(step) in ("ColorJitter", "GaussianBlur", "RandomAppliedTrans") for step in colors):
        old.changed("patches are jittered and blurred one by one here, the whole image there")
    shared = [node({"type": "SharedTrans", "transforms": part}, old.where) for part in (geometric, colors) if part]
    size = patch[0] if patch[0] == patch[1] else patch
    of_cells = node({"type": "RandomGridPatch", "size": size, "grid": _PATCHES}, old.where)
    rest = [step for step in steps if _title(step) == "Normalize"]
    return [*shared[: bool(geometric)], of_cells, *shared[bool(geometric) :], *rest]


def _title(step: Node) -> str:
    title: str = value_at(step, "type")
    return title


def _mean_and_std(old: OldTable) -> Node | None:
    """Converts a `data_preprocessor` or an `img_norm_cfg` to Normalize."""
    mean, std = old.get("mean", "a list"), old.get("std", "a list")
    return normalize(mean, std, old) if mean is not None or std is not None else None
