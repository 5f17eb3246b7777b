"""Images that cannot be read or decoded: each is named once, counted and replaced; too many of them end the run."""

import logging

import numpy as np

from sslrun.errors import RunFailed
from sslrun.randomness import SUBSTITUTE_VIEW, words

logger = logging.getLogger("sslrun")

_ATTEMPTS = 100


class BadSamples:
    """The bad images that a run has met. They go into the checkpoint, so that a resumed run replaces them at once.

    A substitute is a pure function of (seed, epoch, position, attempt): the same sample takes a bad image's place,
    whether the image was known to be bad or is found to be bad at that moment.

    Args:
        max_bad_pct: percentage of the source's samples that may be bad before the run stops. One bad sample is
            allowed in any case, unless this is 0.
    """

    def __init__(self, max_bad_pct: float = 1.0) -> None:
        self.max_bad_pct = max_bad_pct
        self.found: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.found)

    def add(self, sample: int, name: str, reason: str, num_samples: int) -> None:
        """Log and count a bad image, the first time it is met.

        Raises:
            RunFailed: more of the source's `num_samples` are bad than `max_bad_pct` allows.
        """
        if sample in self.found:
            return
        self.found[sample] = f"{name}: {reason}"
        logger.warning("bad image, replaced by another: %s: %s", name, reason)
        allowed = self.max_bad_pct / 100 * num_samples
        if len(self.found) > (max(allowed, 1) if self.max_bad_pct > 0 else 0):
            raise RunFailed(
                f"{len(self.found)} of {num_samples} images cannot be decoded, more than data.max_bad_pct = "
                f"{self.max_bad_pct:g}; the last one: {name}: {reason}"
            )

    def replace(self, ids: np.ndarray, seed: int, epoch: int, positions: np.ndarray, num_samples: int) -> np.ndarray:
        """The ids with every known bad one replaced.

        Args:
            ids: (B,) int64.
            seed: seed of the run.
            epoch: epoch of the batch.
            positions: (B,) int64, positions in the epoch.
            num_samples: N, size of the source.

        Returns:
            (B,) int64; `ids` itself if none of them is bad.
        """
        if not self.found or self.found.keys().isdisjoint(ids.tolist()):
            return ids
        ids = ids.copy()
        for row in np.flatnonzero([sample in self.found for sample in ids.tolist()]):
            place = positions[row : row + 1]
            drawn = words(seed, epoch, place, SUBSTITUTE_VIEW, 2 * _ATTEMPTS)[0]
            candidates = ((drawn[0::2] << np.uint64(32)) | drawn[1::2]) % np.uint64(num_samples)
            good = [sample for sample in candidates.astype(np.int64).tolist() if sample not in self.found]
            if not good:
                raise RunFailed(f"no substitute for {self.found[int(ids[row])]}: {len(self.found)} images are bad")
            ids[row] = good[0]
        return ids

    def state_dict(self) -> dict[str, str]:
        """Plain strings: sample id -> `name: reason`."""
        known = list(self.found.items())  # in one step: the loader's thread may be adding to it
        return {str(sample): text for sample, text in known}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Add the bad images of a checkpoint or of another rank, without logging them again."""
        self.found.update({int(sample): text for sample, text in state.items()})
