"""Rows, lines, the bar and the hooks: what is written is right, and a hook that fails does not end the run."""

import contextlib
import fcntl
import json
import logging
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import termios
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import small_run
from sslrun.cli import main
from sslrun.errors import RunFailed, UsageError
from sslrun.runtime import log
from sslrun.runtime.hooks.base import Hook
from sslrun.runtime.hooks.tensorboard import TensorBoard
from sslrun.runtime.log import RunLog, SpeedMeter, start_logging
from sslrun.runtime.run_files import rows

ROW = {"train/loss": 6.9312, "train/lr": 0.03, "speed/images_per_s": 812.3, "data/wait_pct": 3.1, "mem/peak_gib": 10.25}


@pytest.fixture(autouse=True)
def no_handlers_stay():
    yield
    root = logging.getLogger("sslrun")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()


def run_log(folder: Path, **options) -> RunLog:
    given = {"name": "run", "values": {"seed": 1}, "first_step": 0, "total_steps": 400, "steps_per_epoch": 40}
    return RunLog(folder, **(given | options))


def written(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_row_has_step_epoch_and_time(tmp_path):
    with_two = run_log(tmp_path)
    with_two.write(0, {"knn/top1_pct": 12.5})
    with_two.write(50, ROW)
    with_two.sync()
    with_two.close()
    first, second = written(tmp_path)
    assert list(first) == ["step", "epoch", "wall_s", "knn/top1_pct"]
    assert (second["step"], second["epoch"]) == (50, 1.25) and second.items() >= ROW.items()
    assert 0 <= first["wall_s"] <= second["wall_s"] < 60


def test_wall_time_continues_over_a_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "epoch": 0.25, "wall_s": 1000.0}\n')
    resumed = run_log(tmp_path, first_step=10)
    resumed.write(20, ROW)
    resumed.close()
    assert len(written(tmp_path)) == 2 and 1000 <= written(tmp_path)[1]["wall_s"] < 1060


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    one = run_log(tmp_path)
    one.write(1, {"train/loss": float("nan"), "train/grad_norm": float("inf")})
    one.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail).items() >= {"train/loss": None, "train/grad_norm": None}.items()


def test_tensors_are_refused_reading_one_would_wait_for_the_device(tmp_path):
    one = run_log(tmp_path)
    with pytest.raises(AssertionError, match="plain numbers"):
        one.write(1, {"train/loss": torch.tensor(1.0)})
    one.close()


@pytest.mark.parametrize(("room", "words"), [(0, "File too large"), (20, "No space left on device")])
def test_rows_that_cannot_be_written_end_the_run_in_one_line(tmp_path, room, words):
    one = run_log(tmp_path)
    one.write(1, ROW)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + room, hard))
    try:
        with pytest.raises(RunFailed, match=rf"metrics\.jsonl cannot be written: {words}"):
            one.write(2, ROW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one.close()
    assert [row["step"] for _, row in rows(tmp_path / "metrics.jsonl")] == [1]


def test_lines_are_aligned_and_in_the_file_too(tmp_path, capsys):
    start_logging(0, tmp_path / "log.txt")
    one = run_log(tmp_path)
    one.write(5, ROW | {"train/acc1_pct": 1.5})
    one.write(390, ROW | {"train/loss": 12.25, "speed/images_per_s": 99.0, "train/acc1_pct": 51.0})
    one.write(400, {"knn/top1_pct": 45.123})
    one.close()
    first, second, knn = capsys.readouterr().err.splitlines()
    assert first.startswith("epoch  1/10  step   5/400  loss    6.931  lr     0.03     812.3 images/s  wait   3.1 %")
    assert second.startswith("epoch 10/10  step 390/400  loss    12.25") and second.endswith("train/acc1_pct 51.0")
    assert first.index("train/acc1") == second.index("train/acc1") and first.index("ETA") == second.index("ETA")
    assert knn == "after 10 epochs  step 400/400  knn/top1_pct 45.1"
    in_file = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" INFO ")[1] for line in in_file] == [first, second, knn]


