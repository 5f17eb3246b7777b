"""The recipes of configs/selfsup: each has a plan at its own size, and trains at a small one."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import small_run
from sslrun.cli import main
from sslrun.config import Config, load
from sslrun.nn.vit import SIZES
from sslrun.runtime import checkpoint
from sslrun.training import dry_run

SHIPPED = sorted((small_run.ROOT / "configs/selfsup").rglob("*.toml"))
FIRST_OF_EACH = [min(folder.glob("*.toml")) for folder in sorted((small_run.ROOT / "configs/selfsup").iterdir())]
REPORTED = sorted((small_run.ROOT / "configs/reported").glob("*.toml"))
BY_DAY = FIRST_OF_EACH[::4]
NUMBERS, PIXELS = 16, 3.5  # divisors of the sizes of networks, stores and clusters, and of images
CLUSTERS, GROUP, BATCH = 8, 4, 16


@pytest.mark.nightly  # three minutes: whole networks run on tensors without values
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_has_a_plan(path):
    """Its networks fit together and take its views at their size."""
    name, *lines = dry_run(load(str(path), ["engine.device=cpu", "engine.threads=1"])).splitlines()
    told = dict(line.split(maxsplit=1) for line in lines)
    assert name == path.stem
    words = path.stem.split("_")[-2].split("-")
    number, unit = int(words[-1][:-1]), words[-1][-1]
    expected = f"{number},000 = " if unit == "k" else f" = {number} epochs x "
    assert expected in told["steps"], told["steps"]
    gpus, batch = map(int, words[0].split("xb"))
    accumulation = int(next((word for word in words if word.startswith("accum")), "accum1").removeprefix("accum"))
    assert told["global"].startswith(f"batch {gpus * batch * accumulation} = 1 rank(s) x ")


@pytest.mark.parametrize("path", REPORTED, ids=lambda path: path.stem)
def test_every_reported_recipe_has_a_plan(path, images, capsys):
    sets = ["engine.device=cpu"]
    if "imagenette" in path.stem:
        sets += ["global_batch=64", "data.samples_per_gpu=64"]
        sets += [f"data.{each}.data_prefix={images}" for each in ("source", "holdout")]
    assert main([str(path), "--dry-run", *(f"--set={each}" for each in sets)]) == 0
    assert "steps  " in capsys.readouterr().out


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every table, list and scalar below a value, with its dotted key."""
    yield key, value
    inside = {dict: dict.items, list: enumerate}.get(type(value), lambda _: ())
    for part, below in inside(value):
        yield from leaves(below, f"{key}.{part}".lstrip("."))


def smaller(config: Config, images: Path, ann_file: Path) -> list[str]:
    """Overrides that make a shipped recipe small, so that two steps, an epoch each, take a moment."""
    absent = [key for key in ("epochs", "load_from", "load_strict") if key in config.values]
    overrides = [
        f"_delete_={absent}", "max_iters=2", f"global_batch={BATCH}", f"data.samples_per_gpu={GROUP}",
        f"data.source.data_prefix={images}", f"data.source.ann_file={ann_file}", "engine.device=cpu",
        "engine.threads=1", "log.interval=1", "checkpoint.interval=1", "checkpoint.by=iter",
    ]  # fmt: skip
    unit = config.values["model"]["backbone"].get("patch_size", 1)  # crops consist of whole patches
    if "teacher_weights" in config.values["model"]:
        overrides.append('model={_delete_=["teacher_weights"]}')
    if isinstance(config.values["engine"]["micro_batch"], int):  # what is accumulated stays accumulated
        overrides.append(f"engine.micro_batch={GROUP}")
    copies = tuple(  # tables that are another table, which is made small
        f"{key}."
        for key, value in leaves(config.values["model"], "model")
        if isinstance(value, dict) and str(config.origins(key)[-1].raw).startswith("${")
    )
    for key, value in leaves(config.values["model"], "model"):
        name = key.rpartition(".")[2]
        if key.startswith(copies):
            continue
        if isinstance(value, dict) and value.get("type") == "ResNet":
            overrides.append(f"{key}.base_width={64 // NUMBERS}")
        elif isinstance(value, dict) and value.get("type") == "VisionTransformer":
            overrides += [f"{key}.embed_dim={SIZES[value['arch']][0] // NUMBERS}", f"{key}.depth=2"]
        elif name in ("num_classes", "num_clusters"):
            overrides.append(f"{key}={min(value, CLUSTERS)}")
        elif name == "koleo_group":
            overrides.append(f"{key}={min(value, GROUP)}")
        elif name == "num_heads":
            overrides.append(f"{key}={value // 4}")  # divides a width that is a sixteenth
        elif name == "img_size":
            overrides.append(f"{key}={round(value / PIXELS / unit) * unit}")
        elif type(value) is int and value > NUMBERS and name != "depth":
            overrides.append(f"{key}={value // NUMBERS}")
    for number, view in enumerate(config.values["data"]["views"]):
        patch = math.lcm(view.get("mask", {}).get("patch_size", unit), unit)
        for key, value in leaves(view, f"data.views.{number}"):
            if key.endswith(".size"):
                overrides.append(f"{key}={max(1, round(value / PIXELS / patch)) * patch}")
    return overrides


@pytest.fixture(scope="module")
def ann_file(images, tmp_path_factory) -> Path:
    """As many of the images as fill one global batch, in ImageNet's own way."""
    path = tmp_path_factory.mktemp("meta") / "train.txt"
    found = sorted(image.relative_to(images) for image in images.rglob("*.jpg"))
    lines = [f"{image} {image.parent.name[-1]}\n" for image in found[:: len(found) // BATCH]]
    path.write_text("".join(lines[:BATCH]))
    return path


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.nightly] * (path not in BY_DAY)) for path in SHIPPED],
)
def test_every_shipped_recipe_trains(path, images, ann_file, tmp_path, capsys):
    overrides = smaller(load(str(path)), images, ann_file)
    assert main([str(path), "--work-dir", str(tmp_path), *(f"--set={each}" for each in overrides)]) == 0
    run = tmp_path / path.stem
    assert f"done: {run} " in capsys.readouterr().out
    losses = [row["train/loss"] for row in small_run.metrics(run) if "train/loss" in row]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    before, after = (checkpoint.load(run / f"checkpoints/step_{step:08d}")[0]["model"] for step in (1, 2))
    assert before.keys() == after.keys() and all(bool(value.isfinite().all()) for value in after.values())
    trained = [name for name in after if name.startswith("backbone.") and name.endswith("weight")]
    assert sum(not torch.equal(before[name], after[name]) for name in trained) > len(trained) // 2
    labeled = f"eval.test={{type='ImageFolder',data_prefix='{images}'}}"  # as ImageNet's, four classes
    assert main(["eval", "knn", str(run), "--set", labeled]) == 0
    assert "knn/top1_pct" in capsys.readouterr().out
    assert main(["export", str(run), "--to", "safetensors", "-o", str(tmp_path / "encoder.safetensors")]) == 0
