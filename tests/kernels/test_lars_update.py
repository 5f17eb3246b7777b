"""lars_update_ and square_sums: accuracy over sizes, offsets, layouts and dtypes; skipped steps; launches and bytes."""

from collections.abc import Callable

import pytest
import torch
from ahead_of_time import launched
from launches import LAUNCHES
from test_ema_update import Counted, both, copies, drawn, laid_out
from torch import Tensor
from truth import assert_as_accurate

from sslkernels import lars_update
from sslkernels.device import INTERPRETED
from sslkernels.lars_update import BLOCK, CHUNK, MERGED, WARPS, lars_update_, reference, square_sums

DECAY = 0.1
SHAPES = {
    "one": [(1,)],
    "scalar": [()],
    "primes": [(7,), (13, 17), (3, 5, 7)],
    "edges of blocks": [(BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (2 * BLOCK + 3,)],
    "edges of chunks": [(CHUNK - 1,), (CHUNK + 1,)] if not INTERPRETED else [(BLOCK,)],
    "empty among others": [(0,), (5,), (3, 0), (64,)],
    "all empty": [(0,), (0, 2)],
    "many tiny": [(1 + i % 9,) for i in range(100)],
}


def check(
    weights: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    momentum: float = 0.9,
    found_inf: Tensor | None = None,
) -> None:
    """Update `weights` and `buffers`, and compare with float64 and with plain PyTorch."""
    scales = torch.linspace(0.01, 2.0, len(weights), dtype=torch.float64, device=weights[0].device)
    plain, true = (
        [[kind(x.detach()).clone() for x in side] for side in (weights, gradients, buffers)]
        for kind in (lambda x: x, Tensor.double)
    )
    for side, numbers in ((plain, scales.float()), (true, scales)):
        for w, g, m, scale in zip(*side, numbers, strict=True):
            reference(w, g, m, scale, momentum, DECAY)
    lars_update_(weights, gradients, buffers, scales, momentum, DECAY, found_inf)
    for side in (0, 2):
        for x, p, exact in zip((weights, gradients, buffers)[side], plain[side], true[side], strict=True):
            assert_as_accurate(x.detach(), p, exact, x.dtype)
    assert all(torch.equal(g, before) for g, before in zip(gradients, plain[1], strict=True))


def three(
    shapes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype = torch.float32
) -> list[list[Tensor]]:
    return [*both(shapes, device, dtype, dtype), drawn(shapes, dtype, device, 3)]


def check_sums(weights: list[Tensor], gradients: list[Tensor]) -> None:
    truth = torch.tensor([[float(x.double().square().sum()) for x in side] for side in (weights, gradients)])
    torch.testing.assert_close(square_sums(weights, gradients).cpu(), truth.double(), rtol=5e-6, atol=0.0)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_sizes(device, shapes):
    weights, gradients, buffers = three(shapes, device)
    check_sums(weights, gradients)
    check(weights, gradients, buffers)


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(device, weight, gradient):
    shapes = [(BLOCK + 100,), (33, 5)]
    weights, gradients = both(shapes, device, weight, gradient)
    check(weights, gradients, drawn(shapes, weight, device, 3))


def test_sums_of_more_blocks_than_one_program_adds_at_once(device):
    count = 2 * MERGED + 1 if not INTERPRETED else 3
    weights, gradients = both([(count * BLOCK + 1,), (3,)], device, torch.float32, torch.float32)
    check_sums(weights, gradients)


def test_sums_are_merged_over_many_blocks(device, monkeypatch):
    monkeypatch.setattr(lars_update, "MERGED", 2)
    check_sums(*both([(5 * BLOCK,), (BLOCK + 7,), (4 * BLOCK,)], device, torch.float32, torch.float32))


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "transposed", "with gaps"])
@pytest.mark.parametrize("gradient_layout", ["contiguous", "channels-last", "with gaps", "one row for all"])
def test_layouts(device, layout, gradient_layout):
    weights, gradients, buffers = three([(8, 6, 5, 4)], device)
    weights, gradients = [laid_out(layout, weights[0])], [laid_out(gradient_layout, gradients[0])]
    strides = weights[0].stride()
    check_sums(weights, gradients)
    check(weights, gradients, [laid_out(layout, buffers[0])])
    check(weights, gradients, [laid_out("contiguous", buffers[0])])
    assert weights[0].stride() == strides


@pytest.mark.parametrize(("weight_at", "gradient_at", "buffer_at"), [(0, 1, 0), (1, 0, 0), (0, 0, 3), (4, 8, 12)])
def test_views_that_begin_anywhere(device, weight_at, gradient_at, buffer_at):
    size = BLOCK + 48
    whole = three([(size + 16,)], device)
    around = copies([side[0] for side in whole])
    places = [slice(at, at + size) for at in (weight_at, gradient_at, buffer_at)]
    check(*([side[0][place]] for side, place in zip(whole, places, strict=True)))
    for side, place, before in zip(whole, places, around, strict=True):
        side[0][place] = before[place]
        assert torch.equal(side[0], before)  # nothing outside the views changed


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 1.0])
def test_momenta(device, momentum):
    weights, gradients, buffers = three([(100,), (BLOCK,)], device)
    before = copies(buffers)
    check(weights, gradients, buffers, momentum)
    assert momentum or all(torch.equal(m, b) for m, b in zip(buffers, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "with gaps"])