def test_time_left(monkeypatch, tmp_path, capsys):
    clock = iter([0.0, 0.0, *(t for s in (25, 50) for t in (s, s))])
    monkeypatch.setattr(log, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    start_logging(0)
    one = run_log(tmp_path, total_steps=100)
    one.write(25, ROW)
    one.write(50, ROW)
    one.close()
    assert re.findall(r"ETA +(\S+)", capsys.readouterr().err) == ["0:01:15", "0:00:50"]


def test_warnings_come_from_all_ranks_messages_from_one(tmp_path, capsys):
    start_logging(3, tmp_path / "log.txt")
    logging.getLogger("sslrun.data").info("hidden")
    logging.getLogger("sslrun.data").warning("a bad image")
    assert capsys.readouterr().err == "[rank 3] warning: a bad image\n"
    assert not (tmp_path / "log.txt").exists()
    start_logging(0, tmp_path / "log.txt")
    logging.getLogger("sslrun.data").info("shown")
    logging.getLogger("sslrun.data").warning("a bad image")
    assert capsys.readouterr().err == "shown\nwarning: a bad image\n"  # once: a second call replaces the first
    with pytest.raises(UsageError, match="cannot be written"):
        start_logging(0, tmp_path / "log.txt" / "no folder")


def test_a_full_disk_loses_lines_of_the_log_but_does_not_end_the_run(tmp_path, capsys):
    start_logging(0, tmp_path / "log.txt")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        for _ in range(3):
            logging.getLogger("sslrun").info("a message")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err
    assert err.count("a message") == 3 and err.count("log.txt cannot be written") == 1 and "Traceback" not in err


TERMINAL = """
import logging, sys, time
from pathlib import Path
from sslrun.runtime.log import RunLog, start_logging
folder = Path(sys.argv[1])
start_logging(0, folder / "log.txt")
log = RunLog(folder, name="run", values={}, first_step=10, total_steps=100, steps_per_epoch=50)
for step in range(11, 101):
    log.tick(step)
    time.sleep(0.01)
    if step % 30 == 0:
        log.write(step, {"train/loss": 6.5, "train/lr": 0.03, "speed/images_per_s": 812.3, "data/wait_pct": 3.1})
    if step == 60:
        logging.getLogger("sslrun").warning("a bad image")
        log.write(step, {"knn/top1_pct": 45.0})
log.close()
"""


@pytest.mark.parametrize("columns", [160, 0])
def test_the_bar_moves_on_a_terminal(tmp_path, columns):
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50 if columns else 0, columns, 0, 0))
    process = small_run.python(TERMINAL, tmp_path, stderr=terminal)
    os.close(terminal)
    seen = b""
    with contextlib.suppress(OSError):  # the process has closed its side
        while True:
            seen += os.read(main, 65536)
    os.close(main)
    assert process.wait() == 0
    text = seen.decode()
    steps = [int(step) for step in re.findall(r"step (\d+)/100", text)]
    assert steps == sorted(steps) and len(set(steps)) > 3 and steps[-1] == 100
    assert "epoch 1/2" in text and "epoch 2/2" in text
    if columns:
        assert re.search(r"loss 6\.5 +lr 0\.03 +812\.3 images/s +wait 3\.1 % +ETA \d:\d\d:\d\d", text)
    assert (
        text.count("warning: a bad image") == 1 and text.count("after 1.2 epochs  step  60/100  knn/top1_pct 45.0") == 1
    )
    lines = (tmp_path / "log.txt").read_text()
    assert lines.count("loss") == 3 and lines.count("a bad image") == 1


def test_the_meter_counts_images_waiting_and_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    meter = SpeedMeter(torch.device("cpu"))
    for _ in range(4):
        with meter.waiting():
            now[0] += 0.5
        now[0] += 1.5
        meter.count(32)
    with meter.pausing():
        now[0] += 1000
    figures = meter.read()
    assert figures["speed/images_per_s"] == pytest.approx(16) and figures["data/wait_pct"] == pytest.approx(25)
    assert 0.05 < figures["mem/peak_gib"] < 1000
    now[0] += 1
    assert meter.read()["speed/images_per_s"] == 0 and meter.read()["data/wait_pct"] == 0


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = run_log(tmp_path, hooks=[TensorBoard()])
    one.write(50, ROW)
    one.write(100, ROW | {"train/loss": float("nan")})
    one.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, round(event.value, 4)) for event in events.Scalars("train/loss")] == [(50, 6.9312)]
    assert [event.step for event in events.Scalars("epoch")] == [50, 100]


def test_tensorboard_has_the_recipe_as_hyperparameters_and_text(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    (tmp_path / "config.toml").write_text("seed = 1\n[optimizer]\nlr = 0.5\n")
    values = {"seed": 1, "optimizer": {"type": "SGD", "lr": 0.5, "nesterov": True}, "views": [{"size": 8}]}
    one = run_log(tmp_path, hooks=[TensorBoard()], values=values)
    one.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    given = HParamsPluginData.FromString(content).session_start_info.hparams
    assert (given["seed"].number_value, given["optimizer.lr"].number_value) == (1.0, 0.5)
    assert given["optimizer.nesterov"].number_value == 1.0 and given["optimizer.type"].string_value == "SGD"
    assert given["views"].string_value == '[{"size": 8}]'
    (text,) = events.Tensors("recipe/text_summary")
    assert b"    lr = 0.5\n" in text.tensor_proto.string_val[0]


LOST_EVENTS = """
import os, resource, shutil, sys
from pathlib import Path
from sslrun.runtime.hooks.tensorboard import TensorBoard
from sslrun.runtime.log import RunLog, start_logging
folder, harm, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
start_logging()
log = RunLog(folder, name="run", values={}, first_step=0, total_steps=9, steps_per_epoch=3, hooks=[TensorBoard()])
log.write(1, {"train/loss": 1.0, **{f"train/more_{i}": 1.0 for i in range(20)}})
import time; time.sleep(1)
log._hooks[0].hook._writer.flush()
if harm == "full disk":
    (events,) = (folder / "tensorboard").iterdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (events.stat().st_size + 10, resource.RLIM_INFINITY))
elif harm == "removed":
    shutil.rmtree(folder / "tensorboard")
else:
    folder.rename(folder.with_name("moved"))
    (folder / "tensorboard").mkdir(parents=True)
for step in range(2, steps):
    log.write(step, {"train/loss": 1.0})
log.close()
"""


@pytest.mark.parametrize(
    ("harm", "steps"),
    [
        ("full disk", 3),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in (("full disk", 9), ("removed", 3), ("moved", 9))),
    ],
)
def test_tensorboard_that_cannot_write_is_one_warning(tmp_path, harm, steps):
    """Whether its thread fails at a row or at the end; what it writes goes to the folder, wherever that was moved."""
    pytest.importorskip("tensorboard")
    (tmp_path / "run").mkdir()
    process = small_run.python(LOST_EVENTS, tmp_path / "run", harm, steps, stderr=subprocess.PIPE)
    _, stderr = process.communicate(timeout=120)
    others = [line for line in stderr.splitlines() if not line.startswith("epoch ")]
    assert process.returncode == 0, stderr
    if harm == "moved":
        assert others == [] and list((tmp_path / "run/tensorboard").iterdir()) == []
    else:
        (line,) = others
        assert line.startswith("warning: log.hooks: TensorBoard failed and gets no more rows: [Errno ")
    assert len(written(tmp_path / ("moved" if harm == "moved" else "run"))) == steps - 1


