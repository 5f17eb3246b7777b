"""Classes of two sources are matched by name: what images that are measured get as labels, and what is said of it."""

import json
import logging
import shutil

import numpy as np
import pytest

from small_run import NAME, call, train, write_recipe
from sslrun.data.classes import matched
from sslrun.data.sources import Source


class Labeled(Source, listed=False):
    def __init__(self, name, labels, class_names=None):
        self.name, self.labels, self.class_names = name, np.array(labels), class_names
        self.names, self._is_open = [f"{name}#{i}" for i in range(len(labels))], True

    def __repr__(self):
        return self.name


def match(caplog, train_labels, train_names, test_labels, test_names):
    """(labels, names of the kept images, what was said) of the test images."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="sslrun"):
        test = matched(Labeled("train", train_labels, train_names), Labeled("test", test_labels, test_names))
    labels = None if test.labels is None else test.labels.tolist()
    return labels, [int(name.partition("#")[2]) for name in test.names], caplog.text.count("\n"), caplog.text


def test_by_name(caplog):
    assert match(caplog, [0, 1, 2], list("abc"), [0, 1, 1], list("abc")) == ([0, 1, 1], [0, 1, 2], 1, caplog.text)
    assert "test has no images of 1 of the 3 classes of train: c" in caplog.text
    labels, kept, lines, said = match(caplog, [0, 1, 2], list("abc"), [0, 1, 1], list("bc"))
    assert (labels, kept, lines) == ([1, 2, 2], [0, 1, 2], 1) and "of 1 of the 3 classes of train: a" in said
    labels, kept, lines, said = match(caplog, [0, 1, 2], list("abc"), [0, 1, 2, 3, 0], ["c", "b", "new", "a"])
    assert (labels, kept, lines) == ([2, 1, 0, 2], [0, 1, 3, 4], 1)
    assert "test: 1 of 5 images are left out, since train has no images of their classes: new" in said


def test_a_class_without_training_images_is_left_out(caplog):
    labels, kept, _, said = match(caplog, [0, 2], list("abc"), [0, 1, 2], list("abc"))
    assert (labels, kept) == ([0, 2], [0, 2]) and "left out" in said and said.rstrip().endswith("classes: b")
    labels, kept, _, said = match(caplog, [0, 7], None, [7, 8, 0], None)
    assert (labels, kept) == ([7, 0], [0, 2]) and said.rstrip().endswith("classes: 8")


def test_names_on_one_side(caplog):
    """By number, which is said; folders that are called by numbers are matched with these, not by their order."""
    labels, kept, lines, said = match(caplog, [0, 1], ["n01", "n02"], [1, 0], None)
    assert (labels, kept, lines) == ([1, 0], [0, 1], 1) and "matched by number" in said
    labels, kept, lines, said = match(caplog, [0, 1], None, [1, 0], ["n01", "n02"])
    assert (labels, kept, lines) == ([1, 0], [0, 1], 1) and "matched by number" in said
    folders = ["0", "1", "10", "2"]  # in the order of a folder
    assert match(caplog, [0, 1, 2, 3], folders, [10, 2, 0, 1], None)[:3] == ([2, 3, 0, 1], [0, 1, 2, 3], 0)
    assert match(caplog, [10, 2, 0, 1], None, [0, 1, 2, 3], folders)[:3] == ([0, 1, 10, 2], [0, 1, 2, 3], 0)


def test_no_class_in_common(caplog):
    labels, kept, lines, said = match(caplog, [0, 1], ["a", "b"], [0, 1], ["x", "y"])
    assert (labels, kept, lines) == (None, [0, 1], 1) and "no class in common" in said


def test_the_same_source_is_returned_where_nothing_changes(caplog):
    one = Labeled("train", [0, 1], ["a", "b"])
    for test in (Labeled("test", [1, 0], ["a", "b"]), Labeled("test", [0, 1])):
        assert matched(one, test) is test or test.class_names is None
        assert matched(one, test).labels is test.labels or test.class_names is None
    unlabeled = Labeled("test", [0])
    unlabeled.labels = None
    assert matched(one, unlabeled) is unlabeled and matched(unlabeled, one) is one


@pytest.fixture
def some_classes(images, tmp_path):
    """Copies of training images of two of the four classes, with another first class, and folders that are no class."""
    folder = tmp_path / "test"
    for name in ("class_2", "class_3"):
        shutil.copytree(images / name, folder / name)
    for name in ("a_new_one", "__MACOSX", ".hidden"):
        shutil.copytree(images / "class_0", folder / name)
    return folder


@pytest.fixture
def run_with_some(images, some_classes, tmp_path):
    """A run whose held-out images are `some_classes`: each is its own nearest neighbor, so that every label that is not
    matched costs accuracy."""
    recipe = write_recipe(tmp_path, images, steps=1, name=NAME)
    text = recipe.read_text().replace("holdout = 0.2", f"holdout = {{type='ImageFolder',data_prefix='{some_classes}'}}")
    recipe.write_text(text.replace("knn_k = 5", "knn_k = 1\nprobe_interval = 1"))
    train(recipe)
    return tmp_path / "runs" / NAME


def data_of(run, kind):
    """The results of an evaluation, and its counts of images and classes."""
    (path,) = (run / "eval").glob(f"{kind}_*.json")
    record = json.loads(path.read_text())
    return record["results"], [
        record["data"][key] for key in ("test_samples", "test_left_out", "train_classes", "test_classes")
    ]


def test_a_run_and_its_evaluation_match_by_name(capsys, run_with_some):
    rows = [json.loads(line) for line in (run_with_some / "metrics.jsonl").read_text().splitlines()]
    assert {row["knn/top1_pct"] for row in rows if "knn/top1_pct" in row} == {100.0}
    assert all(row["probe/top1_pct"] > 60 for row in rows if "probe/top1_pct" in row)
    said = (run_with_some / "log.txt").read_text()
    assert "20 of 60 images are left out" in said and "a_new_one" in said and "class_0, class_1" in said
    assert call(capsys, "eval", "knn", run_with_some, "--set", "eval.knn.k=[1]")[0] == 0
    results, counts = data_of(run_with_some, "knn")
    assert results["knn/top1_pct"] == 100.0 and counts == [40, 20, 4, 2]


@pytest.mark.nightly
def test_classifiers_match_by_name(capsys, run_with_some):
    fast = ["--set", "eval.linear.epochs=3", "--set", "eval.linear.optimizer={type='SGD',lr=0.1}"]
    assert call(capsys, "eval", "linear", run_with_some, *fast)[0] == 0
    results, counts = data_of(run_with_some, "linear")
    assert [share is None for share in results["per_class_top1_pct"]] == [True, True, False, False]
    assert counts == [40, 20, 4, 2]
    tuning = ["--set", "eval.finetune.epochs=1", "--set", "eval.finetune.global_batch=32"]
    code, _, err = call(
        capsys, "eval", "finetune", run_with_some, *tuning, "--set", "eval.finetune.lr={policy='Constant'}"
    )
    assert code == 0, err
    assert data_of(run_with_some, "finetune")[1] == [40, 20, 4, 2]
    assert call(capsys, "report", run_with_some)[0] == 0


def test_an_error_names_the_source_without_a_common_class(capsys, run, images, tmp_path):
    shutil.copytree(images / "class_0", tmp_path / "others" / "another")
    others = f"eval.test={{type='ImageFolder',data_prefix='{tmp_path / 'others'}'}}"
    code, _, err = call(capsys, "eval", "knn", run, "--set", others)
    assert code == 2 and "no class in common" in err and "set eval.test to a source that has some" in err
    assert call(capsys, "eval", "spectrum", run, "--set", others)[0] == 0


def test_labels_of_a_list_may_have_gaps(capsys, run, images, tmp_path):
    """A linear classifier has the results that it has for class folders; fine-tuning, which needs an output for each
    number, refuses."""
    numbers = (3, 99, 10**6, 3 * 10**11)
    lines = [f"class_{k}/{i:02d}.jpg {numbers[k]}\n" for k in range(4) for i in range(20)]
    (tmp_path / "list.txt").write_text("".join(lines))
    folder = f"{{type='ImageFolder',data_prefix='{images}'}}"
    listed = f"{{type='ImageList',data_prefix='{images}',ann_file='{tmp_path / 'list.txt'}'}}"
    fast = ["--set", "eval.linear.epochs=3", "--set", "eval.linear.optimizer={type='SGD',lr=0.1}"]
    records = []
    for source in (folder, listed):
        options = [*fast, "--set", f"eval.train={source}", "--set", f"eval.test={source}", "-o", tmp_path / "results"]
        assert call(capsys, "eval", "linear", run, *options)[0] == 0
        (path,) = (tmp_path / "results").iterdir()
        records.append(json.loads(path.read_text()))
        path.unlink()
    assert records[0]["results"] == records[1]["results"] and records[1]["data"]["train_classes"] == 4
    options = ["--set", f"eval.train={listed}", "--set", f"eval.test={listed}"]
    code, _, err = call(capsys, "eval", "finetune", run, *options)
    assert code == 2 and "labels up to 300000000000 for 4 classes: number them from 0" in err


def test_data_check_notes_them(capsys, images, some_classes, tmp_path):
    recipe = write_recipe(tmp_path, images, steps=1, name=NAME)
    other = ["--set", f"eval.test={{type='ImageFolder',data_prefix='{some_classes}'}}", "--set", "data.holdout=0.2"]
    code, _, err = call(capsys, "data", "check", recipe, *other)
    assert code == 1 and err.count("note: ") == 2 and "a_new_one" in err and "class_0, class_1" in err
