"""What a machine without DALI and DeepSpeed can do, and the one line that it answers to the rest."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import small_run
from bare_image import BARE, environment_without
from sslrun.data import dali
from sslrun.data.loader import Loader
from sslrun.data.order import Sequential
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.split import fallbacks, num_dali_steps
from sslrun.data.transforms import CenterCrop, ColorJitter, RandomResizedCrop
from sslrun.data.views import ViewGroup
from sslrun.doctor.running import write_decoded
from sslrun.errors import UsageError

CUDA = torch.device("cuda", 0)


def answer(words: list[str], folder: Path) -> tuple[int, str]:
    """(exit code, output) of a command line where DALI and DeepSpeed are not installed."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment_without(folder / "bare", BARE),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


@pytest.fixture
def no_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "is_installed", lambda: False)


def test_decoded_images_are_trained_on_from_end_to_end(tmp_path, images):
    recipe = small_run.write_recipe(tmp_path, images, steps=4)
    write_decoded(tmp_path)
    source = f'source={{_delete_=true, type="CIFAR10", data_prefix="{tmp_path}"}}'
    code, output = answer([*small_run.command(recipe, f"--set=data.{source}")[1:]], tmp_path)
    assert code == 0 and "done: " in output, output
    assert small_run.last_step(tmp_path / "runs/small") == 4


@pytest.mark.parametrize("verb", ["train", "preview", "data check"])
def test_image_files_are_answered_with_what_to_install(verb, tmp_path, images):
    recipe = small_run.write_recipe(tmp_path, images)
    code, output = answer([str(small_run.ROOT / "bin/sslrun"), *verb.split(), str(recipe)], tmp_path)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2 and "Traceback" not in output, output
    package = f"nvidia-dali-cuda{(torch.version.cuda or '12').split('.')[0]}0"
    assert len(errors) == 1
    assert errors[0].endswith(f"needs NVIDIA DALI, which is not installed: pip install {package}")


def test_several_processes_are_answered_with_what_to_install(tmp_path, images):
    recipe = small_run.write_recipe(tmp_path, images)
    write_decoded(tmp_path)
    source = f'data.source={{_delete_=true, type="CIFAR10", data_prefix="{tmp_path}"}}'
    words = small_run.command(recipe, "--set", source, "--set", "data.holdout=0.3", ranks=2)[1:]
    code, output = answer(words, tmp_path)
    assert (
        code != 0 and "error: several processes need DeepSpeed, which is not installed: pip install deepspeed" in output
    )


def test_the_gpu_tests_can_be_collected(tmp_path):
    files = [path for path in (small_run.ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    words = ["-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", "-c"]
    code, output = answer([*words, str(small_run.ROOT / "pyproject.toml"), *map(str, files)], tmp_path)
    assert code == 0 and "error" not in output.splitlines()[-1], output[-2000:]


def test_on_a_gpu_torch_crops_where_dali_cannot(no_dali):
    group = ViewGroup(1, [RandomResizedCrop(32), ColorJitter(0.4, 0.4, 0.4, 0.1)])
    assert num_dali_steps(group, "exact", CUDA) == 0
    assert fallbacks(group, "exact", CUDA) == ["DALI is not installed: torch does RandomResizedCrop, image by image"]
    assert fallbacks(group, "exact", torch.device("cpu")) == []


def test_with_dali_nothing_changes():
    group = ViewGroup(1, [RandomResizedCrop(32), ColorJitter(0.4, 0.4, 0.4, 0.1)])
    assert num_dali_steps(group, "exact", CUDA) == 1
    assert not any("not installed" in reason for reason in fallbacks(group, "exact", CUDA))


def test_a_loader_that_needs_dali_says_so_at_once(no_dali, images):
    source = ImageFolder(str(images))
    source.open()
    with pytest.raises(UsageError, match=r"^decoding the images of .* needs NVIDIA DALI"):
        Loader(source, [ViewGroup(1, [CenterCrop(16)])], sampler=Sequential(80), seed=0, batch_size=4)
