"""Who is missing, from what was last heard of each rank; and what it costs to say where one stands."""

from dataclasses import replace

import pytest

from sslrun.runtime import heartbeat
from sslrun.runtime.lost_ranks import IN_ORDER, Beat, Heard, Limits, is_gone, numbered, verdict

LIMITS = Limits(silence_s=60, soon_s=8, grace_s=5)
BEAT = Beat(9, "a", 1, 1204, 5, "forward", 0.0, 600.0)


def heard(silent_s: float = 0.0, **changes: object) -> Heard:
    return Heard(replace(BEAT, **changes), silent_s)  # type: ignore[arg-type]


def ranks(*others: Heard) -> dict[int, Heard]:
    return dict(enumerate((heard(), heard(), *others)))


def test_nobody_is_missing_while_the_last_one_moves():
    slow = heard(step=1203, stood_s=599.0, host="b")
    assert verdict(ranks(heard(stood_s=3000.0), slow), LIMITS) is None
    assert verdict(ranks(heard(silent_s=59.0)), LIMITS) is None
    assert verdict(ranks(heard(silent_s=1e6, ended=IN_ORDER)), LIMITS) is None  # it has left in order
    assert verdict(ranks(heard(ended="ValueError: why", silent_s=4.0)), LIMITS) is None  # the others may have it too
    saving = heard(place=4, stood_s=3000.0, patience_s=3600.0)
    assert verdict(ranks(saving, heard(stood_s=2900.0)), LIMITS) is None


def test_nobody_is_missing_while_one_of_those_that_are_behind_moves():
    """All wait for rank 0 at one place, where it writes a checkpoint."""
    everyone = dict(enumerate([heard(stood_s=1.0), heard(stood_s=3000.0), heard(stood_s=3000.0)]))
    assert verdict(everyone, LIMITS) is None


@pytest.mark.parametrize(
    ("others", "line"),
    [
        (
            [heard(silent_s=61.0, host="b", step=1203)],
            "rank 2 on host b has not come back from step 1,204 for 61 s: its process has died or stopped, "
            "or b is cut off",
        ),
        (
            [heard(silent_s=61.0, host="b"), heard(silent_s=64.0, host="b"), heard(silent_s=65.0, host="c")],
            "ranks 2-3 on host b and rank 4 on host c have not come back from step 1,204 (forward) for 61 s: their "
            "processes have died or stopped, or b and c are cut off",
        ),
        (
            [heard(broken="Connection closed by peer"), heard(silent_s=9.0)],
            "rank 3 on host a has not come back from step 1,204 (forward) for 9 s: its process has died or stopped, or "
            "a is cut off",
        ),
        (
            [heard(place=4, stood_s=601.0, doing="reading images")],
            "rank 2 on host a has not come back from step 1,204 (reading images) for 601 s (engine.timeout_s): its "
            "process lives, but does not go on",
        ),
        (
            [heard(silent_s=6.0, ended="ValueError: why"), heard(broken="Connection closed by peer")],
            "rank 2 on host a ended in step 1,204: ValueError: why",
        ),
        (
            [heard(place=4, broken="Connection reset", stood_s=60.0)],
            "the connection between the ranks broke in step 1,204; rank 2 on host a has: Connection reset",
        ),
    ],
)
def test_the_missing_ranks_are_named(others, line):
    assert verdict(ranks(*others), LIMITS) == line


def test_where_all_stand_nobody_is_blamed():
    everyone = dict(enumerate([heard(stood_s=600.0), heard(stood_s=700.0)]))
    assert verdict(everyone, LIMITS) == "no rank has come back from step 1,204 (forward) for 600 s (engine.timeout_s)"


def test_before_the_first_step():
    start = {"step": 0, "place": 1, "doing": "setting up"}
    line = "rank 1 on host a has not come back from the start (setting up) for 60 s"
    assert (verdict({0: heard(**start), 1: heard(60.0, **start)}, LIMITS) or "").startswith(line)


def test_who_is_silent_does_not_judge():
    assert is_gone(heard(silent_s=60.0), [heard()], LIMITS) and is_gone(heard(ended=IN_ORDER), [heard()], LIMITS)
    assert not is_gone(heard(silent_s=59.0), [heard()], LIMITS)
    assert is_gone(heard(silent_s=8.0), [heard(broken="it broke")], LIMITS)


def test_numbers_of_ranks():
    assert numbered([3]) == "rank 3" and numbered([2, 0]) == "ranks 0 and 2"
    assert numbered([0, 2, 4, 5, 6]) == "ranks 0, 2 and 4-6"


def test_a_beat_survives_the_store():
    beat = replace(BEAT, broken="'\"\n", ended="Ünïcode")
    assert Beat.decode(beat.encode().encode()) == beat


def test_ranks_that_stand_in_one_place_have_one_number(monkeypatch):
    main = heartbeat._Main()
    monkeypatch.setattr(heartbeat, "_main", main)
    heartbeat.at("reading images", 7)
    heartbeat.at("forward")
    heartbeat.enter_collective()
    for _ in range(5):
        heartbeat.tick()  # as many as a rank has batches: they may differ
    assert main.where == (7, 3, "forward") and not main.has_begun
    heartbeat.at("reading images", 8)
    assert main.where == (8, 1, "reading images") and main.has_begun
    with heartbeat.uninterrupted():
        assert (main.unhurried, main.uninterrupted) == (1, 1)
    assert (main.unhurried, main.uninterrupted) == (0, 0)
