"""Checkpoints are written by a thread while training goes on; what is saved is the state of its step, bit for bit."""

import os
import signal
import threading
import time
import types

import pytest
import torch

import small_run
from small_run import differences, saved
from sslrun import session, training
from sslrun.cli import main
from sslrun.errors import RunFailed
from sslrun.runtime import checkpoint, heartbeat, host_copies
from sslrun.runtime.host_copies import HostCopies
from sslrun.runtime.run_files import RunFiles
from sslrun.runtime.writer import Writer

STEPS, INTERVAL = 12, 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, images):
    return small_run.write_recipe(tmp_path_factory.mktemp("saving"), images, steps=STEPS)


@pytest.fixture(scope="module")
def straight(recipe):
    """The run whose checkpoints are written before the next step begins."""
    start = Writer.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "start", lambda writer, work: (start(writer, work), writer.wait()))
        assert main([str(recipe), "--work-dir", str(recipe.parent / "straight")]) == 0
    return recipe.parent / "straight" / "small"


class Pace:
    """Counts the steps of a run, and holds up its writer: each checkpoint is written `lag` steps after its own."""

    def __init__(self, monkeypatch, lag):
        self.steps, self._write, self._step = 0, session._write, training.train_step
        self.lag, self.written = lag, []
        monkeypatch.setattr(session, "_write", self.write)
        monkeypatch.setattr(training, "train_step", self.step)

    def step(self, *arguments):
        result = self._step(*arguments)
        self.steps += 1
        return result

    def write(self, log, checkpoints, tensors, state, keep):
        deadline = time.monotonic() + 60
        while self.steps < min(state.step + self.lag, STEPS) and time.monotonic() < deadline:
            time.sleep(0.001)
        self.written.append((state.step, self.steps))
        self._write(log, checkpoints, tensors, state, keep)


def runs_of(recipe, tmp_path, *options):
    return main([str(recipe), "--work-dir", str(tmp_path), *options]), tmp_path / "small"


def test_the_state_is_that_of_its_step_although_training_went_on(recipe, straight, tmp_path, monkeypatch):
    pace = Pace(monkeypatch, lag=3)
    code, run = runs_of(recipe, tmp_path)
    assert code == 0 and pace.written == [(4, 7), (8, 11), (12, 12)]
    for step in (4, 8, 12):
        assert differences(saved(run, step), saved(straight, step)) == []
    assert small_run.timeless(small_run.metrics(run)) == small_run.timeless(small_run.metrics(straight))


def test_without_copies_it_is_another_one(recipe, straight, tmp_path, monkeypatch):
    """The control of the test above."""
    monkeypatch.setattr(HostCopies, "__call__", lambda copies, tensor: tensor.detach())
    Pace(monkeypatch, lag=3)
    code, run = runs_of(recipe, tmp_path)
    assert code == 0
    found = differences(saved(run, 4), saved(straight, 4))
    assert {"model/backbone.conv1.weight", "model/queue.rows", "optimizer/backbone.conv1.weight/momentum_buffer"} <= {
        *found
    }


