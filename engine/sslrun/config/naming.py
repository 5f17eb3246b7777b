"""The naming convention: what `mocov2_resnet50_8xb32-coslr-200e_in1k` says, and whether the recipe agrees.

A mismatch is reported only where name and recipe contradict each other: a component of the user's own, or one for which
the convention has no word, may have any name. naming_convention.txt has the grammar.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from itertools import combinations, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from sslrun.config.check import TAGS
from sslrun.config.dump import inline
from sslrun.config.load import Config
from sslrun.config.node import as_key, lookup, plain, walk
from sslrun.config.schema_reader import at, classes, committed_schema, kinds
from sslrun.started import program

CONVENTION_PATH = Path(__file__).with_name("naming_convention.txt")
RECIPE = "{algorithm}_{module}_{training}_{data}"
BENCHMARK = "{evaluation}_{training}_{data}"

# Word of a schedule -> policy.
SCHEDULES = {
    "constlr": "Constant",
    "coslr": "CosineAnnealing",
    "cosrestartlr": "CosineRestart",
    "cycliclr": "Cyclic",
    "explr": "Exp",
    "flatcoslr": "FlatCosineAnnealing",
    "invlr": "Inv",
    "onecyclelr": "OneCycle",
    "polylr": "Poly",
    "steplr": "Step",
}
# Word of a data set -> its source.
DATASETS = {
    "in1k": "ImageNet",
    "in100": "ImageNet100",
    "inat18": "INaturalist2018",
    "places205": "Places205",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "stl10": "STL10",
}
# Input size in pixels of a data set whose name gives none, if it is not USUAL_SIZE.
SIZES, USUAL_SIZE = {"cifar10": 32, "cifar100": 32, "stl10": 96}, 224

# Backbone -> the form of its module part, whose groups are named by keys of the backbone; an example.
BACKBONES = {
    "ResNet": (re.compile(r"(?:wide-)?res(?:net|next)(?P<depth>\d+).*"), "resnet50"),
    "VisionTransformer": (re.compile(r"vit(?:-(?P<arch>[a-z]+))?(?:-p(?P<patch_size>\d+))?(?:-.*)?"), "vit-small-p16"),
}
# How a word of the module part begins -> keys of the backbone, each with the values that contradict the word.
MODULE_WORDS: dict[str, dict[str, Collection[Any]]] = {
    "nofrz": {"frozen_stages": range(5), "frozen_patch_embed": [True]},
    "wide": {"width_per_group": range(65), "base_width": range(65)},
    "resnext": {"groups": [1]},
}
CROPS = ("CenterCrop", "RandomCrop", "RandomResizedCrop")  # after one of these every image has its `size`
PRECISIONS = {"amp", "bf16", "fp16"}

_TRAINING = re.compile(r"(\d{1,9})xb(\d{1,9})((?:-[a-z0-9]+)*)-([a-z]+lr)-(\d{1,9})(e|k|iters)")
_TRAINING_RULES = {
    r"\d{1,9}xb\d{1,9}(-.*)?": "does not begin with GPUs x batch per GPU, such as 8xb32",
    r".*-\d{1,9}(e|k|iters)": "does not end with a length, such as 200e, 100k or 500iters",
    r".*-[a-z]+lr-[^-]+": "has no schedule, such as coslr, before its length",
}

# The key that a name says something about, what it says, whether the file agrees, and what the file does.
Claim = tuple[str, str, bool, str]


class Name(NamedTuple):
    """The name of a recipe or a benchmark, taken apart.

    Attributes:
        algorithm: the method and its variant, "npid-ensure-neg"; of a benchmark, the kind of evaluation: "linear-vit".
        module: the backbone and its variant, "resnet50", "vit-small-p16"; empty for a benchmark.
        gpus: number of GPUs that the batch was chosen for.
        samples_per_gpu: batch on one GPU.
        accumulation: backward passes per optimizer step.
        crops: number of views of each group of multi-crop; empty without multi-crop.
        is_mixed_precision: whether the name says so.
        schedule: word of the learning-rate schedule: "coslr".
        epochs: length in epochs; None if it is given in optimizer steps.
        max_iters: length in optimizer steps; None if it is given in epochs.
        dataset: word of the data set: "in1k".
        sizes: input sizes in pixels as written, one for each size of views; empty for the data set's usual size.
    """

    algorithm: str
    module: str
    gpus: int
    samples_per_gpu: int
    accumulation: int
    crops: tuple[int, ...]
    is_mixed_precision: bool
    schedule: str
    epochs: int | None
    max_iters: int | None
    dataset: str
    sizes: tuple[int, ...]


def parse(name: str, form: str = RECIPE) -> Name:
    """Takes a name (without `.toml`) apart. Raises ValueError: one line that says which part is wrong and how."""
    parts, count = name.split("_"), form.count("{")
    if len(parts) != count:
        given = f"{len(parts)} part{'s' if len(parts) > 1 else ''}"
        expected = {3: "three", 4: "four"}[count]
        raise ValueError(f"{given} joined by '_', not the {expected} of {form}; words within a part are joined by '-'")
    for part in parts:
        for word in part.split("-"):
            if not re.fullmatch(r"[a-z0-9]+", word):
                raise ValueError(f"{word!r} in the part {part!r} is no word of lower-case letters and digits")
    algorithm, *module, training, data = parts
    for pattern, complaint in _TRAINING_RULES.items():
        if not re.fullmatch(pattern, training):
            raise ValueError(f"the training part {training!r} {complaint}")
    match = _TRAINING.fullmatch(training)
    assert match is not None  # the rules hold
    gpus, samples, middle, schedule, length, unit = match.groups()
    words = middle.split("-")
    crops = [*takewhile(str.isdecimal, words[words.index("mcrop") + 1 :])] if "mcrop" in words else []
    if "mcrop" in words and not crops:
        raise ValueError(f"mcrop in {training!r} is not followed by the views of each group, as in mcrop-2-6")
    accumulations = [word.removeprefix("accum") for word in words if re.fullmatch(r"accum\d{1,9}", word)]
    if len(accumulations) > 1:
        raise ValueError(f"the training part {training!r} says accum more than once")
    dataset, *after = data.split("-")
    steps = int(length) * (1000 if unit == "k" else 1)
    return Name(
        algorithm=algorithm,
        module=module[0] if module else "",
        gpus=int(gpus),
        samples_per_gpu=int(samples),
        accumulation=int(accumulations[0]) if accumulations else 1,
        crops=tuple(map(int, crops)),
        is_mixed_precision=not PRECISIONS.isdisjoint(words),
        schedule=schedule,
        epochs=int(length) if unit == "e" else None,
        max_iters=None if unit == "e" else steps,
        dataset=dataset,
        sizes=tuple(int(word.removesuffix("px")) for word in after if re.fullmatch(r"\d{1,9}(px)?", word)),
    )


def method_of(algorithm: str, methods: Collection[str]) -> tuple[str, tuple[str, ...]] | None:
    """The class that an algorithm part names and the words left over; None where it names none of them.

    The longest match wins. Dashes and capitals do not count, and a version without a class of its own is ignored:
    `relative-loc` is RelativeLoc, `mocov3` MoCoV3, `mocov2` MoCo, `npid-ensure-neg` NPID with two words left over.
    """
    by_word = {method.lower(): method for method in methods}
    words = algorithm.split("-")
    for end in range(len(words), 0, -1):
        joined = "".join(words[:end])
        method = by_word.get(joined) or by_word.get(re.sub(r"v\d+$", "", joined))
        if method is not None:
            return method, tuple(words[end:])
    return None


def methods() -> list[str]:
    """The methods that ship."""
    return list(classes(kinds(committed_schema())["methods"]))


def mismatches(stem: str, form: str, config: Config) -> Iterator[tuple[str, str]]:
    """What a recipe, or a benchmark's `[eval]`, does not do although its name says so: the key, and both in words.

    The key is empty if the name is none of the convention.
    """
    try:
        name = parse(stem, form)
    except ValueError as error:
        yield "", f"the name does not follow the convention: {error} (see `{program()} config lint convention`)"
        return
    for key, says, agrees, does in _recipe(name, config) if form == RECIPE else _benchmark(name, config):
        if not agrees:
            yield key, f"the name says {says}, {does}"


def _recipe(name: Name, config: Config) -> Iterator[Claim]:
    yield from _algorithm(name, config)
    yield from _backbone(name, config)
    yield from _training(name, config, "", "data.samples_per_gpu")
    yield from _views(name, config)
    yield from _source(name, config, "data.source")
    precision = _setting(config, "engine.precision")
    is_possible = not name.is_mixed_precision or precision != "fp32"
    yield "engine.precision", "mixed precision", is_possible, f"engine.precision is {precision}"


def _benchmark(name: Name, config: Config) -> Iterator[Claim]:
    kind = name.algorithm.partition("-")[0]
    table = f"eval.{kind}"
    if lookup(config.root, as_key(table)) is None:
        yield "eval", kind, False, f"and {table} is not set"
        return
    yield from _training(name, config, f"{table}.", f"{table}.samples_per_gpu")
    yield from _source(name, config, "eval.train")
    yield from _source(name, config, "eval.test")
    yield "eval", _mcrop(name.crops), not name.crops, "and evaluation takes one view of an image"
    for key in ("eval.transforms", f"{table}.transforms"):
        if transforms := _setting(config, key):
            yield _sizes(name, [_size(transforms)], key, f"the images of {key}")


def _algorithm(name: Name, config: Config) -> Iterator[Claim]:
    method, named = _setting(config, "model.type"), method_of(name.algorithm, methods())
    if method not in methods():
        return
    if named is None or named[0] != method:
        what = f"stands for {named[0]}" if named else "is no method that ships"
        yield "model.type", name.algorithm, False, f"which {what}, and model.type is {method}"
        return
    words = named[1]
    for begin, end in combinations(range(len(words) + 1), 2):
        switch = f"model.{'_'.join(words[begin:end])}"
        yield switch, "-".join(words[begin:end]), _setting(config, switch) is not False, f"{switch} is false"
    others = [union for kind, union in kinds(committed_schema()).items() if kind != "methods"]
    by_word = {component.lower(): component for union in others for component in classes(union)}
    used = [None, *(node.value for key, node in walk(config.root) if key and key[-1] in TAGS)]
    for word in words:
        component = by_word.get(word)
        yield "model", word, component in used, f"and nothing in the recipe is a {component}"


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
        yield f"{key}.type", name.module, False, f"{key} is a {kind}, whose names begin like {example}"
        return
    for part, written in match.groupdict().items():
        value = _setting(config, f"{key}.{part}")
        yield f"{key}.{part}", name.module, written in (None, str(value)), f"{key}.{part} is {value}"
    for word, contradicting in MODULE_WORDS.items():
        values = {part: value for part in contradicting if (value := _setting(config, f"{key}.{part}")) is not None}
        if values and re.search(rf"\b{word}", name.module):
            agrees = any(value not in contradicting[part] for part, value in values.items())
            does = " and ".join(f"{key}.{part} is {inline(value)}" for part, value in values.items())
            yield f"{key}.{next(iter(values))}", word, agrees, does


def _training(name: Name, config: Config, table: str, samples_key: str) -> Iterator[Claim]:
    """Batch, schedule and length; `table` is the beginning of their keys."""
    samples, batch = _setting(config, samples_key), _setting(config, f"{table}global_batch")
    agrees = samples in (None, name.samples_per_gpu)
    yield samples_key, f"{name.gpus}xb{name.samples_per_gpu}", agrees, f"{samples_key} is {samples}"
    accumulated = f" x {name.accumulation} accumulated" if name.accumulation > 1 else ""
    product = name.gpus * name.samples_per_gpu * name.accumulation
    says = f"{name.gpus} GPUs x {name.samples_per_gpu} samples{accumulated} = {product}"
    yield f"{table}global_batch", says, batch == product, f"{table}global_batch is {batch}"
    yield _word(name.schedule, SCHEDULES, _setting(config, f"{table}lr.policy"), f"{table}lr.policy")
    epochs, max_iters = _setting(config, f"{table}epochs"), _setting(config, f"{table}max_iters")
    says = f"{name.epochs} epochs" if name.max_iters is None else f"{name.max_iters:,} steps"
    key, length = (f"{table}epochs", epochs) if max_iters is None else (f"{table}max_iters", max_iters)
    does = "and no length is set" if length is None else f"{key} is {length}"
    yield key, says, (epochs, max_iters) == (name.epochs, name.max_iters), does


def _source(name: Name, config: Config, key: str) -> Iterator[Claim]:
    source = _setting(config, f"{key}.type")
    yield _word(name.dataset, DATASETS, source, f"{key}.type")
    yield f"{key}.type", name.dataset, source != "Shapes" or name.dataset not in DATASETS, f"{key} draws {source}"


def _word(says: str, words: dict[str, str], component: Any, key: str) -> Claim:
    """That the class that a key names has this word, if it has one."""
    word = next((word for word, known in words.items() if known == component), says)
    return key, says, word == says, f"{key.removesuffix('.type')} is {component} ({word})"


def _views(name: Name, config: Config) -> Iterator[Claim]:
    groups = _setting(config, "data.views")
    counts = [_setting(config, f"data.views.{place}.num_views") for place in range(len(groups))]
    sizes = [_size(group.get("transforms", [])) for group in groups]
    by_size = {size: sum(n for n, other in zip(counts, sizes, strict=True) if other == size) for size in sizes}
    is_one_size = not name.crops and (len(by_size) < 2 or None in by_size)
    agrees = is_one_size or list(name.crops) in (counts, [*by_size.values()])
    says = _mcrop(name.crops) if name.crops else "no mcrop"
    yield "data.views", says, agrees, f"the views are {_mcrop(counts)} of {_listed([*by_size])} px"
    yield _sizes(name, [*by_size], "data.views", "the views")


def _sizes(name: Name, sizes: list[int | None], key: str, images: str) -> Claim:
    """That images have the sizes that the name says, if all their sizes are known."""
    usual = [SIZES.get(name.dataset, USUAL_SIZE)] if name.dataset in DATASETS else sizes
    expected = list(dict.fromkeys(name.sizes)) or usual
    says = f"{'' if name.sizes else f'{name.dataset} without a size, which means '}{_listed(expected)} px"
    return key, says, None in sizes or not sizes or expected == sizes, f"{images} have {_listed(sizes)} px"


def _size(transforms: list[dict[str, Any]]) -> int | None:
    """Height and width of a view in pixels, if its last transform that has a size leaves squares of that size."""
    size = None
    for transform in _flat(transforms):
        if "size" in transform:
            sides = set(transform["size"]) if isinstance(transform["size"], list) else {transform["size"]}
            size = sides.pop() if len(sides) == 1 and transform.get("type") in CROPS else None
    return size


def _flat(transforms: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Transforms in the order in which they are applied, those that hold others replaced by what they hold."""
    for transform in transforms:
        yield from _flat(transform["transforms"]) if "transforms" in transform else [transform]


def _setting(config: Config, key: str) -> Any:
    """The value of a key, or the code's default, or None."""
    setting = at(committed_schema(), config.root, as_key(key))
    return setting.schema.get("default") if setting.node is None else plain(setting.node)


def _mcrop(counts: Sequence[int]) -> str:
    return "-".join(["mcrop", *map(str, counts)])


def _listed(sizes: Sequence[int | None]) -> str:
    return " and ".join(map(str, sizes))
