"""SIGTERM at a random moment of a run of 2 or 4 ranks: all leave with 75, one checkpoint of one step, an exact resume.

Each night draws other moments, and other ranks that get the signal: anywhere, while images are read, in the middle of a
measurement, and while a checkpoint is written.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import small_run
from ranks import run_ranks
from sslrun import session, training
from sslrun.evaluation.monitors.monitors import Monitors
from sslrun.runtime import checkpoint, distributed
from sslrun.runtime.run_files import RunFiles
from stopped_run import main_in_pieces

STEPS, INTERVAL, EPOCH = 12, 2, 4
MOMENTS, TIMES = ("anywhere", "reading images", "in a measurement", "in a save"), 2
PATIENCE_S = 900.0  # for a run on a machine that does other things as well


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    return request.param


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, images):
    """For up to four ranks."""
    path = small_run.write_recipe(tmp_path_factory.mktemp("preempted"), images, steps=STEPS)
    monitors = "\n".join(f"{name}_interval = 1" for name in ("loss", "knn", "probe", "rankme"))
    text = path.read_text().replace("knn_interval = 1", monitors).replace("max_keep_ckpts = 3", "max_keep_ckpts = -1")
    text = text.replace("samples_per_gpu = 8", "samples_per_gpu = 4")
    path.write_text(text.replace("interval = 4\n", f"interval = {INTERVAL}\n"))
    return path


@pytest.fixture(scope="module")
def straight(recipe, ranks):
    """Run folder of the run without a signal."""
    work_dir = recipe.parent / f"straight-{ranks}"
    words, never = [str(recipe), "--work-dir", str(work_dir)], recipe.parent / "never"
    arguments = (words, never, [], "in a save", STEPS + 1, 0.0)
    assert run_ranks(main_with_a_signal, ranks, *arguments, timeout_s=PATIENCE_S) == [0] * ranks
    return work_dir / "small"


def main_with_a_signal(
    words: Sequence[str], mark: Path, to: Sequence[int], moment: str, step: int, delay_s: float
) -> int:
    """Exit code of a run that is asked to stop.

    Args:
        words: the command line.
        mark: a file that rank 0 makes when the moment has come.
        to: the ranks that get SIGTERM then.
        moment: one of MOMENTS; reading, saves and measurements take half a second longer, so that it is in their
            middle.
        step: the optimizer steps before it, at least.
        delay_s: seconds from then on.
    """
    num_done = 0
    train_step, taken, write, measure = training.train_step, training._taken, session._write, Monitors.measure

    def come(name: str, done: int) -> None:
        if name == moment and done >= step and not mark.exists() and distributed.rank() == 0:
            threading.Timer(delay_s, mark.touch).start()

    def step_done(executor, method, statistics, batches, progress, rates, decays):  # type: ignore[no-untyped-def]
        nonlocal num_done
        result = train_step(executor, method, statistics, batches, progress, rates, decays)
        num_done = progress.step + 1
        come("anywhere", num_done)
        return result

    def slow_taken(stream, count):  # type: ignore[no-untyped-def]
        come("reading images", num_done)
        if moment == "reading images":
            time.sleep(0.5)
        return taken(stream, count)

    def slow_write(log, checkpoints, tensors, state, keep):  # type: ignore[no-untyped-def]
        come("in a save", state.step)
        time.sleep(0.5)
        write(log, checkpoints, tensors, state, keep)

    def slow_measure(monitors, executor, progress):  # type: ignore[no-untyped-def]
        come("in a measurement", progress.step)
        return measure(monitors, executor, progress)

    def wait() -> None:
        while not mark.exists():
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    training.train_step, training._taken = step_done, slow_taken
    session._write, Monitors.measure = slow_write, slow_measure  # type: ignore[method-assign]
    if distributed.rank() in to:
        threading.Thread(target=wait, daemon=True).start()
    return main_in_pieces(words)


@pytest.mark.nightly
@pytest.mark.parametrize("time", range(TIMES))
@pytest.mark.parametrize("moment", MOMENTS)
def test_all_ranks_leave_with_one_checkpoint_and_the_resume_is_exact(tmp_path, recipe, ranks, straight, moment, time):
    draw = random.Random(f"{time} {moment} {os.environ.get('SEED', '')} {tmp_path.stat().st_mtime}")
    step = {"in a measurement": EPOCH, "in a save": INTERVAL}.get(moment, 1) * draw.randint(1, 2)
    if moment == "anywhere":
        step = draw.randint(1, STEPS - 3)  # two saves of half a second follow, however fast the machine is
    delay_s = draw.uniform(0.0, 0.4)
    to = sorted(draw.sample(range(ranks), draw.randint(1, ranks)))
    words = [str(recipe), "--work-dir", str(tmp_path)]
    arguments = (words, tmp_path / "mark", to, moment, step, delay_s)
    codes = run_ranks(main_with_a_signal, ranks, *arguments, timeout_s=PATIENCE_S)
    run, told = tmp_path / "small", f"to {to}, {delay_s:.3f} s after {moment} from step {step}"
    assert codes == [75] * ranks, told
    assert RunFiles(run).status() == "pre-empted", told
    found = list(checkpoint.steps(run / "checkpoints"))
    assert found == sorted({*range(INTERVAL, found[-1] + 1, INTERVAL), found[-1]}), told
    assert not list((run / "checkpoints").glob("*.tmp")), told
    assert run_ranks(main_in_pieces, ranks, [*words, "--resume"], timeout_s=PATIENCE_S) == [0] * ranks, told
    # A stop in the measurement after the last step saves a state without it. The resume measures and keeps that state.
    stopped_at_the_end = ["is_measured"] if found[-1] == STEPS else []
    different = small_run.differences(small_run.saved(run, STEPS), small_run.saved(straight, STEPS))
    assert different in ([], stopped_at_the_end), told
    assert small_run.timeless(small_run.metrics(run)) == small_run.timeless(small_run.metrics(straight)), told
