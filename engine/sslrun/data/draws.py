"""Random numbers as a function: Philox4x32-10, keyed by the seed, counted by what the number is for.

Nothing in the data room keeps random state. Every number that an image needs is `uniforms(seed, epoch, positions,
view, count)`, so a resume is a step number and any number of ranks sees the same crops. Source: Salmon, Moraes, Dror,
Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (2011); checked against the known answers of its authors' Random123.
"""

import numpy as np

# Views count from 0. Draws for other purposes use numbers that no recipe reaches.
SUBSTITUTE_VIEW = 0xFFFF0001
ORDER_VIEW = 0xFFFF0002
HOLDOUT_VIEW = 0xFFFF0003
CLUSTER_VIEW = 0xFFFF0004
FRACTION_VIEW = 0xFFFF0005

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10.

    Args:
        counter: (..., 4) integers below 2**32.
        key: two integers below 2**32.

    Returns:
        (..., 4) uint64 holding 32-bit words.
    """
    a, b, c, d = (counter[..., i].astype(np.uint64) for i in range(4))
    key_0, key_1 = key
    for _ in range(10):
        product_0, product_1 = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a = (product_1 >> _SHIFT) ^ b ^ np.uint64(key_0)
        c = (product_0 >> _SHIFT) ^ d ^ np.uint64(key_1)
        b, d = product_1 & _LOW, product_0 & _LOW
        key_0, key_1 = (key_0 + _WEYL[0]) & 0xFFFFFFFF, (key_1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([a, b, c, d], axis=-1)


def words(seed: int, epoch: int, positions: np.ndarray, view: int, count: int, offset: int = 0) -> np.ndarray:
    """(B, count) uint64 holding independent 32-bit words; arguments as in `uniforms`."""
    positions = np.asarray(positions, dtype=np.int64)
    limit = 2**32
    if not 0 <= epoch < limit or (positions.size and not 0 <= positions.min() <= positions.max() < limit):
        raise ValueError("epochs and positions must lie in [0, 2**32)")
    first_block, last_block = offset // 4, -(-(offset + count) // 4)
    counter = np.empty((len(positions), last_block - first_block, 4), dtype=np.uint64)
    counter[..., 0] = np.arange(first_block, last_block, dtype=np.uint64)
    counter[..., 1] = view
    counter[..., 2] = positions[:, None]
    counter[..., 3] = epoch
    flat = philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)).reshape(len(positions), -1)
    start = offset - 4 * first_block
    return flat[:, start : start + count]


def uniforms(seed: int, epoch: int, positions: np.ndarray, view: int, count: int, offset: int = 0) -> np.ndarray:
    """Uniform numbers in [0, 1), a pure function of the arguments; draw k of an image does not depend on `count`.

    Args:
        seed: any integer; its low 64 bits are the key.
        epoch: 0 to 2**32 - 1.
        positions: (B,) places in the epoch of the global order, below 2**32.
        view: running number over all views of all view groups, or one of the constants above.
        count: how many numbers each image gets.
        offset: number of the first one, so that each transform of a view has a range of its own.

    Returns:
        (B, count) float64, multiples of 2**-32.
    """
    return words(seed, epoch, positions, view, count, offset).astype(np.float64) * 2.0**-32
