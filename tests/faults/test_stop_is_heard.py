"""A signal is heard within 5 s wherever a run is, not only after a step; nothing is lost, and it goes on exactly."""

import json
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import small_run
from ranks import run_ranks
from stopped_run import main_in_pieces, main_with_signal

WITHIN_S = 10  # on a loaded machine; a run that does not look needs 15 s or never ends
EPOCH, STEPS = 3, 6
CODES = {signal.SIGTERM: (75, "pre-empted"), signal.SIGINT: (130, "interrupted")}
DEEPCLUSTER = """
[model]
type = "DeepCluster"
pca_dim = 6
backbone = { type = "ResNet", depth = 18, base_width = 4, stem = "small" }
neck = { type = "AvgPool2dNeck", in_channels = 32 }
head = { type = "ClsHead", in_channels = 32, num_classes = 6 }
"""
MONITORS = "\n".join(f"{name}_interval = 1" for name in ("loss", "knn", "probe", "rankme"))


def night(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.nightly)


def write_recipe(folder: Path, images: Path, method: str) -> Path:
    """Two epochs, with every monitor after each (MoCo) or a clustering before each; saved at the end alone."""
    path = small_run.write_recipe(folder, images, steps=STEPS, model=DEEPCLUSTER if method == "DeepCluster" else None)
    text = path.read_text().replace("interval = 4", "interval = 100").replace("holdout = 0.2", "holdout = 0.4")
    if method == "DeepCluster":
        text = text.replace("num_views = 2", "num_views = 1").replace("knn_interval = 1", "knn_interval = 0")
    path.write_text(text.replace("knn_interval = 1", MONITORS))
    return path


def train(recipe: Path, *options: str, ranks: int) -> None:
    assert run_ranks(main_in_pieces, ranks, [str(recipe), *options]) == [0] * ranks


@pytest.fixture(scope="module")
def straight(tmp_path_factory, images) -> Callable[[str, int], Path]:
    """Finished runs of a method on some ranks, made when they are first asked for."""
    made: dict[tuple[str, int], Path] = {}

    def run(method: str, ranks: int) -> Path:
        if (method, ranks) not in made:
            folder = tmp_path_factory.mktemp("straight")
            train(write_recipe(folder, images, method), ranks=ranks)
            made[method, ranks] = folder / "runs/small"
        return made[method, ranks]

    return run


def stopped(
    recipe: Path, place: str, step: int, number: signal.Signals, ranks: int, to: Sequence[int], how: str = "slow"
) -> None:
    """Runs a recipe until a signal `to` some of the ranks stops it, and looks at how it ended."""
    code, state = CODES[number]
    for left_with, took_s in run_ranks(main_with_signal, ranks, [str(recipe)], place, step, int(number), to, how):
        assert left_with == code and took_s < WITHIN_S
    assert_ended(recipe, state, code, [f"step_{step:08d}"] if step else [])


def assert_ended(recipe: Path, state: str, code: int, saved: list[str]) -> None:
    run = recipe.parent / "runs/small"
    record = json.loads((run / "state.json").read_text())
    assert (record["state"], record["exit_code"]) == (state, code)
    assert sorted(path.name for path in (run / "checkpoints").glob("*")) == saved


def assert_goes_on_as(straight: Path, recipe: Path, ranks: int = 1) -> None:
    run = recipe.parent / "runs/small"
    train(recipe, "--resume", ranks=ranks)
    assert small_run.timeless(small_run.metrics(run)) == small_run.timeless(small_run.metrics(straight))
    assert small_run.differences(*(small_run.saved(each, STEPS) for each in (run, straight))) == []


@pytest.mark.parametrize(
    ("method", "place", "ranks", "to"),
    [
        night("MoCo", "features", 1, [0]),
        night("MoCo", "probe", 1, [0]),
        night("MoCo", "step", 1, [0]),
        night("MoCo", "features", 2, [1]),
        night("DeepCluster", "features", 1, [0]),
        night("DeepCluster", "clustering", 2, [0]),
    ],
)
def test_before_the_first_step_a_run_leaves_and_can_start_again(tmp_path, images, straight, method, place, ranks, to):
    recipe = write_recipe(tmp_path, images, method)
    stopped(recipe, place, 0, signal.SIGTERM, ranks, to)
    assert_goes_on_as(straight(method, ranks), recipe, ranks)


