"""A run small enough for tests: its recipe, its start from the command line, and readers of its results."""

import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ranks import run_ranks
from sslrun.cli import main
from sslrun.runtime import checkpoint
from sslrun.runtime.safetensors_file import AS_REAL, DTYPES

ROOT = Path(__file__).resolve().parents[1]
NAME = "mocov2_resnet18_2xb8-coslr-6iters_images-24"  # of the run that the fixture `trained` made
CHANGES_WITH_TIME = ("wall_s", "speed/", "data/", "mem/", "compile/")

RECIPE = """
global_batch = 16
max_iters = {steps}
seed = 3
work_dir = "{work_dir}"

[model]
type = "MoCo"
queue_len = 40
feat_dim = 8
momentum = 0.9
backbone = {{ type = "ResNet", depth = 18, base_width = 4, stem = "small" }}
neck = {{ type = "MoCoV2Neck", in_channels = 32, hid_channels = 16, out_channels = 8 }}
head = {{ type = "ContrastiveHead", temperature = 0.2 }}

[data]
samples_per_gpu = 8
workers_per_gpu = 1
source = {{ type = "ImageFolder", data_prefix = "{images}" }}
holdout = 0.2

[[data.views]]
num_views = 2
transforms = [
  {{ type = "RandomResizedCrop", size = 24, scale = [0.2, 1.0] }},
  {{ type = "ColorJitter", p = 0.8, brightness = 0.4, contrast = 0.4, saturation = 0.4, hue = 0.1 }},
  {{ type = "GaussianBlur", p = 0.5 }},
  {{ type = "RandomHorizontalFlip" }},
]

[optimizer]
type = "SGD"
lr = 0.05
momentum = 0.9
weight_decay = 1e-4

[lr]
policy = "CosineAnnealing"
by = "iter"

[checkpoint]
interval = 4
by = "iter"
max_keep_ckpts = 3

[log]
interval = 3

[monitor]
knn_interval = 1
knn_k = 5

[engine]
device = "cpu"
threads = 1
"""


def write_recipe(folder: Path, images: Path, steps: int = 12, name: str = "small", model: str | None = None) -> Path:
    """The recipe as a file; its run folder is `folder`/runs/`name`. `model`: the table [model] in place of MoCo's."""
    path = folder / f"{name}.toml"
    text = RECIPE.format(steps=steps, work_dir=folder / "runs", images=images)
    if model is not None:
        text = text[: text.index("[model]")] + model + "\n" + text[text.index("[data]") :]
    path.write_text(text)
    return path


def command(recipe: Path, *options: str, ranks: int = 1) -> list[str]:
    """The command line; by torchrun for several ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    return [*launcher, str(ROOT / "bin" / "sslrun"), str(recipe), *options]


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command in this process."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def train(recipe: Path, *options: str, ranks: int = 1) -> None:
    """Train to the end through the command line, in this process or in several ranks."""
    words = [str(recipe), *options]
    codes = [main(words)] if ranks == 1 else run_ranks(main, ranks, words)
    assert codes == [0] * ranks


def answer(words: Sequence[str], folder: Path, settings: Mapping[str, str] | None = None) -> tuple[int, str]:
    """(exit code, output) of a command line that a process of its own runs in a folder.

    Args:
        words: without `bin/sslrun`.
        folder: where.
        settings: environment variables.
    """
    answers = run_ranks(_answer, 1, list(words), folder, dict(settings or {}), timeout_s=1200)  # it may be a training
    ((code, printed),) = answers
    return code, printed


def _answer(words: list[str], folder: Path, settings: dict[str, str]) -> tuple[int, str]:
    os.environ.update(settings)
    os.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            return main(words), printed.getvalue()
        except SystemExit as left:  # of argparse
            return int(left.code or 0), printed.getvalue()


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """Start a process in a process group of its own."""
    return subprocess.Popen(
        arguments,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def python(code: str, *words: object, **options: Any) -> subprocess.Popen[str]:
    """A Python process that runs `code`, which may import the engine, with `words` as arguments; stdout is a pipe."""
    command = [sys.executable, "-c", code, *map(str, words)]
    variables = {**environment(), "PYTHONPATH": str(ROOT / "engine")}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True, **options)


def finish(process: subprocess.Popen[str], timeout_s: float = 120) -> tuple[int, str]:
    """Wait for a process; returns (exit code, output)."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"not done after {timeout_s} s:\n{output[-3000:]}") from None
    return process.returncode, output


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 90) -> None:
    """Poll a condition as long as the process runs."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
            raise AssertionError(
                f"the condition never held; exit code {process.poll()}:\n{process.communicate()[0][-3000:]}"
            )
        time.sleep(0.005)


def last_step(run: Path) -> int:
    rows = metrics(run)
    return max((row["step"] for row in rows), default=-1)


def metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without metrics that depend on the clock or the machine."""
    return [{k: v for k, v in row.items() if not k.startswith(CHANGES_WITH_TIME)} for row in rows]


def differences(a: Path, b: Path) -> list[str]:
    """Names of tensors that are not bit-identical in two checkpoints, and keys whose JSON state differs."""
    (tensors_a, state_a), (tensors_b, state_b) = checkpoint.load(a), checkpoint.load(b)
    found = [key for key in {*state_a, *state_b} if state_a.get(key) != state_b.get(key)]
    for file in {*tensors_a, *tensors_b}:
        left, right = tensors_a[file], tensors_b[file]
        found += [
            f"{file}/{name}"
            for name in {*left, *right}
            if name not in left or name not in right or not torch.equal(left[name], right[name])
        ]
    return found


def saved(run: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return run / f"checkpoints/step_{step:08d}"


def as_of(straight: Path, step: int, work_dir: Path) -> Path:
    """A copy of a run in another work_dir, without the checkpoints after a step; returns its folder."""
    run = Path(shutil.copytree(straight, work_dir / straight.name))
    for at, path in checkpoint.steps(run / "checkpoints").items():
        if at > step:
            shutil.rmtree(path)
    return run


def buffers_of_every_dtype() -> dict[str, torch.Tensor]:
    """(3, 4) tensors of random bits, NaNs with payloads and -0.0 among them, of each dtype that a checkpoint stores."""
    generator = torch.Generator().manual_seed(0)
    buffers = {}
    for dtype in sorted({*DTYPES, *AS_REAL}, key=str):
        raw = torch.randint(0, 256, (3, 4 * dtype.itemsize), dtype=torch.uint8, generator=generator)
        buffer = (raw % 2 if dtype == torch.bool else raw).view(dtype)
        if dtype.is_floating_point and dtype.itemsize > 1:
            buffer[0, :2] = torch.tensor([math.nan, -0.0], dtype=dtype)
        buffers[f"a_{str(dtype).removeprefix('torch.')}"] = buffer
    return buffers


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's values in order."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
