"""The run folder: no run is overwritten, two processes never write one folder, a resume keeps the recipe."""

import copy
import json
import os
import re
from importlib import metadata
from pathlib import Path

import pytest
import tomli
import torch

import small_run
from sslrun.errors import UsageError
from sslrun.runtime import checkpoint
from sslrun.runtime.environment import environment
from sslrun.runtime.run_files import rows
from sslrun.runtime.run_folder import RunFolder, config_changes

RECIPE = {
    "epochs": 10,
    "seed": 1,
    "global_batch": 256,
    "work_dir": "work_dirs",
    "vars": {"mean": [0.5, 0.5]},
    "engine": {"micro_batch": "auto"},
    "optimizer": {"type": "SGD", "lr": 0.03},
    "data": {"workers_per_gpu": 4, "views": [{"num_views": 2, "transforms": [{"type": "GaussianBlur", "p": 0.5}]}]},
    "text": "a literal ${reference}",
}


def changed(key: str, value: object) -> dict:
    values: dict = copy.deepcopy(RECIPE)
    table = values
    *parents, last = key.split(".")
    for part in parents:
        table = table[int(part)] if isinstance(table, list) else table.setdefault(part, {})
    table[last] = value
    return values


def write_rows(folder: RunFolder, steps: range) -> None:
    with open(folder.metrics, "a") as file:
        for step in steps:
            file.write(
                json.dumps({"step": step, "epoch": 0.0, "wall_s": 1.5 * step, "train/loss": 1.0 / (step + 1)}) + "\n"
            )


EMPTY: dict[str, dict] = {"model": {}, "optimizer": {}}


def used_folder(path: Path) -> Path:
    with RunFolder(path, RECIPE, resume=None) as folder:
        write_rows(folder, range(0, 50, 10))
        checkpoint.save(folder.checkpoints, 40, EMPTY, {})
        folder.record_state("done", 0)
    return path


def state(path: Path) -> dict:
    return json.loads((path / "state.json").read_text())


def test_a_new_folder(tmp_path):
    with RunFolder(tmp_path / "a" / "b", RECIPE, resume=None) as folder:
        assert not folder.is_resumed
        assert tomli.loads((folder.path / "config.toml").read_text())["optimizer"] == RECIPE["optimizer"]
        now = state(folder.path)
        assert (now["state"], now["exit_code"], now["pid"]) == ("running", None, os.getpid()) and now["host"]
        folder.write_json("env.json", environment())
        folder.record_state("pre-empted", 75, step=40)
        assert state(folder.path).items() >= {"state": "pre-empted", "exit_code": 75, "step": 40}.items()
        recorded = json.loads((folder.path / "env.json").read_text())
    assert recorded["torch"] == metadata.version("torch") and recorded["numpy"] == metadata.version("numpy")
    assert recorded["cores"] >= 1 and len(recorded["gpus"]) == torch.cuda.device_count()
    assert recorded["commit"] is None or (re.fullmatch("[0-9a-f]{40}", recorded["commit"]) and "dirty" in recorded)


def test_the_same_command_twice_is_refused_and_changes_nothing(tmp_path):
    path = used_folder(tmp_path / "run")
    before = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file() and file.name != ".lock"}
    with pytest.raises(UsageError, match=r"already holds a run \(done\): continue it with --resume") as error:
        RunFolder(path, RECIPE, resume=None)
    assert "\n" not in str(error.value)
    assert before == {
        file.name: file.read_bytes() for file in path.iterdir() if file.is_file() and file.name != ".lock"
    }


def test_a_checkpoint_alone_is_a_run(tmp_path):
    checkpoint.save(tmp_path / "checkpoints", 3, EMPTY, {})
    with pytest.raises(UsageError, match="already holds a run"):
        RunFolder(tmp_path, RECIPE, resume=None)


def test_a_start_that_failed_before_its_first_row_may_be_repeated(tmp_path):
    with RunFolder(tmp_path, RECIPE, resume=None) as folder:
        folder.record_machine_choice("threads", 9)
        folder.record_state("failed", 2)
    with RunFolder(tmp_path, changed("seed", 2), resume=None) as folder:
        assert not folder.is_resumed and folder.machine_choice("threads") is None
    with RunFolder(tmp_path / "never", RECIPE, resume="") as folder:
        assert not folder.is_resumed


