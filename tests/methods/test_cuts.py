"""A step of any method computes the same however its global batch is cut: into view groups, micro-batches or ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import test_barlowtwins
import test_byol
import test_deepcluster
import test_densecl
import test_dino
import test_distillation
import test_ibot
import test_ijepa
import test_lejepa
import test_moco
import test_mocov3
import test_msn
import test_nnclr
import test_npid
import test_relative_loc
import test_rotation_pred
import test_simclr
import test_simsiam
import test_vicreg
import torch
import two_views
from steps import Step, assert_close, piece, pieces, step

from ranks import run_ranks
from sslrun.contract import Batch, Method
from sslrun.nn.norm import BN, SyncBN, group_norms, set_groups
from sslrun.runtime import distributed


@dataclass(frozen=True)
class Case:
    """A method and how its global batch may be cut.

    Attributes:
        make: the method, always with the same weights.
        batch: the global batch.
        micro_batches: sizes to try on one rank. The first is the size of the BatchNorm groups and the micro-batch on
            ranks. Empty where only all samples at once compute the loss: then ranks have one micro-batch each.
        rtol, atol: the largest difference allowed.
    """

    make: Callable[[], Method]
    batch: Batch
    micro_batches: tuple[int, ...] = ()
    rtol: float = 1e-9
    atol: float = 1e-12

    def whole(self) -> Step:
        """The step over the global batch at once."""
        return step(self.grouped(len(self.batch.index)), [self.batch])

    def grouped(self, micro_batch: int) -> Method:
        method = self.make()
        if self.micro_batches:
            set_groups(method, self.micro_batches[0], micro_batch // self.micro_batches[0])
        return method


CASES = {
    "SimCLR, SyncBN": Case(test_simclr.small, two_views.random_batch(8)),
    "BYOL, SyncBN": Case(test_byol.small, two_views.random_batch(8)),
    "SimSiam, SyncBN": Case(test_simsiam.small, two_views.random_batch(8)),
    "BarlowTwins, SyncBN": Case(test_barlowtwins.small, two_views.random_batch(8)),
    "VICReg, SyncBN": Case(test_vicreg.small, two_views.random_batch(8)),
    "VICReg, SyncBN, more dimensions": Case(partial(test_vicreg.small, 12), two_views.random_batch(8)),
    "NNCLR, SyncBN": Case(test_nnclr.small, two_views.random_batch(8)),
    "MSN, SyncBN": Case(test_msn.small, test_msn.crops_of(8)),
    "IJEPA": Case(test_ijepa.small, test_ijepa.random_batch(8)),
    "LeJEPA, SyncBN": Case(test_lejepa.small, test_lejepa.crops_of(8)),
    "MoCoV3, SyncBN": Case(partial(test_mocov3.small, SyncBN()), test_mocov3.random_batch(16)),
    "RelativeLoc, SyncBN": Case(partial(test_relative_loc.small, SyncBN()), test_relative_loc.random_batch(8)),
    "RotationPred, SyncBN": Case(partial(test_rotation_pred.small, SyncBN()), test_rotation_pred.random_batch(8)),
    "BYOL": Case(partial(test_byol.small, BN()), two_views.random_batch(16), (4, 8)),
    "SimSiam": Case(partial(test_simsiam.small, BN()), two_views.random_batch(16), (4, 8)),
    "MoCo": Case(test_moco.small, two_views.random_batch(32, 16), (4, 8, 16)),
    "DenseCL": Case(test_densecl.small, two_views.random_batch(16, 16), (4, 8)),
    "DINO": Case(test_dino.small, test_dino.multi_crop(16), (4, 8)),
    "Distillation": Case(test_distillation.small, test_distillation.random_batch(16), (4, 8)),
    "IBOT": Case(test_ibot.small, test_ibot.multi_crop(16), (4, 8)),
    "DINOv2": Case(test_ibot.small_v2, test_ibot.multi_crop(16), (4, 8)),
    "DINOv3": Case(test_ibot.small_v3, test_ibot.multi_crop(16, test_ibot.LARGE), (4, 8)),
    "MoCoV3": Case(test_mocov3.small, test_mocov3.random_batch(16), (4, 8)),
    "NPID": Case(test_npid.small, test_npid.random_batch(), (2, 4), 1e-12, 1e-14),
    "RelativeLoc": Case(test_relative_loc.small, test_relative_loc.random_batch(12), (3, 6)),
    "RotationPred": Case(test_rotation_pred.small, test_rotation_pred.random_batch(16), (4, 8)),
    "DeepCluster": Case(test_deepcluster.weighted, test_deepcluster.batch_of(0, 16), (4, 8), 1e-3, 1e-6),
}
WITHOUT_NORMS = ("NPID", "IBOT", "DINOv2", "DINOv3")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case.batch.crops()) == 2])
def test_one_view_group_or_two(name):
    case = CASES[name]
    one, two = (Batch(views, case.batch.index, None) for views in ([torch.cat(case.batch.crops())], case.batch.crops()))
    assert_close(step(case.make(), [one]), step(case.make(), [two]), case.rtol, case.atol)


@pytest.mark.parametrize(
    ("name", "micro_batch"), [(name, size) for name, case in CASES.items() for size in case.micro_batches]
)
def test_micro_batches_are_one_batch(name, micro_batch):
    """Groups of BatchNorm in turn or at once, shuffled keys, dropout and weights of samples included."""
    case = CASES[name]
    cut = step(case.grouped(micro_batch), pieces(case.batch, micro_batch))
    assert_close(cut, case.whole(), case.rtol, case.atol)


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.micro_batches and name not in WITHOUT_NORMS]
)
def test_other_groups_compute_something_else(name):
    """The control of the test above."""
    case = CASES[name]
    method = case.grouped(case.micro_batches[0])
    assert group_norms(method)
    set_groups(method, 2 * case.micro_batches[0], len(case.batch.index) // case.micro_batches[0] // 2)
    assert step(method, [case.batch]).loss != pytest.approx(case.whole().loss, rel=1e-6)


def steps_of_a_rank() -> dict[str, Step]:
    """The step of every method on this rank's share of its batch."""
    torch.set_num_threads(1)
    distributed.init(torch.device("cpu"))
    results = {}
    for name, case in CASES.items():
        share = len(case.batch.index) // distributed.world_size()
        own = piece(case.batch, distributed.rank() * share, share)
        size = case.micro_batches[0] if case.micro_batches else share
        results[name] = step(case.grouped(size), pieces(own, size))
    distributed.shutdown()
    return results


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request) -> list[dict[str, Step]]:
    """The results of every rank. Of two ranks each accumulates two micro-batches or more, of four one or more."""
    return run_ranks(steps_of_a_rank, request.param)


@pytest.mark.parametrize("name", CASES)
def test_ranks_are_one_process(name, ranks):
    case = CASES[name]
    expected = case.whole()
    for results in ranks:
        assert_close(results[name], expected, case.rtol, case.atol)
