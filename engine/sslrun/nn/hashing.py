"""Random numbers as a function of a place instead of a stream: the same on every device and for every cut of a batch.

SplitMix64 (Steele, Lea & Flood 2014): `mixed_` of a counter that grows by `INCREMENT`.
"""

from torch import Tensor

INCREMENT = 0x9E3779B97F4A7C15 - 2**64  # as int64, like all factors here
ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def mixed_(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place: int64 to int64, one to one, all bits of a result depend on all of the input."""
    for shift, factor in ROUNDS:
        x ^= shifted(x, shift)
        x *= factor
    x ^= shifted(x, 31)
    return x


def shifted(x: Tensor, bits: int) -> Tensor:
    """int64 to the right, with zeros from the left."""
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)
