"""The naming convention of recipes and benchmarks: what `mocov2_resnet50_8xb32-coslr-200e_in1k` says.

Only the grammar; whether a recipe does what its name says is the business of `sslrun.config.claims`.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

PARTS = "{algorithm}_{module}_{training}_{data}"
BENCHMARK_PARTS = "{evaluation}_{training}_{data}"

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


class DataSet(NamedTuple):
    """What the word of a data set stands for: a source, and the input size in pixels of a name that gives none."""

    source: str
    size: int


DATASETS = {
    "in1k": DataSet("ImageNet", 224),
    "in100": DataSet("ImageNet100", 224),
    "inat18": DataSet("INaturalist2018", 224),
    "places205": DataSet("Places205", 224),
    "cifar10": DataSet("CIFAR10", 32),
    "cifar100": DataSet("CIFAR100", 32),
    "stl10": DataSet("STL10", 96),
}

_WORD = re.compile(r"[a-z0-9]+")
_BATCH = re.compile(r"(\d{1,9})xb(\d{1,9})")
_LENGTH = re.compile(r"(\d{1,9})(e|k|iters)")
_SCHEDULE = re.compile(r"[a-z]+lr")
_ACCUMULATION = re.compile(r"accum\d{1,9}")
_SIZE = re.compile(r"\d{1,9}(?:px)?")
_PRECISION = ("amp", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Name:
    """A name taken apart.

    Attributes:
        algorithm: the method and what is special about it: "mocov2", "npid-ensure-neg".
        module: the backbone and what is special about it or the other networks: "resnet50", "vit-small-p16".
        gpus: number of GPUs that the recipe was made for.
        samples_per_gpu: batch on one of them.
        accumulation: backward passes for one optimizer step.
        crops: views of each group of multi-crop; empty without multi-crop.
        is_mixed_precision: whether the name says so.
        schedule: word of the learning-rate schedule: "coslr".
        epochs: length in epochs, None where it is given in optimizer steps.
        max_iters: length in optimizer steps, None where it is given in epochs.
        dataset: word of the data set: "in1k".
        sizes: input sizes in pixels as written, one for each size of views; empty means the data set's usual one.
        misc: words of training and data that the grammar gives no meaning: augmentations, tricks, subsets.
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
    misc: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class BenchmarkName:
    """The name of a benchmark taken apart.

    Attributes:
        evaluation: the table of `[eval]` that it sets, which is a verb of `sslrun eval`: "linear".
        misc: words after it, and those of training and data that the grammar gives no meaning.
        gpus: number of GPUs that the batch was made for.
        samples_per_gpu: batch on one of them.
        schedule: word of the learning-rate schedule: "coslr".
        epochs: length in epochs, None where it is given in optimizer steps.
        dataset: word of the data set: "in1k".
        sizes: input sizes in pixels as written; empty means the data set's usual one.
    """

    evaluation: str
    misc: tuple[str, ...]
    gpus: int
    samples_per_gpu: int
    schedule: str
    epochs: int | None
    dataset: str
    sizes: tuple[int, ...]


def parse(name: str) -> Name:
    """Takes the name of a recipe (without `.toml`) apart. Raises ValueError: one line, what part is wrong and how."""
    algorithm, module, training, data = _parts(name, PARTS)
    batch, middle, schedule, length = _training(training)
    crops, middle = _crops(training, middle)
    accumulations = [word for word in middle if _ACCUMULATION.fullmatch(word)]
    if len(accumulations) > 1:
        raise ValueError(f"the training part {training!r} says accum more than once")
    dataset, sizes, after = _data(data)
    count = int(length[1]) * (1000 if length[2] == "k" else 1)
    return Name(
        algorithm=algorithm,
        module=module,
        gpus=int(batch[1]),
        samples_per_gpu=int(batch[2]),
        accumulation=int(accumulations[0].removeprefix("accum")) if accumulations else 1,
        crops=crops,
        is_mixed_precision=any(word in _PRECISION for word in middle),
        schedule=schedule,
        epochs=count if length[2] == "e" else None,
        max_iters=None if length[2] == "e" else count,
        dataset=dataset,
        sizes=sizes,
        misc=(*(word for word in middle if word not in (*accumulations, *_PRECISION)), *after),
    )


