"""Every rank says every few seconds where it stands; the run ends, and names the rank, when one is missing.

The beats go through the store in which the ranks have met. Rank 0 reads all of them and gives the verdict
(`lost_ranks.py`); the others read that, and rank 0's beat. If rank 0 is gone, the lowest rank that is left judges, and
if the store is gone with it, the lowest one of each machine. Who judges records the end of the run and prints one line;
all leave with exit code 1, whatever their main thread is doing: in a collective it does not come back.

Two threads do this: one talks to the store, whose answers may not come; the other watches, and never waits for long.
The main thread only counts: what it calls here costs less than a microsecond, in a run of one process too.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from torch.distributed import DistError

from sslrun.runtime import signals
from sslrun.runtime.lost_ranks import IN_ORDER, Beat, Heard, Limits, is_gone, missing, verdict
from sslrun.runtime.signals import Stopped

logger = logging.getLogger(__name__)

FAILED = 1
UNHURRIED_S = 3600.0  # how long a rank may stand before the second step, in a checkpoint, and in what rank 0 does alone
SILENCE_S = 60.0  # how long code may hold Python's global lock, or the network may be down
INTERVAL_S = 2.0
GRACE_S = 5.0
LAST_WORDS_S = 30.0  # for recording the end on storage that may hang
VERDICT, NONE = "verdict", b"-"


class Store(Protocol):
    """What is used of a torch.distributed store."""

    def set(self, key: str, value: str) -> None: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...


@dataclass
class _Main:
    """What the main thread says of itself."""

    where: tuple[int, int, str] = (0, 0, "setting up")  # step, places entered in it, name of the place
    has_begun: bool = False  # a step is done
    moves: int = 0
    unhurried: int = 0
    uninterrupted: int = 0
    work: threading.Thread | None = None  # to be finished before the process ends


_main = _Main()
_watch: Callable[[str], None] | None = None  # gets each place


def at(doing: str, step: int | None = None) -> None:
    """The main thread enters a place of a step. All ranks enter the same places in the same order.

    Args:
        doing: name of the place, for the message.
        step: number of the optimizer step; None for the one that it is in.
    """
    last, place, _ = _main.where
    if step is not None and step != last:
        _main.has_begun = last > 0
        last, place = step, 0
    _main.where = (last, place + 1, doing)
    _main.moves += 1
    if _watch is not None:
        _watch(doing)


@contextlib.contextmanager
def watched(watch: Callable[[str], None]) -> Iterator[None]:
    """While inside, `watch` gets the name of each place that the main thread enters with `at`."""
    global _watch
    assert _watch is None
    _watch = watch
    try:
        yield
    finally:
        _watch = None


def enter_collective() -> None:
    """The main thread enters a collective, where it may wait for others."""
    step, place, doing = _main.where
    _main.where = (step, place + 1, doing)
    _main.moves += 1


def tick() -> None:
    """The main thread has come forward at the place where it is, as by a batch of an evaluation."""
    _main.moves += 1


@contextlib.contextmanager
def unhurried() -> Iterator[None]:
    """Within it the rank may stand for `UNHURRIED_S`: for slow storage, and what is not in pieces."""
    _main.unhurried += 1
    try:
        yield
    finally:
        _main.unhurried -= 1
        _main.moves += 1


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """As `unhurried`; and if another rank is lost meanwhile, this one finishes the block before it ends."""
    _main.uninterrupted += 1
    try:
        with unhurried():
            yield
    finally:
        _main.uninterrupted -= 1


def ends_after(work: threading.Thread) -> None:
    """If a rank is lost, this one ends after a thread has, such as one that writes a checkpoint.

    The thread's work does not count as progress of the main thread.
    """
    _main.work = work


class Heartbeat:
    """The beats of this rank, and the watch over the others. `start`, then `leave`.

    Args:
        connect: connects to the store; called by the thread that talks. The beats of all ranks and `VERDICT` are in it.
        rank: number of this rank.
        processes: (host, process id) of each rank.
        timeout_s: how long a rank may stand without progress once the run has begun.
        hosts_store: whether the store ends with rank 0's process. If not, it is a launcher's.
    """

    def __init__(
        self,
        connect: Callable[[], Store],
        rank: int,
        processes: Sequence[tuple[str, int]],
        *,
        timeout_s: float,
        hosts_store: bool,
    ) -> None:
        self._connect, self._rank, self._processes = connect, rank, processes
        self._timeout_s, self._hosts_store = timeout_s, hosts_store
        silence_s = max(min(SILENCE_S, timeout_s), timeout_s / 10)
        self._interval_s = min(INTERVAL_S, silence_s / 12)
        self._limits = Limits(silence_s, 4 * self._interval_s, min(GRACE_S, silence_s))
        self._record: Callable[[str], None] | None = None
        self._broken = ""
        self._ended: str | None = None
        self._moves, self._stood_s = -1, 0.0
        self._count = itertools.count(1)
        # Of the thread that talks:
        self._cycles, self._beats = 0, dict[int, Beat]()  # (beats are replaced as a whole)
        self._verdict: bytes = NONE
        self._store_error = ""
        self._wake = threading.Event()
        # Of the thread that watches:
        host, pid = processes[0]
        self._ranks = {0: Heard(Beat(0, host, pid, 0, 0, _main.where[2], 0.0, UNHURRIED_S), 0.0)}
        self._reads_all = rank == 0
        self._proposal = ""
        self._is_first_here: bool | None = None
        self._is_judging = True
        self._have_others_ended = threading.Event()
        self._over = threading.Event()

    def start(self) -> None:
        """Starts the two threads."""
        for work in (self._talk, self._watch):
            threading.Thread(target=work, name=f"sslrun-heartbeat{work.__name__}", daemon=True).start()

    def on_loss(self, record: Callable[[str], None]) -> None:
        """Sets what records the end of the run if this rank gives the verdict; it gets the message."""
        self._record = record

    def stop_judging(self) -> None:
        """From now on no verdict ends this process: it is about to leave with an error of its own."""
        self._is_judging = False

    def wait_for_verdict(self, error: BaseException) -> NoReturn:
        """After a collective has failed: waits until it is known why. The process ends meanwhile."""
        self._broken = _first_line(error)
        self._wake.set()
        signals.end_by_verdict()  # not by a signal that the launcher sends because a rank has ended
        while True:
            time.sleep(1)

    def leave(self, error: BaseException | None) -> None:
        """Tells the others that this rank leaves, and why. Rank 0, with which the store ends, waits for them."""
        signals.end_by_verdict()  # waiting for the others may take longer than a stop is given
        is_in_order = error is None or isinstance(error, Stopped)
        stays = self._hosts_store and self._rank == 0
        if is_in_order and stays:
            at("waiting for the other ranks to end")
            while not self._have_others_ended.wait(self._interval_s) and not self._store_error:
                tick()
        self.stop_judging()
        self._ended = IN_ORDER if error is None or is_in_order else f"{type(error).__name__}: {_first_line(error)}"
        self._tell(GRACE_S)
        if stays and isinstance(error, Exception):
            self._have_others_ended.wait(3 * GRACE_S)
        self._over.set()
        self._wake.set()

    def _tell(self, most_s: float) -> None:
        """Waits until the store has this rank's newest beat."""
        written, deadline = self._cycles + 2, time.monotonic() + most_s
        while self._cycles < written and not self._store_error and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(0.01)

    # The thread that talks

    def _talk(self) -> None:
        try:
            store = self._connect()
            while not self._over.is_set():
                self._exchange(store)
                self._wake.wait(self._interval_s)
                self._wake.clear()
        except RuntimeError as error:
            self._store_error = _first_line(error)

    def _exchange(self, store: Store) -> None:
        store.set(str(self._rank), self._beat().encode())
        if self._proposal:
            store.compare_set(VERDICT, NONE.decode(), self._proposal)
        read = range(len(self._processes)) if self._reads_all else [0, self._rank]
        *beats, found = store.multi_get([*map(str, read), VERDICT])
        self._beats = dict(zip(read, map(Beat.decode, beats), strict=True))
        self._verdict = found
        self._cycles += 1

    def _beat(self) -> Beat:
        step, place, doing = _main.where
        host, pid = self._processes[self._rank]
        return Beat(
            next(self._count), host, pid, step, place, doing, self._stood_s, self._patience_s(), self._broken,
            self._ended,
        )  # fmt: skip

    def _patience_s(self) -> float:
        is_unhurried = _main.unhurried or not _main.has_begun
        return max(self._timeout_s, UNHURRIED_S) if is_unhurried else self._timeout_s

    # The thread that watches

    def _watch(self) -> None:
        cycle, silent_s, now = 0, 0.0, time.monotonic()
        while not self._over.wait(min(0.1, self._interval_s) if self._proposal else self._interval_s):
            # If this process is stopped for a while, that is not a time in which the others were silent.
            elapsed_s, now = min(time.monotonic() - now, 2 * self._interval_s), time.monotonic()
            self._note_progress(elapsed_s)
            silent_s += elapsed_s
            if silent_s > self._limits.soon_s / 2 and self._is_first_here is None:
                self._is_first_here = self._is_first()  # now: later the others may have left
            if self._cycles != cycle:
                self._note_beats(silent_s)
                cycle, silent_s, self._is_first_here = self._cycles, 0.0, None
            self._judge(silent_s)

    def _note_progress(self, elapsed_s: float) -> None:
        moves = _main.moves
        self._stood_s = self._stood_s + elapsed_s if moves == self._moves else 0.0
        self._moves = moves

    def _note_beats(self, elapsed_s: float) -> None:
        for rank, beat in self._beats.items():
            old = self._ranks.get(rank)
            is_old = old is not None and old.beat.count == beat.count
            self._ranks[rank] = old.older(elapsed_s) if old is not None and is_old else Heard(beat, 0.0)
        others = {rank: beat for rank, beat in self._beats.items() if rank != self._rank}
        if len(others) == len(self._processes) - 1 and all(beat.ended is not None for beat in others.values()):
            self._have_others_ended.set()
        if self._rank > 0 and self._is_gone(0):
            self._reads_all = True

    def _judge(self, silent_s: float) -> None:
        if not self._is_judging:
            return
        if self._verdict != NONE:
            found = json.loads(self._verdict)
            self._end(found["line"], speaks=found["by"] == self._rank)
        elif (line := self._without_store(silent_s)) is not None:
            self._end(line, speaks=bool(self._is_first_here))
        elif not self._proposal and all(map(self._is_gone, range(self._rank))):
            line = verdict(self._ranks, self._limits)
            if line is not None:
                self._proposal = json.dumps({"by": self._rank, "line": line})
                self._wake.set()

    def _is_gone(self, rank: int) -> bool:
        return rank in self._ranks and is_gone(self._ranks[rank], self._ranks.values(), self._limits)

    def _without_store(self, silent_s: float) -> str | None:
        """The verdict if the store does not answer; None as long as that need not mean that somebody is missing."""
        if not self._store_error:  # then its machine is cut off, or its process stopped
            is_over = silent_s >= self._limits.silence_s
        elif self._hosts_store or self._broken:
            is_over = silent_s >= self._limits.soon_s
        else:  # a launcher has ended, and the ranks may save and leave
            is_over = self._stood_s >= self._patience_s()
        if not is_over:
            return None
        who = missing({0: self._ranks[0]}, silent_s, _main.where[0])
        host = self._ranks[0].beat.host
        if self._store_error:
            what = "its process" if self._hosts_store else f"the launcher on {host}"
            return f"{who}: {what} has ended"
        return f"{who}: its process has stopped, or {host} is cut off"

    def _is_first(self) -> bool:
        """Whether this is the lowest rank of those that run on this machine; rank 0 does not count."""
        host, _ = self._processes[self._rank]
        before = self._processes[1 : self._rank]
        return not any(other == host and _is_running(pid) for other, pid in before)

    def _end(self, line: str, speaks: bool) -> NoReturn:
        """Ends the process."""
        while _main.uninterrupted and self._stood_s < self._patience_s():
            time.sleep(self._interval_s)
            self._note_progress(self._interval_s)
        if _main.work is not None:
            _main.work.join(UNHURRIED_S)
        _bounded(lambda: self._speak(line) if speaks else None, LAST_WORDS_S)
        if self._verdict != NONE:
            self._ended = f"left, since {line}"
            self._tell(self._limits.soon_s)
            if self._hosts_store and self._rank == 0:
                self._let_others_read()
        _bounded(sys.stdout.flush, 1.0)
        os._exit(FAILED)

    def _let_others_read(self) -> None:
        """Waits until the others have read the verdict and left, but not for long: the store ends with this process."""
        deadline = time.monotonic() + self._limits.soon_s
        others = set(range(len(self._processes))) - {self._rank}
        while time.monotonic() < deadline and not all(map(self._is_gone, others)):
            self._tell(self._interval_s)
            self._note_beats(0.0)

    def _speak(self, line: str) -> None:
        if logging.getLogger("sslrun").handlers:
            logger.error("%s", line)
        else:
            print(f"error: {line}", file=sys.stderr, flush=True)
        if self._record is not None:
            self._record(line)


