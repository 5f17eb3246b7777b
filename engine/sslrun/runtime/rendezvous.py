"""The ranks meet: each connects to the store of the first, and waits until all have come."""

import itertools
import os
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from sslrun.errors import UsageError
from sslrun.runtime.heartbeat import FAILED, VERDICT, Heartbeat, first_beat
from sslrun.runtime.lost_ranks import Beat, numbered

PATIENCE = timedelta(days=1)  # of the store and of collectives: which rank is missing is said long before
NOTICE_S = 30.0  # after that, rank 0 says for whom it waits
START = "start several processes with torchrun, deepspeed or srun"
_ALL = "all have come"
_meetings = itertools.count()  # of this process: its store has what was said in the one before
_stores: list[dist.Store] = []  # kept, so that rank 0's is there for as long as its process


@dataclass(frozen=True)
class Meeting:
    """All ranks have come.

    Attributes:
        store: this process's connection to the store.
        heartbeat: not started yet.
    """

    store: dist.Store
    heartbeat: Heartbeat


def meet(rank: int, world_size: int, timeout_s: float) -> Meeting:
    """Waits for all ranks. If some do not come within `timeout_s`, names them and ends the process with exit code 1.

    Raises:
        UsageError: the launcher has not said where the ranks meet.
        UsageError: rank 0 cannot open its port.
    """
    address, port = os.environ.get("MASTER_ADDR"), from_environment("MASTER_PORT")
    if not address:
        raise UsageError(f"WORLD_SIZE is set, but not MASTER_ADDR: {START}")
    if from_environment("RANK") >= world_size:
        raise UsageError(f"RANK is {rank}, but WORLD_SIZE is {world_size}: {START}")
    is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own process has the store
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # several may share a store
    place = f"sslrun/{attempt}/{next(_meetings)}"
    deadline = time.monotonic() + timeout_s

    def connect(is_master: bool = False) -> dist.TCPStore:
        within = timedelta(seconds=timeout_s)
        store = dist.TCPStore(address, port, None, is_master, within, wait_for_workers=False, multi_tenant=True)
        store.set_timeout(PATIENCE)
        return store

    if is_launchers or rank > 0:
        _wait_for_port(rank, address, port, deadline, timeout_s)
    try:
        store = connect(is_master=rank == 0 and not is_launchers)
    except dist.DistNetworkError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"port {port} of {address} (MASTER_PORT, MASTER_ADDR) cannot be used: {reason}") from error
    _stores.append(store)
    beats = dist.PrefixStore(f"{place}/beats", store)
    beats.set(str(rank), first_beat().encode())
    if beats.add("arrived", 1) == world_size:
        beats.set(VERDICT, "-")
        beats.set(_ALL, "")
    _wait_for_all(beats, rank, world_size, deadline, timeout_s)
    everyone = map(Beat.decode, beats.multi_get([str(other) for other in range(world_size)]))
    heartbeat = Heartbeat(
        lambda: dist.PrefixStore(f"{place}/beats", connect()),
        rank,
        [(beat.host, beat.pid) for beat in everyone],
        timeout_s=timeout_s,
        hosts_store=not is_launchers,
    )
    return Meeting(dist.PrefixStore(f"{place}/group", store), heartbeat)


def from_environment(name: str) -> int:
    """A number that a launcher sets. Raises UsageError if it is not set, or is no number."""
    text = os.environ.get(name)
    if text is None:
        raise UsageError(f"WORLD_SIZE is set, but not {name}: {START}")
    if not text.isdecimal():
        raise UsageError(f"{name} is {text!r} in the environment, expected a number: {START}")
    return int(text)


def _wait_for_port(rank: int, address: str, port: int, deadline: float, timeout_s: float) -> None:
    """Until the store listens. (torch's own wait cannot be interrupted, and prints what it tries.)"""
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                _leave_without_first(
                    rank, f"rank 0 has not come to port {port} of {address} within {timeout_s:.0f} s: {error}"
                )
        time.sleep(0.2)


def _wait_for_all(beats: dist.Store, rank: int, world_size: int, deadline: float, timeout_s: float) -> None:
    notice = time.monotonic() + NOTICE_S

    def absent() -> list[int]:
        return [other for other in range(world_size) if not beats.check([str(other)])]

    try:
        while not beats.check([_ALL]):
            now = time.monotonic()
            if rank == 0 and now > notice:
                notice = deadline + 1
                print(f"waiting for {numbered(absent())} of {world_size} to start", file=sys.stderr, flush=True)
            if now > deadline:
                _leave_without_some(absent(), rank, world_size, timeout_s)
            time.sleep(0.05)
    except dist.DistError as error:
        if time.monotonic() < deadline:  # else rank 0 has said who is missing
            _leave_without_first(rank, f"rank 0 has ended before all ranks had come: {str(error).splitlines()[0]}")
        os._exit(FAILED)


def _leave_without_some(absent: list[int], rank: int, world_size: int, timeout_s: float) -> NoReturn:
    """The lowest rank that has come says which have not."""
    if rank == min(set(range(world_size)) - set(absent)):
        have = "has" if len(absent) == 1 else "have"
        _say(f"{numbered(absent)} of {world_size} {have} not come within {timeout_s:.0f} s (engine.timeout_s)")
        time.sleep(2)  # the others may ask the store of this process
    os._exit(FAILED)


def _leave_without_first(rank: int, line: str) -> NoReturn:
    """One rank of each machine says it, since they cannot agree on one: its first, or rank 1 beside rank 0."""
    if rank == 1 or os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        _say(line)
    os._exit(FAILED)


def _say(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)
