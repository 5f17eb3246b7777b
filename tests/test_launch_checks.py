"""What launchers set: what is missing or contradictory is one line, and what launchers really set is not."""

import socket

import pytest

from sslrun.runtime import network
from sslrun.runtime.launch_checks import Arrival, contradiction, environment_fault, slurm_note

TORCHRUN = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
SRUN = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
BATCH = {"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        TORCHRUN,
        {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_SIZE": "8"},  # deepspeed
        {"RANK": "9", "WORLD_SIZE": "12", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},  # nodes of 8 and of 4
        {"WORLD_SIZE": "1"},
        SRUN,
        BATCH,
        TORCHRUN | BATCH,  # --devices, or torchrun, in a batch script
        TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},  # torchrun once on each node
        {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"} | SRUN,  # a script's own export
        {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}
        | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0", "SLURM_PTY_PORT": "4711"},  # srun --ntasks 8 --pty bash
    ],
)
def test_what_launchers_set_is_in_order(environment):
    assert environment_fault(environment) is None


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "3"}, "RANK is '3' in the environment, but WORLD_SIZE is not set: start several"),
        ({"RANK": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, "RANK is '3' in the environment, but WORLD"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is set, but not RANK: start"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE is 0, expected at least 1"),
        ({"WORLD_SIZE": "4", "RANK": "4"}, "RANK is 4, but WORLD_SIZE is 4"),
        ({"WORLD_SIZE": "4", "RANK": "-1"}, "RANK is '-1' in the environment, expected a number"),
        (TORCHRUN | {"LOCAL_RANK": "8"}, "LOCAL_RANK is 8 of 8 ranks on this machine and 16 in all, which cannot be"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "32"}, "LOCAL_RANK is 1 of 32 ranks on this machine and 16 in all"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS is 4, but SLURM_PROCID is None: start the processes"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "4"}, "SLURM_STEP_NUM_TASKS is 4, but SLURM_PROCID is '4'"),
        (  # srun --ntasks-per-node=8 torchrun --nproc-per-node 8: 64 ranks come on each node
            {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
            | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "2"},
            "srun has started 8 tasks, and in this one another launcher starts 8 of 8 ranks: leave the other",
        ),
    ],
)
def test_what_they_cannot_have_set_is_one_line(environment, expected):
    assert str(environment_fault(environment)).startswith(expected)


def test_one_process_in_a_job_of_several_tasks_is_noted():
    assert str(slurm_note(BATCH)).startswith("this Slurm job has 16 tasks, but the run is one process: srun before")
    for environment in ({}, SRUN, BATCH | {"SLURM_NTASKS": "1"}, BATCH | TORCHRUN):
        assert slurm_note(environment) is None


def come(*ranks: tuple[int, int, str]) -> str | None:
    return contradiction([Arrival(rank, size, host, "") for rank, size, host in ranks])


def test_ranks_that_are_not_of_one_run():
    assert come() is None
    assert come((1, 3, "b"), (0, 3, "a"), (2, 3, "b")) is None
    assert str(come((2, 3, "b"), (0, 2, "a"))).startswith(
        "rank 0 on a was started as one of 2 ranks, but rank 2 on b as one of 3: all nodes must be started with"
    )
    assert str(come((0, 4, "a"), (1, 4, "a"), (0, 4, "b"))).startswith("rank 0 of 4 was started twice, on a and on b: ")


def test_the_network_towards_others():
    """A loopback address, as that of a host's own name, is of use only if all ranks are on this machine."""
    assert network.own_address("127.0.0.1") == "127.0.0.1" and network.own_address("no.such.host.invalid") == ""
    assert network.is_own("127.0.0.1") and not network.is_own("192.0.2.1")  # reserved for documents
    assert network.interface_for("127.0.0.1", ["127.0.0.1"]) == network.interface_for("::1", []) == "lo"
    assert network.interface_for("", ["127.0.0.1"]) is None
    own = network.own_address("192.0.2.1")
    if own:  # this machine has a network
        outside = network.interface_for(own, [own])
        assert outside in dict(map(reversed, socket.if_nameindex())) and outside != "lo"
        assert network.interface_for("127.0.1.1", ["127.0.0.1", own]) == outside
        assert network.interface_for("127.0.1.1", ["127.0.0.1", "192.0.2.1"]) == outside
