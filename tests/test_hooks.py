"""Log hooks work in threads of their own: what one does, or fails to do, changes nothing for the run."""

import contextlib
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from sslrun.errors import RunFailed, UsageError
from sslrun.runtime.hooks import delivery
from sslrun.runtime.hooks.base import Hook, library
from sslrun.runtime.hooks.mlflow import MLflow
from sslrun.runtime.hooks.tensorboard import TensorBoard
from sslrun.runtime.hooks.wandb import WandB
from sslrun.runtime.log import RunLog


class Scripted(Hook, listed=False):
    """Does what a test says, and notes what it was called with."""

    def __init__(self, **fails: Exception) -> None:
        self.fails, self.calls = fails, []
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.aborted = False

    def do(self, name: str, note: object) -> None:
        self.goes_on.wait(20)
        if name in self.fails:
            raise self.fails[name]
        self.calls.append(note)

    def open(self, *_: object) -> None:
        self.do("open", "open")

    def write(self, row: Mapping[str, float]) -> None:
        self.do("write", row["step"])

    def close(self) -> None:
        self.do("close", "close")

    def abort(self) -> None:
        self.aborted = True
        self.goes_on.set()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def run_log(folder: Path, *hooks: Hook, first_step: int = 0) -> RunLog:
    return RunLog(
        folder, name="run", values={}, first_step=first_step, total_steps=9, steps_per_epoch=3, hooks=list(hooks)
    )


def test_a_hook_that_hangs_delays_no_row_and_the_end_only_for_a_while(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(delivery, "CLOSE_S", 0.3)
    hangs, well = Scripted(), Scripted()
    one = run_log(tmp_path, hangs, well)
    hangs.goes_on.clear()
    begin = time.monotonic()
    for step in (1, 2):
        one.write(step, {"train/loss": 1.0})
    assert time.monotonic() - begin < 0.2
    one.close()
    assert time.monotonic() - begin < 2 and hangs.aborted and not well.aborted
    assert well.calls == ["open", 1, 2, "close"]
    assert warnings(caplog) == ["log.hooks: Scripted does not end, and may miss the last rows"]


def test_a_hook_knows_how_the_run_ended(tmp_path):
    fails, well = Scripted(write=OSError("the network is gone")), Scripted()
    one = run_log(tmp_path, fails, well)
    one.write(1, {"train/loss": 1.0})
    one.close(75)
    assert (fails.exit_code, well.exit_code) == (1, 75)


class Resumed(Scripted, listed=False):
    def open(self, *_: object) -> None:
        self.missed = [{"step": 1}, {"step": 2}]


def test_what_a_hook_has_missed_comes_before_the_first_new_row(tmp_path):
    one = run_log(tmp_path, resumed := Resumed(), first_step=2)
    one.write(3, {"train/loss": 1.0})
    one.close()
    assert resumed.calls == [1, 2, 3, "close"]


def test_a_hook_that_fails_is_closed_with_one_warning(tmp_path, caplog):
    fails, well = Scripted(write=OSError("the network\nis gone"), close=OSError("still gone")), Scripted()
    one = run_log(tmp_path, fails, well)
    for step in (1, 2, 3):
        one.write(step, {"train/loss": 1.0})
    one.close()
    assert fails.calls == ["open"] and well.calls == ["open", 1, 2, 3, "close"]
    assert warnings(caplog) == ["log.hooks: Scripted failed and gets no more rows: the network is gone"]


def test_what_opening_raises_ends_a_new_run_and_not_one_that_goes_on(tmp_path, caplog):
    well = Scripted()
    with pytest.raises(RunFailed, match=r"log\.hooks: Scripted cannot be opened: no server"):
        run_log(tmp_path, well, Scripted(open=OSError("no server")))
    assert well.calls == ["open", "close"]
    resumed = run_log(tmp_path, Scripted(open=OSError("no server")), first_step=3)
    resumed.write(4, {"train/loss": 1.0})
    resumed.close()
    assert warnings(caplog) == ["log.hooks: Scripted cannot be opened and gets no rows: no server"]
    with pytest.raises(UsageError, match="no such package"):
        run_log(tmp_path, Scripted(open=UsageError("no such package")), first_step=3)


def test_opening_does_not_take_for_ever(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(delivery, "OPEN_S", 0.1)
    monkeypatch.setattr(delivery, "ABORT_S", 0.1)
    for first_step in (0, 3):
        hangs = Scripted()
        hangs.goes_on.clear()
        with contextlib.nullcontext() if first_step else pytest.raises(RunFailed, match="nothing has come for 0 s"):
            run_log(tmp_path, hangs, first_step=first_step).close()
        assert hangs.aborted
    assert warnings(caplog) == ["log.hooks: Scripted cannot be opened and gets no rows: nothing has come for 0 s"]


def test_a_hook_that_is_far_behind_misses_rows(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(delivery, "WAITING_CALLS", 2)
    slow = Scripted()
    one = run_log(tmp_path, slow)
    slow.goes_on.clear()
    for step in range(1, 8):
        one.write(step, {"train/loss": 1.0})
    slow.goes_on.set()
    one.close()
    assert slow.calls[:3] == ["open", 1, 2] and slow.calls[-1] == "close" and 7 not in slow.calls
    assert warnings(caplog) == ["log.hooks: Scripted is 2 rows behind, and misses some"]


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("missing", None, 'log.hooks: "missing" needs a package: pip install missing'),
        ("torn", "import no_such_part", "cannot be imported: No module named 'no_such_part'"),
        ("old", "raise ImportError('libx.so.1: cannot open')", "cannot be imported: libx.so.1: cannot open"),
        ("wrong", "np.float_", "\"wrong\" is installed, but cannot be imported: NameError: name 'np' is not defined"),
        ("data_only", "", "needs a package: pip install data_only .*/data_only is a folder, not the package"),
    ],
)
def test_a_failing_import_names_the_true_cause(tmp_path, monkeypatch, name, source, message):
    monkeypatch.syspath_prepend(tmp_path)
    if source is not None:
        (tmp_path / name).mkdir()
    if source:
        (tmp_path / name / "__init__.py").write_text(source)
    with pytest.raises(UsageError, match=message) as caught:
        library(name, name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("hook", [TensorBoard, WandB, MLflow])
def test_a_missing_package_is_an_error_at_the_start(tmp_path, monkeypatch, hook):
    name = hook.__name__.lower()
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=f"pip install {name}"):
        run_log(tmp_path, hook())