@pytest.mark.parametrize(
    ("method", "place", "ranks", "to"),
    [
        night("MoCo", "held-out loss", 1, [0]),
        night("MoCo", "k-NN", 1, [0]),
        night("MoCo", "features", 1, [0]),
        night("MoCo", "probe", 1, [0]),
        night("MoCo", "spectrum", 1, [0]),
        night("MoCo", "held-out loss", 2, [1]),
        night("MoCo", "features", 2, [1]),
        night("MoCo", "k-NN", 2, [1]),
        night("MoCo", "probe", 2, [0]),
        night("MoCo", "spectrum", 2, [0]),
        night("DeepCluster", "clustering", 1, [0]),
        night("DeepCluster", "features", 1, [0]),
        night("DeepCluster", "features", 2, [0]),
        night("DeepCluster", "clustering", 2, [1]),
    ],
)
def test_between_epochs_a_run_saves_and_a_resume_repeats_what_was_cut_off(
    tmp_path, images, straight, method, place, ranks, to
):
    recipe = write_recipe(tmp_path, images, method)
    stopped(recipe, place, EPOCH, signal.SIGINT, ranks, to)
    assert_goes_on_as(straight(method, ranks), recipe, ranks)


@pytest.mark.parametrize(
    ("method", "place", "step", "ranks", "to"),
    [
        night("MoCo", "batches of a step", 2, 1, [0]),
        night("MoCo", "batches of a step", 2, 2, [1]),
        night("MoCo", "batches of a step", 2, 2, [0, 1]),
        night("MoCo", "batches of features", EPOCH, 2, [0]),
        night("DeepCluster", "batches of a step", EPOCH, 1, [0]),  # after a clustering, which a resume repeats
        night("DeepCluster", "batches of features", EPOCH, 2, [1]),
    ],
)
def test_a_rank_whose_data_does_not_come_stops_with_the_others(
    tmp_path, images, straight, method, place, step, ranks, to
):
    recipe = write_recipe(tmp_path, images, method)
    stopped(recipe, place, step, signal.SIGTERM, ranks, to, "starves")
    assert_goes_on_as(straight(method, ranks), recipe, ranks)


@pytest.mark.parametrize(
    ("place", "how", "ranks"),
    [("step", "blocks", 1), night("features", "blocks", 1), night("opening", "hangs", 2), night("step", "blocks", 2)],
)
def test_a_run_that_does_not_come_back_before_its_first_step_is_ended(tmp_path, images, place, how, ranks):
    """A first compile, a collective that waits for another rank: such code does not return to Python."""
    recipe = write_recipe(tmp_path, images, "MoCo")
    with pytest.raises(AssertionError) as ended:  # the ranks have no results
        run_ranks(
            main_with_signal, ranks, [str(recipe)], place, 0, int(signal.SIGTERM), list(range(ranks)), how, timeout_s=60
        )
    codes = dict(re.findall(r"rank (\d): (-?\d+)", str(ended.value).partition("\n")[0]))
    assert codes == {str(rank): "75" for rank in range(ranks)}
    assert "nothing new to save; start again with: sslrun" in str(ended.value)
    if place != "opening":  # that is before there is a folder
        assert_ended(recipe, "pre-empted", 75, [])
    train(recipe, "--resume", "--set", "max_iters=1", ranks=ranks)


@pytest.mark.parametrize("number", [signal.SIGINT, night(signal.SIGTERM)])
def test_an_index_that_takes_long_is_left_at_once(tmp_path, images, number):
    recipe = write_recipe(tmp_path, images, "MoCo")
    ((code, took_s),) = run_ranks(main_with_signal, 1, [str(recipe)], "opening", 0, int(number), [0], "hangs")
    assert code == CODES[number][0] and took_s < WITHIN_S
