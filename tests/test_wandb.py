"""The hook for Weights & Biases, with the real library: offline, over resumes, and when its process or server fails."""

import json
import os
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import small_run
from sslrun.runtime.hooks import delivery
from sslrun.runtime.hooks.wandb import WandB, _processes
from sslrun.runtime.log import RunLog

pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    os.environ.pop("WANDB_ERROR_REPORTING", None)
    assert not running()


def run_log(folder: Path, hook: WandB, first_step: int = 0) -> RunLog:
    values = {"optimizer": {"lr": 0.5}, "log": {"tags": ["first", "both"]}}
    options = {"name": "recipe", "values": values, "total_steps": 9, "steps_per_epoch": 3}
    return RunLog(folder, first_step=first_step, hooks=[hook], **options)


def running() -> list[int]:
    """The library's processes that still run."""
    return [pid for pid in _processes() if ") Z " not in Path(f"/proc/{pid}/stat").read_text()]


def records(file: Path) -> Iterator:
    """The records of a .wandb file: blocks of 32 KiB, chunks with a checksum, length and kind, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, message = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(message)
            message = b""


def written(folder: Path) -> tuple[list, list[tuple[int, float]]]:
    """The run records and (step, loss) of the rows in the newest folder of W&B."""
    (file,) = (folder / "wandb/latest-run").resolve().glob("*.wandb")
    found = list(records(file))
    rows = [record.history for record in found if record.WhichOneof("record_type") == "history"]
    losses = [(row.step.num, float(item.value_json)) for row in rows for item in row.item if "loss" in f"{item}"]
    return [record.run for record in found if record.WhichOneof("record_type") == "run"], losses


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our own; those of the library are not shown."""
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and r.name.startswith("sslrun")]


def write(one: RunLog, *steps: int) -> None:
    for step in steps:
        one.write(step, {"train/loss": step / 2})


def test_one_run_over_resumes_with_what_the_table_says(tmp_path, caplog):
    caplog.set_level("INFO")
    hook = WandB(project="birds", name="seed 1", group="seeds", tags=["both", "last"], notes="a note")
    one = run_log(tmp_path, hook)
    write(one, 1, 2, 3)
    one.close()
    (run,), losses = written(tmp_path)
    assert (run.project, run.display_name, run.run_group, run.notes) == ("birds", "seed 1", "seeds", "a note")
    assert sorted(run.tags) == ["both", "first", "last"]
    assert {update.key: json.loads(update.value_json) for update in run.config.update}["optimizer"] == {"lr": 0.5}
    assert losses == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert f"wandb sync {(tmp_path / 'wandb/latest-run').resolve()}" in caplog.text

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:2]))  # the run was killed; its checkpoint is of step 2
    time.sleep(1.1)  # its folders are named by seconds
    resumed = run_log(tmp_path, WandB(), first_step=2)
    write(resumed, 3, 4)
    resumed.close()
    (again,), losses = written(tmp_path)
    assert again.run_id == run.run_id and again.display_name == "recipe" and again.project == "sslrun"
    assert losses == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]


@pytest.mark.parametrize(("code", "is_preempted"), [(0, False), (1, False), (75, True)])
def test_it_shows_how_the_run_ended(tmp_path, code, is_preempted):
    one = run_log(tmp_path, WandB())
    one.close(code)
    (file,) = (tmp_path / "wandb/latest-run").resolve().glob("*.wandb")
    found = list(records(file))
    assert [record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"] == [code]
    assert ("preempting" in {record.WhichOneof("record_type") for record in found}) == is_preempted


def test_a_server_that_does_not_answer_leaves_the_run_offline(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    one = run_log(tmp_path, WandB())
    write(one, 1, 2)
    one.close()
    assert written(tmp_path)[1] == [(1, 0.5), (2, 1.0)]
    (line,) = warnings(caplog)
    assert line.startswith("log.wandb: the server cannot be reached: ")


@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_of_the_library_that_dies_or_hangs_is_one_warning(tmp_path, monkeypatch, caplog, harm):
    monkeypatch.setattr(delivery, "CLOSE_S", 1.0)
    one = run_log(tmp_path, WandB())
    for process in running():
        os.kill(process, harm)
    write(one, 1, 2, 3)
    begin = time.monotonic()
    one.close()
    assert time.monotonic() - begin < 5
    (line,) = warnings(caplog)
    assert line.startswith("log.hooks: WandB " + ("failed" if harm == signal.SIGKILL else "does not end"))


FULL_DISK = """
import resource, sys
from pathlib import Path
from sslrun.runtime.hooks.wandb import WandB
from sslrun.runtime.log import RunLog, start_logging
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 1024, resource.RLIM_INFINITY))
start_logging()
log = RunLog(folder, name="run", values={}, first_step=0, total_steps=99, steps_per_epoch=3, hooks=[WandB()])
step = 0
while (folder / "metrics.jsonl").stat().st_size < 18_000:
    step += 1
    log.write(step, {"train/loss": 1.0, **{f"train/more_{i}": 1.0 for i in range(40)}})
log.close()
"""


@pytest.mark.nightly
def test_a_full_disk_under_it_ends_nothing(tmp_path):
    process = small_run.python(FULL_DISK, tmp_path, stderr=subprocess.PIPE)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    (file,) = (tmp_path / "wandb/latest-run").resolve().glob("*.wandb")
    assert file.stat().st_size == 20 * 1024, "its file was not full"
    others = [line for line in stderr.splitlines() if not line.startswith(("epoch ", "W&B: offline"))]
    assert len(others) <= 1 and all(line.startswith("warning: log.hooks: WandB failed") for line in others), stderr


TERMINAL = """
import os, pty, sys
from pathlib import Path
os.environ["TERM"] = "xterm"
program = (
    "import sys; from pathlib import Path; from sslrun.runtime.hooks.wandb import WandB; "
    "from sslrun.runtime.log import RunLog; "
    "RunLog(Path(sys.argv[1]), name='run', values={}, first_step=0, total_steps=9, steps_per_epoch=3, "
    "hooks=[WandB()]).close(); print('no question')"
)
code = pty.spawn([sys.executable, "-c", program, sys.argv[1]])
sys.exit(os.waitstatus_to_exitcode(code))
"""


@pytest.mark.nightly
def test_it_asks_nothing_on_a_terminal(tmp_path):
    process = small_run.python(TERMINAL, tmp_path, stdin=subprocess.PIPE, stderr=subprocess.STDOUT)
    seen, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "no question" in seen and "choice" not in seen.lower(), seen
