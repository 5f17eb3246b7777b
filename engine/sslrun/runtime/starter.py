"""Starts the ranks of a run on this machine, for `--devices N`, and makes one command of them.

The process that the user has started becomes the starter. It imports no torch, starts one process per rank, passes
every signal on to each of them once, and ends with the exit code of rank 0, which is the code in state.json. (torchrun
ends with 1 whatever happened to its ranks.) The ranks have sessions of their own, so that a terminal's Ctrl-C reaches
them by the starter alone. If the starter is killed, they notice it (`launcher.py`).
"""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Literal

from sslrun.errors import UsageError
from sslrun.runtime.early_signals import CODES, HELD, INTERRUPTED
from sslrun.runtime.launch_checks import slurm_tasks
from sslrun.runtime.launcher import STARTER
from sslrun.started import words_of_program

DEBOUNCE_S = 1.0  # a Ctrl-C that comes sooner after the first is the same one
LAST_S = 3.0  # for the ranks to leave after the second Ctrl-C
LOST_S = 20.0  # for the other ranks to say which rank is missing, and to leave
LONGEST_WAIT_S = 3600.0  # for a signal
FAILED = 1


def is_rank() -> bool:
    """Whether this process is a rank that a starter has started."""
    return os.environ.get(STARTER) == str(os.getppid())


def number_of_ranks(devices: int | Literal["auto"]) -> int:
    """How many ranks `--devices` asks for; "auto" is the number of GPUs, or 1 without any.

    Raises:
        UsageError: a launcher has started this process.
    """
    if "WORLD_SIZE" in os.environ or slurm_tasks(os.environ) > 1:
        raise UsageError(
            "--devices starts the ranks itself, but a launcher has started this process as one of several: use one of "
            "the two"
        )
    if devices != "auto":
        return devices
    code = "import torch; print(torch.cuda.device_count())"  # the starter itself stays small, and has one thread
    counted = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    return max(1, int(counted.stdout)) if counted.returncode == 0 else 1


def run_ranks(words: Sequence[str], count: int, started: int | None = None) -> int:
    """Runs a command line on several ranks; returns the exit code when all have ended.

    Args:
        words: the command line, without the program.
        count: number of ranks.
        started: number of ranks that are started; all if None.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who ignores it, and starts this, would hide the codes of the ranks
    heard = {number for number in HELD if signal.getsignal(number) != signal.SIG_IGN}
    old = signal.pthread_sigmask(signal.SIG_BLOCK, heard)  # for the ranks, until `early_signals.enter`
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for environment in _environments(count)[:started]:
            command = [*words_of_program(), *words]
            ranks.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True))
        return _Watch(ranks).until_the_end(heard)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                end_group(rank)
                rank.wait()
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _environments(count: int) -> list[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cores = max(1, len(os.sched_getaffinity(0)) // count)
    common = {"OMP_NUM_THREADS": str(cores), **os.environ, STARTER: str(os.getpid())}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


class _Watch:
    """Passes signals on until all ranks have ended."""

    def __init__(self, ranks: Sequence["subprocess.Popen[bytes]"]) -> None:
        self._ranks = ranks
        self._ended: dict[int, int] = {}  # rank -> exit code
        self._passed_on: set[int] = set()
        self._interrupted_at: float | None = None
        self._terminate_at = self._kill_at = math.inf
        self._has_lost = False

    def until_the_end(self, heard: Iterable[int]) -> int:
        """Takes the blocked signals `heard` as they come; returns the exit code. It does not wait for ranks that stay
        after the second Ctrl-C."""
        while True:
            self._look()
            if len(self._ended) == len(self._ranks):
                return self._exit_code()
            now = time.monotonic()
            if now >= self._kill_at:
                return INTERRUPTED
            if now >= self._terminate_at:
                self._terminate_at = math.inf
                self._signal(signal.SIGTERM)
            wait_s = min(self._terminate_at - now, self._kill_at - now, LONGEST_WAIT_S)
            info = signal.sigtimedwait(heard, wait_s)
            if info is not None and info.si_signo != signal.SIGCHLD:
                self._hear(info.si_signo)

    def _look(self) -> None:
        """Notes which ranks have ended, and gives the others a time if one has failed."""
        for number, rank in enumerate(self._ranks):
            code = rank.poll()
            if code is None or number in self._ended:
                continue
            self._ended[number] = code
            if code in (0, *CODES.values()) or -code in self._passed_on:
                continue
            if code < 0:
                end_group(rank)  # what it has started
                print(f"error: rank {number} was ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
            if not self._has_lost:
                self._has_lost = True
                self._terminate_at = time.monotonic() + LOST_S

    def _hear(self, number: int) -> None:
        if number == signal.SIGTSTP:  # Ctrl-Z, until `fg`
            self._signal(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            self._signal(signal.SIGCONT)
            return
        self._passed_on.add(number)
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is None:
                self._interrupted_at = now
            elif now - self._interrupted_at <= DEBOUNCE_S:
                return
            else:
                self._kill_at = now + LAST_S if self._kill_at == math.inf else now  # at once after the third
        self._signal(number)

    def _signal(self, number: int) -> None:
        for rank in self._ranks:
            rank.send_signal(number)  # does nothing if it has ended

    def _exit_code(self) -> int:
        """That of rank 0; but a failure of another rank is none of success."""
        code = self._ended[0]
        if self._kill_at < math.inf:
            return INTERRUPTED
        if code < 0:
            return 128 - code if -code in self._passed_on else FAILED
        if self._has_lost and code in (0, *CODES.values()):
            return FAILED
        return code


def end_group(rank: "subprocess.Popen[bytes]") -> None:
    """Kills a rank and the processes that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(rank.pid, signal.SIGKILL)
