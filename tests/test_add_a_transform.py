"""docs/add-a-transform.md, followed by a user in an empty folder."""

import re

import numpy as np
import pytest
from PIL import Image

import small_run
from documents import follow, refusal, write_files

DOCUMENT = small_run.ROOT / "docs" / "add-a-transform.md"
SHORT = " --set data.source.num_images=192 --set data.holdout.num_images=64"


@pytest.mark.nightly
def test_the_example_works_outside_the_tree(tmp_path):
    printed = follow(DOCUMENT, tmp_path, lambda line: line + SHORT if "bin/sslrun" in line else line)
    assert re.search(r"^    Cutout +corner -?\d+ > -?\d+$", printed, re.MULTILINE), printed
    assert re.search(r"^    PadToSquare +not applied$", printed, re.MULTILINE), "the drawn images are square"
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size[0] > 300


@pytest.mark.parametrize("mode", ["exact", "dali"])
def test_images_that_are_not_square_go_through_a_run(tmp_path, images, mode):
    write_files(DOCUMENT, tmp_path)
    source = f'{{ _delete_ = true, type = "ImageFolder", data_prefix = "{images}" }}'
    settings = [
        f"data.augment={mode}",
        f"data.source={source}",
        f"data.holdout={source}",
        "epochs=1",
        "global_batch=32",
    ]
    words = ["mine.toml", *(word for setting in settings for word in ("--set", setting))]
    words += ["--set", "monitor.knn_interval=0", "--set", "monitor.probe_interval=0", "--set", "lr.warmup_iters=1"]
    code, printed = small_run.answer(words, tmp_path)
    assert code == 0 and "done: " in printed, printed
    told = "data.views.0, dali mode: PadToSquare has no DALI operators: torch does PadToSquare, RandomResizedCrop"
    assert (told in printed) == (mode == "dali")
    code, printed = small_run.answer(["preview", *words, "--samples", "2", "-o", "two.png"], tmp_path)
    assert code == 0 and np.asarray(Image.open(tmp_path / "two.png")).std() > 10, printed


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("data.views.0.transforms.3.side=0", "side must be at least 1, not 0"),
        ("data.views.0.transforms.3.sides=3", "unknown key of Cutout; did you mean side"),
    ],
)
def test_a_wrong_argument_is_one_line(tmp_path, setting, expected):
    assert expected in refusal(DOCUMENT, tmp_path, "mine.toml", "--dry-run", "--set", setting)
