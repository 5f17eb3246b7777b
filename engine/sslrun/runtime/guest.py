"""sslrun as a guest in a program, such as a notebook: errors are exceptions, and the program finds its own state again.

The command line owns its process. What it may leave behind (log handlers, threads, torch's switches, random numbers) is
restored here, after a run and after an error or Ctrl-C in it.
"""

import contextlib
import gc
import io
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch

from sslrun.runtime import signals
from sslrun.runtime.signals import INTERRUPTED, Stopped


@contextlib.contextmanager
def guest() -> Iterator[None]:
    """A context for work on behalf of a program.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, and what there was is saved.
        SystemExit: the process was asked to stop by SIGTERM or the like, and what there was is saved.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with signals.as_guest(), _torch_restored(), torch.random.fork_rng(devices), _logging_restored(), _with_bars():
            yield
    except Stopped as stopped:
        raise_stop(stopped.exit_code)


def raise_stop(code: int) -> None:
    """The exit code of a stopped run as the exception that a program expects; 0 raises nothing."""
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise SystemExit(code)


@contextlib.contextmanager
def _torch_restored() -> Iterator[None]:
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    threads, has_gc = torch.get_num_threads(), gc.isenabled()
    switches = [(cudnn, name) for name in ("allow_tf32", "benchmark", "deterministic")] + [(products, "allow_tf32")]
    values = [getattr(place, name) for place, name in switches]
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for (place, name), value in zip(switches, values, strict=True):
            setattr(place, name, value)
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        (gc.enable if has_gc else gc.disable)()


@contextlib.contextmanager
def _logging_restored() -> Iterator[None]:
    """The handlers of the run are closed; within it, those of the program do not show its messages a second time."""
    logger = logging.getLogger("sslrun")
    handlers, level, propagates = list(logger.handlers), logger.level, logger.propagate
    logger.propagate = False
    try:
        yield
    finally:
        for handler in [each for each in logger.handlers if each not in handlers]:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(level)
        logger.propagate = propagates


class _AsTerminal:
    """A notebook's stderr, which can redraw a line, though it is no terminal."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise io.UnsupportedOperation("a notebook has no columns")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _with_bars() -> Iterator[None]:
    """Within it, a notebook shows progress bars as a terminal does."""
    if not type(sys.stderr).__module__.startswith("ipykernel"):
        yield
        return
    with contextlib.redirect_stderr(_AsTerminal(sys.stderr)):
        yield
