"""ema_update_: accuracy against float64 over sizes, offsets, layouts and dtypes; launches, cached tables, bad input."""

import itertools
from collections.abc import Callable

import pytest
import torch
from ahead_of_time import launched
from torch import Tensor
from truth import DTYPES, assert_as_accurate

from sslkernels import ema_update
from sslkernels.device import INTERPRETED
from sslkernels.ema_update import BLOCK, CHUNK, _launch, ema_update_, reference

MOMENTUM = 0.99


def drawn(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def both(
    shapes: list[tuple[int, ...]], device: torch.device, teacher: torch.dtype, student: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    return drawn(shapes, teacher, device, 1), drawn(shapes, student, device, 2)


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def check(teacher: list[Tensor], student: list[Tensor], momentum: float | Tensor = MOMENTUM) -> None:
    """Update `teacher`, and compare with float64 and with plain PyTorch."""
    number, teacher = float(momentum), [t.detach() for t in teacher]
    plain, truth = copies(teacher), [t.double() for t in teacher]
    reference(plain, student, number)
    reference(truth, [s.double() for s in student], number)
    ema_update_(teacher, student, momentum)
    for t, p, true in zip(teacher, plain, truth, strict=True):
        assert_as_accurate(t, p, true, t.dtype)


SHAPES = {
    "one": [(1,)],
    "scalar": [()],
    "primes": [(7,), (13, 17), (3, 5, 7)],
    "edges of blocks": [(BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (2 * BLOCK + 3,)],
    "empty among others": [(0,), (5,), (3, 0), (64,)],
    "all empty": [(0,), (0, 2)],
    "many tiny": [(1 + i % 9,) for i in range(200)],
    "nothing": [],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_sizes(device, shapes):
    check(*both(shapes, device, torch.float32, torch.float32))


@pytest.mark.parametrize("teacher", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("student", [*DTYPES, torch.float64], ids=str)
def test_dtypes(device, teacher, student):
    check(*both([(BLOCK + 100,), (33, 5)], device, teacher, student))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.7, 0.9999, 1.0, 1, 0])
def test_momenta(device, momentum):
    teacher, student = both([(100,)], device, torch.float32, torch.float32)
    before = copies(teacher)
    check(teacher, student, momentum)
    if momentum in (0, 1):
        assert torch.equal(teacher[0], student[0] if momentum == 0 else before[0])


def test_all_dtypes_in_one_list(device):
    pairs = list(itertools.product([*DTYPES, torch.float64], repeat=2))
    teacher = [drawn([(40,)], dtype, device, 1)[0] for dtype, _ in pairs]
    student = [drawn([(40,)], dtype, device, 2)[0] for _, dtype in pairs]
    check(teacher, student)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("teacher_at", "student_at"), [(0, 1), (1, 0), (1, 1), (3, 8), (8, 8), (2, 5)])
def test_views_that_begin_anywhere(device, dtype, teacher_at, student_at):
    size = BLOCK + 48
    teacher, student = both([(size + 16,)], device, dtype, dtype)
    around = teacher[0].clone()
    inside = slice(teacher_at, teacher_at + size)
    check([teacher[0][inside]], [student[0][student_at : student_at + size]])
    assert not torch.equal(teacher[0][inside], around[inside])
    teacher[0][inside] = around[inside]
    assert torch.equal(teacher[0], around)  # nothing outside the view changed


def test_neighbors_in_a_flat_buffer(device):
    sizes = [1, 15, 16, 17, 100, BLOCK, 3]
    teacher, student = both([(sum(sizes),)], device, torch.float32, torch.bfloat16)
    check(list(teacher[0].split(sizes)), list(student[0].split(sizes)))


def laid_out(name: str, x: Tensor) -> Tensor:
    """`x`, of shape (8, 6, 5, 4), with other strides."""
    return {
        "contiguous": lambda: x.contiguous(),
        "channels-last": lambda: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: x.transpose(0, 1).contiguous().transpose(0, 1),
        "with gaps": lambda: torch.stack([x, x], dim=-1)[..., 0],
        "one row for all": lambda: x[:1].expand(8, -1, -1, -1),
    }[name]()


@pytest.mark.parametrize("teacher_layout", ["contiguous", "channels-last", "transposed", "with gaps"])
@pytest.mark.parametrize(
    "student_layout", ["contiguous", "channels-last", "transposed", "with gaps", "one row for all"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(device, teacher_layout, student_layout, dtype):
    teacher, student = both([(8, 6, 5, 4)], device, torch.float32, dtype)
    teacher, student = [laid_out(teacher_layout, teacher[0])], [laid_out(student_layout, student[0])]
    strides = teacher[0].stride()
    check(teacher, student)
    assert teacher[0].stride() == strides


def test_counters_are_copied(device):
    def values(*lists: object) -> list[Tensor]:
        return [torch.tensor(value, device=device) for value in lists]

    teacher = values(3, [True, False], [1, 2], [1.0, 1.0])
    student = values(7, [True, True], [5, 6], [0.0, 2.0])
    ema_update_(teacher, student, 0.5)
    assert [t.tolist() for t in teacher] == [7, [True, True], [5, 6], [0.5, 1.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_momentum_as_a_tensor(device, dtype, teacher_dtype):
    for place in {torch.device("cpu"), device}:
        momentum = torch.tensor(0.996, dtype=dtype, device=place)
        check(*both([(100,), (3,)], device, teacher_dtype, torch.float32), momentum)


@pytest.mark.skipif(not INTERPRETED, reason="without the interpreter the host reads the momentum of CPU tensors")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_kernel_reads_the_momentum(dtype):
    teacher, student = both([(100,)], torch.device("cpu"), torch.float32, torch.float32)
    expected = copies(teacher)
    ema_update_(expected, student, 0.75)
    _launch([(teacher[0], student[0])], torch.tensor(0.75, dtype=dtype))
    assert torch.equal(teacher[0], expected[0])


def test_two_runs_are_equal(device):
    teacher, student = both([(BLOCK + 5,), (77,)], device, torch.float32, torch.bfloat16)
    again = copies(teacher)
    ema_update_(teacher, student, MOMENTUM)
    ema_update_(again, student, MOMENTUM)
    assert all(torch.equal(a, b) for a, b in zip(teacher, again, strict=True))


def test_parameters_that_require_a_gradient(device):
    teacher, student = ([torch.nn.Parameter(x) for x in side] for side in both([(5,)], device, *[torch.float32] * 2))
    loss = teacher[0].square().sum()
    ema_update_(teacher, student, MOMENTUM)
    assert teacher[0].is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # autograd notices that the teacher changed after the forward pass


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Callable) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        self.launches += 1
        return self.kernel[grid]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    kernel = Counted(ema_update._ema_kernel)
    monkeypatch.setattr(ema_update, "_ema_kernel", kernel)
    return kernel


def skip_without_kernels(device: torch.device) -> None:
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("the CPU path uses no kernel")


def test_number_of_launches_is_constant(device, counted):
    skip_without_kernels(device)
    for count in (1, 3, 50):
        counted.launches = 0
        check(*both([(64,)] * count, device, torch.float32, torch.float32))
        assert counted.launches == 1
        check(*both([(64,), (33,)] * count, device, torch.float32, torch.float32))
        assert counted.launches == 3  # sizes that are no multiple of 16 bytes need a second launch
        mixed = [t for dtype in (torch.bfloat16, torch.float32) for t in drawn([(64,)] * count, dtype, device, 1)]
        check(mixed, drawn([(64,)] * 2 * count, torch.float32, device, 2))
        assert counted.launches == 5


def test_cached_tables_follow_the_tensors(device):
    """Addresses are used again with other sizes, dtypes and students, as after freeing and allocating."""
    skip_without_kernels(device)
    memory = torch.zeros(4 * BLOCK, device=device), torch.zeros(4 * BLOCK, device=device)
    for size, kind, swapped in itertools.product((BLOCK, 5, 2 * BLOCK + 16, BLOCK), DTYPES, (False, True)):
        teacher, student = (area.view(kind)[:size].normal_() for area in (memory[::-1] if swapped else memory))
        check([teacher], [student])
    ema_update._tables.cache_clear()
    for size in range(1, 40):
        check([memory[0][:size]], [memory[1][:size]])
    assert ema_update._tables.cache_info().currsize <= 16


def test_tables_cover_each_element_once_with_its_true_alignment():
    tensors = ((1 << 40, 1 << 41, 3 * BLOCK), (4, 1 << 42, BLOCK + 16), (1 << 43, 1 << 44, 7), (1 << 45, 2, 2 * BLOCK))
    covered = []
    for alignment, table in ema_update._tables(torch.device("cpu"), 4, 2, tensors):
        for teacher, student, size in table.tolist():
            assert 0 < size <= BLOCK
            assert all(number % alignment == 0 for number in (teacher, student, size))
            assert alignment > 1 or any(number % 16 for number in (teacher, student, size))
            covered += [(teacher + 4 * i, student + 2 * i) for i in range(size)]
    expected = [(t + 4 * i, s + 2 * i) for t, s, size in tensors for i in range(size)]
    assert sorted(covered) == sorted(expected)


def test_a_table_is_built_once(device):
    skip_without_kernels(device)
    teacher, student = both([(100,), (64,)], device, torch.float32, torch.float32)
    ema_update._tables.cache_clear()
    for momentum in (0.9, 0.99, torch.tensor(0.999, device=device)):
        ema_update_(teacher, student, momentum)
    assert ema_update._tables.cache_info().misses == 1


@pytest.mark.parametrize(
    ("backend", "as_tensor"), [("aot_eager", False), pytest.param("inductor", True, marks=pytest.mark.nightly)]
)
def test_compiled_callers(device, backend, as_tensor):
    def step(teacher, student, momentum):
        scaled = [s * 2 for s in student]
        ema_update_(teacher, scaled, momentum)
        return teacher[0] + 1

    teacher, student = both([(100,), (3, 4)], device, torch.float32, torch.float32)
    teacher, expected = [torch.nn.Parameter(t) for t in teacher], copies(teacher)
    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend=backend)
        for momentum in (0.9, 0.99, 0.999):
            argument = torch.tensor(momentum, device=device) if as_tensor else momentum
            result = compiled(teacher, student, argument)
            wanted = step(expected, student, argument)
            assert torch.equal(result, wanted)
            assert all(torch.equal(t, e) for t, e in zip(teacher, expected, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="tests the CPU path")
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)], ids=str)
def test_no_large_temporaries_on_the_cpu(dtypes):
    teacher, student = both([(64, CHUNK // 8)], torch.device("cpu"), *dtypes)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        ema_update_(teacher, student, MOMENTUM)
    assert max(event.cpu_memory_usage for event in profile.function_events) <= 4 * CHUNK


def ones(*shape: int, **options: object) -> Tensor:
    return torch.ones(shape, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([ones(2)], [ones(2), ones(2)], 0.9), "student: expected 1 tensors"),
        (([ones(2), ones(2)], [ones(2), ones(3)], 0.9), r"student\[1\]: expected the shape of teacher\[1\], \(2,\)"),
        (([ones(2)], [ones(2, dtype=torch.int64)], 0.9), "student: expected both floating or both integer"),
        (([ones(2, dtype=torch.complex64)] * 1, [ones(2, dtype=torch.complex64)], 0.9), "student: expected both"),
        (([ones(2)], [ones(2, device="meta")], 0.9), r"student\[0\]: expected the device of teacher\[0\], cpu"),
        (([ones(2), ones(2, device="meta")], [ones(2)] * 2, 0.9), r"teacher\[1\]: expected the device of teacher\[0\]"),
        ((torch.nn.Linear(1, 1).parameters(), [ones(2)], 0.9), "teacher: expected a list of tensors, got generator"),
        (([ones(2)], ones(1, 2), 0.9), "student: expected a list of tensors, got Tensor"),
        (([ones(2)], [3], 0.9), "student: expected a list of tensors, got int"),
        (([ones(2)] * 2, [ones(2)] * 2, 0.9), "share no memory"),
        (([ones(2)], [ones(2)], 1.5), "momentum: expected a number of 0 to 1"),
        (([ones(2)], [ones(2)], -0.1), "momentum: expected a number of 0 to 1"),
        (([ones(2)], [ones(2)], float("nan")), "momentum: expected a number of 0 to 1"),
        (([ones(2)], [ones(2)], "0.9"), "momentum: expected a number of 0 to 1"),
        (([ones(2)], [ones(2)], torch.tensor(1.5)), "momentum: expected a number of 0 to 1"),
        (([ones(2)], [ones(2)], torch.tensor([0.5])), r"momentum: expected a 0-d .* got \(1,\)"),
        (([ones(2)], [ones(2)], torch.tensor(1)), "momentum: expected a 0-d"),
        (([ones(2)], [ones(2)], torch.tensor(0.9, device="meta")), "momentum: expected on the host or on cpu"),
    ],
)
def test_bad_input_is_named_in_one_line(arguments, message):
    before = copies(arguments[0]) if isinstance(arguments[0], list) else []
    with pytest.raises(ValueError, match=message) as raised:
        ema_update_(*arguments)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(t, b) for t, b in zip(arguments[0], before, strict=False) if t.device.type == "cpu")


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_aligned_blocks_move_16_bytes_at_once(dtype):
    def compiled(size: int) -> str:
        pair = [torch.empty(size, dtype=dtype, device="meta") for _ in range(2)]
        (kernel,) = launched(lambda: _launch([tuple(pair)], 0.99), 90)
        return kernel.ptx

    aligned, unaligned = compiled(2 * BLOCK), compiled(BLOCK - 1)
    assert "ld.global.v4.b32" in aligned and "st.global.v4.b32" in aligned
    assert "global.v" not in unaligned


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    device = torch.device("cuda")
    teacher, student = both([(BLOCK + 1,), (64,)], device, torch.float32, torch.bfloat16)
    momentum = torch.tensor(MOMENTUM, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for value in (MOMENTUM, momentum):
            ema_update_(teacher, student, value)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_cuda_graph_replays_it():
    device = torch.device("cuda")
    teacher, student = both([(BLOCK + 1,), (64,)], device, torch.float32, torch.float32)
    start, momentum = copies(teacher), torch.tensor(MOMENTUM, device=device)
    ema_update_(teacher, student, momentum)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_(teacher, student, momentum)
    ema_update._tables.cache_clear()
    torch._foreach_copy_(teacher, start)
    momentum.fill_(0.5)
    graph.replay()
    ema_update_(start, student, 0.5)
    assert all(torch.equal(t, s) for t, s in zip(teacher, start, strict=True))
