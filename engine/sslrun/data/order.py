"""The sample at each position of an epoch, as a function instead of a shuffled list."""

from typing import Protocol

import numpy as np

from sslrun.randomness import CLUSTER_VIEW, ORDER_VIEW, words

_ROUNDS = 12
_MIX = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Sampler(Protocol):
    """Gives the loader the sample ids at some positions."""

    def ids(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """(B,) int64 sample ids at (B,) int64 positions of an epoch."""
        ...


class Sequential:
    """Sample i is at position i; for evaluation. Positions past the end wrap around.

    Args:
        num_samples: N, size of the source.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def ids(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """(B,) int64 sample ids."""
        return np.asarray(positions, dtype=np.int64) % self.num_samples


class Order:
    """A new permutation of the samples in every epoch, computed for any positions without memory or state.

    A Feistel network permutes [0, 2**bits), 2**bits < 2N; an output outside [0, N) is put through it again until it
    falls inside (cycle walking), which leaves a permutation of [0, N). Positions past N wrap to the epoch's first
    samples (with draws of their own, because draws are keyed by position).

    Args:
        num_samples: N, size of the source.
        seed: seed of the run.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError("an order needs at least one sample")
        self.num_samples = num_samples
        self.seed = seed
        bits = max(2, (num_samples - 1).bit_length())
        self._right_bits = np.uint64(bits // 2)
        self._left_mask = np.uint64(2 ** (bits - bits // 2) - 1)
        self._right_mask = np.uint64(2 ** (bits // 2) - 1)

    def ids(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Sample ids of any positions of an epoch.

        Args:
            epoch: number of the epoch, from 0.
            positions: (B,) int64.

        Returns:
            (B,) int64, ids in [0, N).
        """
        keys = words(self.seed, epoch, np.zeros(1, dtype=np.int64), ORDER_VIEW, 2 * _ROUNDS)[0]
        keys = (keys[0::2] << np.uint64(32)) | keys[1::2]
        ids = (np.asarray(positions, dtype=np.int64) % self.num_samples).astype(np.uint64)
        outside = np.arange(len(ids))
        while len(outside):
            ids[outside] = self._permute(ids[outside], keys)
            outside = outside[ids[outside] >= self.num_samples]
        return ids.astype(np.int64)

    def _permute(self, x: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """One pass of the network: each half is changed in turn by a keyed hash of the other half."""
        left, right = x >> self._right_bits, x & self._right_mask
        for i in range(0, _ROUNDS, 2):
            left = left ^ (_hash(right, keys[i]) & self._left_mask)
            right = right ^ (_hash(left, keys[i + 1]) & self._right_mask)
        return (left << self._right_bits) | right


class Balanced:
    """Draws every cluster of samples equally often, whatever its size, as DeepCluster does (Caron et al. 2018, arXiv
    1807.05520, section 3.3).

    In an epoch of N positions, each of the K clusters that have samples is at N // K or N // K + 1 of them. It goes
    through its samples, again and again if it is small, in an order that changes with the epoch.

    Args:
        labels: (N,) cluster of each sample; any whole numbers.
        seed: seed of the run.
    """

    def __init__(self, labels: np.ndarray, seed: int) -> None:
        self.num_samples = len(labels)
        self.seed = seed
        _, self._cluster, self._sizes = np.unique(labels, return_inverse=True, return_counts=True)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._places = Order(self.num_samples, seed)  # shuffles the clusters
        self._epoch, self._members = -1, np.empty(0, dtype=np.int64)

    def ids(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """(B,) int64 sample ids."""
        if epoch != self._epoch:
            keys = words(self.seed, epoch, np.arange(self.num_samples), CLUSTER_VIEW, 1)[:, 0]
            self._epoch, self._members = epoch, np.lexsort((keys, self._cluster))  # cluster after cluster, shuffled
        turn, cluster = np.divmod(self._places.ids(epoch, positions), len(self._sizes))
        return self._members[self._starts[cluster] + turn % self._sizes[cluster]]


def _hash(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finalizer of SplitMix64 over x + key (the key spreads over all 64 bits)."""
    x = x + key
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    return x ^ (x >> np.uint64(31))
