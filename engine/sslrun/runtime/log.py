"""Logging of a run: messages, rows of numbers, progress. Rank 0 writes; warnings of all ranks reach the console.

Functions here take Python floats. The caller reads device tensors once, before, so that nothing in this file waits for
a device.
"""

import contextlib
import errno
import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import torch

from sslrun.errors import RunFailed, UsageError
from sslrun.number_format import after, measured
from sslrun.runtime import distributed
from sslrun.runtime.hooks.base import Hook
from sslrun.runtime.hooks.delivery import Delivery, close
from sslrun.runtime.open_bars import close_bars
from sslrun.runtime.run_files import LOSS, MEMORY, METRICS, RATE, SPEED, WAIT, is_number, rows

logger = logging.getLogger(__name__)

T = TypeVar("T")
# O_NONBLOCK: a pipe without a reader is an error, and is not waited for.
_APPENDING = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK


def start_logging(rank: int = 0, file: Path | None = None, level: str = "INFO") -> None:
    """Send the messages of logger "sslrun" to stderr and, on rank 0, to a file. A second call replaces the first.

    Args:
        rank: rank of this process; ranks other than 0 show only warnings and errors, with their number.
        file: file that messages are appended to.
        level: least severe level of the messages that are shown.

    Raises:
        UsageError: the file cannot be written.
    """
    root = logging.getLogger("sslrun")
    for old in [handler for handler in root.handlers if isinstance(handler, (_Console, _File))]:
        root.removeHandler(old)
        old.close()
    root.setLevel(level)
    root.addHandler(_Console(rank))
    if file is not None and rank == 0:
        try:
            root.addHandler(_File(file))
        except OSError as error:
            raise UsageError(f"{file} cannot be written: {error.strerror}") from error


