"""Update of LARS over lists of tensors, in place (You, Gitman, Ginsburg 2017, arXiv 1708.03888).

    m = momentum m + scale (g + weight_decay w),   w = w - m        with one scale for each tensor

The scale comes from the norms of the whole tensor, so memory is passed over twice: `square_sums` reads w and g, 8 bytes
per float32 parameter; `lars_update_` reads w, g and m and writes w and m, 20 bytes. Gradients do not change, and there
are no temporaries of the size of a tensor. On a GPU each pass is one launch for all tensors; another, small launch adds
the sums of blocks in a fixed order. On the CPU torch's operators go over chunks that stay in the cache.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.device import INTERPRETED, launch

BLOCK, WARPS = 2048, 8  # elements per program: a multiple of 16 bytes
MERGED = 1024  # blocks whose sums a program adds at once
CHUNK = 1 << 17  # elements that the CPU updates at once: three streams and a temporary of 512 KiB each


@torch.no_grad()
def square_sums(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Sums of squares of each weight and of each gradient, without waiting for the device.

    Args:
        weights: tensors on one device, at least one; empty ones have the sum 0.
        gradients: as many tensors of the same shapes, on the same device.

    Returns:
        (2, tensors) float64. Equal calls give equal bits.
    """
    if _runs_kernel(*weights, *gradients):
        return _square_sums_triton(weights, gradients)
    # The float32 sum of a large tensor would lose digits on the CPU: 1e-4 of 2 million squares, 2e-6 of a chunk.
    chunks = [_flat(x).split(CHUNK) for x in (*weights, *gradients)]
    squares = torch.stack(torch._foreach_norm([chunk for part in chunks for chunk in part])).double().square()
    return torch.stack([part.sum() for part in squares.split([len(part) for part in chunks])]).view(2, -1)


@torch.no_grad()
def lars_update_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    scales: Tensor,
    momentum: float,
    weight_decay: float,
    found_inf: Tensor | None = None,
) -> None:
    """buffer = momentum buffer + scale (gradient + weight_decay weight), then weight = weight - buffer, in place.

    Dense float32 tensors (on the CPU float64 too) with the strides of their weight are updated without temporaries,
    others one by one by `reference`. A CUDA graph can capture the call after it was made once with the same tensors.

    Args:
        weights: tensors to update, on one device, with or without requires_grad. No two may share memory.
        gradients: as many tensors of the same shapes. They do not change.
        buffers: as many tensors of the same shapes, to update. With momentum 0 they are neither read nor written.
        scales: (tensors,) float64 on the same device.
        momentum: decay of the buffers.
        weight_decay: factor of the L2 penalty.
        found_inf: 0-d tensor on the same device; if it is not 0, nothing changes.
    """
    if _runs_kernel(*weights, *gradients, *buffers) and all(map(_are_laid_out_alike, weights, gradients, buffers)):
        _update_triton(weights, gradients, buffers, scales, momentum, weight_decay, found_inf)
    else:
        _update_by_torch(weights, gradients, buffers, scales, momentum, weight_decay, found_inf)
    torch.autograd.graph.increment_version([*weights, *buffers])


@torch.no_grad()
def reference(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    scale: float | Tensor,
    momentum: float,
    weight_decay: float,
    found_inf: Tensor | None = None,
) -> None:
    """`lars_update_` of one tensor in plain PyTorch."""
    step = scale * (g + weight_decay * w)
    moved = momentum * m + step if momentum else step
    weight = w - moved
    if found_inf is not None:
        moved, weight = torch.where(found_inf != 0, m, moved), torch.where(found_inf != 0, w, weight)
    w.copy_(weight)
    if momentum:
        m.copy_(moved)


def _update_by_torch(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    scales: Tensor,
    momentum: float,
    weight_decay: float,
    found_inf: Tensor | None,
) -> None:
    if scales.device.type == "cpu" and found_inf is not None and found_inf.item():
        return
    numbers: Sequence[float | Tensor] = scales.tolist() if scales.device.type == "cpu" else scales.unbind()
    for w, g, m, scale in zip(weights, gradients, buffers, numbers, strict=True):
        is_exact = w.dtype == g.dtype == m.dtype and w.dtype in (torch.float32, torch.float64)
        if isinstance(scale, float) and is_exact and _are_laid_out_alike(w, g, m):
            _update_chunks(w, g, m, scale, momentum, weight_decay)
        else:
            reference(w, g, m, scale, momentum, weight_decay, found_inf)


