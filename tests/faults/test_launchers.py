"""The table of docs/cluster.md: what a signal to each process of each launcher does to a run.

By day the table is compared with its rows; each night every row is observed anew. `make fault-tables` writes both.
"""

import pytest
from launchers import CASES, observe

import tables

ROWS, KEY, PAGE = "launchers", "case", "cluster.md"
STARTED = {
    "none": "`bin/sslrun`",
    "nohup": "`nohup bin/sslrun`",
    "devices": "`bin/sslrun --devices`",
    "torchrun": "`torchrun`",
    "deepspeed": "`deepspeed`",
}


@pytest.mark.nightly
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_a_signal_does(case, tmp_path, images):
    row = observe(case, tmp_path, images)
    if tables.is_writing():
        tables.replace(ROWS, KEY, [each.name for each in CASES], row)
    assert row in tables.rows(ROWS), row


def test_the_table_is_that_of_the_rows():
    assert [row[KEY] for row in tables.rows(ROWS)] == [case.name for case in CASES]
    tables.check(PAGE, "signals", lines)


def lines() -> list[str]:
    """The table. What is the same for several signals, or for several processes, is in one line."""
    rows = {row[KEY]: row for row in tables.rows(ROWS)}
    signals: dict[tuple[str, ...], list[str]] = {}
    for case in CASES:
        signals.setdefault((STARTED[case.launcher], case.to, *_outcome(rows[case.name])), []).append(
            f"SIG{case.signal}"
        )
    targets: dict[tuple[str, ...], list[str]] = {}
    for (started, to, *outcome), sent in signals.items():
        targets.setdefault((started, ", ".join(sent), *outcome), []).append(to)
    head = "| started with | signal | to | its exit code | code of the ranks | `state.json` | `runs --wait` | saved |"
    return [head, "|---|---|---|---|---|---|---|---|"] + [
        f"| {started} | {sent} | {', '.join(to)} | {' | '.join(outcome)} |"
        for (started, sent, *outcome), to in targets.items()
    ]


def _outcome(row: tables.Row) -> tuple[str, ...]:
    if row.get("goes_on"):
        return ("the run goes on", "", "running", "", "")
    code = "128 + signal" if row["launcher_code"] < 0 else str(row["launcher_code"])  # as a shell shows it
    ranks = ", ".join(dict.fromkeys(map(str, row["rank_codes"])))
    state = row["state"] if row["state_code"] is None else f"{row['state']}, {row['state_code']}"
    saved = "all steps" if row["saved"] else "up to the last checkpoint"
    return (code, ranks, state, str(row["wait_code"]), saved)
