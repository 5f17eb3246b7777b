"""A run folder that is moved, removed, replaced or made read-only while its run goes on ends the run with 1.

What can be saved is saved where the folder is; nothing is made anew under its name, or written to what took its place.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import small_run
from small_run import call, metrics, saved
from sslrun.errors import RunFailed, UsageError
from sslrun.runtime import checkpoint, durable, folder_lock, held
from sslrun.runtime.log import RunLog
from sslrun.runtime.run_folder import RunFolder


def state(run: Path) -> dict:
    return json.loads((run / "state.json").read_text())


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


@pytest.fixture
def train(tmp_path, images, monkeypatch, capsys):
    """Trains 6 steps with a row each and no checkpoint before the last, and does harm to the run folder before the row
    of a step: (exit code, stderr, the run folder)."""

    def start(harm: Callable[[Path], None], step: int = 3, *options: str) -> tuple[int, str, Path]:
        recipe, run = small_run.write_recipe(tmp_path, images, steps=6), tmp_path / "runs/small"
        write = RunLog.write

        def with_harm(log, at, row):
            if at == step and "train/loss" in row:
                harm(run)
            write(log, at, row)

        monkeypatch.setattr(RunLog, "write", with_harm)
        settings = ("log.interval=1", "checkpoint.interval=100", "monitor.knn_interval=0", *options)
        code, _, errors = call(capsys, recipe, *(f"--set={setting}" for setting in settings))
        return code, errors, run

    return start


def errors_of(stderr: str) -> list[str]:
    """All lines but those of the rows and of the start; a traceback has others."""
    return [
        line for line in stderr.splitlines() if not re.match(r"epoch |small: |warning: the run looks collapsed", line)
    ]


def test_a_folder_that_is_moved_keeps_the_step_that_was_done(train):
    def move(run):
        run.rename(run.with_name("moved"))

    code, stderr, run = train(move)
    moved = run.with_name("moved")
    assert code == 1 and not run.exists()
    assert errors_of(stderr) == [
        f"error: the run folder {run} was moved to {moved} during the run, and the run has stopped; the newest "
        f"checkpoint in {moved}/checkpoints is of step 3"
    ]
    assert checkpoint.damage(saved(moved, 3)) is None
    assert [row["step"] for row in metrics(moved)] == [1, 2, 3]
    assert (state(moved)["state"], state(moved)["exit_code"]) == ("failed", 1)
    assert state(moved)["error"] == errors_of(stderr)[0].removeprefix("error: ")
    assert "step 3/6" in (moved / "log.txt").read_text()


def test_nothing_is_written_into_the_folder_that_took_its_place(train, tmp_path):
    stranger: dict[str, bytes] = {}

    def replace(run):
        run.rename(tmp_path / "elsewhere")
        shutil.copytree(tmp_path / "elsewhere", run)
        (run / "metrics.jsonl").write_text("of another run\n")
        stranger.update(content(run))

    code, stderr, run = train(replace)
    (line,) = errors_of(stderr)
    assert code == 1
    assert f"{run} was moved to {tmp_path}/elsewhere, and another is in its place, during the run" in line
    assert content(run) == stranger
    assert checkpoint.damage(saved(tmp_path / "elsewhere", 3)) is None


@pytest.mark.parametrize("parents", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_a_folder_that_is_removed_is_not_made_anew(train, parents):
    def remove(run):
        shutil.rmtree(run.parent if parents else run)

    code, stderr, run = train(remove)
    assert (code, errors_of(stderr)) == (1, [f"error: the run folder {run} was removed during the run"])
    assert not run.exists() and run.parent.exists() != parents


def test_a_folder_that_is_moved_after_the_last_row_is_not_done(train, monkeypatch):
    """Between the last checkpoint and the record of the end."""
    record = RunFolder.record_end

    def late(folder, code):
        folder.path.rename(folder.path.with_name("moved"))
        record(folder, code)

    monkeypatch.setattr(RunFolder, "record_end", late)
    code, stderr, run = train(lambda run: None)
    (line,) = errors_of(stderr)
    assert code == 1 and line.endswith(f"the newest checkpoint in {run.with_name('moved')}/checkpoints is of step 6")
    assert state(run.with_name("moved"))["state"] == "failed"


@pytest.mark.nightly
def test_a_run_that_goes_on_somewhere_else_can_be_resumed_there(train, capsys, tmp_path):
    code, _, run = train(lambda run: run.parent.rename(run.parents[1] / "other"))
    assert code == 1
    options = ("--work-dir", tmp_path / "other", "--set=log.interval=1", "--set=checkpoint.interval=100")
    code, _, stderr = call(capsys, tmp_path / "small.toml", *options, "--set=monitor.knn_interval=0", "--resume")
    assert code == 0, stderr
    assert [row["step"] for row in metrics(tmp_path / "other/small")] == [1, 2, 3, 4, 5, 6] and not run.exists()


# Of what is in the folder: the harm, and what is said.

RECIPE = {"seed": 1}


@pytest.fixture
def folder(tmp_path):
    """An open run folder with a row, and a checkpoint."""
    with RunFolder(tmp_path / "run", RECIPE, resume=None) as opened:
        descriptor = os.open(opened.metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, b'{"step": 1}\n')
        checkpoint.save(opened.checkpoints, 1, {"model": {}, "optimizer": {}}, {})
        opened.hold(opened.metrics, descriptor)
        opened.look()
        assert opened.lost is None
        yield opened
        os.close(descriptor)


def removed(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def moved(path: Path) -> None:
    path.rename(path.with_name("moved"))


def rotated(path: Path) -> None:
    moved(path)
    path.touch()


def a_link(path: Path) -> None:
    moved(path)
    path.symlink_to(path.parent.parent)


def a_dangling_link(path: Path) -> None:
    removed(path)
    path.symlink_to("nowhere")


def a_file(path: Path) -> None:
    removed(path)
    path.write_text("")


def a_folder(path: Path) -> None:
    removed(path)
    path.mkdir()


def a_pipe(path: Path) -> None:
    removed(path)
    os.mkfifo(path)


HARMS = {
    removed: "was removed",
    moved: "was moved to {0}",
    rotated: "was moved to {0}, and another is in its place,",
    a_link: "was moved to {0}, and another is in its place,",
    a_dangling_link: "was removed",
    a_file: "was replaced by another",
    a_folder: "was replaced by another",
    a_pipe: "was replaced by another",
}


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", ".lock"])
@pytest.mark.parametrize("harm", HARMS)
def test_what_it_holds(folder, name, harm):
    harm(folder.path / name)
    folder.look()
    said = HARMS[harm].format(folder.path / "moved")
    assert folder.lost == f"{folder.path / name} {said} during the run"
    with pytest.raises(RunFailed, match=r"during the run, and the run has stopped"):
        folder.record_end(0)
    with pytest.raises(RunFailed, match=r"during the run$"):
        folder.write_json("env.json", {})
    folder.record_state("failed", 1)
    assert state(folder.path)["state"] == "failed", "the folder itself is the same"


def test_rows_that_are_cut(folder):
    os.truncate(folder.metrics, 5)
    folder.look()
    assert folder.lost == f"{folder.metrics} was cut during the run"


def test_rows_that_grow_are_no_harm(folder):
    for _ in range(3):
        with open(folder.metrics, "a") as file:
            file.write("{}\n")
        folder.look()
    assert folder.lost is None


def test_links_that_were_there_before_are_no_harm(tmp_path):
    """The runs on another disk than the work_dir, and the checkpoints on a third."""
    for name in ("runs", "checkpoints"):
        (tmp_path / f"disk/{name}").mkdir(parents=True)
    (tmp_path / "disk/runs/run").mkdir()
    (tmp_path / "work").symlink_to("disk/runs")
    (tmp_path / "work/run/checkpoints").symlink_to(tmp_path / "disk/checkpoints")
    with RunFolder(tmp_path / "work/run", RECIPE, resume=None) as opened:
        (tmp_path / "work").unlink()
        (tmp_path / "work").symlink_to(tmp_path / "disk/runs")  # another link to the same folder
        opened.record_end(0)
    assert state(tmp_path / "work/run")["state"] == "done"


@pytest.mark.parametrize("name", ["", "checkpoints"])
def test_a_folder_that_becomes_read_only(folder, name, monkeypatch):
    """As by chmod or by a file system that is mounted anew; root may write all the same, so the answer is played."""
    path = folder.path / name
    access = os.access
    monkeypatch.setattr(held.os, "access", lambda at, mode: Path(at) != path and access(at, mode))
    folder.look()
    what = f"the run folder {path}" if not name else path
    assert folder.lost == f"{what} became read-only during the run"
    with pytest.raises(RunFailed, match="became read-only"):
        folder.record_end(0)


def test_a_file_system_that_always_says_no_but_takes_all(tmp_path, monkeypatch):
    monkeypatch.setattr(held.os, "access", lambda *_: False)
    with RunFolder(tmp_path / "run", RECIPE, resume=None) as opened:
        opened.record_end(0)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_an_end_that_cannot_be_recorded_is_not_done(folder, code, monkeypatch):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(durable, "write_file", refuse)
    with pytest.raises(RunFailed, match=f"state.json could not be written: {os.strerror(code)}"):
        folder.record_end(0)


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EIO, errno.ENOSPC])
def test_rows_that_the_storage_refuses_late(tmp_path, code, monkeypatch):
    """Quotas and network file systems may say so only when the rows are synced."""
    log = RunLog(tmp_path, name="run", values={}, first_step=0, total_steps=2, steps_per_epoch=1)

    def refuse(_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(RunFailed, match=rf"metrics\.jsonl cannot be written: {os.strerror(code)}"):
            log.sync()
    log.close()


def test_storage_that_gives_errors_is_not_taken_for_a_folder_that_is_gone(folder, monkeypatch):
    monkeypatch.setattr(durable, "RETRY_S", 0.0)
    original = os.stat

    def failing(path, *arguments, **options):
        if Path(path) == folder.path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return original(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", failing)
        with pytest.raises(RunFailed, match="cannot be read: Input/output error"):
            folder.look()
    folder.look()
    assert folder.lost is None


def test_a_folder_that_another_process_has_taken_is_left_to_it(folder):
    """Without the file of the lock, another run can start there."""
    (folder.path / folder_lock.NAME).unlink()
    other = small_run.python(
        "import sys, time; from pathlib import Path; from sslrun.runtime import folder_lock\n"
        "folder_lock.take(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)",
        folder.path,
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        before = content(folder.path)
        for _ in range(2):
            with pytest.raises(RunFailed, match=r"\.lock was replaced by another during the run"):
                folder.look()
        folder.record_state("failed", 1)
        assert content(folder.path) == before
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("place", [a_file, a_dangling_link, a_pipe])
def test_checkpoints_that_cannot_be_made_end_the_start(tmp_path, place):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    place(tmp_path / "run/checkpoints")
    with pytest.raises(UsageError, match=rf"{tmp_path}/run/checkpoints cannot be made: File exists"):
        RunFolder(tmp_path / "run", RECIPE, resume=None)


@pytest.mark.nightly
@pytest.mark.parametrize("harm", ["moved", "replaced", "removed"])
def test_all_ranks_leave_with_1_and_a_line_each_at_most(tmp_path, images, harm):
    recipe, run = small_run.write_recipe(tmp_path, images, steps=5000), tmp_path / "runs/small"
    settings = ("log.interval=1", "checkpoint.interval=10000", "monitor.knn_interval=0")
    ranks = small_run.start(small_run.command(recipe, *(f"--set={setting}" for setting in settings), ranks=2))
    small_run.wait_until(lambda: small_run.last_step(run) >= 3, ranks)
    run.rename(tmp_path / "moved")
    if harm == "removed":
        shutil.rmtree(tmp_path / "moved")
    elif harm == "replaced":
        shutil.copytree(tmp_path / "moved", run)
        before = content(run)
    code, output = small_run.finish(ranks)
    own, _, of_torchrun = output.partition("Traceback (most recent call last)")
    assert code == 1 and re.findall(r"exitcode *: (-?\d+)", of_torchrun) == ["1", "1"], output
    lines = [line for line in own.splitlines() if "error: " in line]
    assert "done: " not in output and len(lines) == len({line.partition("error: ")[0] for line in lines}), output
    said = [f"moved to {tmp_path}/moved"] + ["removed"] * (harm == "removed")  # a row may be written in between
    starts = tuple(f"error: the run folder {run} was {each}" for each in said)
    assert any(line.startswith(starts) for line in lines), lines
    if harm == "replaced":
        assert content(run) == before
    if harm != "removed":
        assert state(tmp_path / "moved")["state"] == "failed"
        assert checkpoint.newest_good(tmp_path / "moved/checkpoints") is not None
