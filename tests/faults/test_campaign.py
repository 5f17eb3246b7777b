"""The first table of docs/reliability.md: faults are injected into small runs, and nothing is lost.

By day the table is compared with its rows. Each night every kind of fault is injected some times; TIMES=10 in the
environment makes that ten times as often. `make fault-tables` writes rows and table.
"""

import os
import signal

import pytest
from campaign import Campaign
from kinds import KINDS, inject

import tables

ROWS, KEY, PAGE = "reliability", "kind", "reliability.md"


@pytest.fixture(scope="module")
def campaign(tmp_path_factory, images):
    return Campaign(tmp_path_factory.mktemp("campaign"), images)


@pytest.mark.nightly
@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_lost(name, campaign):
    kind = KINDS[name]
    row, lost = inject(kind, campaign, int(kind.nightly * float(os.environ.get("TIMES", "1"))))
    if tables.is_writing():
        tables.replace(ROWS, KEY, list(KINDS), row)
    assert not lost, lost


def test_the_table_is_that_of_the_rows():
    rows = tables.rows(ROWS)
    assert [row[KEY] for row in rows] == list(KINDS)
    assert all(row["lost"] == 0 for row in rows)
    tables.check(PAGE, "faults", lines)


def lines() -> list[str]:
    table = ["| fault | times | lost | exit codes (times) | slowest end |", "|---|---|---|---|---|"]
    for row in tables.rows(ROWS):
        codes = ", ".join(f"{_code(int(code))} ({count:,})" for code, count in row["codes"].items())
        lost = row["lost"] or "nothing"
        table.append(f"| {row[KEY]} | {row['times']:,} | {lost} | {codes} | {row['worst_exit_s']:.1f} s |")
    return table


def _code(code: int) -> str:
    return str(code) if code >= 0 else signal.Signals(-code).name
