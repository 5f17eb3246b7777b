"""Storage that gives errors while a run starts: no list, folder or archive is taken for missing or wrong."""

import builtins
import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import small_run
from sslrun.data.sources import Source
from sslrun.data.sources.cifar import CIFAR10
from sslrun.data.sources.fraction import Fraction
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.sources.image_list import ImageList
from sslrun.data.sources.imagenet import ImageNet
from sslrun.data.sources.imagenet100 import ImageNet100
from sslrun.data.sources.inaturalist2018 import INaturalist2018
from sslrun.data.sources.stl10 import STL10
from sslrun.errors import RunFailed, UsageError
from sslrun.runtime import durable


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(durable, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(durable, "RETRY_S", 0.1)


@pytest.fixture
def fail(monkeypatch):
    """fail(path, number, times): that many accesses to a path fail."""

    def start(path: Path, number: int, times: float) -> None:
        left = {"times": times}

        def wrapped(original: Callable) -> Callable:
            def call(at, *arguments, **options):
                is_it = isinstance(at, (str, os.PathLike)) and os.fspath(at) == str(path)
                if is_it and left["times"] > 0:
                    left["times"] -= 1
                    raise OSError(number, os.strerror(number), str(path))
                return original(at, *arguments, **options)

            return call

        for module, name in ((os, "stat"), (os, "open"), (builtins, "open")):
            monkeypatch.setattr(module, name, wrapped(getattr(module, name)))

    return start


def cases(root: Path) -> dict[str, tuple[Source, Path]]:
    """A source of each kind, and the file or folder that it needs first."""
    (root / "images/n01").mkdir(parents=True)
    (root / "images/n01/a.jpg").touch()
    (root / "list.txt").write_text("n01/a.jpg 0\n")
    (root / "names.txt").write_text("a.jpg\n")
    (root / "classes.txt").write_text("n01\n")
    one = '{"images": [{"id": 1, "file_name": "n01/a.jpg"}], "annotations": [{"image_id": 1, "category_id": 0}]}'
    (root / "train2018.json").write_text(one)
    (root / "meta/data/imagenet/meta").mkdir(parents=True)
    usual = root / "meta/data/imagenet/meta/train.txt"
    usual.write_text("n01/a.jpg 0\n")
    for i in range(1, 6):
        np.zeros(3073, dtype=np.uint8).tofile(root / f"data_batch_{i}.bin")
    (root / "batches.meta.txt").write_text("bird\n")
    np.zeros(96 * 96 * 3, dtype=np.uint8).tofile(root / "unlabeled_X.bin")
    images, folder = str(root / "images"), root / "images"
    return {
        "folder": (ImageFolder(images), folder),
        "class folder": (ImageNet100(images, str(root / "classes.txt")), folder / "n01"),
        "list": (ImageList(images, str(root / "list.txt")), root / "list.txt"),
        "list of classes": (ImageNet100(images, str(root / "classes.txt")), root / "classes.txt"),
        "list of names": (Fraction(ImageFolder(images), names=str(root / "names.txt")), root / "names.txt"),
        "usual list": (ImageNet(images, str(usual)), usual),
        "json": (INaturalist2018(images, str(root / "train2018.json")), root / "train2018.json"),
        "archive": (CIFAR10(str(root)), root / "data_batch_3.bin"),
        "names of classes": (CIFAR10(str(root)), root / "batches.meta.txt"),
        "STL-10": (STL10(str(root), "unlabeled"), root / "unlabeled_X.bin"),
    }


CASES = (
    *("folder", "class folder", "list", "list of classes", "list of names", "usual list", "json"),
    *("archive", "names of classes", "STL-10"),
)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("case", CASES)
def test_it_is_waited_for(tmp_path, fail, case, number):
    source, path = cases(tmp_path)[case]
    fail(path, number, times=2)
    source.open()
    assert len(source) >= 1


@pytest.mark.parametrize("case", CASES)
def test_and_ends_the_start_with_1_if_it_lasts(tmp_path, fail, case):
    source, path = cases(tmp_path)[case]
    fail(path, errno.EIO, times=float("inf"))
    with pytest.raises(RunFailed, match=f"{path} cannot be read: Input/output error"):
        source.open()


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT])
def test_what_the_user_can_mend_is_said_at_once(tmp_path, fail, number):
    source, path = cases(tmp_path)["list"]
    fail(path, number, times=1)
    with pytest.raises(UsageError, match=r"set data\.source\.ann_file"):
        source.open()


@pytest.mark.parametrize("name", ["small.toml", "base.toml"])
def test_a_recipe_that_storage_does_not_give_is_not_wrong(tmp_path, images, capsys, fail, name):
    recipe = small_run.write_recipe(tmp_path, images)
    (tmp_path / "base.toml").write_text("seed = 1\n")
    recipe.write_text('extends = "base.toml"\n' + recipe.read_text())
    fail(tmp_path / name, errno.ESTALE, times=float("inf"))
    code, _, err = small_run.call(capsys, recipe, "--dry-run")
    assert (code, err.count("\n")) == (1, 1) and f"{name} cannot be read: Stale file handle" in err
