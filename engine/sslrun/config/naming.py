"""The naming convention: what `mocov2_resnet50_8xb32-coslr-200e_in1k` says, and whether the recipe agrees.

A mismatch is reported only where name and recipe contradict each other: a component of the user's own, or one for which
the convention has no word, may have any name.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from sslrun.config.check import TAGS
from sslrun.config.dump import inline
from sslrun.config.load import Config
from sslrun.config.node import as_key, lookup, plain, walk
from sslrun.config.schema_reader import at, classes, committed_schema, kinds

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

# Word of a data set -> its source, and the input size in pixels if the name gives none.
DATASETS = {
    "in1k": ("ImageNet", 224),
    "in100": ("ImageNet100", 224),
    "inat18": ("INaturalist2018", 224),
    "places205": ("Places205", 224),
    "cifar10": ("CIFAR10", 32),
    "cifar100": ("CIFAR100", 32),
    "stl10": ("STL10", 96),
}

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
PRECISIONS = ("amp", "bf16", "fp16")

_TRAINING = re.compile(r"(\d{1,9})xb(\d{1,9})((?:-[a-z0-9]+)*)-([a-z]+lr)-(\d{1,9})(e|k|iters)")
_TRAINING_RULES = {
    r"\d{1,9}xb\d{1,9}(-.*)?": "does not begin with GPUs x batch per GPU, such as 8xb32",
    r".*-\d{1,9}(e|k|iters)": "does not end with a length, such as 200e, 100k or 500iters",
    r".*-[a-z]+lr-[^-]+": "has no schedule, such as coslr, before its length",
}
_SIZE = re.compile(r"\d{1,9}(?:px)?")


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


class Mismatch(NamedTuple):
    """A mismatch between a file's name and its content: the key that contradicts the name, and both in words."""

    key: str
    message: str


def parse(name: str, form: str = RECIPE) -> Name:
    """Takes a name (without `.toml`) apart. Raises ValueError: one line that says which part is wrong and how."""
    parts, count = name.split("_"), form.count("{")
    if len(parts) != count:
        found = f"{len(parts)} part{'s' if len(parts) > 1 else ''}"
        asked = {3: "three", 4: "four"}[count]
        raise ValueError(f"{found} joined by '_', not the {asked} of {form}; words within a part are joined by '-'")
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
    crops = re.search(r"-mcrop(?![a-z0-9])((?:-\d+(?![a-z0-9]))*)", middle)
    if crops and not crops[1]:
        raise ValueError(f"mcrop in {training!r} is not followed by the views of each group, as in mcrop-2-6")
    words = (middle.replace(crops[0], "", 1) if crops else middle).split("-")[1:]
    accumulations = [word for word in words if re.fullmatch(r"accum\d{1,9}", word)]
    if len(accumulations) > 1:
        raise ValueError(f"the training part {training!r} says accum more than once")
    dataset, *after = data.split("-")
    count = int(length) * (1000 if unit == "k" else 1)
    return Name(
        algorithm=algorithm,
        module=module[0] if module else "",
        gpus=int(gpus),
        samples_per_gpu=int(samples),
        accumulation=int(accumulations[0].removeprefix("accum")) if accumulations else 1,
        crops=tuple(map(int, crops[1].split("-")[1:])) if crops else (),
        is_mixed_precision=any(word in PRECISIONS for word in words),
        schedule=schedule,
        epochs=count if unit == "e" else None,
        max_iters=None if unit == "e" else count,
        dataset=dataset,
        sizes=tuple(int(word.removesuffix("px")) for word in after if _SIZE.fullmatch(word)),
    )


def method_of(algorithm: str, methods: Collection[str]) -> tuple[str, tuple[str, ...]] | None:
    """The class that an algorithm part names and the words left over; None where it names none of them.

    The longest beginning wins, dashes and capitals do not count, and a version that is no class of its own falls away:
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


def mismatches(name: Name, config: Config) -> list[Mismatch]:
    """What a recipe, or a benchmark's `[eval]`, does not do although its name says so."""
    claims = _recipe(name, config) if name.module else _benchmark(name, config)
    return [Mismatch(key, f"the name says {says}, {does}") for key, holds, says, does in claims if not holds]


# A claim: the key that it is about, whether the file keeps it, what the name says, and what the file does.
Claims = Iterator[tuple[str, bool, str, str]]


def _recipe(name: Name, config: Config) -> Claims:
    yield from _algorithm(name, config)
    yield from _backbone(name, config)
    yield from _batch(name, config, "data.samples_per_gpu", "global_batch")
    yield from _schedule(name, config, "")
    yield from _views(name, config)
    yield from _dataset(name, config, "data.source")
    precision = _setting(config, "engine.precision")
    holds = not (name.is_mixed_precision and precision == "fp32")
    yield "engine.precision", holds, "mixed precision", f"engine.precision is {precision}"


