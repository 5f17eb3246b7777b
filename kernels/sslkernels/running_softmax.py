"""Sums of exponentials over scores that are read a tile at a time: what `sinkhorn` and `soft_cross_entropy` share.

A sum is carried as (high, total), for total * exp(high / temperature), with `high` in the units of the scores: they are
compared and subtracted as they came, and only the differences are scaled, so a low temperature costs no digits. A score
of -inf adds nothing, and a sum without terms has total 0; `high` is finite even then, so that no inf - inf arises.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.device import processors

CHUNK_ELEMENTS = 2**17  # of a chunk of rows on the CPU, for each thread: it and its temporaries stay in the caches
PROGRAMS_PER_PROCESSOR = 16  # of 128 threads: twice what runs at once
MOST_SPLITS = 128  # their partial sums are merged in one tile
LOWEST = tl.constexpr(-1e30)  # `high` of a sum without terms, in the kernels: what is below counts as -inf


def row_chunks(x: Tensor) -> Iterator[slice]:
    """The rows of (B, K), as many at a time as the caches hold."""
    rows, columns = x.shape
    step = max(1, CHUNK_ELEMENTS * torch.get_num_threads() // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def finite_max(x: Tensor, dim: int) -> Tensor:
    """The maximum along `dim`, which is kept with size 1; 0 where all is -inf."""
    high = x.amax(dim=dim, keepdim=True)
    return high.masked_fill_(high == -math.inf, 0.0)


def exponentiate_(x: Tensor, temperature: float) -> Tensor:
    """exp(x / temperature) in place, for x up to 0.

    What is below 2^-112 counts as 0, even for float64 no more than that beside 1: numbers that are not normal, below
    2^-126, cost a CPU a hundred times as much.
    """
    return F.threshold(x.mul_(math.log2(math.e) / temperature), -112.0, -math.inf, inplace=True).exp2_()


def split(length: int, block: int, least_blocks: int, other_programs: int, device: torch.device) -> tuple[int, int]:
    """(splits, length of each) of what one program would walk through in blocks.

    As many as fill the processors, but no split shorter than `least_blocks`, for each costs partial sums.
    """
    blocks = triton.cdiv(length, block)
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors(device), other_programs)
    wanted = min(wanted, blocks // least_blocks, MOST_SPLITS)
    blocks_per_split = triton.cdiv(blocks, max(1, wanted))
    return triton.cdiv(blocks, blocks_per_split), blocks_per_split * block


@triton.jit
def load_tile(start, row, column, rows, columns, stride, outside):
    """float32 (rows, columns) of a matrix; `outside` where it ends.

    A vector over the columns is read as a matrix with stride 0, so that no thread needs what another one read.
    """
    place = start + row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(place, mask=(row < rows)[:, None] & (column < columns)[None, :], other=outside).to(tl.float32)


@triton.jit
def store_tile(start, row, column, rows, columns, x):
    """Into a contiguous (rows, columns) matrix, in its dtype."""
    place = start + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(place, x.to(start.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def weigh(high, x, scale):
    """What a sum so far and a new term at x count, relative to the higher of them: (the higher, old, new).

    Element by element, with one exponential. `scale` is log2(e) / temperature.
    """
    decay = tl.exp2(-tl.abs(x - high) * scale)
    is_higher = x > high
    return tl.maximum(high, x), tl.where(is_higher, decay, 1.0), tl.where(is_higher, 1.0, decay)


@triton.jit
def weigh_all(high, scale, axis: tl.constexpr):
    """The highest along an axis of a tile of sums, and what each of them counts relative to it."""
    top = tl.max(high, axis=axis)
    return top, tl.exp2((high - tl.expand_dims(top, axis)) * scale)
