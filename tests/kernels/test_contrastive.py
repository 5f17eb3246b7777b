"""info_nce, batch_nce, bank_nce and nt_xent: accuracy, edges, determinism, ranks, compilers, bad input."""

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from contrastive_cases import (
    OPERATIONS,
    PER_ROW,
    Operation,
    batch_nce_over_ranks,
    near,
    nt_xent_over_ranks,
    one_process,
    unit_rows,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from truth import DTYPES, NIGHTLY_IF_INTERPRETED, assert_as_accurate, error, value_and_gradient

from ranks import run_ranks
from sslkernels import bank_nce, batch_nce, info_nce, nt_xent
from sslkernels.bank_nce import _bank_nce
from sslkernels.batch_nce import _batch_nce
from sslkernels.contrast import contrast, sweep_in_chunks
from sslkernels.device import INTERPRETED
from sslkernels.info_nce import _info_nce
from sslkernels.nt_xent import _attraction, _log_sums

# (B, D, K): ones, primes, and one below, at and above the sizes of the kernels' blocks. The chunked path takes D above
# 256 (above 128 in float32) on every device.
SHAPES = [
    (2, 1, 1), (2, 3, 5), (14, 16, 31), (62, 17, 63), (64, 32, 64), (66, 33, 65), (126, 31, 127), (130, 127, 131),
    (6, 128, 257), (6, 129, 257), (4, 256, 67), (4, 257, 67),
]  # fmt: skip
TEMPERATURES = [0.01, 0.024, 0.026, 0.2, 1.0]

OPS = pytest.mark.parametrize("name", OPERATIONS)


def arguments(name, rows, dim, keys, dtype, device, seed=0):
    random = torch.Generator().manual_seed(seed)
    if name == "bank_nce":
        rows = min(rows, 34)  # a program handles one query, so the number of rows has no edges
    queries = (torch.randn(rows, dim, generator=random) * 3).to(device=device, dtype=dtype)
    if name == "nt_xent":  # each row of the second half lies near its row of the first
        queries[rows // 2 :] = near(queries[: rows // 2], random)
    return queries, OPERATIONS[name].others(queries, keys, random)


def check(operation: Operation, queries, others, temperature, dtype):
    truths = [x.double() if x.is_floating_point() else x for x in others]
    truth = value_and_gradient(operation.reference, queries.double(), *truths, temperature)
    plain = value_and_gradient(operation.reference, queries, *others, temperature)
    ours = value_and_gradient(operation, queries, *others, temperature)
    assert ours[1].dtype == dtype
    for result, by_torch, true in zip(ours, plain, truth, strict=True):
        assert_as_accurate(result, by_torch, true, dtype)


@OPS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_as_accurate_as_torch(name, shape, dtype, device):
    queries, others = arguments(name, *shape, dtype, device)
    check(OPERATIONS[name], queries, others, 0.2, dtype)


@OPS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_peaked_and_flat(name, temperature, dtype, device):
    queries, others = arguments(name, 34, 24, 150, dtype, device, seed=1)
    check(OPERATIONS[name], queries, others, temperature, dtype)


def test_float16_needs_the_running_maximum(device):
    """At the lowest temperature of the fixed shift, weights relative to 1/T would be subnormal in float16."""
    queries, others = arguments("batch_nce", 34, 24, 150, torch.float16, device, seed=1)
    check(OPERATIONS["batch_nce"], queries, others, 0.026, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_loss_per_row(dtype, device):
    queries, others = arguments("info_nce", 14, 16, 31, dtype, device)
    check(PER_ROW, queries, others, 0.2, dtype)
    weights = 2.0 ** torch.arange(-7, 7, device=device)
    _, gradient = value_and_gradient(PER_ROW, queries, *others, 0.2)
    _, weighted = value_and_gradient(lambda *args: PER_ROW(*args) * weights, queries, *others, 0.2)
    unit = torch.finfo(dtype).eps * float(gradient.abs().max()) * weights.unsqueeze(1)
    assert ((weighted.double() - gradient.double() * weights.unsqueeze(1)).abs() <= unit).all()


@OPS
def test_a_negative_equal_to_the_query(name, device):
    queries, others = arguments(name, 34, 24, 150, torch.float32, device, seed=2)
    if name == "nt_xent":
        queries[1] = queries[0]
    else:
        others[0 if "info" not in name else 1][7] = F.normalize(queries[3], dim=0)
    check(OPERATIONS[name], queries, others, 0.05, torch.float32)


@OPS
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows_have_a_loss_and_no_gradient(name, dtype, device):
    queries, others = arguments(name, 6, 20, 40, dtype, device)
    queries[2] = 0
    value, gradient = value_and_gradient(OPERATIONS[name], queries, *others, 0.1)
    truths = [x.double() if x.is_floating_point() else x for x in others]
    truth, expected = value_and_gradient(OPERATIONS[name].reference, queries.double(), *truths, 0.1)
    expected[2] = 0
    assert_as_accurate(value, truth.to(dtype), truth, dtype)
    assert not gradient[2].any()
    assert error(gradient, expected) < 0.03 * float(expected.abs().max())  # of the other rows
    value, gradient = value_and_gradient(OPERATIONS[name], torch.zeros_like(queries), *others, 0.1)
    assert value.isfinite().all() and not gradient.any()


def test_keys_far_from_every_query_count_at_a_low_temperature(device):
    """exp((s - 1) / T) underflows for them, so the shift must follow the largest similarity."""
    random = torch.Generator().manual_seed(6)
    center = torch.zeros(16).index_fill_(0, torch.tensor(3), 1.0)
    queries = (center + 0.05 * torch.randn(34, 16, generator=random)).to(device)
    keys = F.normalize(0.05 * torch.randn(150, 16, generator=random) - center, dim=1).to(device)
    check(OPERATIONS["info_nce"], queries, [F.normalize(-queries, dim=1), keys], 0.01, torch.float32)


def test_the_views_of_one_image_have_no_negatives(device):
    """At a low temperature the log-sum of opposite rows is far below 0; columns outside the matrix must not count."""
    rows = torch.zeros(2, 16, device=device)
    rows[0, 3], rows[1, 3] = 1.0, -1.0
    value, gradient = value_and_gradient(nt_xent, rows, 0.01)
    assert float(value) == 0.0 and not gradient.any()


@OPS
def test_strided_inputs(name, device):
    queries, others = arguments(name, 6, 20, 70, torch.float32, device)
    scattered = [
        torch.stack([x, x.flip(0)], dim=-1)[..., 0] if x.is_floating_point() else torch.stack([x, x])[0] for x in others
    ]
    transposed = queries.T.contiguous().T
    assert not transposed.is_contiguous() and not any(x.is_contiguous() for x in scattered if x.is_floating_point())
    expected = value_and_gradient(OPERATIONS[name], queries, *others, 0.2)
    value, gradient = value_and_gradient(OPERATIONS[name], transposed, *scattered, 0.2)
    assert error(value, expected[0]) < 1e-6 and error(gradient, expected[1]) < 1e-6


@OPS
@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs one program after another")
@pytest.mark.parametrize("temperature", [0.01, 0.2])
def test_repeats_to_the_bit(name, temperature, device):
    queries, others = arguments(name, 130, 24, 300, torch.float32, device)
    first = value_and_gradient(OPERATIONS[name], queries, *others, temperature)
    second = value_and_gradient(OPERATIONS[name], queries, *others, temperature)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@OPS
def test_scales_with_what_comes_from_above(name, device):
    queries, others = arguments(name, 6, 20, 40, torch.float32, device)
    _, gradient = value_and_gradient(OPERATIONS[name], queries, *others, 0.2)
    _, scaled = value_and_gradient(lambda *args: OPERATIONS[name](*args) * 1024, queries, *others, 0.2)
    assert torch.equal(scaled, 1024 * gradient)


@OPS
def test_autocast_around_it_changes_nothing(name, device):
    queries, others = arguments(name, 6, 20, 40, torch.float32, device)
    expected = value_and_gradient(OPERATIONS[name], queries, *others, 0.2)
    with torch.autocast(device.type, torch.bfloat16):
        result = value_and_gradient(OPERATIONS[name], queries, *others, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@OPS
def test_without_gradient_the_value_is_the_same(name, device):
    queries, others = arguments(name, 6, 20, 70, torch.float32, device)
    value, _ = value_and_gradient(OPERATIONS[name], queries, *others, 0.2)
    alone = OPERATIONS[name](queries, *others, 0.2)
    assert not alone.requires_grad
    assert error(alone, value) < 1e-6


@OPS
def test_a_second_derivative_is_an_error(name, device):
    queries, others = arguments(name, 6, 20, 40, torch.float32, device)
    queries.requires_grad_()
    (gradient,) = torch.autograd.grad(OPERATIONS[name](queries, *others, 0.2), queries, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        gradient.square().sum().backward()


@pytest.mark.skipif(INTERPRETED, reason="float64 never goes to a kernel")
@pytest.mark.parametrize("name", [*OPERATIONS, "per row"])
@pytest.mark.parametrize("temperature", [0.01, 0.3])
def test_gradcheck(name, temperature):
    operation = OPERATIONS.get(name, PER_ROW)
    queries, others = arguments(name if name in OPERATIONS else "info_nce", 6, 5, 9, torch.float64, "cpu")
    for function in (operation.reference, operation):
        assert torch.autograd.gradcheck(lambda q, f=function: f(q, *others, temperature), queries.requires_grad_())


def test_top1_counts_what_is_closer_than_every_negative(device):
    random = torch.Generator().manual_seed(5)
    queue = unit_rows(70, 16, torch.zeros((), device=device), random)
    queries = unit_rows(10, 16, queue, random)
    positives = queries.clone()
    positives[:4] = -queries[:4]  # farther than every negative
    assert float(info_nce(queries, positives, queue, 0.2)[1]) == pytest.approx(0.6)
    bank = torch.cat([queue, positives])
    own, drawn = torch.arange(70, 80, device=device), torch.arange(70, device=device).expand(10, -1).contiguous()
    assert float(bank_nce(queries, bank, own, drawn, 0.2)[1]) == pytest.approx(0.6)


def test_top1_of_collapsed_embeddings_is_not_a_success(device):
    one = torch.zeros(1, 16, device=device)
    one[0, 3] = 1.0
    _, top1 = info_nce(one.expand(8, -1), one.expand(8, -1), one.expand(40, -1), 0.2)
    assert float(top1) == 0.0


def test_nan_stays_visible(device):
    queries, others = arguments("info_nce", 6, 20, 40, torch.float32, device)
    queries[1, 2] = torch.nan
    loss, top1 = info_nce(queries, *others, 0.2)
    assert loss.isnan() and float(top1) <= 5 / 6


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        pytest.param("nt_xent", 2, marks=NIGHTLY_IF_INTERPRETED),
        pytest.param("nt_xent", 4, marks=pytest.mark.nightly),
        pytest.param("batch_nce", 2, marks=pytest.mark.nightly),
        pytest.param("batch_nce", 4, marks=NIGHTLY_IF_INTERPRETED),
    ],
)
def test_ranks_together_equal_one_process(name, world_size, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    function = {"nt_xent": nt_xent_over_ranks, "batch_nce": batch_nce_over_ranks}[name]
    loss, gradient = one_process(name)
    for rank_loss, rank_gradient in run_ranks(function, world_size, world_size):
        assert rank_loss == pytest.approx(loss, rel=1e-6)
        assert error(rank_gradient, gradient) < 1e-6 * float(gradient.abs().max()) + 1e-8


@pytest.mark.skipif(INTERPRETED, reason="compiled code does not call the interpreter")
@pytest.mark.parametrize("name", [*OPERATIONS, "per row"])
def test_in_a_compiled_caller(name, device):
    operation = OPERATIONS.get(name, PER_ROW)
    queries, others = arguments(name if name in OPERATIONS else "info_nce", 6, 20, 40, torch.float32, device)
    compiled = torch.compile(operation.function, backend="aot_eager", fullgraph=True)
    expected = value_and_gradient(operation, queries, *others, 0.2)
    result = value_and_gradient(compiled, queries, *others, 0.2)
    assert all(error(a, b) < 1e-6 for a, b in zip(result, expected, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="compiled code does not call the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_operators_are_what_they_declare(needs_gradient, dtype, device):
    queries, (positives, queue) = arguments("info_nce", 6, 20, 40, dtype, device)
    own = torch.arange(6, device=device)
    torch.library.opcheck(_info_nce, (queries, positives, queue, 0.2, needs_gradient))
    torch.library.opcheck(_batch_nce, (queries, queue, own, 0.2, needs_gradient))
    torch.library.opcheck(_bank_nce, (queries, queue, own, own.expand(6, -1).contiguous(), 0.2, needs_gradient))
    rows = F.normalize(queries.float() if device.type == "cpu" else queries, dim=1)
    pair = torch.stack([own, own.roll(3)], dim=1)
    torch.library.opcheck(_log_sums, (rows, rows, pair, 0.2))
    log_sum = _log_sums(rows, rows, pair, 0.2)
    torch.library.opcheck(_attraction, (rows, rows, pair, log_sum, log_sum, 0.2))


class Largest(TorchDispatchMode):
    """A context that records the number of elements of the largest tensor created in it."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.skipif(INTERPRETED, reason="tests the chunked path")
def test_the_chunked_path_never_holds_all_logits():
    queries, (positives, queue) = arguments("info_nce", 256, 16, 20_000, torch.float32, "cpu")
    with Largest() as largest:
        contrast(queries, positives, queue, None, 0.2, needs_gradient=True)
    assert largest.elements <= 2**19 < len(queries) * len(queue) / 8
    rows, own = F.normalize(torch.randn(3000, 16), dim=1), torch.arange(3000).unsqueeze(1)
    with Largest() as largest:
        log_total, shift, _, _ = sweep_in_chunks(rows, rows, own, 0.2, needs_keys=False)
        log_sum = log_total + shift / 0.2
        _attraction._init_fn(rows, rows, own, log_sum, log_sum, 0.2)
    assert largest.elements <= 2**19 < len(rows) ** 2 / 8


ROWS, KEYS, INDEX = torch.ones(4, 8), torch.ones(5, 8), torch.zeros(4, dtype=torch.long)
DRAWN, WITH_GRADIENT = torch.zeros(4, 3, dtype=torch.long), torch.ones(4, 8).requires_grad_()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: info_nce(torch.ones(8), ROWS, KEYS, 0.2), "queries: expected a 2-d floating tensor, got (8,) float32"),
        (lambda: info_nce(ROWS.long(), ROWS, KEYS, 0.2), "queries: expected a 2-d floating tensor, got (4, 8) int64"),
        (lambda: info_nce(ROWS[:0], ROWS[:0], KEYS, 0.2), "queries: expected at least one row and one column"),
        (lambda: info_nce(ROWS, ROWS[:3], KEYS, 0.2), "positives: expected 4 rows, got (3, 8) float32"),
        (lambda: info_nce(ROWS, ROWS, KEYS[:, :7], 0.2), "queue: expected 8 columns, got (5, 7) float32"),
        (lambda: info_nce(ROWS, ROWS, KEYS.to("meta"), 0.2), "queue: expected the device of queries, cpu, got meta"),
        (lambda: info_nce(ROWS, ROWS, KEYS, 0.0), "temperature: expected a finite number above 0, got 0.0"),
        (lambda: info_nce(ROWS, ROWS, KEYS, 0.2, reduction="sum"), "reduction: expected 'mean' or 'none', got 'sum'"),
        (
            lambda: info_nce(ROWS, ROWS.clone().requires_grad_(), KEYS, 0.2),
            "positives: expected a tensor that requires",
        ),
        (lambda: batch_nce(ROWS, KEYS, INDEX[:3], 0.2), "positive_index: expected shape (4), got (3,) int64"),
        (lambda: batch_nce(ROWS, KEYS, INDEX.int(), 0.2), "positive_index: expected an int64 tensor of shape (4), got"),
        (lambda: batch_nce(ROWS, KEYS, INDEX + 5, 0.2), "positive_index: expected entries of 0 to 4, got 5 to 5"),
        (
            lambda: batch_nce(ROWS, KEYS.clone().requires_grad_(), INDEX, 0.2),
            "keys: expected a tensor that requires no",
        ),
        (
            lambda: bank_nce(ROWS, KEYS, INDEX, DRAWN - 1, 0.2),
            "negative_index: expected entries of 0 to 4, got -1",
        ),
        (
            lambda: bank_nce(ROWS, KEYS, INDEX, DRAWN[:2], 0.2),
            "negative_index: expected shape (4, any), got (2, 3)",
        ),
        (lambda: nt_xent(ROWS[:3], 0.2), "embeddings: expected an even number of rows, got (3, 8) float32"),
        (lambda: nt_xent(ROWS, float("nan")), "temperature: expected a finite number above 0, got nan"),
        (lambda: nt_xent("rows", 0.2), "embeddings: expected a 2-d floating tensor, got 'rows'"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ValueError) as raised:
        call()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(INTERPRETED, reason="tests code that runs before any kernel")
@OPS
def test_fake_tensors_are_accepted(name):
    """The engine estimates the memory of a step with fake tensors, whose indices have no entries to check."""
    queries, others = arguments(name, 6, 4, 9, torch.float32, "cpu")
    with FakeTensorMode() as fake:
        queries = fake.from_tensor(queries).requires_grad_()
        loss = OPERATIONS[name](queries, *(fake.from_tensor(x) for x in others), 0.2).sum()
        loss.backward()
    assert loss.shape == () and queries.grad.shape == (6, 4)


@pytest.mark.skipif(INTERPRETED, reason="tests the dispatcher on a GPU")
@pytest.mark.gpu
@OPS
def test_a_gpu_runs_the_kernels(name):
    queries, others = arguments(name, 66, 24, 150, torch.bfloat16, "cuda")
    with (
        mock.patch("triton.runtime.jit.JITFunction.run", side_effect=RuntimeError("launched")),
        pytest.raises(RuntimeError, match="launched"),
    ):
        OPERATIONS[name](queries, *others, 0.2)
