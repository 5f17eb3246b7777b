"""soft_cross_entropy: accuracy, probabilities, -inf, the identity with sinkhorn, memory, compilers, bad input."""

import pytest
import torch
from memory import Peak
from torch import Tensor
from truth import DTYPES, assert_as_accurate, error, value_and_gradient

from sslkernels import running_softmax, sinkhorn, sinkhorn_center, soft_cross_entropy
from sslkernels.device import INTERPRETED
from sslkernels.soft_cross_entropy import _forward, _gradient, reference

# numpy, which runs interpreted kernels, warns about logarithms of 0 and about products that a kernel discards.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):RuntimeWarning")

# (B, K): ones, primes, and one below, at and above the sizes of the kernels' blocks; 2,100 columns are several splits.
SHAPES = [(1, 1), (1, 7), (7, 1), (2, 3), (13, 17), (3, 255), (4, 256), (5, 257), (31, 513), (33, 31), (3, 2100)]

# The form of the teacher: scores, scores with a center, or probabilities.
KINDS = pytest.mark.parametrize("kind", ["scores", "centered", "probabilities"])


def arguments(kind: str, rows: int, columns: int, dtype, device="cpu", tau_t=0.1, seed=0) -> list:
    """(student, teacher, tau_t, center), to be called with a tau_s after the teacher."""
    random = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, columns, generator=random) for _ in range(2))
    center = torch.randn(columns, generator=random).to(device, torch.float64 if dtype == torch.float64 else None)
    if kind == "probabilities":
        teacher = torch.rand(rows, 1, generator=random) * torch.softmax(teacher / tau_t, dim=1)
    student, teacher = student.to(device, dtype), teacher.to(device, dtype)
    return [student, teacher, None if kind == "probabilities" else tau_t, center if kind == "centered" else None]


def call(function, *, tau_s=0.1, reduction="none"):
    return lambda student, teacher, tau_t, center: function(student, teacher, tau_s, tau_t, center, reduction=reduction)


