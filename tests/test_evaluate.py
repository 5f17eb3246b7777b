"""`sslrun eval`: results on the terminal and in a file, errors of one line."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch

import small_run
from ranks import run_ranks
from small_run import call
from sslrun.cli import main
from sslrun.export.publish import publish


def record(run: Path, kind: str = "knn") -> dict:
    (path,) = (run / "eval").glob(f"{kind}_*.json")
    return json.loads(path.read_text())


def test_the_result_is_shown_and_kept(capsys, run):
    code, out, err = call(capsys, "eval", "knn", run)
    assert code == 0, err
    kept = record(run)
    assert out.splitlines()[0].split() == ["knn/top1_pct", f"{kept['results']['knn/top1_pct']:.1f}"]
    assert (kept["kind"], kept["name"], kept["step"], kept["epoch"]) == ("knn", small_run.NAME, 6, 1.5)
    assert kept["weights"] == "checkpoints/step_00000006"
    assert kept["data"]["train_samples"] == 64 and kept["data"]["test_samples"] == 16
    assert kept["config"]["data"]["holdout"] == 0.2
    assert torch.__version__.startswith(kept["environment"]["torch"])
    assert kept["command"].startswith("sslrun eval knn ")


def test_the_same_settings_replace_a_result_and_others_do_not(capsys, run):
    for words in (["--set", "eval.transforms=[{type='CenterCrop',size=24}]"], [], []):
        assert call(capsys, "eval", "knn", run, *words)[0] == 0
    assert call(capsys, "eval", "knn", run / "checkpoints/step_00000004")[0] == 0
    assert sorted(path.name[:17] for path in (run / "eval").iterdir()) == ["knn_step_00000004"] + 2 * [
        "knn_step_00000006"
    ]


def test_a_run_may_be_given_by_any_path(capsys, run, monkeypatch):
    for folder, name in ((run.parent, run.name), (run, "."), (run / "checkpoints", "step_00000006")):
        monkeypatch.chdir(folder)
        assert call(capsys, "eval", "knn", name)[0] == 0
    assert record(run)["weights"] == "checkpoints/step_00000006"  # one file, whatever it was called


def test_a_file_of_weights_gives_the_same_result_as_its_run(capsys, run, tmp_path):
    file = publish(run, tmp_path / "published")
    code, out, _ = call(capsys, "eval", "knn", file, "--recipe", run / "config.toml", "-o", tmp_path / "results")
    assert code == 0
    assert call(capsys, "eval", "knn", run)[1] == out
    (path,) = (tmp_path / "results").iterdir()
    assert path.name.startswith(f"knn_{file.stem}_")


def test_an_overlay_may_set_other_images(capsys, run, images, tmp_path):
    overlay = tmp_path / "bench.toml"
    overlay.write_text(f"[eval.test]\ntype = 'ImageFolder'\ndata_prefix = '{images}'\n")
    assert call(capsys, "eval", "knn", run, "--with", overlay)[0] == 0
    assert record(run)["data"]["test_samples"] == 80


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--set", "eval.kk=3"], 2, "unknown key of EvalConfig"),
        (["--set", "eval.test={type='ImageFolder',data_prefix='nowhere'}"], 2, "eval.test.data_prefix"),
        (["--with", "nowhere.toml"], 2, "No such file"),
        (["--recipe", "a.toml"], 2, "has its own recipe"),
        (["-o", "/dev/null/x"], 2, "cannot be made"),
        (["--set", "eval.extra.knn.type=Knn"], 2, "is none of finetune, knn, linear, spectrum"),
        (["--set", "eval.extra.mine.k=[1]"], 2, "type is missing; it names one of the evaluations"),
        (["--set", "eval.knn.type=Knn"], 2, "unknown key of Knn"),
    ],
)
def test_errors_are_one_line(capsys, run, words, code, message):
    got, out, err = call(capsys, "eval", "knn", run, *words)
    assert (got, out) == (code, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_an_unknown_kind_lists_the_known_ones(capsys, run):
    for kind, answer in {"knnn": "did you mean knn?", "accuracy": "has finetune, knn, linear, spectrum;"}.items():
        code, out, err = call(capsys, "eval", kind, run)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"no evaluation called '{kind}'" in err and answer in err


def test_a_kind_may_have_a_second_table_with_other_settings(capsys, run):
    extra = ["--set", "eval.extra.nearest={type='Knn',k=[1]}"]
    assert call(capsys, "eval", "nearest", run, *extra)[0] == 0
    kept = record(run, "nearest")
    assert (kept["kind"], [row["k"] for row in kept["results"]["grid"]]) == ("nearest", [1])
    assert call(capsys, "eval", "knn", run, "--set", "eval.knn.k=[1]")[0] == 0
    assert record(run)["results"] == kept["results"]


def test_without_labels_or_test_images(capsys, run, images, tmp_path):
    flat = tmp_path / "flat"
    shutil.copytree(images / "class_0", flat)
    code, _, err = call(capsys, "eval", "knn", run, "--set", f"eval.train={{type='ImageFolder',data_prefix='{flat}'}}")
    assert code == 2 and "has no labels: set eval.train" in err
    config = run / "config.toml"
    config.write_text(config.read_text().replace("holdout = 0.2\n", ""))
    code, _, err = call(capsys, "eval", "knn", run)
    assert code == 2 and "there are no images to classify: set eval.test" in err


def printed(words: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return main(words), out.getvalue()


def test_two_ranks_give_the_result_of_one_process(capsys, run):
    alone = call(capsys, "eval", "knn", run)[1]
    words = ["eval", "knn", str(run), "-o", str(run / "ranks")]
    assert run_ranks(printed, 2, words) == [(0, alone), (0, "")]
