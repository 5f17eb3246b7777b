"""sinkhorn and its center: accuracy, SwAV's own form, empty rows and columns, ranks, memory, compilers, bad input."""

import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from memory import Peak
from torch import Tensor
from truth import DTYPES, NIGHTLY_IF_INTERPRETED, assert_as_accurate, error

from ranks import run_ranks
from sslkernels import running_softmax, sinkhorn, sinkhorn_center
from sslkernels.device import INTERPRETED
from sslkernels.sinkhorn import _assignments, _column_levels, reference

# numpy, which runs interpreted kernels, warns about logarithms of 0 and about products that a kernel discards.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):RuntimeWarning")

# (B, K): ones, primes, and one below, at and above the sizes of the kernels' blocks; several splits of either side.
SHAPES = [
    (1, 1), (1, 7), (7, 1), (2, 3), (13, 17), (3, 255), (16, 256), (17, 257), (31, 513), (70, 30), (5, 2100),
]  # fmt: skip


def scores(rows: int, columns: int, dtype=torch.float32, device="cpu", seed=0, spread=1.0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=random) * spread).to(device=device, dtype=dtype)


def swav(x: Tensor, epsilon: float, num_iters: int) -> Tensor:
    """`distributed_sinkhorn` of SwAV's main_swav.py, on one process."""
    Q = torch.exp(x / epsilon).t()
    K, B = Q.shape
    Q /= Q.sum()
    for _ in range(num_iters):
        Q /= Q.sum(dim=1, keepdim=True)
        Q /= K
        Q /= Q.sum(dim=0, keepdim=True)
        Q /= B
    return (Q * B).t()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_as_accurate_as_torch(shape, dtype, device):
    x = scores(*shape, dtype, device)
    assignments = sinkhorn(x, 0.3, 3)
    assert assignments.dtype == dtype and not assignments.requires_grad
    assert_as_accurate(assignments, reference(x, 0.3, 3), reference(x.double(), 0.3, 3), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_iters", [1, 2, 5])
@pytest.mark.parametrize("epsilon", [0.002, 0.01, 0.05, 1.0])
def test_peaked_and_flat(epsilon, num_iters, dtype, device):
    x = scores(33, 70, dtype, device, seed=1)
    truth = reference(x.double(), epsilon, num_iters)
    assert_as_accurate(sinkhorn(x, epsilon, num_iters), reference(x, epsilon, num_iters), truth, dtype)


@pytest.mark.skipif(INTERPRETED, reason="float64 never goes to a kernel")
@pytest.mark.parametrize("epsilon", [0.05, 1.0])
@pytest.mark.parametrize("num_iters", [1, 10])
def test_equals_what_swav_computes(num_iters, epsilon):
    x = scores(29, 43, torch.float64, seed=2)
    expected = swav(x, epsilon, num_iters)
    assert error(sinkhorn(x, epsilon, num_iters), expected) < 1e-13
    assert error(reference(x, epsilon, num_iters), expected) < 1e-13


@pytest.mark.parametrize("num_iters", [1, 3])
def test_the_center_makes_the_assignments_a_softmax(num_iters, device):
    x = scores(29, 300, torch.float32, device, seed=3)
    center = sinkhorn_center(x, 0.1, num_iters)
    assert center.shape == (300,) and center.dtype == torch.float32
    truth = reference(x.double(), 0.1, num_iters)
    assert error(torch.softmax((x.double() - center) / 0.1, dim=1), truth) < 1e-5
    assert error(torch.softmax(x.double() / 0.1, dim=1), truth) > 0.1  # which no other center would do
    assert sinkhorn_center(x.bfloat16(), 0.1, num_iters).dtype == torch.float32
    assert sinkhorn_center(x.double(), 0.1, num_iters).dtype == torch.float64


def test_parts_of_the_rows_give_the_center_of_all(device):
    """Also where a part has a column without mass, and the others have it; one part exists at a time."""
    x = scores(40, 300, torch.float64, device, seed=3)
    x[:7, 4] = -torch.inf
    x[:, 5] = -torch.inf
    alive: list[weakref.ref[Tensor]] = []

    def part(first: int, last: int) -> Tensor:
        assert all(other() is None for other in alive)
        made = x[first:last].clone()
        alive.append(weakref.ref(made))
        return made

    parts = [partial(part, first, last) for first, last in ((0, 7), (7, 8), (8, 40))]
    torch.testing.assert_close(sinkhorn_center(parts, 0.1, 3), sinkhorn_center(x, 0.1, 3), rtol=1e-12, atol=1e-13)
    assert len(alive) == 9
    with pytest.raises(ValueError, match="num_iters"):
        sinkhorn_center(parts, 0.1, 0)


def test_all_prototypes_are_used_equally(device):
    assignments = sinkhorn(scores(40, 10, device=device, seed=4), 1.0, 20)
    torch.testing.assert_close(assignments.sum(dim=1), torch.ones(40, device=device), rtol=0, atol=1e-5)
    torch.testing.assert_close(assignments.sum(dim=0), torch.full((10,), 4.0, device=device), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES[::-1])
def test_rows_and_columns_without_mass_are_as_if_they_did_not_exist(dtype, device):
    x = scores(40, 300, dtype, device, seed=5)
    x[[0, 17]] = -torch.inf
    x[:, [3, 260]] = -torch.inf
    x[5, 100:299] = -torch.inf  # not all of the row
    rows = [row for row in range(40) if row not in (0, 17)]
    columns = [column for column in range(300) if column not in (3, 260)]
    assignments, center = sinkhorn(x, 0.05, 3), sinkhorn_center(x, 0.05, 3)
    assert not assignments[[0, 17]].any() and not assignments[:, [3, 260]].any() and not assignments[5, 100:299].any()
    assert center.isfinite().all() and not center[[3, 260]].any()
    rest = x[rows][:, columns]
    truth, plain = reference(rest.double(), 0.05, 3), reference(rest, 0.05, 3)
    assert_as_accurate(assignments[rows][:, columns], plain, truth, dtype)
    assert error(reference(x.double(), 0.05, 3)[rows][:, columns], truth) < 1e-12
    nothing = torch.full_like(x, -torch.inf)
    assert not sinkhorn(nothing, 0.05, 3).any() and not sinkhorn_center(nothing, 0.05, 3).any()


def test_nan_stays_visible(device):
    x = scores(6, 40, device=device)
    x[2, 3] = torch.nan
    assert sinkhorn_center(x, 0.05, 3).isnan().all() and sinkhorn(x, 0.05, 3).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_scores(dtype, device):
    x = scores(33, 70, dtype, device)
    expected = sinkhorn(x, 0.05, 3)
    assert error(sinkhorn(x.T.contiguous().T, 0.05, 3), expected) < 1e-6
    assert error(sinkhorn(torch.cat([x, x], dim=1)[:, :70], 0.05, 3), expected) < 1e-6
    assert error(sinkhorn(x.repeat_interleave(2, dim=0)[::2], 0.05, 3), expected) < 1e-6


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs one program after another")
def test_repeats_to_the_bit(device):
    x = scores(150, 600, device=device)
    assert torch.equal(sinkhorn(x, 0.05, 3), sinkhorn(x, 0.05, 3))


def test_scores_of_the_network_and_autocast_around_it(device):
    x = scores(33, 70, device=device)
    expected = sinkhorn(x, 0.05, 3)
    with torch.autocast(device.type, torch.bfloat16):
        result = sinkhorn(x.clone().requires_grad_(), 0.05, 3)
    assert torch.equal(result, expected) and not result.requires_grad


ROWS_OF_RANK = {2: [3, 20], 4: [1, 9, 4, 9]}


def over_ranks(shares: list[int]) -> tuple[Tensor, Tensor]:
    """This rank's assignments, and the center, in rows that are dealt out as `shares` says."""
    dist.init_process_group("gloo")
    mine = shared_scores().split(shares)[dist.get_rank()]
    group = dist.group.WORLD
    return sinkhorn(mine, 0.05, 3, group=group), sinkhorn_center(mine, 0.05, 3, group=group)


def shared_scores() -> Tensor:
    """A column that only the first rank knows, and a row of nothing."""
    x = scores(23, 37, seed=6)
    x[1:, 5] = -torch.inf
    x[8] = -torch.inf
    return x


@pytest.mark.parametrize(
    "world_size", [pytest.param(2, marks=NIGHTLY_IF_INTERPRETED), pytest.param(4, marks=pytest.mark.nightly)]
)
def test_ranks_together_equal_one_process(world_size, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    results = run_ranks(over_ranks, world_size, ROWS_OF_RANK[world_size])
    truth = reference(shared_scores().double(), 0.05, 3)
    together = torch.cat([assignments for assignments, _ in results])
    assert error(together, truth) < 1e-5
    assert all(torch.equal(center, results[0][1]) for _, center in results)
    alone = [reference(x.double(), 0.05, 3) for x in shared_scores().split(ROWS_OF_RANK[world_size])]
    assert error(torch.cat(alone), truth) > 0.1


@pytest.mark.skipif(INTERPRETED, reason="tests the chunked path")
@pytest.mark.parametrize("shape", [(640, 3000), (40, 70_000)])
def test_memory_is_a_few_chunks_and_the_assignments(shape, monkeypatch):
    monkeypatch.setattr(running_softmax, "CHUNK_ELEMENTS", 2**16 // torch.get_num_threads())
    x, few = scores(*shape), 24 * max(2**16, shape[1])  # bytes of six float32 chunks
    assert few < x.nbytes / 4
    with Peak(x) as first:
        levels = _column_levels._init_fn(x, None, 0.05)
    with Peak(x, levels) as further:
        _column_levels._init_fn(x, levels, 0.05)
    with Peak(x, levels) as assigning:
        assignments = _assignments._init_fn(x, levels, 0.05)
    assert 0 < first.bytes < few and 0 < further.bytes < few
    assert assignments.nbytes <= assigning.bytes < assignments.nbytes + few


@pytest.mark.skipif(INTERPRETED, reason="compiled code does not call the interpreter")
def test_in_a_compiled_caller(device):
    x = scores(33, 70, device=device)
    compiled = torch.compile(lambda x: sinkhorn(x * 2, 0.05, 3), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), sinkhorn(x * 2, 0.05, 3))


@pytest.mark.skipif(INTERPRETED, reason="compiled code does not call the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operators_are_what_they_declare(dtype, device):
    x = scores(33, 70, dtype, device)
    torch.library.opcheck(_column_levels, (x, None, 0.05))
    center = sinkhorn_center(x, 0.05, 1)
    torch.library.opcheck(_column_levels, (x, center, 0.05))
    torch.library.opcheck(_assignments, (x.T.contiguous().T, center, 0.05))


SCORES = torch.ones(4, 8)


@pytest.mark.parametrize("function", [sinkhorn, sinkhorn_center])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(8), 0.05, 3), "scores: expected a 2-d floating tensor, got (8,) float32"),
        ((SCORES.long(), 0.05, 3), "scores: expected a 2-d floating tensor, got (4, 8) int64"),
        (("scores", 0.05, 3), "scores: expected a 2-d floating tensor, got 'scores'"),
        ((SCORES[:0], 0.05, 3), "scores: expected at least one row and one column, got (0, 8) float32"),
        ((SCORES, 0.0, 3), "epsilon: expected a finite number above 0, got 0.0"),
        ((SCORES, 0.05, 0), "num_iters: expected a whole number of at least 1, got 0"),
        ((SCORES, 0.05, 1.5), "num_iters: expected a whole number of at least 1, got 1.5"),
    ],
)
def test_bad_input_is_one_line(function, arguments, message):
    with pytest.raises(ValueError) as raised:
        function(*arguments)
    assert str(raised.value) == message
