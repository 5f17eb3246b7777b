"""Every source of randomness of a run: what is drawn, by which function, with which key.

No random state is kept between two steps. Each draw is a function of the seed and of its purpose, so a resumed run
draws the same numbers as an uninterrupted one.

    what is drawn                              function                             key
    initial weights of all networks            `seed_weights`                       seed
    initial rows of NPID's bank                `fixed_generator`                    a number of `seed_weights`' stream
    transforms of a view                       `uniforms`, the view's number        seed, epoch, position, view
    noise of RandomErasing                     numpy's Philox, standard normal      a draw of the transform
    mask of a view                             `uniforms`, from MASK_OFFSET on      seed, epoch, position, view
    sharing out of masks over views            `uniforms`, from SLOT_OFFSET on      seed, epoch, samples, view
    order of the samples of an epoch           `words`, ORDER_VIEW                  seed, epoch
    order of the samples within a cluster      `words`, CLUSTER_VIEW                seed, epoch, sample
    substitute of a bad image                  `words`, SUBSTITUTE_VIEW             seed, epoch, position
    held-out samples (data.holdout)            `uniforms`, HOLDOUT_VIEW             0, sample: the same for every seed
    samples that `Fraction` keeps              `words`, FRACTION_VIEW               seed of the fraction, sample
    drawn images of `Shapes`                   `draw` in data/sources/shapes_drawing   seed of the source, stream, image
    a method's own draws, equal on all ranks   `step_generator`, `step_rng`         seed, step
    dropout masks of our own methods           `mixed_` (`sslrun.nn.dropout`)       seed, step, position in global batch
    stochastic depth of our own networks       `mixed_` (`sslrun.nn.stochastic`)    seed, step, pass, branch, group
    scale of rotary positions                  `mixed_` (`sslrun.nn.stochastic`)    seed, step, pass, block
    rows of a bank, of NPID and InterCLR       `mixed_` (`sslrun.nn.drawn_rows`)    seed, step, position in global batch
    torch's global generators                  `seed_torch`                         seed, step, phase, rank, micro-batch
    initial weights of linear classifiers      `fixed_generator`                    seed
    images that test an exported file          `fixed_generator`                    number of images

`torch.nn.Dropout`, and everything else that draws from torch's global generators, is repeated to the bit with the same
number of ranks and the same micro-batch. With others the masks differ, because each micro-batch draws its own;
`sslrun.nn.dropout.dropout_masks` gives masks that do not depend on ranks or micro-batches, and a part of a network that
is a `sslrun.runtime.network_draws.Drawing` draws numbers that do not. A pass is a forward pass of a network, counted
within a micro-batch; a group is one of `data.samples_per_gpu` samples of the global batch, in one view.

Sources: Philox4x32-10, Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (2011), checked
against the known answers of its authors' Random123; SplitMix64, Steele, Lea & Flood (2014).
"""

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

# Views count from 0. Draws for other purposes use view numbers that no recipe reaches.
SUBSTITUTE_VIEW = 0xFFFF0001
ORDER_VIEW = 0xFFFF0002
HOLDOUT_VIEW = 0xFFFF0003
CLUSTER_VIEW = 0xFFFF0004
FRACTION_VIEW = 0xFFFF0005

# Draws of a view for other purposes than its transforms, from these indices on, which no list of transforms reaches.
MASK_OFFSET = 1 << 24
SLOT_OFFSET = 1 << 28

INCREMENT = 0x9E3779B97F4A7C15 - 2**64  # increment of SplitMix64's counter, as int64
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))

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
        positions: (B,) positions in the order of the epoch, below 2**32.
        view: number of the view, counted through all view groups, or one of the constants above.
        count: how many numbers to draw for each image.
        offset: index of the first number, so that each transform of a view has its own range.

    Returns:
        (B, count) float64, multiples of 2**-32.
    """
    return words(seed, epoch, positions, view, count, offset).astype(np.float64) * 2.0**-32


def mixed_(x: Tensor) -> Tensor:
    """SplitMix64's finalizer, in place: a bijection of int64 in which every output bit depends on all input bits."""
    for shift, factor in _ROUNDS:
        x ^= shifted(x, shift)
        x *= factor
    x ^= shifted(x, 31)
    return x


def shifted(x: Tensor, bits: int) -> Tensor:
    """int64 shifted to the right, with zeros from the left."""
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def as_uniform(x: Tensor) -> Tensor:
    """float32 in [0, 1), multiples of 2**-24, of random int64."""
    return shifted(x, 40).float() / 2**24


class Phase(IntEnum):
    """The parts of a step or epoch for which torch's generators are seeded separately."""

    EPOCH = 0  # Method.before_epoch
    TARGETS = 1  # Method.targets
    FORWARD = 2  # Method.forward and its backward pass
    UPDATE = 3  # Method.rewrites, Method.after_step


def seed_torch(device: torch.device, seed: int, step: int, phase: Phase, rank: int = 0, micro_batch: int = 0) -> None:
    """Seeds torch's global generators of the CPU and of the device, without waiting for the device.

    Args:
        device: the device of the run.
        seed: the run's seed.
        step: number of optimizer steps before this one.
        phase: the part of the step that follows.
        rank: rank of this process; 0 on all ranks if they have to draw the same numbers.
        micro_batch: index of the micro-batch in the step.
    """
    key = _key_of(seed, step, phase, rank, micro_batch)
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(key)


def seed_weights(seed: int) -> None:
    """Seeds torch's global generators, from which the initial weights of all networks are drawn."""
    torch.manual_seed(seed)


def step_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator that depends on (seed, step) alone: equal on every rank and after every resume."""
    return fixed_generator((seed << 31) + step)


def step_rng(seed: int, step: int) -> np.random.Generator:
    """The same as a NumPy generator, which has more distributions."""
    return np.random.default_rng([seed, step])


def fixed_generator(seed: int) -> torch.Generator:
    """A new CPU generator with this seed."""
    return torch.Generator().manual_seed(seed)


def key_of(*parts: int) -> int:
    """An int64 that depends on all parts and on their order."""
    return _key_of(*parts) - 2**63


def _key_of(*parts: int) -> int:
    key = 0
    for part in parts:
        key = _mixed(key + part + 1)
    return key


def _mixed(x: int) -> int:
    """One step of SplitMix64, of a Python integer modulo 2^64."""
    x = (x + INCREMENT) % 2**64
    for shift, factor in _ROUNDS:
        x = (x ^ (x >> shift)) * factor % 2**64
    return x ^ (x >> 31)
