"""Converts the data of an old config: source, groups of views, batch on one GPU."""

import posixpath
from typing import Any

from sslrun.config.node import Node
from sslrun.importer.masked import is_mask, mask
from sslrun.importer.old import OldTable, node
from sslrun.importer.ours import Part, component, names, value_at
from sslrun.importer.transforms import mean_and_std, transform

_SOURCES = {"DeepClusterImageNet": "ImageNet", "ImageNet21k": "ImageList", "CustomDataset": "ImageList"}
_IN_MEMORY = ("CIFAR10", "CIFAR100")  # sources of fixed files, without a list of images
_DATASETS = (
    "MultiViewDataset", "SingleViewDataset", "DeepClusterDataset", "RelativeLocDataset", "RotationPredDataset",
    "ContrastiveDataset", "BYOLDataset", "NPIDDataset",  # of OpenSelfSup
)  # fmt: skip
_GEOMETRIC = ("RandomResizedCrop", "Resize", "CenterCrop", "RandomCrop", "RandomHorizontalFlip")
_PATCHES = 3  # rows and columns of Relative-Loc's grid
_JITTER = 21  # pixels by which a patch is smaller than its cell

_Group = tuple[Any, list[OldTable]]  # number of views, and the steps of one old pipeline


def images_0x(old: OldTable, top: OldTable) -> Part:
    """Converts `data` of 0.x and OpenSelfSup, whose loader normalizes prefetched batches by `img_norm_cfg`."""
    made = _batches(old, old.first("samples_per_gpu", "imgs_per_gpu", kind="a whole number"), "workers_per_gpu")
    train = old.table("train")
    if not train:
        return made
    title = train.type()
    if title not in _DATASETS:
        train.lost(f"there is no data set {title or 'without a type'} here")
    if source := train.table("data_source"):
        made["source"] = _source(source)
    numbers = mean_and_std(top.table("img_norm_cfg")) if train.get("prefetch", "true or false") else {}
    return made | _views(_groups_0x(train, title), numbers, title == "RelativeLocDataset", train)


def images_1x(old: OldTable, preprocessor: OldTable) -> Part:
    """Converts `train_dataloader` of MMSelfSup 1.x and MMPretrain, and the `data_preprocessor`, which normalizes."""
    made = _batches(old, old.take("batch_size", "a whole number"), "num_workers")
    dataset = old.table("dataset")
    if not dataset:
        return made
    pipeline = dataset.take("pipeline", "a list")
    made["source"] = _source(dataset)
    if pipeline is None:
        return made
    titles = [str(value_at(step, "type")).rpartition(".")[2] for step in pipeline.value]
    groups = _groups_1x(dataset, pipeline, titles)
    return made | _views(groups, mean_and_std(preprocessor), "RandomPatchWithLabels" in titles, dataset)


def _batches(old: OldTable, batch: Node | None, workers: str) -> Part:
    """Converts the keys that all forms have. All keep an incomplete last batch by default."""
    return {"samples_per_gpu": batch, "workers_per_gpu": old.take(workers), "drop_last": old.take("drop_last") or False}


def _source(old: OldTable) -> Node | None:
    """Converts a data source of 0.x, or a data set of 1.x, whose paths are relative to its `data_root`."""
    title = old.type()
    root = old.get("data_root", "a string", "")
    folder = _prefix(old)
    if title == "ImageNet":  # whose splits are folders
        split = old.get("split", "a string", "")
        folder = folder or split
    old.notes.append("sources")
    ours = _SOURCES.get(title, title)
    if ours not in names("sources"):
        old.give_up(f"there is no source {title or 'without a type'} here; custom_imports can add your own")
        return None
    made: Part = {}
    if path := posixpath.join(root, folder):
        made["data_prefix"] = path.rstrip("/") or "/"
    if title in _IN_MEMORY:
        old.leave("its files have fixed names, and it reads no list of images", "ann_file", "list_file")
    listed = old.first("ann_file", "list_file", kind="a string")
    if listed is not None and listed.value:
        made["ann_file"] = posixpath.join(root, listed.value)
    return component(old, "sources", "ImageFolder" if ours == "ImageList" and "ann_file" not in made else ours, made)


def _prefix(old: OldTable) -> str:
    """The folder of the images, which is a path, or a path in a table of several."""
    if isinstance(old.peek("data_prefix"), dict):
        folder = old.table("data_prefix").first("img_path", "img", "img_prefix", kind="a string")
    else:
        folder = old.first("data_prefix", "root", kind="a string")
    return folder.value if folder is not None else ""