def test_tensorboard_drops_rows_after_the_step_of_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def shown(first_step: int, *steps: int) -> list[int]:
        one = run_log(tmp_path, hooks=[TensorBoard()], first_step=first_step)
        for step in steps:
            one.write(step, ROW)
        one.close()
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        return [event.step for event in events.Scalars("train/loss")]

    assert shown(0, 10, 20, 30) == [10, 20, 30]
    time.sleep(1.1)  # event files are named and ordered by seconds
    assert shown(20, 30, 40) == [10, 20, 30, 40]
    time.sleep(1.1)
    assert shown(0, 15) == [15], "started anew: there was no checkpoint"


class Remembering(Hook):
    """A user's own hook."""

    rows: ClassVar[list[dict[str, float]]] = []

    def __init__(self, every: int = 1) -> None:
        self.every = every

    def open(self, folder: Path, name: str, values: dict[str, Any], first_step: int) -> None:
        self.opened = folder.name, name, first_step

    def write(self, row: Mapping[str, float]) -> None:
        if row["step"] % self.every == 0:
            self.rows.append(dict(row))


def test_hooks_of_a_recipe_are_words_or_tables(tmp_path, images):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = small_run.write_recipe(tmp_path, images, steps=6)
    hooks = "log.hooks=['tensorboard',{type='Remembering',every=2}]"
    words = ["--set", "custom_imports=['test_log']", "--set", hooks, "--set", "log.interval=1"]
    assert main([str(recipe), *words]) == 0
    run = tmp_path / "runs/small"
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    (first,) = events.Images("first batch")
    assert (first.step, first.height, first.width) == (0, 8 * 28 - 4, 2 * 28 - 4)  # of 8 samples, two views of 24 px
    losses = [row for row in small_run.metrics(run) if "train/loss" in row]
    seen = [row["train/loss"] for row in Remembering.rows if "train/loss" in row]
    assert seen == [row["train/loss"] for row in losses if row["step"] % 2 == 0] and len(seen) == 3


class Stopping(Hook):
    """Sends a signal to the run, and notes how it ended."""

    codes: ClassVar[list[int]] = []

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def write(self, row: Mapping[str, float]) -> None:
        if self.number and row["step"] == 1:
            os.kill(os.getpid(), self.number)

    def close(self) -> None:
        self.codes.append(self.exit_code)


@pytest.mark.parametrize(
    ("number", "steps", "lr", "code"),
    [(0, 2, 0.03, 0), (signal.SIGTERM, 300, 0.03, 75), (signal.SIGINT, 300, 0.03, 130), (0, 9, 1e38, 3)],
)
def test_a_hook_is_told_how_the_run_ended(tmp_path, images, number, steps, lr, code):
    recipe = small_run.write_recipe(tmp_path, images, steps=steps)
    hooks = f"log.hooks=[{{type='Stopping',number={int(number)}}}]"
    words = ["--set", "custom_imports=['test_log']", "--set", hooks, "--set", "log.interval=1"]
    assert main([str(recipe), *words, "--set", f"optimizer.lr={lr}"]) == code
    assert Stopping.codes[-1] == code


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ("['tensorbord']", '"tensorboard", "wandb" or "mlflow" or a table whose type names one of the hooks'),
        ("[{type='TensorBoard',project='x'}]", "unknown key of TensorBoard"),
        ("[{project='x'}]", "type is missing; it names one of the hooks"),
    ],
)
def test_a_wrong_hook_is_one_line(tmp_path, images, capsys, hooks, message):
    recipe = small_run.write_recipe(tmp_path, images)
    code, _, err = small_run.call(capsys, recipe, "--dry-run", "--set", f"log.hooks={hooks}")
    assert (code, err.count("\n")) == (2, 1) and message in err