def _benchmark(name: Name, config: Config) -> Claims:
    kind = name.algorithm.partition("-")[0]
    table = f"eval.{kind}"
    if lookup(config.root, as_key(table)) is None:
        yield "eval", False, kind, f"and {table} is not set"
        return
    yield from _batch(name, config, f"{table}.samples_per_gpu", f"{table}.global_batch")
    yield from _schedule(name, config, f"{table}.")
    yield from _dataset(name, config, "eval.train")
    yield from _dataset(name, config, "eval.test")
    yield "eval", not name.crops, _mcrop(name.crops), "and evaluation takes one view of an image"
    for key in ("eval.transforms", f"{table}.transforms"):
        if transforms := _setting(config, key):
            yield from _sizes(name, [_size(transforms)], key, f"the images of {key}")


def _algorithm(name: Name, config: Config) -> Claims:
    method, named = _setting(config, "model.type"), method_of(name.algorithm, methods())
    if method not in methods():
        return
    if named is None or named[0] != method:
        what = f"stands for {named[0]}" if named else "is no method that ships"
        yield "model.type", False, name.algorithm, f"which {what}, and model.type is {method}"
        return
    words = named[1]
    for begin, end in combinations(range(len(words) + 1), 2):
        switch = f"model.{'_'.join(words[begin:end])}"
        yield switch, _setting(config, switch) is not False, "-".join(words[begin:end]), f"{switch} is false"
    others = [union for kind, union in kinds(committed_schema()).items() if kind != "methods"]
    by_word = {component.lower(): component for union in others for component in classes(union)}
    used = [node.value for key, node in walk(config.root) if key and key[-1] in TAGS]
    for word in words:
        component = by_word.get(word)
        yield "model", not component or component in used, word, f"and nothing in the recipe is a {component}"


def _backbone(name: Name, config: Config) -> Claims:
    key = "model.backbone"
    while lookup(config.root, as_key(f"{key}.backbone")) is not None:  # a filter in front of the network
        key += ".backbone"
    kind = _setting(config, f"{key}.type")
    if kind not in BACKBONES:
        return
    form, example = BACKBONES[kind]
    match = form.fullmatch(name.module)
    if match is None:
        yield f"{key}.type", False, name.module, f"{key} is a {kind}, whose names begin like {example}"
        return
    for part, written in match.groupdict().items():
        value = _setting(config, f"{key}.{part}")
        yield f"{key}.{part}", written in (None, str(value)), name.module, f"{key}.{part} is {value}"
    for word, contradicting in MODULE_WORDS.items():
        values = {part: value for part in contradicting if (value := _setting(config, f"{key}.{part}")) is not None}
        if values and re.search(rf"\b{word}", name.module):
            holds = any(value not in contradicting[part] for part, value in values.items())
            does = " and ".join(f"{key}.{part} is {inline(value)}" for part, value in values.items())
            yield f"{key}.{next(iter(values))}", holds, word, does


def _batch(name: Name, config: Config, samples_key: str, batch_key: str) -> Claims:
    samples, batch = _setting(config, samples_key), _setting(config, batch_key)
    holds = samples in (None, name.samples_per_gpu)
    yield samples_key, holds, f"{name.gpus}xb{name.samples_per_gpu}", f"{samples_key} is {samples}"
    accumulated = f" x {name.accumulation} accumulated" if name.accumulation > 1 else ""
    product = name.gpus * name.samples_per_gpu * name.accumulation
    says = f"{name.gpus} GPUs x {name.samples_per_gpu} samples{accumulated} = {product}"
    yield batch_key, batch == product, says, f"{batch_key} is {batch}"


def _schedule(name: Name, config: Config, table: str) -> Claims:
    policy = _setting(config, f"{table}lr.policy")
    word = next((word for word, known in SCHEDULES.items() if known == policy), name.schedule)
    yield f"{table}lr.policy", word == name.schedule, name.schedule, f"{table}lr.policy is {policy} ({word})"
    says = {f"{table}epochs": name.epochs, f"{table}max_iters": name.max_iters}
    does = {key: _setting(config, key) for key in says}
    given = [key for key, value in does.items() if value is not None]
    length = f"{name.max_iters:,} steps" if name.epochs is None else f"{name.epochs} epochs"
    shown = " and ".join(f"{key} is {does[key]}" for key in given) or "and no length is set"
    yield (*given, "epochs")[0], says == does, length, shown


def _dataset(name: Name, config: Config, key: str) -> Claims:
    source = _setting(config, f"{key}.type")
    word = next((word for word, (known, _) in DATASETS.items() if known == source), name.dataset)
    yield f"{key}.type", word == name.dataset, name.dataset, f"{key} is {source} ({word})"
    yield f"{key}.type", source != "Shapes" or name.dataset not in DATASETS, name.dataset, f"{key} draws {source}"


