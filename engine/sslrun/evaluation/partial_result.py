"""The saved state of a long evaluation, in a file beside its result: the same command continues from it."""

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sslrun.runtime import distributed
from sslrun.runtime.durable import replace_or_fail

logger = logging.getLogger(__name__)

SAVE_S = 120.0  # seconds between two saves


class PartialResult:
    """The state of an evaluation after some of its steps, the same on all ranks. Rank 0 reads and writes the file.

    Args:
        path: path of the file.
        identity: returns a text that differs for every other evaluation; called on rank 0 when it is first needed.
    """

    def __init__(self, path: Path, identity: Callable[[], str]) -> None:
        self.path, self._identity = path, functools.cache(identity)
        self._saved_s = time.monotonic()

    def load(self, tensors: Mapping[str, Tensor]) -> int:
        """Fills the tensors of all ranks from the file; returns the number of steps done, 0 without a saved state.

        A file that is damaged or belongs to another evaluation is ignored, with a warning.
        """
        steps = distributed.from_rank_0(lambda: self._read(tensors))
        if steps:
            distributed.broadcast_(list(tensors.values()))
        return steps

    def save(self, tensors: Mapping[str, Tensor], steps: int, *, now: bool) -> None:
        """Replaces the file if `now`, or if the last save is more than SAVE_S ago.

        Raises:
            RunFailed: the file could not be written. The old file is untouched.
        """
        if distributed.rank() > 0 or not (now or time.monotonic() - self._saved_s > SAVE_S):
            return
        host = {name: tensor.cpu() for name, tensor in tensors.items()}
        metadata = {"steps": str(steps), "digest": self._digest(host, steps)}
        replace_or_fail(self.path, save(host, metadata), makes_folder=True)
        self._saved_s = time.monotonic()

    def remove(self) -> None:
        """Removes the file, after the evaluation is done."""
        if distributed.rank() == 0:
            self.path.unlink(missing_ok=True)

    def _read(self, tensors: Mapping[str, Tensor]) -> int:
        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, "pt") as file:
                steps = int(file.metadata()["steps"])
                saved = {name: file.get_tensor(name) for name in tensors}
                is_good = file.metadata()["digest"] == self._digest(saved, steps)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            is_good = False
        if not is_good:
            logger.warning("%s is damaged, or of other weights, images or settings: starting over", self.path)
            return 0
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
        return steps

    def _digest(self, tensors: Mapping[str, Tensor], steps: int) -> str:
        return digest(f"{self._identity()} {steps}", tensors)


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a text and of the names and values of tensors, 64 hexadecimal digits."""
    hashed = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        hashed.update(name.encode())
        hashed.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
