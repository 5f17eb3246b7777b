"""The metrics of a step are those of the global batch, for any division among micro-batches and ranks."""

import pytest
import torch
import torch.nn.functional as F

import small_run
from ranks import run_ranks
from sslrun.contract import Loss, Pooled
from sslrun.nn.feature_std import feature_std
from sslrun.runtime import distributed
from sslrun.runtime.metrics import of_a_step


def embeddings() -> torch.Tensor:
    return torch.randn(24, 7, generator=torch.Generator().manual_seed(0)) + 0.3


def longhand(rows: torch.Tensor) -> float:
    """sqrt(D) times the mean over dimensions of the standard deviation of the unit vectors, a number at a time."""
    unit = [[x / sum(y * y for y in row) ** 0.5 for x in row] for row in rows.double().tolist()]
    spread = 0.0
    for column in zip(*unit, strict=True):
        mean = sum(column) / len(column)
        spread += (sum((x - mean) ** 2 for x in column) / len(column)) ** 0.5
    return spread / len(unit[0]) * len(unit[0]) ** 0.5


def metrics(rows: torch.Tensor, micro_batches: int) -> dict[str, torch.Tensor]:
    parts = rows.chunk(micro_batches)
    return of_a_step(
        [Loss(part.mean(), {"top1_pct": part[:, 0].mean(), "spread": feature_std(part)}) for part in parts]
    )


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8])
def test_a_pooled_metric_is_of_all_micro_batches(micro_batches):
    rows = embeddings()
    found = metrics(rows, micro_batches)
    assert {name: (value.dtype, value.dim()) for name, value in found.items()} == dict.fromkeys(
        ("loss", "top1_pct", "spread"), (torch.float32, 0)
    )
    assert found["spread"].item() == pytest.approx(longhand(rows), rel=1e-6)
    assert found["loss"].item() == pytest.approx(rows.mean().item(), rel=1e-6)
    assert found["top1_pct"].item() == pytest.approx(rows[:, 0].mean().item(), rel=1e-6)
    if micro_batches > 1:
        apart = sum(longhand(part) for part in rows.chunk(micro_batches)) / micro_batches
        assert abs(apart - longhand(rows)) > 1e-3, "the mean over the parts is something else"


def _on_a_rank(micro_batches: int) -> float:
    distributed.init(torch.device("cpu"))
    rank = distributed.rank()
    try:
        return metrics(embeddings().chunk(2)[rank], micro_batches)["spread"].item()
    finally:
        distributed.shutdown()


@pytest.mark.nightly
def test_a_pooled_metric_is_of_all_ranks():
    assert run_ranks(_on_a_rank, 2, 3) == [pytest.approx(longhand(embeddings()), rel=1e-6)] * 2


def test_a_row_does_not_depend_on_what_is_on_the_device_at_once(tmp_path, images):
    recipe, rows = small_run.write_recipe(tmp_path, images, steps=1), []
    for micro_batch in (16, 8):
        options = [
            f"engine.micro_batch={micro_batch}",
            "monitor.knn_interval=0",
            f"work_dir={tmp_path / str(micro_batch)}",
        ]
        small_run.train(recipe, *(f"--set={option}" for option in options))
        (row,) = small_run.timeless(small_run.metrics(tmp_path / f"{micro_batch}/small"))
        rows.append(row)
    assert rows[0]["train/feature_std"] > 0.01 and rows[0] == pytest.approx(rows[1], rel=1e-4)


def test_equal_embeddings_have_no_spread():
    """The sums of squares of almost equal numbers cancel; nothing of them may be left, and no NaN."""
    rows = torch.randn(1, 512, generator=torch.Generator().manual_seed(1)).expand(256, -1).contiguous()
    assert of_a_step([Loss(rows.mean(), {"spread": feature_std(rows)})])["spread"].item() < 1e-5
    off = rows + 1e-4 * F.normalize(torch.randn(256, 512, generator=torch.Generator().manual_seed(2)), dim=1)
    assert of_a_step([Loss(rows.mean(), {"spread": feature_std(off)})])["spread"].item() == pytest.approx(
        longhand(off), rel=1e-3
    )


def test_a_method_may_pool_a_metric_of_its_own():
    losses = [Loss(torch.zeros(()), {"largest": Pooled(torch.ones(2), lambda sums: sums.prod())}) for _ in range(3)]
    assert of_a_step(losses)["largest"].item() == 9
