"""The rendezvous of the ranks: each connects to the store of rank 0, and waits until all have connected."""

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
from sslrun.runtime.launch_checks import START, Arrival, contradiction
from sslrun.runtime.lost_ranks import Beat, numbered
from sslrun.runtime.network import LOOPBACK, is_own, own_address

PATIENCE = timedelta(days=1)  # of the store and of collectives: a missing rank is reported long before
NOTICE_S = 30.0  # after that, rank 0 prints for which ranks it waits
NAME_S = 30.0  # for the address of rank 0 to be known by name
READ_S = 2.0  # for the others to read in rank 0's store why all leave
_ALL, _REFUSED = "all have connected", "refused"
_meetings = itertools.count()  # of this process: the keys of the one before are still in its store
_stores: list[dist.Store] = []  # kept, so that rank 0's is there for as long as its process


@dataclass(frozen=True)
class Meeting:
    """All ranks have connected.

    Attributes:
        store: this process's connection to the store.
        heartbeat: not started yet.
        arrivals: what each rank has sent; the first is this one's.
    """

    store: dist.Store
    heartbeat: Heartbeat
    arrivals: list[Arrival]


def meet(rank: int, world_size: int, timeout_s: float) -> Meeting:
    """Waits for all ranks. If some do not connect within `timeout_s`, names them and ends the process with exit code 1.

    Raises:
        UsageError: address or port of rank 0 are not set, or cannot be used.
        UsageError: the ranks that have connected cannot be one run.
    """
    address, port = os.environ.get("MASTER_ADDR"), from_environment("MASTER_PORT")
    if not address:
        raise UsageError(f"WORLD_SIZE is set, but not MASTER_ADDR: {START}")
    if not 0 < port < 2**16:
        raise UsageError(f"MASTER_PORT is {port}, expected 1 to {2**16 - 1}: {START}")
    is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own process has the store
    has_store = rank == 0 and not is_launchers
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # several may share a store
    place = f"sslrun/{attempt}/{next(_meetings)}"
    deadline = time.monotonic() + timeout_s
    # What is on the same machine stays reachable by the loopback address if the network goes down.
    near = LOOPBACK if is_own(address) else address

    def connect(host: str = near, is_master: bool = False) -> dist.TCPStore:
        within = timedelta(seconds=timeout_s)
        store = dist.TCPStore(host, port, None, is_master, within, wait_for_workers=False, multi_tenant=True)
        store.set_timeout(PATIENCE)
        return store

    if not has_store:
        _wait_for_port(rank, address, port, deadline, timeout_s)
    try:
        if has_store:
            _stores.append(connect(LOOPBACK, is_master=True))
            _require_reachable(address, port)
        store = connect()
    except dist.DistNetworkError as error:
        where = f"port {port} of {address} (MASTER_PORT, MASTER_ADDR)"
        if "EADDRINUSE" in str(error):
            why = f"{where} is in use by another program: give each run a port of its own, with --master_port"
        else:
            why = f"{where} cannot be used: {str(error).splitlines()[0]}"
        raise UsageError(why) from error
    _stores.append(store)
    own = Arrival(rank, world_size, socket.gethostname(), own_address(address))
    beats = dist.PrefixStore(f"{place}/beats", store)
    arrivals = _wait_for_all(dist.PrefixStore(f"{place}/arrivals", store), beats, own, deadline, timeout_s, has_store)
    everyone = map(Beat.decode, beats.multi_get([str(other) for other in range(world_size)]))
    heartbeat = Heartbeat(
        lambda: dist.PrefixStore(f"{place}/beats", connect()),
        rank,
        [(beat.host, beat.pid) for beat in everyone],
        timeout_s=timeout_s,
        hosts_store=not is_launchers,
    )
    return Meeting(dist.PrefixStore(f"{place}/group", store), heartbeat, [own, *arrivals])


def from_environment(name: str) -> int:
    """A number that a launcher sets. Raises UsageError if it is not set, or is no number."""
    text = os.environ.get(name)
    if text is None:
        raise UsageError(f"WORLD_SIZE is set, but not {name}: {START}")
    if not text.isdecimal():
        raise UsageError(f"{name} is {text!r} in the environment, expected a number: {START}")
    return int(text)


def _require_reachable(address: str, port: int) -> None:
    """Raises UsageError if this process, which is rank 0 and listens, is not at the address of rank 0."""
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError as error:
        raise UsageError(
            f"rank 0 is on {socket.gethostname()}, but cannot be reached at {address}, port {port} (MASTER_ADDR, "
            f"MASTER_PORT): {error.strerror or error}; --master_addr is the address of the node with --node_rank 0"
        ) from error


