"""`--dry-run` and the verbs that only look write nothing: no images are drawn, nothing is compiled or kept."""

import os
from pathlib import Path

import pytest

from small_run import ROOT, answer, write_recipe
from sslrun.data.sources.fraction import Fraction
from sslrun.data.sources.shapes import Shapes

QUICKSTART, MOCO = ROOT / "configs/quickstart.toml", ROOT / "configs/mocov2.toml"
VERBS = {
    "dry run": ([str(QUICKSTART), "--dry-run"], 0, "samples      5,000 (Shapes('train', 5000 images of 80 px))"),
    "dry run of a split": (
        [str(QUICKSTART), "--dry-run", "--set", "data._delete_=['holdout']", "--set", "data.holdout=0.2"],
        0,
        "samples      4,000 (4000 of Shapes('train', 5000 images of 80 px))",
    ),
    "dry run of a part": (
        [
            *(str(QUICKSTART), "--dry-run", "--set"),
            "data.source={_delete_=true, type='Fraction', share=0.1, source={type='Shapes'}}",
        ],
        0,
        "samples      500 (10 % of Shapes('train', 5000 images of 80 px))",
    ),
    "dry run without data": ([str(MOCO), "--dry-run"], 0, "samples      1,281,167 (as published; "),
    "dry run of a part without data": (
        [
            *(str(MOCO), "--dry-run", "--set"),
            "data.source={_delete_=true, type='Fraction', share=0.1, source={type='ImageNet', data_prefix='nowhere'}}",
            *("--set", "data.holdout=0.5"),
        ],
        0,
        "samples      64,059 (as published; ",
    ),
    "list": (["list"], 0, "backbones"),
    "list of one": (["list", "backbones", "ResNet"], 0, "depth"),
    "print": (["config", "print", str(MOCO)], 0, "queue_len"),
    "explain": (["config", "explain", str(MOCO), "--all"], 0, "queue_len"),
    "diff": (["config", "diff", str(MOCO), str(ROOT / "configs/mocov1.toml")], 1, "temperature"),
    "lint": (["config", "lint", str(QUICKSTART)], 0, "1 file checked"),
    "schema": (["config", "schema"], 0, "properties"),
    "runs": (["runs", str(ROOT / "configs")], 0, "no runs"),
}


SLOW = ("dry run without data", "dry run of a split")


@pytest.mark.parametrize("verb", [pytest.param(v, marks=pytest.mark.nightly) if v in SLOW else v for v in VERBS])
def test_nothing_is_written(tmp_path, verb):
    words, expected, text = VERBS[verb]
    folders = {"HOME": "home", "XDG_CACHE_HOME": "cache", "TMPDIR": "tmp", "SSLRUN_CACHE": "", "here": "here"}
    for name in filter(None, folders.values()):
        (tmp_path / name).mkdir()
    settings = {key: str(tmp_path / name) if name else "" for key, name in folders.items()}
    code, printed = answer(words, tmp_path / "here", settings)
    assert code == expected and text in printed, printed
    # torch makes this folder, empty, when it is imported.
    found = [path for path in tmp_path.rglob("*") if path.name not in folders.values()]
    assert [path for path in found if not path.name.startswith("torchinductor_")] == []


def test_the_control_drawn_images_are_drawn_when_a_run_opens_them(tmp_path):
    source = Fraction(Shapes(str(tmp_path / "shapes"), num_images=20, size=16), share=0.5)
    assert source.nominal_size == 10
    source.open()
    assert len(source) == 10 and len(list(tmp_path.rglob("*.jpg"))) == 20


@pytest.mark.nightly
def test_a_dry_run_needs_no_folder_that_can_be_written(tmp_path, images):
    recipe = write_recipe(tmp_path, images)
    code, printed = answer([str(recipe), "--dry-run", "--work-dir", "/proc/nowhere"], Path(os.sep))
    assert code == 0, printed
