"""Checks of a launch: pure functions of the variables that launchers set, and of the ranks that have connected."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

START = "start several processes with torchrun, deepspeed or srun"
_NODES = "all nodes must be started with the same hostfile or numbers of ranks, each with its own --node_rank"


@dataclass(frozen=True)
class Arrival:
    """What a rank sends to the others when it connects.

    Attributes:
        rank: its number.
        world_size: the number of ranks, by its launcher.
        host: name of its machine.
        address: of its machine, towards rank 0; empty if that is unknown.
    """

    rank: int
    world_size: int
    host: str
    address: str

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: bytes) -> "Arrival":
        return Arrival(**json.loads(text))


def contradiction(arrivals: Sequence[Arrival]) -> str | None:
    """Why the ranks that have connected cannot be one run, in one line; None if they can."""
    if not arrivals:
        return None
    first = min(arrivals, key=lambda arrival: arrival.rank)
    seen: dict[int, Arrival] = {}
    for arrival in arrivals:
        if arrival.world_size != first.world_size:
            return (
                f"rank {first.rank} on {first.host} was started as one of {first.world_size} ranks, but rank "
                f"{arrival.rank} on {arrival.host} as one of {arrival.world_size}: {_NODES}"
            )
        other = seen.setdefault(arrival.rank, arrival)
        if other is not arrival:
            return (
                f"rank {arrival.rank} of {arrival.world_size} was started twice, on {other.host} and on "
                f"{arrival.host}: {_NODES}; and each run needs its own port (--master_port)"
            )
    return None


def environment_fault(environment: Mapping[str, str]) -> str | None:
    """What is missing or contradictory in the variables that launchers set, in one line; None if nothing is."""
    if "WORLD_SIZE" not in environment:
        if "RANK" in environment:
            return (
                f"RANK is {environment['RANK']!r} in the environment, but WORLD_SIZE is not set: {START}, or unset it"
            )
        tasks, task = slurm_tasks(environment), environment.get("SLURM_PROCID")
        if tasks > 1 and (task is None or not task.isdecimal() or int(task) >= tasks):
            return f"SLURM_STEP_NUM_TASKS is {tasks}, but SLURM_PROCID is {task!r}: start the processes with srun"
        return None
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    numbers: dict[str, int] = {}
    for name in names:
        if name in environment:
            if not environment[name].isdecimal():
                return f"{name} is {environment[name]!r} in the environment, expected a number: {START}"
            numbers[name] = int(environment[name])
    size = numbers["WORLD_SIZE"]
    here = numbers.get("LOCAL_WORLD_SIZE", numbers.get("LOCAL_SIZE"))
    if size < 1:
        return f"WORLD_SIZE is {size}, expected at least 1: {START}"
    if size > 1 and "RANK" not in numbers:
        return f"WORLD_SIZE is set, but not RANK: {START}"
    if numbers.get("RANK", 0) >= size:
        return f"RANK is {numbers['RANK']}, but WORLD_SIZE is {size}: {START}"
    if here is not None and not numbers.get("LOCAL_RANK", 0) < here <= size:
        return (
            f"LOCAL_RANK is {numbers.get('LOCAL_RANK', 0)} of {here} ranks on this machine and {size} in all, which "
            f"cannot be: {START}"
        )
    return _two_launchers(environment, size, here or 1)


def slurm_tasks(environment: Mapping[str, str]) -> int:
    """The number of tasks of this Slurm step, each of which is a rank if no launcher says otherwise; 1 in a script."""
    text = environment.get("SLURM_STEP_NUM_TASKS", "1")
    return int(text) if text.isdecimal() else 1


def slurm_note(environment: Mapping[str, str]) -> str | None:
    """A line for a run of one process in a Slurm job of several tasks, which `srun` was perhaps to start."""
    tasks = environment.get("SLURM_NTASKS", "1")
    if not tasks.isdecimal() or int(tasks) == 1 or slurm_tasks(environment) > 1 or "WORLD_SIZE" in environment:
        return None
    return f"this Slurm job has {tasks} tasks, but the run is one process: srun before the command starts one in each"


def _two_launchers(environment: Mapping[str, str], size: int, here: int) -> str | None:
    """Whether srun starts a launcher in each of several tasks of a node, so that more ranks come than WORLD_SIZE says.

    One launcher in the one task of each node is in order, and so is a script that sets the variables from Slurm's.
    """
    tasks = slurm_tasks(environment)
    if size == tasks and environment.get("RANK") == environment.get("SLURM_PROCID"):
        return None
    if "SLURM_PTY_PORT" in environment:  # a shell in one task (`srun --pty bash`): the others have ended
        return None
    if tasks == 1 or size >= tasks - 1 + here:  # the other tasks start at least one rank each
        return None
    return (
        f"srun has started {tasks} tasks, and in this one another launcher starts {here} of {size} ranks: leave the "
        "other launcher out, or start it once on each node (srun --ntasks-per-node=1)"
    )