def _wait_for_port(rank: int, address: str, port: int, deadline: float, timeout_s: float) -> None:
    """Until the store listens. (torch's own wait cannot be interrupted, and prints what it tries.)"""
    named = min(deadline, time.monotonic() + NAME_S)
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            if isinstance(error, socket.gaierror) and time.monotonic() > named:
                raise UsageError(
                    f"MASTER_ADDR is {address!r}, which {socket.gethostname()} does not know: {error.strerror}; "
                    "--master_addr is the address of the node with --node_rank 0"
                ) from error
            if time.monotonic() > deadline:
                _leave_without_first(
                    rank, f"rank 0 does not listen on port {port} of {address} after {timeout_s:.0f} s: {error}"
                )
        time.sleep(0.2)


def _wait_for_all(
    store: dist.Store, beats: dist.Store, own: Arrival, deadline: float, timeout_s: float, has_store: bool
) -> list[Arrival]:
    """Adds this rank, and returns the arrivals when all have connected; the last one writes that into the store.

    Raises:
        UsageError: the ranks that have connected cannot be one run, or the run has begun without this process.
    """
    rank, world_size = own.rank, own.world_size
    notice = time.monotonic() + NOTICE_S
    arrivals: list[Arrival] = []
    is_announced = False

    def absent() -> list[int]:
        return [other for other in range(world_size) if not beats.check([str(other)])]

    try:
        number = store.add("count", 1)
        store.set(str(number), own.encode())
        while True:
            arrivals += _newly_arrived(store, len(arrivals))
            is_over = beats.check([_ALL])
            if is_over and is_announced:
                return arrivals
            if len(arrivals) >= number or store.check([_REFUSED]):
                _require_one_run(store, arrivals, is_over, own, has_store)
            if not is_announced and len(arrivals) >= number:
                is_announced = True  # not before: the beats of a run that has begun without this process are its own
                beats.set(str(rank), first_beat().encode())
            if is_announced and number == world_size and not absent():
                beats.set(VERDICT, "-")
                beats.set(_ALL, "")
            now = time.monotonic()
            if rank == 0 and now > notice:
                notice = deadline + 1
                print(f"waiting for {numbered(absent())} of {world_size} to start", file=sys.stderr, flush=True)
            if now > deadline:
                _leave_without_some(absent(), rank, world_size, timeout_s)
            time.sleep(max(0.05, world_size / 1000))
    except dist.DistError as error:
        if time.monotonic() < deadline:  # else rank 0 has printed which are missing
            _leave_without_first(rank, f"rank 0 has ended before all ranks connected: {str(error).splitlines()[0]}")
        os._exit(FAILED)


def _newly_arrived(store: dist.Store, known: int) -> list[Arrival]:
    """The arrivals after the first `known`; none as long as one of them is only half there."""
    names = [str(number) for number in range(known + 1, store.add("count", 0) + 1)]
    return [Arrival.decode(text) for text in store.multi_get(names)] if names and store.check(names) else []


def _require_one_run(store: dist.Store, arrivals: list[Arrival], is_late: bool, own: Arrival, has_store: bool) -> None:
    """Raises UsageError, on all ranks that wait, if those that have connected cannot be one run."""
    if (why := contradiction(arrivals)) is None and not store.check([_REFUSED]):
        return
    if is_late:
        raise UsageError(
            f"rank {own.rank} of {own.world_size} on {own.host} has connected to a run of {arrivals[0].world_size} "
            f"ranks that has already begun: {why}"
        )
    if why is not None:
        store.compare_set(_REFUSED, "", why)
    error = UsageError(store.get(_REFUSED).decode())
    error.is_common = True
    if has_store:
        time.sleep(READ_S)
    raise error


def _leave_without_some(absent: list[int], rank: int, world_size: int, timeout_s: float) -> NoReturn:
    """The lowest rank that has connected prints which have not."""
    if rank == min(set(range(world_size)) - set(absent)):
        have = "has" if len(absent) == 1 else "have"
        _print(f"{numbered(absent)} of {world_size} {have} not connected within {timeout_s:.0f} s (engine.timeout_s)")
        time.sleep(2)  # the others may ask the store of this process
    os._exit(FAILED)


def _leave_without_first(rank: int, line: str) -> NoReturn:
    """One rank of each machine prints it, since they cannot agree on one: its first, or rank 1 beside rank 0."""
    if rank == 1 or os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        _print(line)
    os._exit(FAILED)


def _print(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)
