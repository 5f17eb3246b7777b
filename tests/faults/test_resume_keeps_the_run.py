"""A resume never erases a run: without a checkpoint that can be read it stops and changes nothing."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from small_run import NAME, call, metrics, saved
from sslrun.runtime import checkpoint, durable, folder_lock, run_folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a finished run of 6 steps, with checkpoints at the steps 4 and 6."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / NAME))


@pytest.fixture
def resume(run, capsys):
    """Resumes the run: (exit code, the last line of stderr)."""

    def start(*options):
        recipe = run.parents[1] / f"{NAME}.toml"
        shutil.copy(run / "config.toml", recipe)
        code, _, errors = call(capsys, recipe, "--work-dir", run.parent, "--set", "max_iters=8", *options)
        return code, errors.splitlines()[-1]

    return start


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a run except its lock."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != folder_lock.NAME
    }


def fails(monkeypatch, path: Path, code: int, times: int = 10**9):
    """Reading `path`, or listing it, fails with an errno the first `times` times; returns the list of failures."""
    failures: list[Path] = []

    def failing(original):
        def read(place, *arguments, **options):
            if Path(place) == path and len(failures) < times:
                failures.append(path)
                raise OSError(code, os.strerror(code), str(path))
            return original(place, *arguments, **options)

        return read

    for module, name in ((os, "listdir"), (os, "stat"), (Path, "read_bytes")):
        monkeypatch.setattr(module, name, failing(getattr(module, name)))
    return failures


@pytest.mark.parametrize(
    "code",
    [
        errno.EIO,
        *(pytest.param(code, marks=pytest.mark.nightly) for code in (errno.ESTALE, errno.EACCES, errno.ETIMEDOUT)),
    ],
)
@pytest.mark.parametrize("what", ["checkpoints", "checkpoints/step_00000006/manifest.json", "metrics.jsonl"])
def test_storage_that_gives_errors_ends_the_start_with_1(run, resume, monkeypatch, what, code):
    monkeypatch.setattr(durable, "RETRY_S", 0.0)
    if what == "metrics.jsonl":  # asked for only if there is no checkpoint
        shutil.rmtree(run / "checkpoints")
    before = content(run)
    with monkeypatch.context() as patch:
        failures = fails(patch, run / what, code)
        answer = resume("--resume")
    assert failures, "the fault was not injected"
    assert answer == (1, f"error: {run / what} cannot be read: {os.strerror(code)} (tried for 0 s)")
    assert content(run) == before


def test_storage_that_recovers_is_waited_for(run, resume, monkeypatch, caplog):
    monkeypatch.setattr(durable, "FIRST_PAUSE_S", 0.01)
    manifest = saved(run, 6) / "manifest.json"
    failures = fails(monkeypatch, manifest, errno.EIO, times=3)
    code, _ = resume("--resume")
    assert code == 0 and len(failures) == 3
    assert [row["step"] for row in metrics(run)][-1] == 8
    warned = [record.message for record in caplog.records if "trying again" in record.message]
    assert warned == [f"{manifest} cannot be read: Input/output error; trying again for 60 s"]


NONE_SAVED = "it has no checkpoint (it ended before its first, or they were removed)"


def test_a_run_that_was_killed_before_its_first_checkpoint_is_not_told_to_resume(run, resume):
    shutil.rmtree(run / "checkpoints")
    code, line = resume()
    assert code == 2 and line == (
        f"error: {run} already holds a run (done) that {NONE_SAVED.removeprefix('it ')}: --restart sets it aside and "
        "starts from the beginning; or give the new one another --work-dir"
    )


def all_damaged(run: Path) -> None:
    for path in checkpoint.steps(run / "checkpoints").values():
        os.truncate(path / "model.safetensors", 10)


def folder_gone(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def a_file_in_its_place(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("")


def rows_gone_too(run: Path) -> None:
    all_damaged(run)
    (run / "metrics.jsonl").unlink()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (all_damaged, "none of its 2 checkpoints is intact"),
        (rows_gone_too, "none of its 2 checkpoints is intact"),
        (folder_gone, NONE_SAVED),
        (a_file_in_its_place, NONE_SAVED),
    ],
)
def test_a_run_without_a_good_checkpoint_ends_the_start_with_2_until_it_is_set_aside(
    run, resume, monkeypatch, harm, words
):
    harm(run)
    before = content(run)
    for _ in range(2):  # a scheduler that tries again changes nothing either
        code, line = resume("--resume")
        assert code == 2 and line.startswith(f"error: {run} holds a run that cannot be continued: {words}. --restart")
        assert content(run) == before
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: "20260101-000000")
    code, _ = resume("--restart")
    assert code == 0 and [row["step"] for row in metrics(run)][-1] == 8
    assert content(run.with_name(f"{NAME}.before-20260101-000000")) == before


def test_a_newer_checkpoint_that_cannot_be_read_now_is_not_passed_over(run, resume, monkeypatch):
    """The older one is good; continuing from it would set the newer one aside."""
    monkeypatch.setattr(durable, "RETRY_S", 0.0)
    before = content(run)
    with monkeypatch.context() as patch:
        fails(patch, saved(run, 6) / "manifest.json", errno.EIO)
        assert resume("--resume")[0] == 1
    assert content(run) == before
    os.truncate(saved(run, 6) / "model.safetensors", 10)  # the control: a damaged one is
    assert resume("--resume")[0] == 0
    assert (run / "checkpoints/step_00000006.aside").is_dir()


def test_restart_and_resume_exclude_each_other(run, resume, capsys):
    with pytest.raises(SystemExit) as left:
        resume("--resume", "--restart")
    assert left.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_run_that_is_in_use_is_not_set_aside(run, resume):
    import small_run

    holder = small_run.python(
        "import sys, time; from pathlib import Path; from sslrun.runtime import folder_lock\n"
        "folder_lock.take(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)",
        run,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        before = content(run)
        code, line = resume("--restart")
        assert code == 2 and f"is in use by process {holder.pid}" in line
        assert content(run) == before
    finally:
        holder.kill()
        holder.wait()
