"""How far a long evaluation has come, in a file beside its result: the same command goes on from there."""

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

from sslrun.errors import RunFailed
from sslrun.runtime import distributed
from sslrun.runtime.durable import replace_file

logger = logging.getLogger(__name__)

SAVE_S = 120.0  # between two times that it is written


class PartialResult:
    """The state of an evaluation after some of its steps. Rank 0 reads and writes it; the state is the same on all.

    Args:
        path: of the file.
        identity: makes a text that differs where the evaluation is another one, on rank 0 when it is first needed.
    """

    def __init__(self, path: Path, identity: Callable[[], str]) -> None:
        self.path, self._identity = path, functools.cache(identity)
        self._saved_s = time.monotonic()

    def load(self, tensors: Mapping[str, Tensor]) -> int:
        """Fills the tensors of all ranks from the file; the steps done, 0 where there is nothing to go on from.

        A file that is damaged, or of another evaluation, is left alone, with a warning, until it is replaced.
        """
        steps = distributed.from_rank_0(lambda: self._read(tensors))
        if steps:
            distributed.broadcast_(list(tensors.values()))
        return steps

    def save(self, tensors: Mapping[str, Tensor], steps: int, *, now: bool) -> None:
        """Replaces the file: now, or if the last time was long ago.

        Raises:
            RunFailed: it could not be written. What was there is untouched.
        """
        if distributed.rank() > 0 or not (now or time.monotonic() - self._saved_s > SAVE_S):
            return
        host = {name: tensor.cpu() for name, tensor in tensors.items()}
        metadata = {"steps": str(steps), "digest": self._digest(host, steps)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, save(host, metadata))
        except OSError as error:
            raise RunFailed(f"{self.path} could not be written: {error.strerror}") from error
        self._saved_s = time.monotonic()

    def remove(self) -> None:
        """The evaluation is done."""
        if distributed.rank() == 0:
            self.path.unlink(missing_ok=True)

    def _read(self, tensors: Mapping[str, Tensor]) -> int:
        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, "pt") as file:
                steps = int(file.metadata()["steps"])
                found = {name: file.get_tensor(name) for name in tensors}
                is_good = file.metadata()["digest"] == self._digest(found, steps)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            is_good = False
        if not is_good:
            logger.warning("%s is damaged, or of other weights, images or settings: beginning anew", self.path)
            return 0
        for name, tensor in tensors.items():
            tensor.copy_(found[name])
        return steps

    def _digest(self, tensors: Mapping[str, Tensor], steps: int) -> str:
        return digest(f"{self._identity()} {steps}", tensors)


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """64 digits that tell texts, and names and values of tensors, apart."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