@pytest.mark.parametrize("resume", [None, ""])
def test_a_start_that_ended_before_its_first_step_may_be_repeated(tmp_path, resume):
    with RunFolder(tmp_path / "run", RECIPE, resume=None) as folder:
        write_rows(folder, range(1))
    with RunFolder(tmp_path / "run", changed("seed", 2), resume=resume) as folder:
        assert not folder.is_resumed and folder.newest is None
        folder.go_back_to(0)
        assert folder.metrics.read_bytes() == b""


@pytest.mark.parametrize("content", ['{"step": 3}\n', '{"step": 0}', '{"step": 0}\n{"st', '{"loss": 1}\n', "damaged\n"])
def test_rows_of_a_trained_network_and_what_cannot_be_read_are_a_run(tmp_path, content):
    with RunFolder(tmp_path / "run", RECIPE, resume=None) as folder:
        write_rows(folder, range(1))
        folder.metrics.write_text(folder.metrics.read_text() + content)
    for resume in (None, ""):
        with pytest.raises(UsageError, match="holds a run"):
            RunFolder(tmp_path / "run", RECIPE, resume=resume)


def test_a_resume_keeps_the_machines_choices_and_removes_remains_of_a_kill(tmp_path):
    with RunFolder(tmp_path, RECIPE, resume=None) as folder:
        for choice in (64, 32):
            folder.record_machine_choice("micro_batch", choice)
            assert folder.machine_choice("micro_batch") == 64
        write_rows(folder, range(3))
        checkpoint.save(folder.checkpoints, 2, EMPTY, {})
        (folder.checkpoints / "step_00000004.tmp").mkdir(parents=True)
    with RunFolder(tmp_path, RECIPE, resume="") as folder:
        assert folder.is_resumed and folder.machine_choice("micro_batch") == 64
        folder.record_machine_choice("threads", 2)
        assert json.loads((tmp_path / "machine.json").read_text()) == {"micro_batch": 64, "threads": 2}
        assert [path.name for path in folder.checkpoints.iterdir()] == ["step_00000002"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 20),
        ("engine.micro_batch", 64),
        ("data.workers_per_gpu", 8),
        ("data.prefetch", 3),
        ("checkpoint.interval", 2),
        ("log.hooks", ["tensorboard"]),
        ("monitor.knn_interval", 1),
        ("work_dir", "elsewhere"),
        ("vars.mean", [0.4]),
        ("global_batch", 256.0),
    ],
)
def test_a_resume_may_change_values_that_no_step_depends_on(tmp_path, key, value):
    used_folder(tmp_path)
    with RunFolder(tmp_path, changed(key, value), resume=""):
        assert tomli.loads((tmp_path / "config.toml").read_text()).items() >= {
            key.partition(".")[0]: value
        }.items() or ("." in key)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optimizer.lr", 0.06, "optimizer.lr: 0.03 -> 0.06"),
        ("seed", 2, "seed: 1 -> 2"),
        ("seed", True, "seed: 1 -> true"),
        ("optimizer.momentum", 0.9, r"optimizer.momentum: \(absent\) -> 0.9"),
        ("data.views.0.transforms.0.p", 1.0, r"data.views.0.transforms.0.p: 0.5 -> 1.0"),
        ("data.views", [], r"data.views.0.num_views: 2 -> \(absent\)"),
        ("data.hw_decoder_load", 1.0, r"data.hw_decoder_load: \(absent\) -> 1.0"),
        ("engineering", 1, r"engineering: \(absent\) -> 1"),
    ],
)
def test_a_resume_with_another_recipe_is_refused_with_the_difference(tmp_path, key, value, words):
    used_folder(tmp_path)
    before = (tmp_path / "config.toml").read_bytes()
    with pytest.raises(UsageError, match=words) as error:
        RunFolder(tmp_path, changed(key, value), resume="")
    assert "\n" not in str(error.value) and "epochs" in str(error.value)
    assert (tmp_path / "config.toml").read_bytes() == before and state(tmp_path)["state"] == "done"


