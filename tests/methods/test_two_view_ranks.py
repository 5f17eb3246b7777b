"""SimCLR, BYOL, SimSiam and Barlow Twins with SyncBN: ranks compute what one process does with the whole batch."""

from pathlib import Path

import pytest
import test_barlowtwins
import test_byol
import test_simclr
import test_simsiam
import torch
from torch import Tensor
from two_views import assert_equal_steps, piece, random_batch, step

from ranks import run_ranks
from sslrun.runtime import distributed

METHODS = {
    "SimCLR": test_simclr.small,
    "BYOL": test_byol.small,
    "SimSiam": test_simsiam.small,
    "BarlowTwins": test_barlowtwins.small,
}


def steps_of_a_rank(num_samples: int) -> dict[str, tuple[float, dict[str, Tensor]]]:
    """In each rank: its part of the batch; loss and gradients averaged over ranks, as the executor does."""
    distributed.init(torch.device("cpu"))
    share = num_samples // distributed.world_size()
    part = piece(random_batch(num_samples), distributed.rank() * share, share)
    results = {}
    for name, make in METHODS.items():
        value, gradients = step(make(), [part])
        averages = [torch.tensor(value, dtype=torch.float64), *gradients.values()]
        distributed.all_reduce_mean_(averages)
        results[name] = float(averages[0]), dict(zip(gradients, averages[1:], strict=True))
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_compute_what_one_process_does(world_size, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    ranks = run_ranks(steps_of_a_rank, world_size, 8)
    for name, make in METHODS.items():
        whole = step(make(), [random_batch(8)])
        for results in ranks:
            assert_equal_steps(whole, results[name])
