"""A run goes on with another number of ranks, at the same global batch: the same samples and crops, the same loss."""

import contextlib
import io
from pathlib import Path

import pytest

import small_run
from ranks import run_ranks
from sslrun import cli
from sslrun.runtime.run_files import RunFiles

# A network without batch statistics that draws random numbers, and an optimizer whose state is two tensors and a
# counter for each parameter. 24 samples can be divided among 1, 2, 3 and 4 ranks.
RECIPE = """
global_batch = 24
max_iters = {steps}
seed = 3
work_dir = "{folder}"

[model]
type = "MoCo"
queue_len = 48
feat_dim = 8
momentum = 0.9
neck = {{ type = "NonLinearNeck", in_channels = 24, hid_channels = 16, out_channels = 8 }}
head = {{ type = "ContrastiveHead", temperature = 0.2 }}

[model.backbone]
type = "VisionTransformer"
img_size = 24
patch_size = 8
embed_dim = 24
depth = 2
num_heads = 3
positions = "rotary"
rotary_rescale = 1.5
drop_path = 0.3

[data]
samples_per_gpu = 2
workers_per_gpu = 1
source = {{ type = "ImageFolder", data_prefix = "{images}" }}

[[data.views]]
num_views = 2
transforms = [
  {{ type = "RandomResizedCrop", size = 24, scale = [0.2, 1.0] }},
  {{ type = "ColorJitter", p = 0.8, brightness = 0.4, contrast = 0.4, saturation = 0.4, hue = 0.1 }},
  {{ type = "RandomHorizontalFlip" }},
]

[optimizer]
type = "AdamW"
lr = 1e-3
weight_decay = 0.05

[lr]
policy = "CosineAnnealing"
by = "iter"

[checkpoint]
interval = {saved}
max_keep_ckpts = 9
by = "iter"

[log]
interval = 1

[engine]
device = "cpu"
threads = 1
"""
TOLERANCE = 1e-5  # relative


def started(words: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(words)
    return code, err.getvalue()


def train(recipe: Path, ranks: int, stage: int, *words: str) -> RunFiles:
    words = (str(recipe), "--set", f"engine.zero_stage={stage}", *words)
    for code, err in run_ranks(started, ranks, list(words), timeout_s=900):
        assert code == 0, err
    return RunFiles(recipe.parent / "runs/elastic")


def losses(run: RunFiles) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in small_run.metrics(run.path) if "train/loss" in row}


def write(folder: Path, images: Path, saved: int, steps: int) -> Path:
    path = folder / "elastic.toml"
    path.write_text(RECIPE.format(steps=steps, saved=saved, folder=folder / "runs", images=images))
    return path


def continued(straight: RunFiles, recipe: Path, folder: Path, saved: int, ranks: int, stage: int) -> dict[int, float]:
    """The losses after the checkpoint of step `saved` of a run that goes on with so many ranks."""
    small_run.as_of(straight.path, saved, folder)
    run = RunFiles(folder / straight.path.name)
    train(recipe, ranks, stage, "--resume", "--work-dir", str(folder))
    before, after = run.machine()["starts"]
    assert before["step"] == 0 and after == {"step": saved, "ranks": ranks, "nodes": 1, "device": "cpu"}
    changed = f"changed on this resume: number of ranks: {before['ranks']} -> {ranks}\n"
    assert changed in (run.path / "log.txt").read_text()
    return {step: loss for step, loss in losses(run).items() if step > saved}


def largest_difference(some: dict[int, float], others: dict[int, float]) -> float:
    assert some.keys() == others.keys()
    return max(abs(some[step] / others[step] - 1) for step in some)


def test_two_ranks_go_on_as_one(tmp_path, images):
    recipe = write(tmp_path, images, saved=2, steps=6)
    straight = train(recipe, 2, 1)
    wanted = {step: loss for step, loss in losses(straight).items() if step > 2}
    assert len(wanted) == 4 and len(set(wanted.values())) == 4
    one = continued(straight, recipe, tmp_path / "one", 2, 1, 1)
    assert largest_difference(one, wanted) < TOLERANCE


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_four_ranks_go_on_as_three_two_and_one(tmp_path, images, stage):
    recipe = write(tmp_path, images, saved=5, steps=25)
    straight = train(recipe, 4, stage)
    wanted = {step: loss for step, loss in losses(straight).items() if step > 5}
    assert len(wanted) == 20
    for ranks in (3, 2, 1):
        found = continued(straight, recipe, tmp_path / str(ranks), 5, ranks, stage)
        assert largest_difference(found, wanted) < TOLERANCE, ranks


@pytest.mark.nightly
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_from_shards_goes_on_with_other_ranks_as_one_from_files(tmp_path, images, monkeypatch, before, after):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    packed = tmp_path / "packed"
    assert started(["data", "pack", str(images), str(packed), "--shard-size", "30k"])[0] == 0
    assert len(list(packed.glob("*.tar"))) > 3
    found = {}
    for name in ("files", "shards"):
        (tmp_path / name).mkdir()
        recipe = write(tmp_path / name, images, saved=2, steps=6)
        if name == "shards":
            of_files = f'type = "ImageFolder", data_prefix = "{images}"'
            assert of_files in recipe.read_text()
            text = recipe.read_text().replace(of_files, f'type = "WebDataset", shards = "{packed}"')
            recipe.write_text(text)
        straight = train(recipe, before, 1)
        wanted = {step: loss for step, loss in losses(straight).items() if step > 2}
        found[name] = continued(straight, recipe, tmp_path / name / "other", 2, after, 1)
        assert len(set(wanted.values())) == 4 and largest_difference(found[name], wanted) < TOLERANCE
    assert found["files"] == found["shards"], "to the bit"
