"""Momentum update of a teacher, over lists of tensors (MoCo: He et al. 2019, arXiv 1911.05722, eq. 2).

    teacher = m teacher + (1 - m) student = teacher + (1 - m) (student - teacher), in place

Memory traffic: the teacher is read and written and the student read, 12 bytes per float32 parameter, without
temporaries. On a GPU there is one launch per pair of dtypes, whose programs look up their block of elements in a table,
and a second one for blocks that are not aligned to 16 bytes. On the CPU torch's foreach functions are used;
`torch.compile` of `reference` takes 0.85 of their time there.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.arguments import describe
from sslkernels.device import INTERPRETED, KERNEL_DTYPES, launch, runs_triton

BLOCK, WARPS = 4096, 8  # elements per program: a multiple of 16 bytes, so all blocks of a tensor are aligned alike
ALIGNMENT = 16  # bytes of the widest memory access
CHUNK = 1 << 18  # elements that the CPU converts at once: 1 MiB, which fits the cache

Pairs = list[tuple[Tensor, Tensor]]  # (teacher, student)


@torch.no_grad()
def ema_update_(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float | Tensor) -> None:
    """teacher[i] = momentum teacher[i] + (1 - momentum) student[i] for all i, in place.

    Floating tensors of any dtype are averaged in float32 (in float64 if teacher or student is); integer and bool
    tensors, such as counters among buffers, are copied. Strides may differ. On a GPU the kernel takes tensors that are
    contiguous, or dense with equal strides (channels-last); torch updates other layouts and float64 one by one. A CUDA
    graph can capture the call after it was made once with the same tensors.

    Args:
        teacher: tensors to update, with or without requires_grad. No two may share memory.
        student: as many tensors of the same shapes, on the same device.
        momentum: 0 to 1; a number, or a 0-d float32 or float64 tensor on the host or on the device of the tensors. A
            tensor on the device is read by the kernel, without a wait and without a check of its range.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or range.
    """
    _check_momentum(momentum)
    if not torch.compiler.is_compiling():
        _ema_update(teacher, student, momentum)
        return
    if not isinstance(momentum, Tensor):
        momentum = torch.full((), momentum, dtype=torch.float64)
    _ema_update_op([t.detach() for t in teacher], [s.detach() for s in student], momentum)


@torch.no_grad()
def reference(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float | Tensor) -> None:
    """`ema_update_` in plain PyTorch, tensor by tensor."""
    for t, s in zip(teacher, student, strict=True):
        t.copy_(momentum * t + (1 - momentum) * s if t.is_floating_point() else s)


@torch.library.custom_op("sslkernels::ema_update_", mutates_args=("teacher",))
def _ema_update_op(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: Tensor) -> None:
    _ema_update(teacher, student, momentum)


def _ema_update(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float | Tensor) -> None:
    groups = _groups(teacher, student)
    if isinstance(momentum, Tensor):
        if momentum.device.type == "cpu":
            momentum = momentum.item()
            _check_momentum(momentum)
        elif teacher and momentum.device != teacher[0].device:
            raise ValueError(f"momentum: expected on the host or on {teacher[0].device}, got on {momentum.device}")
    for (dtype, _, are_alike), pairs in groups.items():
        if not dtype.is_floating_point:
            torch._foreach_copy_([t for t, _ in pairs], [s for _, s in pairs])
        elif are_alike and runs_triton(*pairs[0]) and not (INTERPRETED and pairs[0][0].is_cuda):
            _launch(pairs, momentum)
        else:
            _average(pairs, momentum)


def _check_momentum(momentum: float | Tensor) -> None:
    if isinstance(momentum, Tensor):
        if momentum.shape != () or momentum.dtype not in (torch.float32, torch.float64):  # bfloat16 rounds 0.999 to 1
            raise ValueError(f"momentum: expected a 0-d float32 or float64 tensor, got {describe(momentum)}")
    elif not isinstance(momentum, (int, float)) or not 0 <= momentum <= 1:
        raise ValueError(f"momentum: expected a number of 0 to 1, or a 0-d tensor, got {momentum!r}")


def _groups(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> dict[tuple[torch.dtype, torch.dtype, bool], Pairs]:
    """Non-empty pairs, by dtypes and by whether both have the same layout. Raises ValueError for wrong arguments."""
    for name, tensors in (("teacher", teacher), ("student", student)):
        wrong = [x for x in tensors if not isinstance(x, Tensor)] if isinstance(tensors, (list, tuple)) else [tensors]
        if wrong:
            raise ValueError(f"{name}: expected a list of tensors, got {type(wrong[0]).__name__}")
    if len(teacher) != len(student):
        raise ValueError(f"student: expected {len(teacher)} tensors, as many as in teacher, got {len(student)}")
    device = teacher[0].device if teacher else None
    groups: dict[tuple[torch.dtype, torch.dtype, bool], Pairs] = {}
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        if t.shape != s.shape:
            raise ValueError(f"student[{i}]: expected the shape of teacher[{i}], {tuple(t.shape)}, got {describe(s)}")
        for name, x in (("teacher", t), ("student", s)):
            if x.device != device:
                raise ValueError(f"{name}[{i}]: expected the device of teacher[0], {device}, got {x.device}")
        if t.numel():
            groups.setdefault((t.dtype, s.dtype, _are_laid_out_alike(t, s)), []).append((t, s))
    for t_dtype, s_dtype, _ in groups:
        if t_dtype.is_floating_point != s_dtype.is_floating_point or t_dtype.is_complex or s_dtype.is_complex:
            raise ValueError(f"student: expected both floating or both integer, got {s_dtype} for {t_dtype} of teacher")
    places = [t.data_ptr() for pairs in groups.values() for t, _ in pairs]
    if len(set(places)) < len(places):
        raise ValueError("teacher: expected tensors that share no memory, got two that begin at one address")
    return groups


def _are_laid_out_alike(t: Tensor, s: Tensor) -> bool:
    """Whether equal offsets in memory hold equal elements of both tensors, without gaps."""
    if t.is_contiguous() and s.is_contiguous():
        return True
    if t.stride() != s.stride():
        return False
    is_channels_last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)  # a quicker question
    return is_channels_last or torch.ops.aten.is_non_overlapping_and_dense(t)


def _average(pairs: Pairs, momentum: float | Tensor) -> None:
    """Update by torch, for any dtypes, strides and devices. All `pairs` have the same two dtypes."""
    t, s = pairs[0]
    wide = torch.float64 if torch.float64 in (t.dtype, s.dtype) else torch.float32
    if isinstance(momentum, Tensor):
        weight = (1 - momentum.double()).to(wide)
    else:
        weight = torch.full((), 1 - momentum, dtype=wide, device=t.device)
    if t.dtype == s.dtype == wide:
        # A list of weights is a tenth faster on the CPU than one number.
        torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], [weight] * len(pairs))
        return
    for pair in pairs:
        t, s = (torch.atleast_1d(x) for x in pair)
        rows = max(1, CHUNK * len(t) // t.numel())
        for a, b in zip(t.split(rows), s.split(rows), strict=True):
            a.copy_(a.to(wide).lerp_(b.to(wide), weight))


def _launch(pairs: Pairs, momentum: float | Tensor) -> None:
    """Update by Triton. All `pairs` have the same two dtypes, and both tensors of a pair the same layout."""
    t, s = pairs[0]
    rows = [(t.data_ptr(), s.data_ptr(), t.numel()) for t, s in pairs]
    number, pointer = (0.0, momentum) if isinstance(momentum, Tensor) else (1.0 - momentum, None)
    dtypes = {"TEACHER": KERNEL_DTYPES[t.dtype], "STUDENT": KERNEL_DTYPES[s.dtype]}
    with torch.cuda.device_of(t):  # for the questions about its current stream, too
        for alignment, table in _tables(t.device, t.element_size(), s.element_size(), tuple(rows)):
            launch(
                _ema_kernel, (len(table),), table, number, pointer,
                **dtypes, ALIGNMENT=alignment, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
            if table.is_cuda:
                table.record_stream(torch.cuda.current_stream())  # the table may be freed while another stream reads it
                if torch.cuda.is_current_stream_capturing():
                    _captured.append(table)
    torch.autograd.graph.increment_version([t for t, _ in pairs])


_captured: list[Tensor] = []  # tables that CUDA graphs read again


@functools.lru_cache(16)
def _tables(
    device: torch.device, teacher_bytes: int, student_bytes: int, tensors: tuple[tuple[int, int, int], ...]
) -> list[tuple[int, Tensor]]:
    """[(alignment, (blocks, 3) int64 on `device`)]: per block its address in teacher and student, and its length.

    Args:
        tensors: (address of the teacher, address of the student, number of elements) for each pair.

    This is a pure function of numbers, so a cached table is right for whichever tensors are at these addresses now. A
    table that one stream fills cannot be read too early by another: both would write the same teacher, so their callers
    must order them anyway.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("ema_update_: call it with these tensors once before a CUDA graph captures it")
    tables: dict[int, list[tuple[int, int, int]]] = {ALIGNMENT: [], 1: []}
    for t, s, size in tensors:
        for offset in range(0, size, BLOCK):
            row = (t + offset * teacher_bytes, s + offset * student_bytes, min(size - offset, BLOCK))
            tables[1 if any(number % ALIGNMENT for number in row) else ALIGNMENT].append(row)
    host = {alignment: torch.tensor(rows, dtype=torch.int64) for alignment, rows in tables.items() if rows}
    if device.type == "cuda":  # without waiting for the device
        host = {alignment: table.pin_memory() for alignment, table in host.items()}
    return [(alignment, table.to(device, non_blocking=True)) for alignment, table in host.items()]


@triton.jit
def _ema_kernel(
    table,
    weight,  # 1 - momentum, unless `momentum` is a pointer
    momentum,
    TEACHER: tl.constexpr,
    STUDENT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = table + 3 * tl.program_id(0).to(tl.int64)
    # The hint lets the compiler move 16 bytes at once.
    teacher = tl.multiple_of(tl.load(row).to(tl.pointer_type(TEACHER)), ALIGNMENT)
    student = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(STUDENT)), ALIGNMENT)
    size = tl.multiple_of(tl.load(row + 2), ALIGNMENT)
    if momentum is not None:
        weight = (1 - tl.load(momentum).to(tl.float64)).to(tl.float32)
    at = tl.arange(0, BLOCK)
    t = tl.load(teacher + at, mask=at < size).to(tl.float32)
    s = tl.load(student + at, mask=at < size).to(tl.float32)
    # Interpolate from the nearer end, as torch.lerp does: momentum 0 gives exactly the student.
    moved = tl.where(weight < 0.5, t + weight * (s - t), s - (1 - weight) * (s - t))
    tl.store(teacher + at, moved.to(TEACHER), mask=at < size)
