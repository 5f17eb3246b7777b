"""What is measured on held-out pictures: when, that it is what it says, and that the training never notices."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import small_run
from sslrun.cli import main
from sslrun.errors import UsageError
from sslrun.evaluation.held_out import untouched
from sslrun.evaluation.monitor import MonitorConfig

CPU = torch.device("cpu")
SIMSIAM = """
[model]
type = "SimSiam"
backbone = { type = "ResNet", depth = 18, base_width = 4, stem = "small" }
neck = { type = "NonLinearNeck", in_channels = 32, hid_channels = 16, out_channels = 16 }

[model.head]
type = "LatentPredictHead"
predictor = { type = "NonLinearNeck", in_channels = 16, hid_channels = 8, out_channels = 16 }

"""


def run(recipe: Path, work_dir: Path, *options: str) -> list[dict[str, Any]]:
    """The rows of one training in this process."""
    words = [str(recipe), "--work-dir", str(work_dir), *(f"--set={option}" for option in options)]
    assert main(words) == 0
    return small_run.metrics(work_dir / "small")


def without(rows: list[dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith(prefix)} for row in rows]


@pytest.fixture
def simsiam(tmp_path, pictures):
    """A method whose loss depends on weights and pictures alone."""
    path = small_run.write_recipe(tmp_path, pictures, steps=5)
    text = path.read_text()
    path.write_text(text[: text.index("[model]")] + SIMSIAM + text[text.index("[data]") :])
    return path


def test_the_held_out_loss_is_what_training_would_have(tmp_path, pictures, simsiam):
    """Held out what is trained on, in the order of epoch 0, with a learning rate of 0: an epoch's losses are its parts.

    80 pictures are 5 batches of 16, each of two BatchNorm groups, in one micro-batch or in two.
    """
    same = f'holdout = {{ type = "ImageFolder", data_prefix = "{pictures}" }}'
    simsiam.write_text(simsiam.read_text().replace("holdout = 0.2", same))
    standing = ["optimizer.lr=0.0", "log.interval=1", "monitor.knn_interval=0", "monitor.loss_interval=1"]
    for micro_batch in (16, 8):
        rows = run(simsiam, tmp_path / str(micro_batch), *standing, f"engine.micro_batch={micro_batch}")
        before, *steps, after = rows
        losses = [row["train/loss"] for row in steps]
        assert (before["step"], len(losses), after["step"]) == (0, 5, 5)
        assert before["val/loss"] == pytest.approx(sum(losses) / 5, rel=1e-6)
        assert before["val/feature_std"] == pytest.approx(sum(row["train/feature_std"] for row in steps) / 5, rel=1e-6)
        assert after["val/loss"] == before["val/loss"], "the same pictures in the same crops"
        assert max(losses) - min(losses) > 1e-4, "or any mean would do"


def test_training_is_the_same_bits_with_and_without_it(tmp_path, pictures):
    """The queue, both networks' statistics, the optimiser; on two ranks, with everything sharded, too."""
    recipe = small_run.write_recipe(tmp_path, pictures, steps=9)
    first = []
    for ranks in (1, 2):
        measured, plain = tmp_path / f"{ranks}/with/small", tmp_path / f"{ranks}/without/small"
        for where, interval in ((measured, 1), (plain, 0)):
            options = [f"--work-dir={where.parent}", f"--set=monitor.loss_interval={interval}"]
            words = small_run.command(recipe, *options, "--set=engine.zero_stage=3", ranks=ranks)
            code, output = small_run.finish(small_run.start(words))
            assert code == 0, output[-3000:]
        for step in (4, 8, 9):
            assert small_run.differences(*(each / f"checkpoints/step_{step:08d}" for each in (measured, plain))) == []
        rows = small_run.timeless(small_run.metrics(measured))
        assert without(rows, "val/") == small_run.timeless(small_run.metrics(plain))
        losses = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}
        assert list(losses) == [0, 4, 8, 9] and len(set(losses.values())) == 4
        first.append(losses[0])
    assert first[0] == pytest.approx(first[1], rel=1e-5), "two ranks measure what one does"