def test_every_refused_key_is_listed():
    values = changed("optimizer.lr", 1.0)
    values["seed"] = 5
    assert [key for key, _ in config_changes(RECIPE, values)] == ["seed", "optimizer.lr"]
    assert config_changes(RECIPE, copy.deepcopy(RECIPE)) == []


def test_a_resume_without_the_old_recipe_is_refused(tmp_path):
    used_folder(tmp_path)
    (tmp_path / "config.toml").write_text("broken [")
    with pytest.raises(UsageError, match=r"config\.toml cannot be compared"):
        RunFolder(tmp_path, RECIPE, resume="")


def test_going_back_cuts_rows_and_sets_checkpoints_aside(tmp_path):
    used_folder(tmp_path)
    checkpoint.save(tmp_path / "checkpoints", 20, EMPTY, {})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 50, "epo')  # a kill in the middle of a write
    with RunFolder(tmp_path, RECIPE, resume="") as folder:
        kept = folder.metrics.read_bytes().splitlines(keepends=True)[:3]
        folder.go_back_to(20)
        assert folder.metrics.read_bytes() == b"".join(kept)
        assert [row["step"] for _, row in rows(folder.metrics)] == [0, 10, 20]
        assert list(checkpoint.steps(folder.checkpoints)) == [20]
        folder.go_back_to(0)
        assert folder.metrics.read_bytes() == b"" and checkpoint.steps(folder.checkpoints) == {}


HOLDER = """
import sys, time
from pathlib import Path
from sslrun.runtime.run_folder import RunFolder
with RunFolder(Path(sys.argv[1]), {"seed": 1}, resume=None):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_at_once_are_refused_until_the_first_dies(tmp_path):
    holder = small_run.python(HOLDER, tmp_path)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        for resume in (None, ""):
            with pytest.raises(UsageError, match=rf"is in use by process {holder.pid} on \S+$"):
                RunFolder(tmp_path, {"seed": 1}, resume=resume)
    finally:
        holder.kill()
        holder.wait()
    with RunFolder(tmp_path, {"seed": 1}, resume=None):
        assert state(tmp_path)["pid"] == os.getpid()


def test_a_worker_that_outlives_the_run_does_not_keep_the_lock(tmp_path):
    """A forked child inherits open files; it must not inherit the lock with them."""
    script = f"""
import os, sys, time
from pathlib import Path
from sslrun.runtime.run_folder import RunFolder
folder = RunFolder(Path({str(tmp_path)!r}), {{"seed": 1}}, resume=None)
if os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(0.2)
os._exit(0)
"""
    process = small_run.python(script)
    assert process.stdout is not None
    orphan = int(process.stdout.readline())
    try:
        process.wait()
        with RunFolder(tmp_path, {"seed": 1}, resume=None):
            pass
    finally:
        os.kill(orphan, 9)


@pytest.mark.parametrize("name", ["file/run", "file", "n" * 300, "null\0byte"])
def test_a_folder_that_cannot_be_created(tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"cannot be written: .*work_dir") as error:
        RunFolder(tmp_path / name, RECIPE, resume=None)
    assert "\n" not in str(error.value)


def test_a_lock_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UsageError, match=r"\.lock is not a regular file: remove it$"):
        RunFolder(tmp_path, RECIPE, resume=None)


def test_a_read_only_folder(tmp_path):
    """In a child process that is not root: root may write everywhere."""
    used_folder(tmp_path / "run")
    before = sorted(file.name for file in (tmp_path / "run").iterdir())
    for path in (tmp_path / "run", tmp_path):
        path.chmod(0o555)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            for path, resume in ((tmp_path / "new", None), (tmp_path / "run", "")):
                try:
                    RunFolder(path, RECIPE, resume=resume)
                except UsageError as error:
                    code = 0 if "cannot be written: Permission denied" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for path in (tmp_path, tmp_path / "run"):
        path.chmod(0o755)
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == before


def test_a_state_that_cannot_be_recorded_is_a_warning(tmp_path, caplog):
    with RunFolder(tmp_path, RECIPE, resume=None) as folder:
        (tmp_path / "state.json.tmp").mkdir()
        folder.record_state("done", 0)
    assert "state.json could not be written" in caplog.text
