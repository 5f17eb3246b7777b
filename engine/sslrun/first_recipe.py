"""`sslrun init`: a first recipe for a folder of images, with choices that follow from the images and the machine."""

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sslrun.config.dump import inline
from sslrun.config.paths import stated
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.errors import UsageError
from sslrun.started import lasting_program, program

SLURM = Path(__file__).with_name("sslrun.slurm")  # a link to bin/sslrun.slurm
LEAST = 16  # images; below, no batch can be filled
STEPS = {"cuda": 30_000, "cpu": 4_000}  # optimizer steps of the run, about
HOLDOUT = 0.1
CPU_WIDTH = 24  # channels of the first stage of the ResNet


@dataclass(frozen=True)
class Looked:
    """What a folder of images and the machine are like.

    Attributes:
        folder: absolute path of the folder.
        count: number of images.
        classes: number of class folders; 0 without.
        sides: shorter sides of the images in pixels: smallest, median, largest.
        unreadable: images whose header cannot be read.
        device: "cuda" or "cpu".
        gpus: number of GPUs.
        cores: number of CPU cores.
    """

    folder: str
    count: int
    classes: int
    sides: tuple[int, int, int]
    unreadable: int
    device: str
    gpus: int
    cores: int


def look(folder: Path, gpus: int, cores: int) -> Looked:
    """Looks at a folder of images; reads the headers of all of them.

    Raises:
        UsageError: it is no folder, or has too few images to train on.
    """
    source = ImageFolder(str(folder))
    try:
        source.open()
    except UsageError as error:  # without advice about keys of a recipe
        raise UsageError(str(error).rpartition(": set ")[0] or str(error)) from None
    if len(source) < LEAST:
        raise UsageError(stated(folder, f" has {len(source)} images; training needs at least {LEAST}"))
    shorter = source.sizes.min(axis=1)
    readable = np.sort(shorter[shorter > 0])
    if len(readable) == 0:
        raise UsageError(stated(folder, " has no image whose size can be read"))
    return Looked(
        folder=str(folder.absolute()),
        count=len(source),
        classes=0 if source.labels is None else len(np.unique(source.labels)),
        sides=(int(readable[0]), int(readable[len(readable) // 2]), int(readable[-1])),
        unreadable=int((shorter == 0).sum()),
        device="cuda" if gpus else "cpu",
        gpus=gpus,
        cores=cores,
    )


def recipe(seen: Looked, name: str = "recipe.toml") -> str:
    """The text of the recipe. Each choice stands beside its reason.

    Args:
        seen: the images and the machine.
        name: name of the recipe's file, for the commands at its head.
    """
    is_cpu, side = seen.device == "cpu", seen.sides[1]
    trained = seen.count - round(HOLDOUT * seen.count)
    size = next((px for px in (224, 160, 128, 96, 64, 48) if px <= side and not (is_cpu and px > 96)), 32)
    is_large = not is_cpu and seen.count >= 20_000 and size >= 160
    base = "small/mocov2_resnet50_224px" if is_large else "small/mocov2_resnet18_96px"
    batch = _power_of_2(min(64 if is_cpu else 256, trained // 2))
    per_epoch = trained // batch
    epochs = min(800, max(20, round(STEPS[seen.device] / per_epoch)))
    whose = f"{seen.gpus} GPU{'s' * (seen.gpus > 1)}" if seen.gpus else f"no GPU and {seen.cores} CPU cores"
    lines = [
        f"# Written by `sslrun init` for {json.dumps(seen.folder, ensure_ascii=False)}:",
        f"# {_images(seen)}; shorter sides of {seen.sides[0]} to {seen.sides[2]} px,",
        f"# {side} px in the middle. The machine has {whose}.",
        "#",
        f"#   {program()} {shlex.quote(name)} --dry-run    # the plan of the run; without --dry-run, the run",
        f"#   {program()} config explain {shlex.quote(name)} --all    # every value and its meaning",
        "",
        f'extends = "sslrun:{base}"  # {_why(base, seen)}',
        "",
        f"epochs = {epochs}  # of {per_epoch:,} steps each, about {epochs * per_epoch:,} in all; more train better",
        f"global_batch = {batch}  # on any number of devices",
        *([f"lr.warmup_epochs = {max(1, epochs // 20)}  # a twentieth of the run"] if epochs < 100 else []),
        "",
        "[model]",
        f"queue_len = {_power_of_2(min(4096, trained // 2))}  # negatives; fewer than the {trained:,} training images",
        *_network(is_cpu, size),
        "",
        "[data]",
        f"samples_per_gpu = {min(32, batch // 2)}  # samples that BatchNorm sees together; MoCo mixes two such groups",
        f"workers_per_gpu = {max(1, min(8, seen.cores // max(1, seen.gpus)))}  # decoding threads; {seen.cores} cores",
        f"source = {{ data_prefix = {inline(seen.folder)} }}",
        f"views.0.transforms.0.size = {size}  # px of a crop; "
        + ("larger ones are slow on a CPU" if is_cpu and side >= 128 else "not more than most images have"),
        "",
        "[log]",
        f"interval = {max(1, min(50, per_epoch))}  # steps between two rows; an epoch has {per_epoch:,}",
        "",
        *_monitors(seen, epochs),
        *(["", "[engine]", "threads = 1  # leaves the other core to the data"] if is_cpu and seen.cores == 2 else []),
    ]
    return "\n".join(lines) + "\n"


def _images(seen: Looked) -> str:
    classes = f" in {seen.classes} class folders" if seen.classes else " without class folders"
    return f"{seen.count:,} images{classes}{f', {seen.unreadable} of them unreadable' * bool(seen.unreadable)}"


def _network(is_cpu: bool, size: int) -> list[str]:
    """The lines of the network, where it is not that of the shipped recipe."""
    small_stem = 'stem = "small"'
    if not is_cpu:
        why = "halves the image once less, for less than 96 px"
        return [f"backbone = {{ {small_stem} }}  # {why}"] if size < 96 else []
    stem = f", {small_stem}" if size < 48 else ""
    width = CPU_WIDTH * 8  # of ResNet-18's features
    return [
        f"backbone = {{ base_width = {CPU_WIDTH}{stem} }}  # narrow: with the usual 64, a step takes 7 times as long",
        f"neck = {{ in_channels = {width}, hid_channels = {width} }}  # the backbone's number of features",
    ]


def _why(base: str, seen: Looked) -> str:
    if "resnet50" in base:
        return "enough images for ResNet-50"
    return "ResNet-18 for a CPU" if seen.device == "cpu" else "ResNet-18 for few or small images"


def _monitors(seen: Looked, epochs: int) -> list[str]:
    interval = max(1, epochs // 20)
    if seen.classes > 1:
        return [
            "[monitor]  # on the tenth of the images that data.holdout keeps out of training",
            f"knn_interval = {interval}  # epochs; k-NN accuracy: how well features separate the class folders",
            f"loss_interval = {interval}",
            f"rankme_interval = {interval}",
        ]
    return [
        "[monitor]  # on the tenth of the images that data.holdout keeps out of training; no classes, so no k-NN",
        "knn_interval = 0",
        f"loss_interval = {interval}  # epochs",
        f"rankme_interval = {interval}",
    ]


def _power_of_2(most: int) -> int:
    """The largest power of 2 up to a number."""
    return 1 << max(0, most.bit_length() - 1)


def slurm(recipe_file: Path, gpus: int) -> str:
    """A batch script of Slurm that trains a recipe over as many jobs as it takes: bin/sslrun.slurm, filled in.

    Args:
        recipe_file: the recipe.
        gpus: GPUs of a node.
    """
    name = shlex.quote(recipe_file.stem)
    script = f"{recipe_file.stem}.sbatch"
    text = SLURM.read_text(encoding="utf-8")
    head, setting = text[: text.index("#SBATCH")], f"--job-name={name}\n#SBATCH --chdir={shlex.quote(os.getcwd())}"
    for old, new in (
        (head, f"#!/bin/bash\n# Written by `sslrun init --slurm`; submit it with: sbatch {shlex.quote(script)}\n"),
        ("--job-name=sslrun", setting),
        ("--output=%x", f"--output={name}"),
        ("node=8", f"node={max(1, gpus)}"),
        ('(bin/sslrun "$@")', f'({lasting_program()} {shlex.quote(str(recipe_file))} "$@")'),
    ):
        assert old in text, f"{SLURM} has no {old}"
        text = text.replace(old, new)
    return text
