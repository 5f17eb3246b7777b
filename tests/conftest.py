"""Fixtures that several test files share."""

import importlib.util
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import small_run
from sslrun.cli import main

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker per core
    torch.set_num_threads(1)

# Started by nohup or in the background, pytest and what it starts would ignore these, which tests send.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        for marker in item.iter_markers("needs"):
            if not is_installed(*marker.args):
                item.add_marker(pytest.mark.skip(reason=f"needs {marker.args[0]}, which is not installed"))


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent package
        return False


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 small JPEGs in 4 class folders; each class has its own pattern."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for label in range(4):
        (root / f"class_{label}").mkdir()
        for number in range(20):
            wave = np.sin(np.arange(40) * (label + 1) * 0.3 + random.uniform(0, 6))
            pixels = random.integers(0, 60, (36, 40, 3)) + (90 * (wave + 1))[None, :, None] * random.uniform(0.3, 1, 3)
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(root / f"class_{label}" / f"{number:02d}.jpg", quality=92)
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """Folder of a run with checkpoints of steps 4 and 6; the recipe is beside `runs`. Tests only read it."""
    folder = tmp_path_factory.mktemp("trained")
    assert main([str(small_run.write_recipe(folder, images, steps=6, name=small_run.NAME))]) == 0
    return folder / "runs" / small_run.NAME


VIT = """
[model]
type = "MoCo"
queue_len = 40
feat_dim = 8
backbone = { type = "VisionTransformer", img_size = 24, patch_size = 8, embed_dim = 24, depth = 2, num_heads = 3 }
neck = { type = "NonLinearNeck", in_channels = 24, hid_channels = 16, out_channels = 8 }
head = { type = "ContrastiveHead", temperature = 0.2 }
"""


@pytest.fixture(scope="session")
def trained_vit(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """Folder of a run of a vision transformer without held-out images. Tests only read it."""
    folder = tmp_path_factory.mktemp("vit")
    recipe = small_run.write_recipe(folder, images, steps=1, name="vit", model=VIT)
    text = recipe.read_text().replace("holdout = 0.2\n", "").replace("knn_interval = 1", "knn_interval = 0")
    recipe.write_text(text)
    assert main([str(recipe)]) == 0
    return folder / "runs" / "vit"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """A function that writes files, `write("a.py", text)`, into a new folder that is the current one."""
    monkeypatch.chdir(tmp_path)

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the `trained` run that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / small_run.NAME))