def parse_benchmark(name: str) -> BenchmarkName:
    """Takes the name of a benchmark (without `.toml`) apart. Raises ValueError as `parse` does."""
    evaluation, training, data = _parts(name, BENCHMARK_PARTS)
    kind, *words = evaluation.split("-")
    batch, middle, schedule, length = _training(training)
    dataset, sizes, after = _data(data)
    return BenchmarkName(
        evaluation=kind,
        misc=(*words, *middle, *after),
        gpus=int(batch[1]),
        samples_per_gpu=int(batch[2]),
        schedule=schedule,
        epochs=int(length[1]) if length[2] == "e" else None,
        dataset=dataset,
        sizes=sizes,
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


def _parts(name: str, form: str) -> list[str]:
    """The parts of a name, as many as the form has."""
    parts, count = name.split("_"), form.count("{")
    if len(parts) != count:
        found = f"{len(parts)} part{'s' if len(parts) > 1 else ''}"
        asked = {3: "three", 4: "four"}[count]
        raise ValueError(f"{found} joined by '_', not the {asked} of {form}; words within a part are joined by '-'")
    for part in parts:
        for word in part.split("-"):
            if not _WORD.fullmatch(word):
                raise ValueError(f"{word!r} in the part {part!r} is no word of lower-case letters and digits")
    return parts


def _data(part: str) -> tuple[str, tuple[int, ...], list[str]]:
    """The data set, the sizes and the other words of a data part."""
    dataset, *after = part.split("-")
    sizes = [word for word in after if _SIZE.fullmatch(word)]
    return dataset, tuple(int(size.removesuffix("px")) for size in sizes), [word for word in after if word not in sizes]


def _training(part: str) -> tuple[re.Match[str], list[str], str, re.Match[str]]:
    """The batch, the words between, the schedule and the length of a training part."""
    first, *middle = part.split("-")
    last = middle.pop() if middle else ""
    schedule = middle.pop() if middle else ""
    batch, length = _BATCH.fullmatch(first), _LENGTH.fullmatch(last)
    if batch is None:
        raise ValueError(f"the training part {part!r} does not begin with GPUs x batch per GPU, such as 8xb32")
    if length is None:
        raise ValueError(f"the training part {part!r} does not end with a length, such as 200e, 100k or 500iters")
    if not _SCHEDULE.fullmatch(schedule):
        raise ValueError(f"the training part {part!r} has no schedule, such as coslr, before its length")
    return batch, middle, schedule, length


def _crops(part: str, words: list[str]) -> tuple[tuple[int, ...], list[str]]:
    """The counts after `mcrop`, and the words without them."""
    if "mcrop" not in words:
        return (), words
    begin = words.index("mcrop")
    end = begin + 1
    while end < len(words) and words[end].isdecimal():
        end += 1
    if end == begin + 1:
        raise ValueError(f"mcrop in {part!r} is not followed by the views of each group, as in mcrop-2-6")
    return tuple(map(int, words[begin + 1 : end])), words[:begin] + words[end:]


def convention() -> str:
    """The grammar for people: what `sslrun config lint convention` prints."""
    schedules = "\n".join(f"        {word:<14}{policy}" for word, policy in SCHEDULES.items())
    datasets = "\n".join(f"        {word:<11}{source:<17}{size:>3} px" for word, (source, size) in DATASETS.items())
    return CONVENTION.format(parts=PARTS, benchmark=BENCHMARK_PARTS, schedules=schedules, datasets=datasets)


CONVENTION = """\
A recipe is called

    {parts}.toml

Parts are joined by '_', words within a part by '-'; words are lower-case letters and digits.

algorithm = METHOD[-MISC]
    The method, its words joined by '-', and what is special about it.
        mocov2    relative-loc    npid-ensure-neg    deepcluster-sobel
    METHOD must be model.type (mocov2 and mocov1 are versions of MoCo). A MISC that is a switch of the method
    (ensure-neg) must be on, one that is a component (sobel) must be used.

module = BACKBONE[-MISC]
    The backbone and what is special about the networks.
        resnet50    resnet50-nofrz    vit-small-p16
    Depth of a ResNet; size and patch of a ViT.

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
    The table of [eval] that it sets, and what is special about it: linear, linear-vit. The batch is
    eval.KIND.global_batch, the schedule eval.KIND.lr.policy, the length eval.KIND.epochs, the data set eval.train and
    eval.test.
        linear_8xb32-steplr-100e_in1k

A run folder carries the name of its recipe, published weights that name, a date and a hash:
    mocov2_resnet50_8xb32-coslr-200e_in1k_20260131-0a1b2c3d.pth
"""
