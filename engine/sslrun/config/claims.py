"""Whether a recipe or a benchmark does what its name says.

A rule speaks only where name and recipe contradict each other: a component of one's own, or one whose word the
convention does not know, may be called anything.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sslrun.config.check import TAGS
from sslrun.config.load import Config
from sslrun.config.naming import DATASETS, SCHEDULES, BenchmarkName, Name, method_of
from sslrun.config.node import as_key, lookup, plain, walk
from sslrun.config.schema_reader import at, classes, committed_schema, kinds

CROPS = ("CenterCrop", "RandomCrop", "RandomResizedCrop")  # after them every image has their `size`

# How the module part begins for a backbone that ships, its groups named by the keys that they speak of; an example.
BACKBONES = {
    "ResNet": (re.compile(r"(?:wide-)?res(?:net|next)(?P<depth>\d+).*"), "resnet50"),
    "VisionTransformer": (re.compile(r"vit(?:-(?P<arch>[a-z]+))?(?:-p(?P<patch_size>\d+))?(?:-.*)?"), "vit-small-p16"),
}


class Claim(NamedTuple):
    """Something that a name says and that is not so, with the key that says otherwise."""

    key: str
    message: str


class View(NamedTuple):
    """A group of views: how many, and their height and width in pixels; None where that is not known."""

    num_views: int
    size: int | None


def contradictions(name: Name, config: Config) -> Iterator[Claim]:
    """Every claim of a name that its recipe does not keep."""
    yield from _algorithm(name, config)
    yield from _backbone(name, config)
    yield from _batch(name, config)
    yield from _views(name, _views_of(config))
    yield from _schedule(name, config)
    yield from _dataset(name.dataset, config, "data.source")
    if name.is_mixed_precision and _setting(config, "engine.precision") == "fp32":
        yield Claim("engine.precision", "the name says mixed precision, engine.precision is fp32")


def benchmark_contradictions(name: BenchmarkName, config: Config) -> Iterator[Claim]:
    """Every claim of a benchmark's name that its `[eval]` does not keep."""
    table = f"eval.{name.evaluation}"
    if lookup(config.root, as_key(table)) is None:
        yield Claim("eval", f"the name says {name.evaluation}, and {table} is not set")
        return
    batch, product = _setting(config, f"{table}.global_batch"), name.gpus * name.samples_per_gpu
    if batch != product:
        said = f"{name.gpus} GPUs x {name.samples_per_gpu} samples = {product}"
        yield Claim(f"{table}.global_batch", f"the name says {said}, {table}.global_batch is {batch}")
    yield from _policy(name.schedule, config, f"{table}.lr.policy")
    epochs = _setting(config, f"{table}.epochs")
    if epochs != name.epochs:
        yield Claim(f"{table}.epochs", f"the name says {name.epochs} epochs, {table}.epochs is {epochs}")
    for key in ("eval.train", "eval.test"):
        yield from _dataset(name.dataset, config, key)
    for key in ("eval.transforms", f"{table}.transforms"):
        transforms = _setting(config, key)
        yield from _sizes(name, [_size(transforms)] if transforms else [], key)


def methods() -> list[str]:
    """The methods that ship."""
    return list(classes(kinds(committed_schema())["methods"]))


def _algorithm(name: Name, config: Config) -> Iterator[Claim]:
    method = _setting(config, "model.type")
    if method not in methods():
        return
    found = method_of(name.algorithm, methods())
    if found is None or found[0] != method:
        said = f"stands for {found[0]}" if found else "is no method that ships"
        yield Claim("model.type", f"{name.algorithm} in the name {said}, model.type is {method}")
        return
    switch = f"model.{'_'.join(found[1])}"
    if found[1] and _setting(config, switch) is False:
        yield Claim(switch, f"the name says {'-'.join(found[1])}, {switch} is false")
    others = [union for kind, union in kinds(committed_schema()).items() if kind != "methods"]
    by_word = {component.lower(): component for union in others for component in classes(union)}
    used = [node.value for key, node in walk(config.root) if key and key[-1] in TAGS]
    for word in found[1]:
        if word in by_word and by_word[word] not in used:
            yield Claim("model", f"the name says {word}, and nothing in the recipe is a {by_word[word]}")


def _backbone(name: Name, config: Config) -> Iterator[Claim]:
    key = "model.backbone"
    while lookup(config.root, as_key(f"{key}.backbone")) is not None:  # a filter in front of the network
        key += ".backbone"
    kind = _setting(config, f"{key}.type")
    if kind not in BACKBONES:
        return
    form, example = BACKBONES[kind]
    match = form.fullmatch(name.module)
    if match is None:
        yield Claim(f"{key}.type", f"{name.module} in the name does not begin like {example}, and {key} is a {kind}")
        return
    for part, said in match.groupdict().items():
        here = _setting(config, f"{key}.{part}")
        if said is not None and said != str(here):
            yield Claim(f"{key}.{part}", f"{name.module} in the name says {part} {said}, {key}.{part} is {here}")


