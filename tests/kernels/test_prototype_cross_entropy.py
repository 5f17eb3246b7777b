"""prototype_cross_entropy: exact in float64, as accurate as torch in other dtypes, memory, compilers, bad input."""

import pytest
import torch
from memory import Peak
from torch import Tensor
from truth import assert_as_accurate, error

from sslkernels import prototype_cross_entropy, soft_cross_entropy
from sslkernels.device import INTERPRETED
from sslkernels.prototype_cross_entropy import _loss_and_gradients, _soften_, reference

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):RuntimeWarning")

# (N, D, K, R): ones, primes, and one around the sizes of blocks; 131 rows are several chunks on the CPU.
SHAPES = [(1, 1, 1, 1), (3, 2, 7, 1), (7, 5, 33, 4), (37, 24, 1009, 9), (131, 16, 2049, 70)]


def arguments(rows: int, dim: int, columns: int, targets: int, dtype=torch.float64, device="cpu", seed=0) -> list:
    """(rows, prototypes, teacher, pairs, shares, center); a fifth of the pairs are none."""
    random = torch.Generator().manual_seed(seed)
    x, w = torch.randn(rows, dim, generator=random), torch.randn(columns, dim, generator=random)
    x, w = (torch.nn.functional.normalize(each, dim=1) for each in (x, w))
    teacher, center = torch.randn(targets, columns, generator=random), torch.randn(columns, generator=random)
    pairs = torch.randint(targets, (rows, 2), generator=random)
    shares = torch.rand(rows, 2, generator=random) * (torch.rand(rows, 2, generator=random) > 0.2)
    floats = [each.to(device, dtype) for each in (x, w, teacher)]
    wide = torch.promote_types(dtype, torch.float32)
    return [*floats, pairs.to(device), shares.to(device, wide), center.to(device, wide)]