def test_when_it_is_due():
    def steps(config: MonitorConfig, total: int = 11) -> list[int]:
        return [step for step in range(total + 1) if config.is_due(config.loss_interval, step, 4, total)]

    assert steps(MonitorConfig(loss_interval=1)) == [0, 4, 8, 11]
    assert steps(MonitorConfig(loss_interval=2)) == [0, 8, 11]
    assert steps(MonitorConfig(loss_interval=9)) == [0, 11]
    assert steps(MonitorConfig(loss_interval=3, by="iter")) == [0, 3, 6, 9, 11]
    assert steps(MonitorConfig(knn_interval=1)) == []
    with pytest.raises(UsageError, match=r"monitor\.loss_interval must be at least 0, not -1"):
        MonitorConfig(loss_interval=-1)


def test_each_has_an_interval_and_a_row_has_what_is_due(tmp_path, pictures):
    recipe = small_run.write_recipe(tmp_path, pictures, steps=7)
    rows = run(
        recipe, tmp_path, "monitor.by=iter", "monitor.loss_interval=3", "monitor.knn_interval=2", "log.interval=9"
    )
    seen = {row["step"]: {key.split("/")[0] for key in row} & {"val", "knn"} for row in rows if "train/loss" not in row}
    both = {"val", "knn"}
    assert seen == {0: both, 2: {"knn"}, 3: {"val"}, 4: {"knn"}, 6: both, 7: both}
    assert rows[0].keys() >= {"val/loss", "val/top1_pct", "val/feature_std"}
    assert all(math.isfinite(row["val/loss"]) for row in rows if "val/loss" in row)


def test_fewer_pictures_than_a_batch_are_said_to_be_in_it_twice(tmp_path, pictures, capsys):
    recipe = small_run.write_recipe(tmp_path, pictures, steps=1)
    rows = run(recipe, tmp_path, "data.holdout=0.1", "monitor.loss_interval=1")
    assert "the 8 held-out pictures fill a global batch of 16 only with some" in capsys.readouterr().err
    assert math.isfinite(rows[0]["val/loss"])


def test_without_held_out_pictures_nothing_is_measured_and_that_is_said(tmp_path, pictures, capsys):
    recipe = small_run.write_recipe(tmp_path, pictures, steps=1)
    recipe.write_text(recipe.read_text().replace("holdout = 0.2\n", ""))
    rows = run(recipe, tmp_path, "monitor.loss_interval=1")
    assert "no held-out pictures (data.holdout)" in capsys.readouterr().err
    assert not any("val/loss" in row for row in rows)


@pytest.mark.parametrize("name", ["npid", "odc", "deepcluster"])
def test_a_method_that_knows_its_pictures_has_no_loss_on_others(name, capsys):
    recipe = small_run.ROOT / f"configs/learn/{name}.toml"
    assert main([str(recipe), "--set", "monitor.loss_interval=1", "--dry-run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "monitor.loss_interval" in lines[0] and "set it to 0" in lines[0]


class Restless(nn.Module):
    """Does in a forward pass all that a method should not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.centre = self.centre * 0.9 + x.mean(0)
        self.count += 1
        return self.norm(nn.functional.dropout(x, 0.5)).sum()


def test_whatever_a_method_does_is_undone():
    module = Restless()
    buffers, values = dict(module.named_buffers()), {n: b.clone() for n, b in module.named_buffers()}
    state = torch.get_rng_state()
    with untouched(module, CPU):
        loss = module(torch.ones(4, 3))
        assert module.count == 1 and module.centre.sum() == 3 and module.norm.num_batches_tracked == 1
    assert not loss.requires_grad and torch.equal(torch.get_rng_state(), state)
    assert all(module.get_buffer(name) is buffer for name, buffer in buffers.items())
    assert all(torch.equal(buffer, values[name]) for name, buffer in buffers.items())