def _batch(name: Name, config: Config) -> Iterator[Claim]:
    samples, batch = _setting(config, "data.samples_per_gpu"), _setting(config, "global_batch")
    if samples != name.samples_per_gpu:
        said = f"{name.gpus}xb{name.samples_per_gpu} in the name says {name.samples_per_gpu} samples per GPU"
        yield Claim("data.samples_per_gpu", f"{said}, data.samples_per_gpu is {samples}")
    accumulation = f" x {name.accumulation} accumulated" if name.accumulation > 1 else ""
    product = name.gpus * name.samples_per_gpu * name.accumulation
    if batch != product:
        said = f"{name.gpus} GPUs x {name.samples_per_gpu} samples{accumulation} = {product}"
        yield Claim("global_batch", f"the name says {said}, global_batch is {batch}")


def _views(name: Name, views: list[View]) -> Iterator[Claim]:
    counts = [view.num_views for view in views]
    sizes = list(dict.fromkeys(view.size for view in views))
    by_size = [sum(view.num_views for view in views if view.size == size) for size in sizes]
    if name.crops and list(name.crops) not in (counts, by_size):
        yield Claim("data.views", f"the name says {_mcrop(name.crops)}, the views are {_mcrop(counts)}")
    if not name.crops and len(sizes) > 1 and None not in sizes:
        yield Claim("data.views", f"views of {_listed(sizes)} px: the name does not say {_mcrop(by_size)}")
    yield from _sizes(name, sizes, "data.views")


def _sizes(name: Name | BenchmarkName, sizes: list[int | None], key: str) -> Iterator[Claim]:
    """Whether images at a key have the sizes that a name says, where they are known."""
    if None in sizes or not sizes:
        return
    usual = DATASETS.get(name.dataset)
    said = list(dict.fromkeys(name.sizes)) or ([usual.size] if usual else sizes)
    if said != sizes:
        how = "says" if name.sizes else f"says {name.dataset} without a size, which means"
        what = "the views" if key == "data.views" else f"the images of {key}"
        yield Claim(key, f"the name {how} {_listed(said)} px, {what} have {_listed(sizes)} px")


def _views_of(config: Config) -> list[View]:
    return [
        View(_setting(config, f"data.views.{place}.num_views"), _size(view.get("transforms", [])))
        for place, view in enumerate(_setting(config, "data.views"))
    ]


def _size(transforms: list[dict[str, Any]]) -> int | None:
    """Height and width of a view, where its last transform that has a size leaves squares of that size."""
    size = None
    for transform in _flat(transforms):
        if "size" in transform:
            sides = set(transform["size"]) if isinstance(transform["size"], list) else {transform["size"]}
            size = sides.pop() if len(sides) == 1 and transform.get("type") in CROPS else None
    return size


def _flat(transforms: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Transforms in the order in which they are applied; those that hold others give way to them."""
    for transform in transforms:
        yield from _flat(transform["transforms"]) if "transforms" in transform else [transform]


def _schedule(name: Name, config: Config) -> Iterator[Claim]:
    yield from _policy(name.schedule, config, "lr.policy")
    said = {"epochs": name.epochs, "max_iters": name.max_iters}
    here = {key: _setting(config, key) for key in said}
    if here != said:
        yield Claim(
            "max_iters" if here["epochs"] is None else "epochs", f"the name says {_length(said)}, not {_length(here)}"
        )


def _policy(word: str, config: Config, key: str) -> Iterator[Claim]:
    policy = _setting(config, key)
    words = {known: word for word, known in SCHEDULES.items()}
    if policy in words and words[policy] != word:
        yield Claim(key, f"the name says {word}, {key} is {policy} ({words[policy]})")


def _dataset(word: str, config: Config, key: str) -> Iterator[Claim]:
    source = _setting(config, f"{key}.type")
    words = {dataset.source: word for word, dataset in DATASETS.items()}
    if source in words and words[source] != word:
        yield Claim(f"{key}.type", f"the name says {word}, {key} is {source} ({words[source]})")
    elif source == "Shapes" and word in DATASETS:
        yield Claim(f"{key}.type", f"the name says {word}, {key} draws {source}")


def _setting(config: Config, key: str) -> Any:
    """The value of a key, else the default of the code, else None."""
    parts = as_key(key)
    node = lookup(config.root, parts)
    return at(committed_schema(), config.root, parts).get("default") if node is None else plain(node)


def _length(keys: dict[str, int | None]) -> str:
    return " and ".join(f"{key} = {value}" for key, value in keys.items() if value is not None) or "no length"


def _mcrop(counts: Sequence[int]) -> str:
    return "-".join(["mcrop", *map(str, counts)])


def _listed(sizes: Sequence[int | None]) -> str:
    return " and ".join(map(str, sizes))