def test_found_inf(device, dtype, layout):
    shape = [(8, 6, 5, 4)]
    weights, gradients, buffers = ([laid_out(layout, side[0])] for side in three(shape, device, dtype))
    gradients[0].view(-1)[:1].fill_(torch.nan) if layout == "contiguous" else gradients[0].fill_(torch.inf)
    before = copies([*weights, *buffers])
    scales = torch.ones(1, dtype=torch.float64, device=device)
    for flag in (torch.ones((), device=device), torch.full((), 2.0, device=device)):
        lars_update_(weights, gradients, buffers, scales, 0.9, DECAY, flag)
        assert all(torch.equal(x, b) for x, b in zip([*weights, *buffers], before, strict=True))
    check(*three(shape, device, dtype), found_inf=torch.zeros((), device=device))


def test_the_reference_obeys_found_inf(device):
    (w,), (g,), (m,) = three([(50,)], device)
    before = copies([w, m])
    reference(w, torch.full_like(g, torch.nan), m, 1.0, 0.9, DECAY, torch.ones((), device=device))
    assert torch.equal(w, before[0]) and torch.equal(m, before[1])


def test_two_runs_are_equal(device):
    runs = []
    for _ in range(2):
        weights, gradients, buffers = three([(3 * BLOCK + 5,), (77,)], device)
        for _ in range(2):
            sums = square_sums(weights, gradients)
            lars_update_(weights, gradients, buffers, sums[0].sqrt() * 1e-3, 0.9, DECAY)
        runs.append([sums, *weights, *buffers])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_parameters_that_require_a_gradient(device):
    weights, gradients, buffers = three([(5,)], device)
    weights = [torch.nn.Parameter(weights[0])]
    loss = weights[0].square().sum()
    check(weights, gradients, buffers)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # autograd notices that the weight changed after the forward pass


def test_number_of_launches_is_constant(device, monkeypatch):
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("the CPU path uses no kernel")
    kernels = {
        name: Counted(getattr(lars_update, name)) for name in ("_squares_kernel", "_merge_kernel", "_update_kernel")
    }
    for name, kernel in kernels.items():
        monkeypatch.setattr(lars_update, name, kernel)
    for calls, count in enumerate((1, 3, 50), start=1):
        weights, gradients, buffers = three([(64,), (33,)] * count, device)
        check_sums(weights, gradients)
        check(weights, gradients, buffers)
        assert [kernel.launches for kernel in kernels.values()] == [calls] * 3


def test_tables_cover_each_element_once():
    sizes = (3 * BLOCK, 0, 7, BLOCK + 1)
    tensors = tuple((8 * i, 0, 0, size) for i, size in enumerate(sizes))
    addresses, blocks, ends = lars_update._tables(torch.device("cpu"), tensors)
    assert addresses.tolist() == [list(row) for row in tensors]
    expected = [[i, first] for i, size in enumerate(sizes) for first in range(0, size, BLOCK)]
    assert blocks.tolist() == expected
    assert ends.tolist() == [0, 3, 3, 4, 6]


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize(
    ("launch", "update"), [("lars_update: momentum, found_inf", (3, 2)), ("lars_update: no momentum", (2, 1))]
)
def test_bytes_per_parameter(launch, update):
    """A full block moves 8 bytes per parameter for the sums, and 20 with momentum for the update, 16 at once."""
    kernels = {kernel.kernel: kernel.ptx for kernel in launched(LAUNCHES[launch], 90)}
    accesses = BLOCK // (WARPS * 32) // 4  # of 16 bytes, per thread and tensor
    counts = {name: tuple(ptx.count(f"{op}.global.v4") for op in ("ld", "st")) for name, ptx in kernels.items()}
    assert counts["_squares_kernel"] == (2 * accesses, 0)
    assert counts["_update_kernel"] == tuple(number * accesses for number in update)


@pytest.mark.skipif(INTERPRETED, reason="tests the CPU path")
def test_no_large_temporaries_on_the_cpu():
    weights, gradients, buffers = three([(8 * CHUNK,)], torch.device("cpu"))
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        sums = square_sums(weights, gradients)
        lars_update_(weights, gradients, buffers, sums[0], 0.9, DECAY)
    assert max(event.cpu_memory_usage for event in profile.function_events) <= 4 * CHUNK


@pytest.fixture
def on_the_gpu() -> tuple[list[list[Tensor]], Callable[[], None]]:
    device = torch.device("cuda")
    lists = three([(BLOCK + 1,), (64,)], device)
    found_inf = torch.zeros((), device=device)

    def step() -> None:
        lars_update_(*lists, square_sums(*lists[:2])[0] * 1e-3, 0.9, DECAY, found_inf)

    return lists, step


@pytest.mark.gpu
def test_nothing_waits_for_the_device(on_the_gpu):
    _, step = on_the_gpu
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_cuda_graph_replays_it(on_the_gpu):
    lists, step = on_the_gpu
    start = [copies(side) for side in lists]
    step()
    expected = [copies(side) for side in lists]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    lars_update._addresses.cache_clear()
    lars_update._blocks.cache_clear()
    for side, before in zip(lists, start, strict=True):
        torch._foreach_copy_(side, before)
    graph.replay()
    assert all(
        torch.equal(x, e) for side, true in zip(lists, expected, strict=True) for x, e in zip(side, true, strict=True)
    )