def results(function, x, w, teacher, pairs, shares, center, tau_s=0.1, tau_t=0.04) -> tuple[Tensor, Tensor, Tensor]:
    """The value and both gradients of three times it."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    value = function(x, w, teacher, pairs, shares, tau_s, tau_t, center)
    (3 * value).backward()
    return value.detach(), x.grad, w.grad


def in_float64(given: list) -> list:
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given]


@pytest.mark.skipif(INTERPRETED, reason="float64 never goes to a kernel")
@pytest.mark.parametrize("taus", [(0.1, 0.04), (1.0, 1.0), (0.01, 0.02)])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_exact_in_float64(shape, taus):
    given = arguments(*shape)
    for result, truth in zip(
        results(prototype_cross_entropy, *given, *taus), results(reference, *given, *taus), strict=True
    ):
        assert error(result, truth) <= 1e-13 * max(1.0, float(truth.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taus", [(0.1, 0.04), (1.0, 1.0), (0.01, 0.02)])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_as_accurate_as_torch(shape, taus, dtype, device):
    given = arguments(*shape, dtype, device)
    truth = results(reference, *in_float64(given), *taus)
    plain = results(reference, *given[:4], *(x.to(dtype) for x in given[4:]), *taus)
    ours = results(prototype_cross_entropy, *given, *taus)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == dtype
    for result, by_torch, true in zip(ours, plain, truth, strict=True):
        assert_as_accurate(result, by_torch, true, dtype)


# (N, D, K): ones, primes, and several chunks on the CPU.
ROW_SHAPES = [(1, 1, 1), (3, 2, 7), (37, 24, 1009), (131, 16, 2049)]


def row_by_row(rows: int, dim: int, columns: int, *others) -> list:
    """As `arguments`; row i meets target i."""
    x, w, teacher, _, shares, center = arguments(rows, dim, columns, rows, *others)
    return [x, w, teacher, None, shares[:, :1].contiguous(), center]


@pytest.mark.skipif(INTERPRETED, reason="float64 never goes to a kernel")
@pytest.mark.parametrize("taus", [(0.1, 0.04), (1.0, 1.0), (0.01, 0.02)])
@pytest.mark.parametrize("shape", ROW_SHAPES)
def test_row_by_row_is_exact_in_float64(shape, taus):
    given = row_by_row(*shape)
    in_pairs = [*given[:3], torch.arange(shape[0]).unsqueeze(1), *given[4:]]
    truth = results(reference, *in_pairs, *taus)
    for way in (given, in_pairs):
        for result, true in zip(results(prototype_cross_entropy, *way, *taus), truth, strict=True):
            assert error(result, true) <= 1e-13 * max(1.0, float(true.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taus", [(0.1, 0.04), (1.0, 1.0), (0.01, 0.02)])
@pytest.mark.parametrize("shape", ROW_SHAPES)
def test_row_by_row_is_as_accurate_as_torch(shape, taus, dtype, device):
    given = row_by_row(*shape, dtype, device)
    truth = results(reference, *in_float64(given), *taus)
    plain = results(reference, *given[:4], *(x.to(dtype) for x in given[4:]), *taus)
    ours = results(prototype_cross_entropy, *given, *taus)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == dtype
    for result, by_torch, true in zip(ours, plain, truth, strict=True):
        assert_as_accurate(result, by_torch, true, dtype)


def test_is_dinos_loss(device):
    """All pairs of a global crop of the teacher and another crop of the student, as main_dino.py computes them."""
    batch, crops, columns = 5, 4, 300
    x, w, *_ = arguments(crops * batch, 16, columns, 1, torch.float32, device)
    teacher = torch.randn(2 * batch, columns, device=device, generator=torch.Generator(device).manual_seed(1))
    center = teacher.mean(dim=0)
    scores, targets = (x @ w.T).chunk(crops), teacher.chunk(2)
    expected = torch.stack([
        soft_cross_entropy(scores[v], targets[t], 0.1, 0.04, center)
        for t in range(2) for v in range(crops) if v != t
    ]).mean()  # fmt: skip
    crop, sample = (
        torch.arange(crops * batch, device=device) // batch,
        torch.arange(crops * batch, device=device) % batch,
    )
    pairs = torch.stack([sample, batch + sample], dim=1)
    others = torch.stack([crop != 0, crop != 1], dim=1)
    shares = others.float() / (batch * (2 * crops - 2))
    torch.testing.assert_close(prototype_cross_entropy(x, w, teacher, pairs, shares, 0.1, 0.04, center), expected)


WAYS = pytest.mark.parametrize(
    "make",
    [
        lambda device: arguments(7, 5, 33, 4, torch.float32, device),
        lambda device: row_by_row(7, 5, 33, torch.float32, device),
    ],
    ids=["pairs", "row by row"],
)


@WAYS
def test_only_the_wanted_gradients(make, device):
    given = make(device)
    value, to_rows, to_prototypes = results(prototype_cross_entropy, *given)
    x, w, teacher, pairs, shares, center = given
    others = (teacher, pairs, shares, 0.1, 0.04, center)
    leaf = x.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(3 * prototype_cross_entropy(leaf, w, *others), leaf)[0], to_rows)
    leaf = w.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(3 * prototype_cross_entropy(x, leaf, *others), leaf)[0], to_prototypes)
    with torch.no_grad():
        assert torch.equal(prototype_cross_entropy(x, w, *others), value)
    assert not prototype_cross_entropy(x, w, *others).requires_grad


def test_scores_far_above_zero(device):
    """A running maximum: no bound on the scores is assumed."""
    x, w, *others = arguments(7, 5, 33, 4, torch.float32, device)
    given = [100 * x, 100 * w, *others]
    truth = results(reference, *in_float64(given))
    for result, true in zip(results(prototype_cross_entropy, *given), truth, strict=True):
        assert result.isfinite().all() and error(result, true) <= 1e-5 * float(true.abs().max())


def test_the_pass_over_a_chunk(device):
    scores = torch.randn(3, 5000, device=device, generator=torch.Generator(device).manual_seed(0))
    factors = torch.tensor([1.0, 0.0, 2.5], device=device)
    expected = factors[:, None] * torch.softmax(scores / 0.1, dim=1), torch.logsumexp(scores / 0.1, dim=1)
    log_sums = _soften_(scores, factors, 0.1)
    torch.testing.assert_close((scores, log_sums), expected)


@pytest.mark.skipif(INTERPRETED, reason="tests the chunked path")
def test_memory_is_a_chunk_and_the_gradients():
    given = arguments(5120, 8, 5000, 16, torch.float32)
    scores = 5120 * 5000 * 4
    with Peak(*given) as peak:
        _loss_and_gradients._init_fn(*given[:5], given[5], 0.1, 0.04, True, True)
    assert 64 * 5000 * 4 < peak.bytes < scores / 3


@pytest.mark.skipif(INTERPRETED, reason="tests the chunked path")
def test_memory_row_by_row_is_two_chunks_and_the_gradients():
    given = row_by_row(2560, 8, 5000, torch.float32)
    scores = 2560 * 5000 * 4
    with Peak(*(x for x in given if x is not None)) as peak:
        _loss_and_gradients._init_fn(*given[:5], given[5], 0.1, 0.04, True, True)
    assert 2 * 64 * 5000 * 4 < peak.bytes < scores / 2


def test_a_second_derivative_is_an_error(device):
    x, w, *others, center = arguments(7, 5, 33, 4, torch.float32, device)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(prototype_cross_entropy(x, w, *others, 0.1, 0.04, center), x, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        gradient.square().sum().backward()


@WAYS
@pytest.mark.skipif(INTERPRETED, reason="compiled code does not call the interpreter")
def test_in_a_compiled_caller(make, device):
    given = make(device)
    compiled = torch.compile(lambda *x: prototype_cross_entropy(*x), backend="aot_eager", fullgraph=True)
    for result, expected in zip(results(compiled, *given), results(prototype_cross_entropy, *given), strict=True):
        assert error(result, expected) < 1e-6
    torch.library.opcheck(_loss_and_gradients, (*given[:5], given[5], 0.1, 0.04, True, True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: torch.ones(4)}, "rows: expected a 2-d floating tensor"),
        ({1: torch.ones(8, 3)}, "prototypes: expected 2 columns"),
        ({2: torch.ones(3, 9)}, "teacher: expected 8 columns"),
        ({3: torch.ones(4, 2)}, "pairs: expected an int64 tensor"),
        ({3: torch.full((4, 2), 3)}, "pairs: expected entries of 0 to 2"),
        ({4: torch.ones(3, 2)}, "shares: expected 4 rows"),
        ({3: None}, "shares: expected 1 columns"),
        ({3: None, 4: torch.ones(4, 1)}, "teacher: expected 4 rows"),
        ({5: 0.0}, "student_temperature: expected a finite number above 0"),
        ({7: torch.ones(7)}, r"center: expected a floating tensor of shape \(8,\)"),
        ({2: torch.ones(3, 8, requires_grad=True)}, "teacher: expected a tensor that requires no gradient"),
    ],
)
def test_bad_input_is_named(changed, message):
    given = [torch.ones(4, 2), torch.ones(8, 2), torch.ones(3, 8), torch.zeros(4, 2, dtype=torch.int64),
             torch.ones(4, 2), 0.1, 0.04, torch.ones(8)]  # fmt: skip
    for place, value in changed.items():
        given[place] = value
    with pytest.raises(ValueError, match=message):
        prototype_cross_entropy(*given)