def _update_chunks(w: Tensor, g: Tensor, m: Tensor, scale: float, momentum: float, weight_decay: float) -> None:
    """Update by torch on the CPU; the scaled gradient of a chunk stays in the cache."""
    w, g, m = (_flat(x) for x in (w, g, m))
    scaled = torch.empty(min(CHUNK, w.numel()), dtype=w.dtype)
    for a, b, c in zip(w.split(CHUNK), g.split(CHUNK), m.split(CHUNK), strict=True):
        u = scaled[: len(a)]
        torch.mul(b, scale, out=u)
        torch._fused_sgd_(
            [a], [u], [c] if momentum else [], weight_decay=scale * weight_decay, momentum=momentum, lr=1.0,
            dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip


def _runs_kernel(*tensors: Tensor) -> bool:
    return all(x.is_cuda != INTERPRETED and x.dtype == torch.float32 and _is_dense(x) for x in tensors)


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(x)


def _flat(x: Tensor) -> Tensor:
    """All elements in one dimension: those of a dense tensor in the order of its memory, without a copy."""
    return x.as_strided((x.numel(),), (1,)) if _is_dense(x) else x.flatten()


def _are_laid_out_alike(weight: Tensor, *others: Tensor) -> bool:
    """Whether equal offsets in memory hold equal elements of all tensors, without gaps."""
    if all(x.is_contiguous() for x in (weight, *others)):
        return True
    strides = [
        [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1] for x in (weight, *others)
    ]
    return _is_dense(weight) and all(other == strides[0] for other in strides)


def _square_sums_triton(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    tensors = tuple((w.data_ptr(), g.data_ptr(), 0, w.numel()) for w, g in zip(weights, gradients, strict=True))
    first = weights[0]
    addresses, blocks, ends = _tables(first.device, tensors)
    of_blocks = torch.empty(2, len(blocks), dtype=torch.float32, device=first.device)
    sums = torch.empty(2, len(tensors), dtype=torch.float64, device=first.device)
    if len(blocks):
        launch(_squares_kernel, (len(blocks),), addresses, blocks, of_blocks, len(blocks), BLOCK=BLOCK, num_warps=WARPS)
    launch(_merge_kernel, (len(tensors), 2), of_blocks, ends, sums, len(blocks), len(tensors), MERGED=MERGED)
    return sums


def _update_triton(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    scales: Tensor,
    momentum: float,
    weight_decay: float,
    found_inf: Tensor | None,
) -> None:
    lists = zip(weights, gradients, buffers, strict=True)
    addresses, blocks, _ = _tables(
        weights[0].device, tuple((w.data_ptr(), g.data_ptr(), m.data_ptr(), w.numel()) for w, g, m in lists)
    )
    if len(blocks):
        launch(
            _update_kernel, (len(blocks),), addresses, blocks, scales, found_inf, float(momentum), float(weight_decay),
            HAS_MOMENTUM=momentum != 0, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


_captured: list[tuple[Tensor, ...]] = []  # tables that CUDA graphs read again


def _tables(device: torch.device, tensors: tuple[tuple[int, int, int, int], ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Tables on `device`, int64, which the kernels read.

    Args:
        tensors: (addresses of weight, gradient and buffer, number of elements) for each tensor.

    Returns:
        (tensors, 4), the argument; (blocks, 2), for each block its tensor and its first element; (tensors + 1,), the
        first block of each tensor, and the number of blocks.
    """
    tables = _addresses(device, tensors), *_blocks(device, tuple(size for *_, size in tensors))
    if device.type == "cuda":
        with torch.cuda.device(device):
            for table in tables:
                table.record_stream(torch.cuda.current_stream())  # it may be freed while another stream reads it
            if torch.cuda.is_current_stream_capturing():
                _captured.append(tables)
    return tables


@functools.lru_cache(16)
def _addresses(device: torch.device, tensors: tuple[tuple[int, int, int, int], ...]) -> Tensor:
    return _on_device(tensors, 4, device)


@functools.lru_cache(16)
def _blocks(device: torch.device, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    blocks, ends = [], [0]
    for tensor, size in enumerate(sizes):
        blocks += [(tensor, first) for first in range(0, size, BLOCK)]
        ends.append(len(blocks))
    return _on_device(blocks, 2, device), _on_device([(end,) for end in ends], 1, device).view(-1)


def _on_device(rows: Sequence[tuple[int, ...]], columns: int, device: torch.device) -> Tensor:
    """(rows, columns) int64, without waiting for the device."""
    if device.type != "cuda":
        return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, columns)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("lars_update_: call it with these tensors once before a CUDA graph captures it")
    table = torch.tensor(rows, dtype=torch.int64).view(-1, columns).pin_memory()
    return table.to(device, non_blocking=True)


@triton.jit
def _place(addresses, blocks, BLOCK: tl.constexpr):
    """The tensor of this program, its row in the table of addresses, the first element, and the number of elements."""
    block = blocks + 2 * tl.program_id(0).to(tl.int64)
    tensor, first = tl.load(block), tl.load(block + 1)
    row = addresses + 4 * tensor
    return tensor, row, first, tl.minimum(tl.load(row + 3) - first, BLOCK).to(tl.int32)


@triton.jit
def _is_whole(size, places, BLOCK: tl.constexpr):
    """Whether a block is full and aligned to 16 bytes in all tensors; `places` is the bitwise or of their addresses."""
    return (size == BLOCK) & (places % 16 == 0)


@triton.jit
def _aligned(address):
    return tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)  # so the compiler moves 16 bytes at once


@triton.jit
def _squares_kernel(addresses, blocks, of_blocks, num_blocks, BLOCK: tl.constexpr):
    _, row, first, size = _place(addresses, blocks, BLOCK)
    w, g = tl.load(row) + 4 * first, tl.load(row + 1) + 4 * first
    at = tl.arange(0, BLOCK)
    if _is_whole(size, w | g, BLOCK):
        x = tl.load(_aligned(w) + at)
        y = tl.load(_aligned(g) + at)
    else:
        x = tl.load(w.to(tl.pointer_type(tl.float32)) + at, mask=at < size, other=0.0)
        y = tl.load(g.to(tl.pointer_type(tl.float32)) + at, mask=at < size, other=0.0)
    tl.store(of_blocks + tl.program_id(0), tl.sum(x * x))
    tl.store(of_blocks + num_blocks + tl.program_id(0), tl.sum(y * y))


@triton.jit
def _merge_kernel(of_blocks, ends, sums, num_blocks, num_tensors, MERGED: tl.constexpr):
    """Adds the sums of the blocks of one tensor, for the weights (program 0 of the second axis) or the gradients."""
    tensor, side = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(ends + tensor).to(tl.int32), tl.load(ends + tensor + 1).to(tl.int32)
    total = tl.zeros([MERGED], tl.float64)
    for first in range(begin, end, MERGED):
        at = first + tl.arange(0, MERGED)
        total += tl.load(of_blocks + side * num_blocks + at, mask=at < end, other=0.0).to(tl.float64)
    tl.store(sums + side * num_tensors + tensor, tl.sum(total))


@triton.jit
def _update_kernel(
    addresses,
    blocks,
    scales,
    found_inf,
    momentum,
    weight_decay,
    HAS_MOMENTUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, row, first, size = _place(addresses, blocks, BLOCK)
    scale = tl.load(scales + tensor).to(tl.float32)
    if found_inf is not None:
        size = tl.where(tl.load(found_inf) != 0, 0, size)  # nothing is read or written
    w, g, m = tl.load(row) + 4 * first, tl.load(row + 1) + 4 * first, tl.load(row + 2) + 4 * first
    at = tl.arange(0, BLOCK)
    if _is_whole(size, w | g | m, BLOCK):
        weight = tl.load(_aligned(w) + at)
        moved = scale * (tl.load(_aligned(g) + at) + weight_decay * weight)
        if HAS_MOMENTUM:
            moved += momentum * tl.load(_aligned(m) + at)
            tl.store(_aligned(m) + at, moved)
        tl.store(_aligned(w) + at, weight - moved)
    else:
        weights = w.to(tl.pointer_type(tl.float32)) + at
        gradients, buffers = g.to(tl.pointer_type(tl.float32)) + at, m.to(tl.pointer_type(tl.float32)) + at
        inside = at < size
        weight = tl.load(weights, mask=inside)
        moved = scale * (tl.load(gradients, mask=inside) + weight_decay * weight)
        if HAS_MOMENTUM:
            moved += momentum * tl.load(buffers, mask=inside)
            tl.store(buffers, moved, mask=inside)
        tl.store(weights, weight - moved, mask=inside)