def check(kind, student, teacher, tau_t, center, tau_s, dtype, reduction="none"):
    def in_float64(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.double()

    plain_center = None if center is None else center.to(dtype)
    truth = value_and_gradient(
        call(reference, tau_s=tau_s, reduction=reduction),
        student.double(),
        in_float64(teacher),
        tau_t,
        in_float64(center),
    )
    plain = value_and_gradient(call(reference, tau_s=tau_s, reduction=reduction), student, teacher, tau_t, plain_center)
    ours = value_and_gradient(
        call(soft_cross_entropy, tau_s=tau_s, reduction=reduction), student, teacher, tau_t, center
    )
    assert ours[0].dtype == torch.promote_types(dtype, torch.float32) and ours[1].dtype == dtype
    for result, by_torch, true in zip(ours, plain, truth, strict=True):
        assert_as_accurate(result, by_torch, true, dtype)


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_as_accurate_as_torch(kind, shape, dtype, device):
    check(kind, *arguments(kind, *shape, dtype, device), 0.1, dtype)


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tau_s", "tau_t"), [(0.01, 0.01), (0.1, 0.04), (1.0, 0.01), (0.01, 1.0), (1.0, 1.0)])
def test_peaked_and_flat(kind, tau_s, tau_t, dtype, device):
    check(kind, *arguments(kind, 33, 70, dtype, device, tau_t, seed=1), tau_s, dtype)


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_over_rows(kind, dtype, device):
    check(kind, *arguments(kind, 33, 70, dtype, device, seed=2), 0.1, dtype, reduction="mean")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_of_another_dtype(dtype, device):
    student, teacher, tau_t, center = arguments("centered", 13, 300, torch.float32, device)
    expected = value_and_gradient(call(soft_cross_entropy), student.to(dtype).float(), teacher, tau_t, center)
    loss, gradient = value_and_gradient(call(soft_cross_entropy), student.to(dtype), teacher, tau_t, center)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert error(loss, expected[0]) < 1e-4
    assert error(gradient, expected[1]) <= 1.01 * torch.finfo(dtype).eps * float(expected[1].abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # by day the first: float32 sums of bfloat16 scores
def test_with_the_center_of_sinkhorn_it_is_that_against_the_assignments(dtype, device):
    student, teacher, epsilon, _ = arguments("scores", 12, 300, dtype, device, tau_t=0.05, seed=3)
    assignments = sinkhorn(teacher.double(), epsilon, 3)
    expected = -(assignments * torch.log_softmax(student.double() / 0.1, dim=1)).sum(dim=1)
    center = sinkhorn_center(teacher, epsilon, 3)
    assert error(soft_cross_entropy(student, teacher, 0.1, epsilon, center, reduction="none"), expected) < 1e-4
    assert error(soft_cross_entropy(student, teacher, 0.1, epsilon, reduction="none"), expected) > 1.0
    given = soft_cross_entropy(student, sinkhorn(teacher, epsilon, 3), 0.1, None, reduction="none")
    assert error(given, expected) < (1e-4 if dtype == torch.float32 else 0.3)


def test_dino(device):
    """Against `DINOLoss` of main_dino.py: one pair of crops."""
    student, teacher, tau_t, center = arguments("centered", 13, 300, torch.float32, device, tau_t=0.04)
    q = torch.softmax((teacher - center) / tau_t, dim=-1)
    expected = torch.sum(-q * torch.log_softmax(student / 0.1, dim=-1), dim=-1).mean()
    torch.testing.assert_close(soft_cross_entropy(student, teacher, 0.1, tau_t, center), expected)


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_minus_infinity(kind, dtype, device):
    student, teacher, tau_t, center = arguments(kind, 9, 600, dtype, device, seed=4)
    nothing = 0.0 if kind == "probabilities" else -torch.inf
    teacher[:, ::3] = nothing
    student[:, ::6] = -torch.inf  # the teacher gives these columns no probability
    teacher[[0, 8]] = nothing
    student[8] = -torch.inf
    teacher[5], student[6, 8:] = nothing, -torch.inf
    teacher[5, 599], teacher[6, 8:], teacher[6, 7] = 1.0, nothing, 0.5
    losses, gradient = value_and_gradient(call(soft_cross_entropy), student, teacher, tau_t, center)
    assert not losses[[0, 8]].any() and not gradient[[0, 8]].any()
    assert losses.isfinite().all() and gradient.isfinite().all()
    rest = list(range(8))  # torch gives no gradient for row 8, whose student has no softmax
    check(kind, student[rest], teacher[rest], tau_t, center, 0.1, dtype)


@KINDS
def test_what_the_student_holds_for_impossible_costs_infinitely_much(kind, device):
    student, teacher, tau_t, center = arguments(kind, 6, 300, torch.float32, device)
    student[3, 270] = student[4, 10] = -torch.inf
    teacher[3, 270] = teacher[4, 10] = 1.0 if kind == "probabilities" else 3.0
    losses = soft_cross_entropy(student, teacher, 0.1, tau_t, center, reduction="none")
    assert losses[[3, 4]].isposinf().all() and losses[[0, 1, 2, 5]].isfinite().all()


def test_where_the_teacher_underflows_the_student_may_be_minus_infinity(device):
    student, teacher, tau_t, _ = arguments("scores", 3, 2100, torch.float32, device)
    teacher[0, 7] = teacher[1, 7::256] = teacher[2, :1280] = -40.0  # until something higher comes, or nothing does
    student[0, 7] = student[1, 7::256] = student[2, 7] = -torch.inf
    impossible = teacher.masked_fill(teacher == -40.0, -torch.inf)
    expected = soft_cross_entropy(student, impossible, 0.1, tau_t, reduction="none")
    losses = soft_cross_entropy(student, teacher, 0.1, tau_t, reduction="none")
    assert expected.isfinite().all() and error(losses, expected) < 1e-5


@KINDS
def test_nan_stays_visible(kind, device):
    clean = arguments(kind, 6, 300, torch.float32, device)
    for place in (0, 1):
        spoilt = [x.clone() if isinstance(x, Tensor) else x for x in clean]
        spoilt[place][2, 270] = torch.nan
        losses, gradient = value_and_gradient(call(soft_cross_entropy), *spoilt)
        rows = torch.arange(6, device=device) == 2
        assert losses[rows].isnan().all() and losses[~rows].isfinite().all()
        assert gradient[rows].isnan().any() and gradient[~rows].isfinite().all()


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(kind, dtype, device):
    student, teacher, tau_t, center = arguments(kind, 5, 70, dtype, device)
    expected = value_and_gradient(call(soft_cross_entropy), student, teacher, tau_t, center)
    if center is not None:
        center = torch.stack([center, center], dim=1)[:, 0]
    for change in (
        lambda x: x.T.contiguous().T,
        lambda x: torch.cat([x, x], dim=1)[:, :70],
        lambda x: x.repeat_interleave(2, dim=0)[::2],
    ):
        assert change(student).stride() != student.stride()
        losses = soft_cross_entropy(change(student), change(teacher), 0.1, tau_t, center, reduction="none")
        assert error(losses, expected[0]) <= 1e-6 * float(expected[0].max())
        leaf = student.clone().requires_grad_()
        soft_cross_entropy(change(leaf), change(teacher), 0.1, tau_t, center, reduction="none").sum().backward()
        assert error(leaf.grad, expected[1]) <= 8 * torch.finfo(dtype).eps * float(expected[1].abs().max())


@KINDS
@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs one program after another")
def test_repeats_to_the_bit(kind, device):
    given = arguments(kind, 33, 2100, torch.float32, device)
    first, second = (value_and_gradient(call(soft_cross_entropy), *given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_scales_with_what_comes_from_above(device):
    given = arguments("centered", 9, 70, torch.float32, device)
    _, gradient = value_and_gradient(call(soft_cross_entropy), *given)
    weights = 2.0 ** torch.arange(-16, 17, 4, device=device)
    _, weighted = value_and_gradient(lambda *x: call(soft_cross_entropy)(*x) * weights, *given)
    assert torch.equal(weighted, gradient * weights.unsqueeze(1))


@KINDS
def test_autocast_around_it_changes_nothing(kind, device):
    given = arguments(kind, 5, 70, torch.float32, device)
    expected = value_and_gradient(call(soft_cross_entropy), *given)
    with torch.autocast(device.type, torch.bfloat16):
        result = value_and_gradient(call(soft_cross_entropy), *given)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_a_second_derivative_is_an_error(device):
    student, *others = arguments("centered", 6, 40, torch.float32, device)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(call(soft_cross_entropy)(student, *others).sum(), student, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        gradient.square().sum().backward()


@KINDS
@pytest.mark.skipif(INTERPRETED, reason="float64 never goes to a kernel")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_gradcheck(kind, tau, reduction):
    student, *others = arguments(kind, 5, 9, torch.float64, tau_t=tau)
    for function in (reference, soft_cross_entropy):
        operation = call(function, tau_s=tau, reduction=reduction)
        assert torch.autograd.gradcheck(lambda s, f=operation: f(s, *others), student.requires_grad_())


@pytest.mark.skipif(INTERPRETED, reason="tests the chunked path")
@pytest.mark.parametrize(("shape", "dtype"), [((1280, 3000), torch.bfloat16), ((60, 70_000), torch.float32)])
def test_memory_is_a_few_chunks_and_the_gradient(shape, dtype, monkeypatch):
    monkeypatch.setattr(running_softmax, "CHUNK_ELEMENTS", 2**16 // torch.get_num_threads())
    student, teacher, tau_t, center = arguments("centered", *shape, dtype)
    few = 24 * max(2**16, shape[1])  # bytes of six float32 chunks
    assert few < student.nbytes / 4
    with Peak(student, teacher, center) as forward:
        losses, statistics = _forward._init_fn(student, teacher, center, 0.1, tau_t)
    upstream = torch.ones_like(losses)
    with Peak(student, teacher, center, upstream, statistics) as backward:
        gradient = _gradient._init_fn(upstream, student, teacher, center, statistics, 0.1, tau_t)
    assert 0 < forward.bytes < few
    assert gradient.nbytes < backward.bytes < gradient.nbytes + few
    assert statistics.numel() == 4 * len(student)  # all that is kept for the backward pass


@KINDS
@pytest.mark.skipif(INTERPRETED, reason="compiled code does not call the interpreter")
def test_in_a_compiled_caller(kind, device):
    given = arguments(kind, 33, 70, torch.float32, device)
    compiled = torch.compile(call(soft_cross_entropy, reduction="mean"), backend="aot_eager", fullgraph=True)
    expected = value_and_gradient(call(soft_cross_entropy, reduction="mean"), *given)
    result = value_and_gradient(compiled, *given)
    assert all(error(a, b) < 1e-6 for a, b in zip(result, expected, strict=True))


@KINDS
@pytest.mark.skipif(INTERPRETED, reason="compiled code does not call the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_are_what_they_declare(kind, dtype, device):
    student, teacher, tau_t, center = arguments(kind, 33, 70, dtype, device)
    torch.library.opcheck(_forward, (student.requires_grad_(), teacher, center, 0.1, tau_t))
    losses, statistics = _forward(student.detach(), teacher, center, 0.1, tau_t)
    torch.library.opcheck(_gradient, (losses, student.detach(), teacher, center, statistics, 0.1, tau_t))


SCORES, CENTER = torch.ones(4, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.ones(8), SCORES, 0.1, 0.1), "student: expected a 2-d floating tensor, got (8,) float32"),
        ((SCORES[:0], SCORES[:0], 0.1, 0.1), "student: expected at least one row and one column, got (0, 8) float32"),
        ((SCORES, SCORES[:3], 0.1, 0.1), "teacher: expected 4 rows, got (3, 8) float32"),
        ((SCORES, SCORES[:, :7], 0.1, 0.1), "teacher: expected 8 columns, got (4, 7) float32"),
        ((SCORES, SCORES.long(), 0.1, 0.1), "teacher: expected a 2-d floating tensor, got (4, 8) int64"),
        ((SCORES, SCORES.to("meta"), 0.1, 0.1), "teacher: expected the device of student, cpu, got meta"),
        ((SCORES, SCORES, 0.0, 0.1), "student_temperature: expected a finite number above 0, got 0.0"),
        ((SCORES, SCORES, None, 0.1), "student_temperature: expected a finite number above 0, got None"),
        ((SCORES, SCORES, 0.1, -1.0), "teacher_temperature: expected a finite number above 0, got -1.0"),
        ((SCORES, SCORES, 0.1, 0.1, CENTER[:7]), "center: expected a floating tensor of 8 entries, got (7,) float32"),
        ((SCORES, SCORES, 0.1, 0.1, CENTER.long()), "center: expected a floating tensor of 8 entries, got (8,) int64"),
        ((SCORES, SCORES, 0.1, 0.1, 0.5), "center: expected a floating tensor of 8 entries, got 0.5"),
        ((SCORES, SCORES, 0.1, 0.1, CENTER.to("meta")), "center: expected the device of student, cpu, got meta"),
        ((SCORES, SCORES, 0.1, None, CENTER), "center: expected None, since the teacher's rows are probabilities"),
        (
            (SCORES, SCORES.clone().requires_grad_(), 0.1, 0.1),
            "teacher: expected a tensor that requires no gradient (only the student gets one)",
        ),
        (
            (SCORES, SCORES, 0.1, 0.1, CENTER.clone().requires_grad_()),
            "center: expected a tensor that requires no gradient (only the student gets one)",
        ),
    ],
)
def test_bad_input_is_one_line(given, message):
    with pytest.raises(ValueError) as raised:
        soft_cross_entropy(*given)
    assert str(raised.value) == message


def test_reduction_is_mean_or_none():
    with pytest.raises(ValueError, match=r"^reduction: expected 'mean' or 'none', got 'sum'$"):
        soft_cross_entropy(SCORES, SCORES, 0.1, 0.1, reduction="sum")
