"""A rank that is lost or hangs is named, and the others leave in order with exit code 1."""

import os
import re
import signal
import time

import pytest
import torch

from ranks import run_ranks
from sslrun.runtime import distributed, heartbeat

TIMEOUT_S = 2.0


def step(number: int, vote: distributed.Vote) -> None:
    heartbeat.at("thinking", number)
    time.sleep(0.2)
    heartbeat.at("voting")
    vote.cast(0)


@distributed.naming_lost_ranks()
def lose(rank: int, how: str) -> None:
    """Steps on all ranks; one of them is lost in step 3."""
    distributed.init(torch.device("cpu"), TIMEOUT_S)
    vote = distributed.Vote(torch.device("cpu"))
    for number in range(1, 10):
        heartbeat.at("thinking", number)
        if number == 3 and distributed.rank() == rank:
            if how == "hangs":
                time.sleep(1e6)
            os.kill(os.getpid(), getattr(signal, how))
        step(number, vote)


@pytest.mark.parametrize(
    ("rank", "how", "code", "line"),
    [
        (
            2,
            "hangs",
            1,
            r"error: rank 2 on host \S+ has not come back from step 3 \(thinking\) for 2 s \(engine.timeout_s",
        ),
        (
            0,
            "SIGSTOP",
            -9,
            r"error: rank 0 on host \S+ has not come back from step 3.* for 2 s: its process has",
        ),
    ],
)
def test_ranks_leave_with_one_line_that_names_the_one_that_is_missing(rank, how, code, line):
    with pytest.raises(AssertionError) as failure:
        run_ranks(lose, 3, rank, how, timeout_s=30)
    text = str(failure.value)
    codes = {int(number): int(code) for number, code in re.findall(r"rank (\d): (-?\d+)[,;]", text.splitlines()[0])}
    assert codes == {0: 1, 1: 1, 2: 1, rank: code}, text  # -9: what has started it ends it at last
    assert len(re.findall(line, text)) == 1 and text.count("error:") == 1 and "Traceback" not in text, text


def leave_one_by_one() -> float:
    """The ranks leave at different times, rank 0 first; returns how long that took."""
    distributed.init(torch.device("cpu"), TIMEOUT_S)
    vote = distributed.Vote(torch.device("cpu"))
    for number in range(1, 5):
        step(number, vote)
        time.sleep(0.9 * TIMEOUT_S if number == 4 and distributed.rank() == 1 else 0)  # slow, but not missing
    begin = time.monotonic()
    distributed.shutdown()
    return time.monotonic() - begin


def test_a_slow_rank_and_an_end_in_order_are_no_loss():
    first, *_ = run_ranks(leave_one_by_one, 3, timeout_s=30, silent=True)
    assert first > 0.5  # it has waited for rank 1, since the store is in its process