def shown(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yields the items, with a progress bar if rank 0 has a terminal.

    Args:
        items: items to yield.
        total: number of items.
        what: text beside the bar.
    """
    from sslrun.runtime.bar import WholeLine

    # disable=None: shown only on a terminal.
    yield from WholeLine(items, what, total, leave=False, dynamic_ncols=True, disable=bool(distributed.rank()) or None)


class _Console(logging.Handler):
    """Messages on stderr, above the progress bar if there is one."""

    def __init__(self, rank: int) -> None:
        super().__init__(logging.NOTSET if rank == 0 else logging.WARNING)
        self.prefix = f"[rank {rank}] " if rank else ""

    def emit(self, record: logging.LogRecord) -> None:
        is_terminal = sys.stderr.isatty()
        if is_terminal and getattr(record, "is_in_bar", False):
            return
        severity = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        text = f"{self.prefix}{severity}{self.format(record)}"
        try:
            if is_terminal:
                from tqdm import tqdm

                tqdm.write(text, file=sys.stderr)
            else:
                sys.stderr.write(text + "\n")
                sys.stderr.flush()
        except OSError:  # stderr is closed; the message is in the file
            pass


class _File(logging.StreamHandler[TextIO]):
    """log.txt, in its folder wherever that is moved. A full disk loses lines, but does not end the run."""

    def __init__(self, path: Path) -> None:
        self._path, self._has_failed = path, False
        with contextlib.ExitStack() as stack:
            self._folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, self._folder)
            super().__init__(self._open())
            self._stack = stack.pop_all()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # the old file is as good
            self._follow()
        super().emit(record)

    def close(self) -> None:
        super().close()
        with contextlib.suppress(OSError), self._stack:  # a full disk
            self.stream.close()

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._has_failed:
            self._has_failed = True
            print(f"warning: {self._path} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)

    def _open(self) -> TextIO:
        return open(os.open(self._path.name, _APPENDING, 0o644, dir_fd=self._folder), "a", encoding="utf-8")

    def _follow(self) -> None:
        """Begin another file if this one was removed or renamed, as by logrotate."""
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(self._path.name, dir_fd=self._folder)
            if os.path.samestat(found, os.fstat(self.stream.fileno())):
                return
        old = self.setStream(self._open())
        if old is not None:
            old.close()


class SpeedMeter:
    """Images per second, share of time spent waiting for data, and peak memory, since the last reading.

    Read it right after the metrics of a log step: reading the metrics has waited for the device, so that the time is
    that of finished steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._images = 0
        self._waited_s = 0.0
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Wraps taking the next batch from the loader."""
        begin = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - begin

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Wraps what is not training (evaluation, checkpoints); its time does not count."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin

    def count(self, images: int) -> None:
        """Count one step of `images` images over all ranks; an image counts once, whatever its number of views."""
        self._images += images

    def read(self) -> dict[str, float]:
        """The numbers by their names; starts a new interval."""
        now = time.perf_counter()
        elapsed = max(now - self._since, 1e-9)
        metrics = {
            SPEED: self._images / elapsed,
            WAIT: 100 * self._waited_s / elapsed,
            MEMORY: _peak_bytes(self._device) / 2**30,
        }
        self._images, self._waited_s, self._since = 0, 0.0, now
        return metrics


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class RunLog:
    """Writes the rows of a run to metrics.jsonl, log.txt, the console (a bar or lines) and the hooks.

    Args:
        folder: the run folder, whose metrics.jsonl has no rows after `first_step`.
        name: the run's name, for the hooks.
        values: the resolved recipe, for the hooks.
        first_step: optimizer steps done when this process starts.
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps per epoch.
        hooks: further places for the rows, not opened yet.

    Raises:
        UsageError: a hook's package is not installed.
        RunFailed: metrics.jsonl cannot be written, or a hook of a new run cannot be opened.

    Attributes:
        descriptor: the open metrics.jsonl.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        values: dict[str, Any],
        first_step: int,
        total_steps: int,
        steps_per_epoch: int,
        hooks: Sequence[Hook] = (),
    ) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._path = folder / METRICS
        earlier = (
            [row["wall_s"] for _, row in rows(self._path) if is_number(row.get("wall_s"))]
            if self._path.exists()
            else []
        )
        earlier_s = max(earlier, default=0.0)
        self._began = time.monotonic() - earlier_s
        try:
            self.descriptor = os.open(self._path, _APPENDING, 0o644)
        except OSError as error:
            raise RunFailed(f"{self._path} cannot be written: {error.strerror}") from error
        self._has_images = False
        self._hooks: list[Delivery] = []
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, self.descriptor)
            stack.callback(close, self._hooks, 1)
            for hook in hooks:
                delivery = Delivery(hook)
                delivery.open(folder, name, values, first_step)
                self._hooks.append(delivery)
            stack.pop_all()
        self._progress = _Progress(first_step, total_steps, steps_per_epoch)

    def tick(self, step: int) -> None:
        """Move the bar after a step."""
        self._progress.tick(step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one row of numbers, measured after `step` optimizer steps.

        A number that is not finite is written as null. `epoch` in the row is `step` in epochs; `wall_s` continues over
        resumes.

        Raises:
            RunFailed: metrics.jsonl cannot be written.
        """
        assert all(isinstance(value, (int, float)) for value in metrics.values()), "plain numbers only"
        where = {"step": step, "epoch": step / self._steps_per_epoch, "wall_s": time.monotonic() - self._began}
        assert not where.keys() & metrics.keys()
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        row = {**where, **{name: finite.get(name) for name in metrics}}
        line = json.dumps(row).encode() + b"\n"
        try:
            if os.write(self.descriptor, line) < len(line):  # the disk is full; a resume drops the partial line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RunFailed(f"{self._path} cannot be written: {error.strerror}") from error
        self._progress.show(step, metrics)
        for hook in self._hooks:
            hook.call(lambda hook: hook.write({**where, **finite}))

    @property
    def wants_images(self) -> bool:
        """Whether a hook shows the first batch, which it has not got yet."""
        return not self._has_images and any(type(each.hook).images is not Hook.images for each in self._hooks)

    def images(self, step: int, sheet: np.ndarray) -> None:
        """Give the hooks the first batch; arguments as of `Hook.images`."""
        self._has_images = True
        for hook in self._hooks:
            hook.call(lambda hook: hook.images(step, sheet))

    def sync(self) -> None:
        """Wait until all rows are on the disk. Called before a checkpoint, which must not be ahead of them.

        Raises:
            RunFailed: they cannot be written. Some file systems find out only now that a disk or a quota is full.
        """
        try:
            os.fsync(self.descriptor)
        except OSError as error:
            raise RunFailed(f"{self._path} cannot be written: {error.strerror}") from error

    def close(self, exit_code: int = 0) -> None:
        """End the bar, close the file and the hooks, which get the exit code of the run."""
        self._progress.close()
        os.close(self.descriptor)
        close(self._hooks, exit_code)


class _Progress:
    """A bar on a terminal, else lines; log.txt gets the lines in any case."""

    def __init__(self, first_step: int, total_steps: int, steps_per_epoch: int) -> None:
        self._total_steps, self._steps_per_epoch = total_steps, steps_per_epoch
        self._last_step, self._last_time = first_step, time.monotonic()
        self._step_s: float | None = None
        self._bar = None
        if sys.stderr.isatty():
            from sslrun.runtime.bar import Bar

            self._bar = Bar(total_steps, first_step, {"epoch": self._epoch(first_step)})

    def tick(self, step: int) -> None:
        if self._bar is not None:
            if step % self._steps_per_epoch == 0:
                self._bar.parts["epoch"] = self._epoch(step)
            self._bar.update(step - self._bar.n)

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        known = {
            name: shape.format(measured(metric, metrics[metric]))
            for name, (metric, shape) in _SHOWN.items()
            if metric in metrics
        }
        shown = {metric for metric, _ in _SHOWN.values()}
        others = [f"{name} {measured(name, value)}" for name, value in metrics.items() if name not in shown]
        is_training = LOSS in metrics
        if is_training:
            known["ETA"] = f"ETA {self._eta(step):>8}"
        if is_training and self._bar is not None:
            self._bar.parts |= {name: " ".join(part.split()) for name, part in known.items()}
            self._bar.refresh()
        digits = len(str(self._total_steps))
        when = self._epoch(step - 1) if is_training else after(step / self._steps_per_epoch)
        head = f"{when}  step {step:>{digits}}/{self._total_steps}"
        logger.info(
            "%s",
            "  ".join([head, *known.values(), *others]),
            extra={"is_in_bar": is_training and self._bar is not None},
        )

    def close(self) -> None:
        if self._bar is not None:
            close_bars()

    def _epoch(self, step: int) -> str:
        """The epoch of the step that follows `step` others."""
        epochs = math.ceil(self._total_steps / self._steps_per_epoch)
        current = min(step // self._steps_per_epoch + 1, epochs)
        return f"epoch {current:>{len(str(epochs))}}/{epochs}"

    def _eta(self, step: int) -> str:
        """Time left at the recent speed, including evaluations and checkpoints."""
        now = time.monotonic()
        if step > self._last_step:
            step_s = (now - self._last_time) / (step - self._last_step)
            self._step_s = step_s if self._step_s is None else 0.7 * self._step_s + 0.3 * step_s
            self._last_step, self._last_time = step, now
        if self._step_s is None:
            return "?"
        return str(timedelta(seconds=round(self._step_s * (self._total_steps - step))))


# The parts of a line (`bar.NEED`): which metric, and its place in a line, so that lines are aligned.
_SHOWN = {
    "loss": (LOSS, "loss {:>8}"),
    "rate": (RATE, "lr {:>8}"),
    "speed": (SPEED, "{:>8} images/s"),
    "wait": (WAIT, "wait {:>5} %"),
    "memory": (MEMORY, "{:>6} GiB"),
}
