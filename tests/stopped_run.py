"""A run that gets a signal at a chosen place, and from then on is slow there: who does not look is not done in time."""

import ctypes
import importlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sslrun.cli import main
from sslrun.evaluation import features, knn, spectrum
from sslrun.nn import clustering
from sslrun.runtime import distributed

SLOW_S = 1.0  # a call of a slow place

# What is called many times there, in the runs of the tests.
PLACES = {
    "index": ("sslrun.data.sources.base", "Source.open"),
    "features": ("sslrun.evaluation.features", "pooled"),
    "k-NN": ("sslrun.evaluation.knn", "_keys"),
    "probe": ("torch.nn.functional", "linear"),
    "spectrum": ("torch", "Tensor.addmm_"),
    "held-out loss": ("sslrun.runtime.executor", "Executor.forward"),
    "clustering": ("sslrun.nn.clustering", "_nearest"),
    "step": ("sslrun.runtime.executor", "Executor.forward"),
    "data": ("sslrun.data.sources.subset", "Subset.encoded"),
}


def main_with_signal(
    words: Sequence[str], place: str, after: int, number: int, ranks: Sequence[int], how: str = "slow"
) -> tuple[int, float]:
    """(exit code, seconds from the signal to the end) of a command line.

    Args:
        words: the command line.
        place: one of PLACES.
        after: the calls of it before the signal.
        number: the signal.
        ranks: the ranks that get it.
        how: "slow" takes its time in Python; "blocked" never comes back from C, and "hung" never from a lock in Python.
    """
    torch.set_num_threads(1)
    features.BATCH, knn.BANK_PIECE, clustering.PIECE, spectrum.PIECE = 4, 4, 16, 64  # in many pieces
    module, name = PLACES[place]
    owner: Any = importlib.import_module(module)
    *parents, attribute = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    slow = _Slow(getattr(owner, attribute), after, number, distributed.rank() in ranks, how)
    setattr(owner, attribute, lambda *arguments, **options: slow(*arguments, **options))
    code = main(words)
    assert slow.began is not None, f"{place} was called {slow.calls} times, not more than {after}"
    return code, time.monotonic() - slow.began


class _Slow:
    def __init__(self, function: Callable[..., Any], after: int, number: int, is_signaled: bool, how: str) -> None:
        self.function, self.after, self.number, self.is_signaled, self.how = function, after, number, is_signaled, how
        self.calls, self.began = 0, None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls > self.after:
            if self.began is None:
                self.began = time.monotonic()
                if self.is_signaled:
                    threading.Timer(0.3, os.kill, (os.getpid(), self.number)).start()
            if self.how == "blocked":
                lock_twice()
            if self.how == "hung":
                threading.Event().wait()
            for _ in range(10):
                time.sleep(SLOW_S / 10)
        return self.function(*arguments, **options)


def lock_twice() -> None:
    """Waits for ever in C, without Python's global lock; a signal does not interrupt it."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)
