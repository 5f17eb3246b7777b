"""Launches that cannot be a run: one line, exit code 2, and a run that has begun is not disturbed."""

import contextlib
import io
import os
import time
from pathlib import Path

import pytest

import small_run
from ranks import run_ranks
from sslrun import cli

Answers = list[tuple[int, str]]


def started(words: list[str], changes: dict[int, dict[str, str]], late: int | None, metrics: Path) -> tuple[int, str]:
    """(exit code, errors) of a training by one of several processes, whose launcher has set other variables than the
    first launcher. One may come when the run has begun."""
    process = int(os.environ.get("RANK", "0"))
    os.environ.update(changes.get(process, {}))
    while process == late and not metrics.exists():
        time.sleep(0.1)
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(words)
    return code, err.getvalue()


def start(
    folder: Path, images: Path, count: int, changes: dict[int, dict[str, str]], late: int | None = None
) -> Answers:
    recipe = small_run.write_recipe(folder, images, steps=6)
    words = [str(recipe), "--set", "engine.timeout_s=60"]
    return run_ranks(started, count, words, changes, late, folder / "runs/small/metrics.jsonl", timeout_s=900)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"WORLD_SIZE": "4"}, "was started as one of 3 ranks, but rank 2 on "),
        pytest.param({"RANK": "1"}, "error: rank 1 of 3 was started twice, on ", marks=pytest.mark.nightly),
        (
            None,
            "global_batch 16 in groups of data.samples_per_gpu 8 cannot be split among 3 processes; possible",
        ),
    ],
)
def test_ranks_that_are_no_run_are_one_line_on_rank_0(tmp_path, images, change, expected):
    answers = start(tmp_path, images, 3, {} if change is None else {2: change})
    assert [code for code, _ in answers] == [2, 2, 2], answers
    lines = "".join(printed for _, printed in answers).strip().splitlines()
    assert len(lines) == 1 and expected in lines[0] and lines[0] in answers[0][1], answers
    assert not (tmp_path / "runs/small/metrics.jsonl").exists()


@pytest.mark.nightly
def test_a_run_that_has_begun_takes_no_notice_of_another_rank(tmp_path, images):
    two = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    other = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    answers = start(tmp_path, images, 3, {0: two, 1: two, 2: other}, late=2)
    assert [code for code, _ in answers] == [0, 0, 2], answers
    assert (
        "error: rank 2 of 4 on " in answers[2][1]
        and " has connected to a run of 2 ranks that has already begun: " in (answers[2][1])
    )
    assert small_run.last_step(tmp_path / "runs/small") == 6


@pytest.mark.parametrize(
    ("rank", "address", "expected"),
    [
        ("0", "192.0.2.1", "cannot be reached at 192.0.2.1, port "),  # reserved for documents
        ("1", "no.such.host.invalid", "error: MASTER_ADDR is 'no.such.host.invalid', which "),
    ],
)
def test_an_address_where_rank_0_is_not(tmp_path, images, rank, address, expected):
    recipe = small_run.write_recipe(tmp_path, images, steps=6)
    port = str(small_run.free_port())
    launcher = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": port}
    ((code, printed),) = run_ranks(
        started, 1, [str(recipe), "--set=engine.timeout_s=2"], {0: launcher}, None, tmp_path / "none"
    )
    assert code == 2 and expected in printed and len(printed.strip().splitlines()) == 1, printed
