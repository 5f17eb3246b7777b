"""`import sslrun`: training, encoders and evaluations in the caller's own process, which finds its state again."""

import ast
import gc
import logging
import multiprocessing
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tomli
import torch
from PIL import Image

import small_run
import sslrun
from small_run import call
from sslrun import training
from sslrun.config import load as load_config


@pytest.fixture(autouse=True)
def logger_of_a_new_process() -> None:
    """Without the handlers that the command line has left in the process of the tests."""
    logging.getLogger("sslrun").handlers.clear()


@pytest.fixture
def recipe(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of 4 steps in the current folder."""
    monkeypatch.chdir(tmp_path)
    return small_run.write_recipe(tmp_path, images, steps=4)


def state_of_the_process() -> list[object]:
    logger = logging.getLogger("sslrun")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]
    state = [handlers, list(logger.handlers), logger.level, logger.propagate, torch.get_num_threads(), gc.isenabled()]
    return [
        *state,
        torch.get_rng_state().tolist(),
        sys.stderr,
        {t for t in threading.enumerate() if "sslrun" in t.name},
    ]


def test_a_table_is_a_recipe_and_two_runs_fit_one_process(recipe, images):
    before = state_of_the_process()
    run = sslrun.train({"extends": "small.toml"}, {"log.interval": 1})
    assert run.folder == Path("runs/small").resolve() and Path(run) == run.folder
    assert run.last["step"] == 4 and [row["step"] for row in run.rows if "train/loss" in row] == [1, 2, 3, 4]
    table = {"extends": ["small.toml"], "data": {"source": {"data_prefix": images}}, "max_iters": 4}
    again = sslrun.train(table, ["log.interval=1"], name="again", work_dir=Path("elsewhere"))
    assert again.folder == Path("elsewhere/again").resolve()
    assert small_run.timeless(again.rows) == small_run.timeless(run.rows)  # the recipe alone decides
    assert state_of_the_process() == before


def test_a_run_is_that_of_the_command_line(capsys, recipe):
    run = sslrun.train(recipe)
    assert call(capsys, recipe, "--work-dir", "other")[0] == 0
    assert not small_run.differences(small_run.saved(run.folder, 4), small_run.saved(Path("other/small"), 4))
    assert capsys.readouterr().out == ""


def test_ctrl_c_saves_and_is_an_exception(recipe, monkeypatch):
    step = training.train_step

    def with_ctrl_c(executor, method, statistics, batches, progress, rates, decays):
        if progress.step == 1:
            signal.raise_signal(signal.SIGINT)
        return step(executor, method, statistics, batches, progress, rates, decays)

    before = state_of_the_process()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training, "train_step", with_ctrl_c)
        sslrun.train(recipe)
    assert state_of_the_process() == before
    with pytest.raises(sslrun.UsageError, match="already holds a run"):
        sslrun.train(recipe)
    assert sslrun.train(recipe, resume=True).last["step"] == 4
    straight = sslrun.train(recipe, work_dir="straight")
    assert not small_run.differences(small_run.saved(Path("runs/small"), 4), small_run.saved(straight.folder, 4))


def test_sigterm_before_the_first_step_ends_no_process(recipe, monkeypatch):
    def asked(*arguments):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(training, "prepare", asked)
    before = state_of_the_process()
    with pytest.raises(SystemExit) as ended:
        sslrun.train(recipe)
    assert ended.value.code == 75 and state_of_the_process() == before


def test_another_thread_leaves_signals_alone(recipe):
    runs = []
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: runs.append(sslrun.train(recipe)))
    thread.start()
    while thread.is_alive():
        assert signal.getsignal(signal.SIGINT) == before
        thread.join(0.05)
    assert runs[0].last["step"] == 4


@pytest.mark.parametrize(
    ("recipe_or_table", "overrides", "message"),
    [
        ({"extends": "nowhere.toml"}, None, "<table>: extends: nowhere.toml does not exist"),
        ({"extends": "small.toml", "epochz": 1}, None, "<table>: epochz: unknown key of Recipe; did you mean epochs?"),
        ({"extends": "small.toml", "seed": None}, None, "seed: TOML has no None"),
        ({"extends": "small.toml", "lr": {1: 2}}, None, "lr: 1 is no key: keys are texts"),
        (
            {"extends": "small.toml", "vars": {"a": [object()]}},
            None,
            "vars.a.0: no value of a recipe has the type object",
        ),
        ("small.toml", {"seed": None}, "seed: TOML has no None"),
        ("small.toml", "seed=1", "overrides are a dict, or a list of KEY=VALUE texts"),
        ("small.toml", ["seed"], "expected KEY=VALUE"),
        ("nowhere.toml", None, "nowhere.toml: No such file"),
        ("mocov22", None, "did you mean"),
    ],
)
def test_errors_are_exceptions_of_one_line(recipe, recipe_or_table, overrides, message):
    with pytest.raises(sslrun.UsageError) as error:
        sslrun.train(recipe_or_table, overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_table_is_loaded_as_a_file_is(recipe, monkeypatch):
    table = {"extends": "sslrun:simclr", "epochs": 3, "vars": {"here": "${config.dir}", "n": "${epochs}"}}
    config = load_config(table)
    assert config.name == load_config("simclr").name
    assert config.values["epochs"] == 3
    assert config.values["vars"].items() >= {"here": str(recipe.parent), "n": 3}.items()
    assert str(config.origins("epochs")[-1]) == "<table>"
    whole = tomli.loads(recipe.read_text())
    assert load_config(whole, ["seed=1"]).name == "recipe"
    assert load_config(whole, name="mine").name == "mine"
    with pytest.raises(sslrun.UsageError, match="'a/b' is a path"):
        load_config(whole, name="a/b")


def test_an_encoder_is_a_module_with_a_transform(trained, images):
    before = state_of_the_process()
    encoder = sslrun.load(trained)
    assert (encoder.name, encoder.step, encoder.device.type) == (small_run.NAME, 6, "cpu")
    paths = sslrun.images(images)
    assert paths == sorted(str(path) for path in images.rglob("*.jpg"))
    vectors = encoder.embed(str(images))
    some = encoder.embed([paths[40], Path(paths[3])], batch_size=1, l2=True)
    assert np.allclose(some, vectors[[40, 3]] / np.linalg.norm(vectors[[40, 3]], axis=1, keepdims=True), atol=1e-5)
    assert state_of_the_process() == before
    with Image.open(paths[5]) as image:
        views = [encoder.transform(image), encoder.transform(paths[5]), encoder.transform(Path(paths[5]))]
    assert all(torch.equal(view, views[0]) for view in views) and views[0].shape == (3, 24, 24)
    found = encoder.module(torch.stack(views))
    assert found.requires_grad and np.allclose(found[0].detach().numpy(), vectors[5], atol=1e-5)


def test_other_preparation_and_modes(trained, tmp_path):
    encoder = sslrun.load(trained, {"eval.transforms": [{"type": "CenterCrop", "size": 16}]})
    gray = Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20), "L")
    expected = torch.from_numpy(np.asarray(gray, dtype=np.float32)[2:18, 2:18] / 255)
    assert torch.allclose(encoder.transform(gray), expected.expand(3, 16, 16))
    deep = Image.fromarray((np.arange(400, dtype=np.uint16).reshape(20, 20) % 256) * 16)  # 12 bits
    assert torch.allclose(encoder.transform(deep), expected.expand(3, 16, 16), atol=1 / 250)
    deep.save(tmp_path / "deep.png")
    assert torch.equal(encoder.transform(tmp_path / "deep.png"), encoder.transform(deep))
    for name, text in (("nowhere.jpg", "No such file"), ("broken.jpg", "PIL knows no such image")):
        (tmp_path / "broken.jpg").write_text("no image")
        with pytest.raises(sslrun.UsageError, match=text):
            encoder.transform(tmp_path / name)


def test_a_transform_works_in_forked_and_spawned_workers(trained, images):
    transform, path = sslrun.load(trained).transform, sslrun.images(images)[0]
    here = transform(path)  # its threads exist now, and a fork has none of them
    worker = multiprocessing.get_context("fork").Process(target=prepare_as, args=(here, transform, path))
    worker.start()
    worker.join(20)
    worker.kill()
    worker.join()
    assert worker.exitcode == 0
    assert torch.equal(pickle.loads(pickle.dumps(transform))(path), here)


def prepare_as(expected, transform, path):
    assert torch.equal(transform(path), expected)


def test_out_is_written_and_returned(trained, images, tmp_path):
    encoder = sslrun.load(trained)
    vectors = encoder.embed(images)
    assert np.array_equal(encoder.embed(images, out=tmp_path / "a.npz"), vectors)
    assert np.array_equal(np.load(tmp_path / "a.npz")["vectors"], vectors)
    with pytest.raises(sslrun.UsageError, match="exists"):
        encoder.embed(images, out=tmp_path / "a.npz")
    encoder.embed(sslrun.images(images)[:3], out=tmp_path / "a.npz", force=True)
    assert np.load(tmp_path / "a.npz")["paths"].tolist() == sslrun.images(images)[:3]


def test_an_evaluation_is_that_of_the_command_line(capsys, run):
    before = state_of_the_process()
    results = sslrun.evaluate("knn", run, {"eval.knn.k": [3, 5]})
    tuned = sslrun.evaluate("finetune", run, ["eval.finetune.epochs=1", "eval.finetune.global_batch=32"])
    assert 0 <= tuned["finetune/top1_pct"] <= 100 and state_of_the_process() == before
    code, out, _ = call(capsys, "eval", "knn", run, "--set", "eval.knn.k=[3, 5]")
    assert code == 0 and out.split()[:2] == ["knn/top1_pct", f"{results['knn/top1_pct']:.1f}"]
    with pytest.raises(sslrun.UsageError, match="no evaluation called 'nearest'"):
        sslrun.evaluate("nearest", run)


def test_importing_needs_no_torch():
    code = "import sys, sslrun; sslrun.train, sslrun.load, sslrun.evaluate, sslrun.images, sslrun.UsageError\n"
    code += "assert not {'torch', 'numpy', 'nvidia.dali'} & set(sys.modules), 'heavy imports'"
    process = small_run.python(code, stderr=subprocess.STDOUT)
    assert small_run.finish(process) == (0, "")


def test_type_checkers_see_every_export():
    tree = ast.parse(Path(sslrun.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == sslrun._EXPORTS
    assert {*sslrun._EXPORTS} <= {*dir(sslrun)}
    assert all(getattr(sslrun, name) is not None for name in sslrun._EXPORTS)