_own: Heartbeat | None = None


def join(own: Heartbeat) -> None:
    """This process's heartbeat begins."""
    global _own
    _own = own
    own.start()


def leave(error: BaseException | None) -> None:
    """It ends, in order or with an error."""
    global _own
    if _own is not None:
        _own.leave(error)
        _own = None


def stop_judging() -> None:
    """No verdict on a lost rank ends this process any more: it is leaving with an error of its own."""
    if _own is not None:
        _own.stop_judging()


def on_loss(record: Callable[[str], None]) -> None:
    """Sets what this rank does with the message if a rank is missing and it is up to this one to record that."""
    if _own is not None:
        _own.on_loss(record)


@contextlib.contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """A context, or a decorator, in which the error of a collective ends the process by the verdict on who is missing.

    For all that is done after `join`. gloo and NCCL only know that a connection has broken.
    """
    try:
        yield
    except RuntimeError as error:
        if _own is not None and (isinstance(error, DistError) or re.search(r"\b(gloo|NCCL)\b", str(error))):
            _own.wait_for_verdict(error)
        raise


def _bounded(work: Callable[[], None], most_s: float) -> None:
    """Does what may hang, for so long at most."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(most_s)


def _is_running(pid: int) -> bool:
    """Whether a process of this machine is there, and neither ended nor stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X", b"T")
    except OSError:
        return False


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def first_beat() -> Beat:
    """The beat of a process that has just come."""
    return Beat(0, socket.gethostname(), os.getpid(), 0, 0, "setting up", 0.0, UNHURRIED_S)
