"""A run that gets a signal at a chosen place, and from then on is slow there: who does not look is not done in time."""

import ctypes
import importlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from sslrun.cli import main
from sslrun.contract import Batch
from sslrun.evaluation import features, knn, spectrum
from sslrun.nn import clustering
from sslrun.runtime import distributed, signals
from sslrun.runtime.executor import Executor

SLOW_S = 1.5  # one call of a slow place

# What is called there: many times, but for "opening" and "step".
PLACES = {
    "opening": ("sslrun.data.sources.base", "Source.open"),
    "features": ("sslrun.evaluation.features", "pooled"),
    "held-out loss": ("sslrun.runtime.executor", "Executor.forward"),
    "k-NN": ("sslrun.evaluation.knn", "_keys"),
    "probe": ("torch.nn.functional", "cross_entropy"),
    "spectrum": ("torch", "Tensor.addmm_"),
    "clustering": ("sslrun.nn.clustering", "_nearest"),
    "step": ("sslrun.runtime.executor", "Executor.forward"),
    "batches of a step": ("sslrun.training", "_taken"),
    "batches of features": ("sslrun.evaluation.features", "stoppable"),
}


def main_in_pieces(words: Sequence[str]) -> int:
    """The exit code of a command line whose measurements and clusterings are made in many small pieces."""
    torch.set_num_threads(1)
    features.BATCH, knn.BANK_PIECE, clustering.PIECE, spectrum.PIECE = 4, 4, 16, 64
    return main(words)


def main_with_signal(
    words: Sequence[str], place: str, step: int, number: int, ranks: Sequence[int], how: str = "slow"
) -> tuple[int, float]:
    """(exit code, seconds from the signal to the end) of `main_in_pieces`.

    Args:
        words: the command line.
        place: one of PLACES.
        step: the optimizer steps before the signal; it comes with the next call of the place.
        number: the signal.
        ranks: the ranks that get it.
        how: what a call of the place does from then on: "slow" takes `SLOW_S` longer, "hangs" never returns from a lock
            of Python's, "blocks" never returns from C. "starves" is what a wait for batches does that do not come,
            on the ranks that get the signal.
    """
    place_at = _Place(step, number if distributed.rank() in ranks else None, how)
    for owner, attribute, wrapped in (
        (Executor, "step", place_at.counting),
        (*_owner(*PLACES[place]), place_at.slowed),
    ):
        setattr(owner, attribute, wrapped(getattr(owner, attribute)))
    code = main_in_pieces(words)
    if place_at.began is None:
        assert distributed.rank() not in ranks, f"{place} was not called after step {step}"
        return code, 0.0
    return code, time.monotonic() - place_at.began


def _owner(module: str, name: str) -> tuple[Any, str]:
    owner: Any = importlib.import_module(module)
    *parents, attribute = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, attribute


class _Place:
    def __init__(self, step: int, number: int | None, how: str) -> None:
        self.steps_left, self.number, self.how = step, number, how
        self.began: float | None = None

    def counting(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.steps_left -= 1
            return step(*arguments, **options)

        return counted

    def slowed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*arguments: Any, **options: Any) -> Any:
            if self.steps_left <= 0:
                self._take_time()
                if self.how == "starves" and self.number is not None:
                    return function(*[_Starving() if isinstance(each, Iterator) else each for each in arguments])
            return function(*arguments, **options)

        return slow

    def _take_time(self) -> None:
        if self.began is None:
            self.began = time.monotonic()
            if self.number is not None:
                threading.Timer(0.3, os.kill, (os.getpid(), self.number)).start()
        if self.how == "blocks":
            lock_twice(for_s=3600)
        if self.how == "hangs":
            threading.Event().wait()
        if self.how == "slow":
            time.sleep(SLOW_S)


class _Starving:
    """A stream whose batches do not come, as `BatchStream` behaves then."""

    def __iter__(self) -> "_Starving":
        return self

    def __next__(self) -> Batch:
        while not (code := signals.requested()):
            time.sleep(0.1)
        time.sleep(1)  # the batch may still come
        raise signals.Stopped(code)


def lock_twice(for_s: float) -> None:
    """Waits in C, without Python's global lock; no signal interrupts it."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    until = (ctypes.c_long * 2)(int(time.time() + for_s), 0)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_timedlock(mutex, until)