def _groups_0x(train: OldTable, title: str) -> list[_Group]:
    """Reads `pipelines` with `num_views`, or one `pipeline`, or `pipeline1` and `pipeline2` of OpenSelfSup."""
    if title == "BYOLDataset":
        return [(1, train.tables(name)) for name in ("pipeline1", "pipeline2") if name in train]
    if "pipeline" in train:  # format_pipeline is what is done to each patch of Relative-Loc
        steps = [*train.tables("pipeline"), *train.tables("format_pipeline")]
        return [(2 if title == "ContrastiveDataset" else 1, steps)]
    return _paired(train, "pipelines")


def _paired(old: OldTable, name: str) -> list[_Group]:
    """Pairs pipelines with their numbers of views."""
    counts, pipelines = old.take("num_views"), old.take(name, "a list")
    if pipelines is None:
        return []
    each = counts.value if counts is not None and isinstance(counts.value, list) else [counts]
    if len(each) != len(pipelines.value):
        old.lost(f"{len(pipelines.value)} pipelines for {len(each)} numbers of views", name)
    pairs = enumerate(zip(each, pipelines.value, strict=False))
    return [(count or 1, old.tables_in(steps, name, index)) for index, (count, steps) in pairs]


def _groups_1x(dataset: OldTable, pipeline: Node, titles: list[str]) -> list[_Group]:
    """Reads a pipeline of 1.x, which may hold a MultiView: each of its groups stands between the other steps."""
    if "MultiView" not in titles:
        return [(1, dataset.tables_in(pipeline, "pipeline"))]
    index = titles.index("MultiView")
    (view,) = dataset.tables_in(pipeline, "pipeline", of=slice(index, index + 1))
    view.type()
    groups = _paired(view, "transforms")
    if len(groups) > 1 and any("Random" in title for title in titles[:index]):
        view.changed("what stands before MultiView is drawn for each group of views here")
    before, after = slice(index), slice(index + 1, None)

    def steps(of: slice) -> list[OldTable]:
        return dataset.tables_in(pipeline, "pipeline", of=of)

    return [(count, [*steps(before), *own, *steps(after)]) for count, own in groups]


def _views(groups: list[_Group], numbers: Part, is_grid: bool, old: OldTable) -> Part:
    """Converts groups of views; where no step of a pipeline normalizes, the `numbers` of what stands beside it do."""
    views = []
    for count, steps in groups:
        makers = [step for step in steps if is_mask(str(step.peek("type")).rpartition(".")[2])]
        made = [found for step in steps if step not in makers and (found := transform(step)) is not None]
        if is_grid:
            count, made = _PATCHES**2, _grid(made, old)
        if numbers and not any(value_at(step, "type") == "Normalize" for step in made):
            made.append(node({"type": "Normalize", **numbers}, old.where))
        sizes = [size for step in made if isinstance(size := value_at(step, "size"), int)]
        masks = [found for maker in makers if (found := mask(maker, sizes[-1] if sizes else None)) is not None]
        views.append({"num_views": count, **({"mask": masks[0]} if masks else {}), "transforms": made})
    return {"views": views or None}


def _grid(steps: list[Node], old: OldTable) -> list[Node]:
    """Relative-Loc: crops and resizes are shared by all nine patches, then come the patches, then shared colors."""
    titles = [value_at(step, "type") for step in steps]
    pairs = list(zip(titles, steps, strict=True))
    geometric = [step for title, step in pairs if title in _GEOMETRIC]
    colors = [step for title, step in pairs if title not in (*_GEOMETRIC, "Normalize")]
    sizes = [size for step in geometric if (size := value_at(step, "size")) is not None]
    if not sizes or not isinstance(sizes[-1], int):
        old.lost("the size of the patches follows from the last crop, whose size is not one number")
        return steps
    if not {"ColorJitter", "GaussianBlur", "RandomAppliedTrans"}.isdisjoint(titles):
        old.changed("patches are jittered and blurred one by one here, the whole image there")
    patch = {"type": "RandomGridPatch", "size": sizes[-1] // _PATCHES - _JITTER, "grid": _PATCHES}
    shared = [{"type": "SharedTrans", "transforms": part} for part in (geometric, colors)]
    made = [shared[0], patch, *(shared[1:] if colors else ())]
    return [*(node(step, old.where) for step in made), *(step for title, step in pairs if title == "Normalize")]