def _views(name: Name, config: Config) -> Claims:
    groups = _setting(config, "data.views")
    counts = [_setting(config, f"data.views.{place}.num_views") for place in range(len(groups))]
    sizes = [_size(group.get("transforms", [])) for group in groups]
    by_size = {size: sum(n for n, other in zip(counts, sizes, strict=True) if other == size) for size in sizes}
    one_size = not name.crops and (len(by_size) < 2 or None in by_size)
    holds = one_size or list(name.crops) in (counts, [*by_size.values()])
    says = _mcrop(name.crops) if name.crops else "no mcrop"
    yield "data.views", holds, says, f"the views are {_mcrop(counts)} of {_listed([*by_size])} px"
    yield from _sizes(name, [*by_size], "data.views", "the views")


def _sizes(name: Name, sizes: list[int | None], key: str, what: str) -> Claims:
    """Whether images have the sizes that the name says, if all their sizes are known."""
    usual = DATASETS.get(name.dataset)
    expected = list(dict.fromkeys(name.sizes)) or ([usual[1]] if usual else sizes)
    says = (
        f"{_listed(expected)} px"
        if name.sizes
        else f"{name.dataset} without a size, which means {_listed(expected)} px"
    )
    yield key, None in sizes or not sizes or expected == sizes, says, f"{what} have {_listed(sizes)} px"


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
    parts = as_key(key)
    node = lookup(config.root, parts)
    return at(committed_schema(), config.root, parts).get("default") if node is None else plain(node)


def _mcrop(counts: Sequence[int]) -> str:
    return "-".join(["mcrop", *map(str, counts)])


def _listed(sizes: Sequence[int | None]) -> str:
    return " and ".join(map(str, sizes))


def convention() -> str:
    """The grammar for people: what `sslrun config lint convention` prints."""
    schedules = "\n".join(f"        {word:<14}{policy}" for word, policy in SCHEDULES.items())
    datasets = "\n".join(f"        {word:<11}{source:<17}{size:>3} px" for word, (source, size) in DATASETS.items())
    return CONVENTION.format(parts=RECIPE, benchmark=BENCHMARK, schedules=schedules, datasets=datasets)


CONVENTION = """\
A recipe is called

    {parts}.toml

Parts are joined by '_', words within a part by '-'; words are lower-case letters and digits.

algorithm = METHOD[-MISC]
    The method, its words joined by '-', and its variant.
        mocov2    relative-loc    npid-ensure-neg    deepcluster-sobel
    METHOD must be model.type (mocov2 and mocov1 are versions of MoCo). A MISC that is a switch of the method
    (ensure-neg) must be on, one that is a component (sobel) must be used.

module = BACKBONE[-MISC]
    The backbone and its variant.
        resnet50    resnet50-nofrz    vit-small-p16
    Depth of a ResNet; size and patch of a ViT. nofrz: no stage is frozen (frozen_stages = -1); wide-resnet50 is wider
    than a ResNet-50, resnext50 has groups.

training = GPUSxbBATCH[-WORD...]-SCHEDULE-LENGTH
    8xb32          8 GPUs, 32 samples on each: data.samples_per_gpu = 32, global_batch = 8 x 32
    WORDs          augmentation, training tricks, loss tricks, in this order; with a meaning are
        mcrop-2-6  two groups of views (data.views), of 2 and 6 views; their sizes stand in the data part
        accum16    gradients of 16 passes in a step: global_batch = 8 x 32 x 16
        amp        mixed precision; also bf16, fp16
    SCHEDULE       lr.policy
{schedules}
    LENGTH         200e: 200 epochs; 100k: 100,000 optimizer steps; 500iters: 500 of them

data = DATASET[-WORD...][-SIZE...]
    in1k           the data set, its images cropped to the usual size
    in1k-384px     cropped to 384 x 384 pixels
    in1k-224-96    cropped to two sizes, in the order of data.views
    DATASET        data.source and the usual size; any other word for images of one's own
{datasets}

Examples
    mocov2_resnet50_8xb32-coslr-200e_in1k
    byol_resnet50_8xb32-accum16-coslr-200e_in1k
    swav_resnet50_8xb32-mcrop-2-6-coslr-200e_in1k-224-96
    mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k
    npid-ensure-neg_resnet50_8xb32-steplr-200e_in1k

A benchmark, what `sslrun eval ... --with` takes, sets [eval] alone and is called

    {benchmark}.toml

evaluation = KIND[-MISC]
    The table of [eval] that it sets, and its variant: linear, linear-vit. The batch is eval.KIND.global_batch (and
    eval.KIND.samples_per_gpu), the schedule eval.KIND.lr.policy, the length eval.KIND.epochs, the data set eval.train
    and eval.test.
        linear_8xb32-steplr-100e_in1k

A run folder carries the name of its recipe, published weights that name, a date and a hash:
    mocov2_resnet50_8xb32-coslr-200e_in1k_20260131-0a1b2c3d.pth
"""