def test_a_state_that_does_not_fit_twice_is_written_at_once(recipe, straight, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(HostCopies, "_memory", full)
    pace = Pace(monkeypatch, lag=0)
    code, run = runs_of(recipe, tmp_path)
    assert code == 0 and pace.written == [(4, 4), (8, 8), (12, 12)]
    assert "warning: no memory for a copy of the state" in capsys.readouterr().err
    for step in (4, 8, 12):
        assert differences(saved(run, step), saved(straight, step)) == []


@pytest.mark.parametrize("failing", [4, 12])
def test_an_error_of_the_writer_ends_the_run(recipe, tmp_path, monkeypatch, capsys, failing):
    pace = Pace(monkeypatch, lag=1)
    write = pace._write

    def fails(log, checkpoints, tensors, state, keep):
        if state.step == failing:
            raise RunFailed("the checkpoint could not be written: the disk is full")
        write(log, checkpoints, tensors, state, keep)

    pace._write = fails
    code, run = runs_of(recipe, tmp_path)
    assert code == 1
    assert "error: the checkpoint could not be written: the disk is full" in capsys.readouterr().err
    assert RunFiles(run).status() == "failed" and not saved(run, failing).exists()
    assert pace.steps < failing + INTERVAL, "it goes on to the next save"


def test_a_save_waits_for_the_one_before(recipe, tmp_path, monkeypatch):
    pace = Pace(monkeypatch, lag=0)
    write, at_once, most = pace._write, [0], [0]

    def slow(log, checkpoints, tensors, state, keep):
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        time.sleep(0.3)
        write(log, checkpoints, tensors, state, keep)
        at_once[0] -= 1

    pace._write = slow
    code, run = runs_of(recipe, tmp_path, "--set=checkpoint.interval=1", "--set=checkpoint.max_keep_ckpts=-1")
    assert code == 0 and most == [1]
    assert [step for step, _ in pace.written] == list(checkpoint.steps(run / "checkpoints")) == list(range(1, 13))


def test_a_signal_during_a_save_saves_again_and_leaves(recipe, straight, tmp_path, monkeypatch):
    pace = Pace(monkeypatch, lag=0)
    write = pace._write

    def signaled(log, checkpoints, tensors, state, keep):
        if state.step == 4:
            while pace.steps < 5:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        write(log, checkpoints, tensors, state, keep)

    pace._write = signaled
    code, run = runs_of(recipe, tmp_path)
    assert code == 75 and RunFiles(run).status() == "pre-empted"
    last = pace.steps
    assert list(checkpoint.steps(run / "checkpoints")) == [4, last] and 5 <= last <= 7
    assert runs_of(recipe, tmp_path, "--resume")[0] == 0
    assert differences(saved(run, STEPS), saved(straight, STEPS)) == []


def test_a_run_that_fails_finishes_the_save_under_way(recipe, straight, tmp_path, monkeypatch, capsys):
    pace = Pace(monkeypatch, lag=0)
    write, step = pace._write, pace._step

    def slow(log, checkpoints, tensors, state, keep):
        time.sleep(1.0)
        write(log, checkpoints, tensors, state, keep)

    def breaks(*arguments):
        if pace.steps == 5:
            raise RunFailed("the fifth step was the last")
        return step(*arguments)

    pace._write, pace._step = slow, breaks
    code, run = runs_of(recipe, tmp_path)
    assert code == 1 and "error: the fifth step was the last" in capsys.readouterr().err
    assert differences(saved(run, 4), saved(straight, 4)) == []


def test_a_second_ctrl_c_does_not_wait_for_the_writer():
    writer, may_end = Writer(), threading.Event()
    writer.start(may_end.wait)
    writer.leave(KeyboardInterrupt, KeyboardInterrupt(), None)
    may_end.set()
    writer.wait()


def test_the_writer_is_no_progress_and_is_waited_for_when_a_rank_is_lost(monkeypatch):
    main_thread = heartbeat._Main()
    monkeypatch.setattr(heartbeat, "_main", main_thread)
    writer, may_end = Writer(), threading.Event()
    moves = main_thread.moves
    writer.start(may_end.wait)
    assert (main_thread.moves, main_thread.unhurried, main_thread.uninterrupted) == (moves, 0, 0)

    def ended(code):
        assert may_end.is_set(), "the process has ended before its checkpoint was written"
        raise SystemExit(code)

    monkeypatch.setattr(heartbeat.os, "_exit", ended)
    own = heartbeat.Heartbeat(lambda: None, 0, [("here", 1)], timeout_s=60, hosts_store=True)
    threading.Timer(0.2, may_end.set).start()
    with pytest.raises(SystemExit):
        own._end("rank 1 is missing", speaks=False)


def test_copies_of_every_dtype_keep_their_bits_and_strides():
    copies = HostCopies()
    copies.begin()
    for tensor in [
        *small_run.buffers_of_every_dtype().values(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 6).t(),
        torch.randn(3, 4, dtype=torch.complex64).conj(),
        torch.randn(1, 3).expand(2, 3),
        torch.zeros(()),
        torch.randn(3, requires_grad=True),
    ]:
        copy = copies(tensor)
        assert small_run.bits(copy) == small_run.bits(tensor) and copy.data_ptr() != tensor.data_ptr()
        assert copy.shape == tensor.shape and not copy.requires_grad
    assert copies.finish()
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert copies(channels_last).stride() == channels_last.stride()


class Played(torch.Tensor):
    """A tensor that says that it is on a CUDA device."""

    is_cuda = property(lambda tensor: True)


def test_buffers_are_used_again_but_not_within_a_state(monkeypatch):
    made, waits = [], []

    def empty_like(tensor, *, device, pin_memory):
        assert (device, pin_memory) == ("cpu", True)
        made.append(torch.empty_like(torch.Tensor(tensor)))
        return made[-1]

    cuda = types.SimpleNamespace(
        current_stream=lambda device: types.SimpleNamespace(synchronize=lambda: waits.append(device))
    )
    monkeypatch.setattr(host_copies, "torch", types.SimpleNamespace(empty_like=empty_like, cuda=cuda))
    copies = HostCopies()
    for factor in (1.0, 2.0):
        weights = [factor * torch.ones(2, 3), factor * torch.ones(3), 3 * factor * torch.ones(2, 3)]
        copies.begin()
        taken = [copies(weight.as_subclass(Played)) for weight in weights]
        assert copies.finish() and all(map(torch.equal, taken, weights))
    assert len(made) == 3 and len(waits) == 2, "one wait for each state"


@pytest.mark.gpu
def test_copies_of_cuda_tensors_use_their_buffers_again():
    weights = [torch.randn(64, 3, 7, 7, device="cuda").to(memory_format=torch.channels_last), torch.ones(5).cuda()]
    weights.append(weights[1].clone() * 2)  # of the same kind
    copies, addresses = HostCopies(), []
    for factor in (1.0, 2.0):
        copies.begin()
        taken = [copies(weight * factor) for weight in weights]
        assert copies.finish() and all(copy.is_pinned() for copy in taken)
        assert all(torch.equal(copy, (weight * factor).cpu()) for copy, weight in zip(taken, weights, strict=True))
        addresses.append({copy.data_ptr() for copy in taken})
    assert addresses[0] == addresses[1] and len(addresses[0]) == 3
