"""Running sums of exponentials over scores that are read tile by tile; shared by `sinkhorn` and `soft_cross_entropy`.

A sum is represented as (high, total), which stands for total * exp(high / temperature). `high` is in the units of the
scores: scores are compared and subtracted unscaled, and only differences are divided by the temperature, so a low
temperature loses no digits. A score of -inf adds nothing. A sum without terms has total 0 and a finite `high`, so that
inf - inf cannot occur.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.device import processors

CHUNK_ELEMENTS = 2**17  # per thread, of a chunk of rows on the CPU: the chunk and its temporaries fit the caches
PROGRAMS_PER_PROCESSOR = 16  # with 128 threads each: twice as many as run at once
MOST_SPLITS = 128  # limit, because one tile merges all partial sums
LOWEST = tl.constexpr(-1e30)  # in the kernels: `high` of a sum without terms; scores below count as -inf


def row_chunks(x: Tensor) -> Iterator[slice]:
    """Slices over the rows of (B, K), each as long as the caches allow."""
    rows, columns = x.shape
    step = max(1, CHUNK_ELEMENTS * torch.get_num_threads() // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def finite_max(x: Tensor, dim: int) -> Tensor:
    """Maximum along `dim`, which is kept with size 1; 0 where all entries are -inf."""
    high = x.amax(dim=dim, keepdim=True)
    return high.masked_fill_(high == -math.inf, 0.0)


def exponentiate_(x: Tensor, temperature: float) -> Tensor:
    """exp(x / temperature) in place, for x <= 0.

    Results below 2^-112 become 0, because subnormal numbers (below 2^-126) are a hundred times slower on a CPU.
    """
    return F.threshold(x.mul_(math.log2(math.e) / temperature), -112.0, -math.inf, inplace=True).exp2_()


def split(length: int, block: int, least_blocks: int, other_programs: int, device: torch.device) -> tuple[int, int]:
    """(number of splits, length of each) for a loop of `length` elements in blocks of `block`.

    Enough splits to occupy all processors, but none shorter than `least_blocks` blocks, because each split writes
    partial sums.
    """
    blocks = triton.cdiv(length, block)
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors(device), other_programs)
    wanted = min(wanted, blocks // least_blocks, MOST_SPLITS)
    blocks_per_split = triton.cdiv(blocks, max(1, wanted))
    return triton.cdiv(blocks, blocks_per_split), blocks_per_split * block


@triton.jit
def load_tile(start, row, column, rows, columns, stride, outside):
    """A float32 tile of a (rows, columns) matrix; `outside` beyond its edges.

    A vector over the columns is read as a matrix with stride 0, so that threads need not exchange values.
    """
    place = start + row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(place, mask=(row < rows)[:, None] & (column < columns)[None, :], other=outside).to(tl.float32)


@triton.jit
def store_tile(start, row, column, rows, columns, x):
    """Store a tile into a contiguous (rows, columns) matrix, in its dtype."""
    place = start + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(place, x.to(start.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def weigh(high, x, scale):
    """(max(high, x), weight of the old sum, weight of the new term), elementwise, with one exponential.

    Both weights are relative to the maximum. `scale` is log2(e) / temperature.
    """
    decay = tl.exp2(-tl.abs(x - high) * scale)
    is_higher = x > high
    return tl.maximum(high, x), tl.where(is_higher, decay, 1.0), tl.where(is_higher, 1.0, decay)


@triton.jit
def weigh_all(high, scale, axis: tl.constexpr):
    """Maximum of `high` along an axis of a tile of sums, and the weight of each sum relative to it."""
    top = tl.max(high, axis=axis)
    return top, tl.exp2((high - tl.expand_dims(top, axis)) * scale)
