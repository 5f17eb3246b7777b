"""Images that cannot be read or decoded: each is named once, counted and replaced; too many of them end the run.

A damaged image is bad for good. One that the storage does not give, while it gives others, is absent: replaced for one
epoch, and not in the checkpoint.
"""

import logging
from collections.abc import Iterable, Set

import numpy as np

from sslrun.data.outage import Record
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
        self.absent: dict[int, int] = {}  # sample -> the epoch in which it is replaced
        self.record = Record()
        self._named: set[int] = set()

    def __len__(self) -> int:
        return len(self.found)

    def is_replaced(self, sample: int, epoch: int) -> bool:
        """Whether another image takes the sample's place in an epoch."""
        return sample in self.found or self.absent.get(sample) == epoch

    def set_absent(self, sample: int, epoch: int, name: str, reason: str, num_samples: int) -> None:
        """Replace an image for one epoch; log it the first time that it is met.

        Raises:
            RunFailed: as `add`; absent images count too.
        """
        self.absent[sample] = epoch
        if sample not in self._named:
            self._named.add(sample)
            logger.warning(
                "image cannot be read, though others can: replaced for this epoch, by which the run differs from an "
                "undisturbed one; it is tried again in the next epoch and after a resume: %s: %s",
                name,
                reason,
            )
        self._check(name, reason, num_samples)

    def forget_absent(self, samples: Iterable[int] | None = None) -> None:
        """Count these samples, which can be read again, or all, no more as absent."""
        for sample in list(self.absent) if samples is None else samples:
            self.absent.pop(sample, None)

    def add(self, sample: int, name: str, reason: str, num_samples: int) -> None:
        """Log and count a bad image, the first time it is met.

        Raises:
            RunFailed: more of the source's `num_samples` are bad than `max_bad_pct` allows.
        """
        if sample in self.found:
            return
        self.absent.pop(sample, None)
        self.found[sample] = f"{name}: {reason}"
        logger.warning("bad image, replaced by another: %s: %s", name, reason)
        self._check(name, reason, num_samples)

    def _check(self, name: str, reason: str, num_samples: int) -> None:
        allowed, count = self.max_bad_pct / 100 * num_samples, len(self.found) + len(self.absent)
        if count > (max(allowed, 1) if self.max_bad_pct > 0 else 0):
            trouble = "decoded" if not self.absent else f"decoded, {len(self.absent)} of them not even read"
            raise RunFailed(
                f"{count} of {num_samples} images cannot be {trouble}, more than data.max_bad_pct = "
                f"{self.max_bad_pct:g}; the last one: {name}: {reason}"
            )

    def replace(self, ids: np.ndarray, seed: int, epoch: int, positions: np.ndarray, num_samples: int) -> np.ndarray:
        """The ids with every known bad one, and every one that is absent in this epoch, replaced.

        Args:
            ids: (B,) int64.
            seed: seed of the run.
            epoch: epoch of the batch.
            positions: (B,) int64, positions in the epoch.
            num_samples: N, size of the source.

        Returns:
            (B,) int64; `ids` itself if none of them is bad.
        """
        known: Set[int] = self.found.keys()
        if self.absent:
            known = known | {sample for sample, absent_in in self.absent.items() if absent_in == epoch}
        if not known or known.isdisjoint(ids.tolist()):
            return ids
        ids = ids.copy()
        for row in np.flatnonzero([sample in known for sample in ids.tolist()]):
            place = positions[row : row + 1]
            drawn = words(seed, epoch, place, SUBSTITUTE_VIEW, 2 * _ATTEMPTS)[0]
            candidates = ((drawn[0::2] << np.uint64(32)) | drawn[1::2]) % np.uint64(num_samples)
            good = [sample for sample in candidates.astype(np.int64).tolist() if sample not in known]
            if not good:
                named = self.found.get(int(ids[row]), f"image {ids[row]}")
                raise RunFailed(f"no substitute for {named}: {len(known)} images are bad")
            ids[row] = good[0]
        return ids

    def state_dict(self) -> dict[str, str]:
        """Plain strings: sample id -> `name: reason`."""
        known = list(self.found.items())  # in one step: the loader's thread may be adding to it
        return {str(sample): text for sample, text in known}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Add the bad images of a checkpoint or of another rank, without logging them again."""
        self.found.update({int(sample): text for sample, text in state.items()})
