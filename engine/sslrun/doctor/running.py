"""Checks of the parts of a run: images are decoded, DeepSpeed takes steps, a small recipe is trained."""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslrun.doctor import Finding

if TYPE_CHECKING:
    import torch

    from sslrun.contract import Batch, Method

RECIPE = """
global_batch = 32
max_iters = 12
work_dir = "runs"

[model]
type = "MoCo"
queue_len = 64
feat_dim = 16
backbone = {{ type = "ResNet", depth = 18, base_width = 16, stem = "small" }}
neck = {{ type = "MoCoV2Neck", in_channels = 128, hid_channels = 64, out_channels = 16 }}
head = {{ type = "ContrastiveHead", temperature = 0.2 }}

[data]
samples_per_gpu = 16
workers_per_gpu = 2
source = {source}

[[data.views]]
num_views = 2
transforms = [
  {{ type = "RandomResizedCrop", size = 32, scale = [0.2, 1.0] }},
  {{ type = "ColorJitter", p = 0.8, brightness = 0.4, contrast = 0.4, saturation = 0.4, hue = 0.1 }},
  {{ type = "RandomHorizontalFlip", p = 0.5 }},
]

[optimizer]
type = "SGD"
lr = 0.03
momentum = 0.9

[lr]
policy = "CosineAnnealing"
by = "iter"

[log]
interval = 4
level = "ERROR"

[engine]
compile = "off"
"""


def decoding() -> Finding:
    """JPEGs decoded on the device, against the CPU."""
    import torch

    from sslrun.data import dali

    if not dali.is_installed():
        says = "DALI is not installed; only data of decoded images (CIFAR10, STL10, ...) can be trained on"
        return Finding("missing", says, dali.install_command())
    with in_new_folder():
        here = _decoded(torch.device("cpu"))
        if not torch.cuda.is_available():
            return Finding("works", f"{len(here)} JPEGs are decoded on the CPU; there is no GPU to do it")
        there = _decoded(torch.device("cuda", 0))
    error = max(float((one.float() - other.float()).abs().mean()) for one, other in zip(here, there, strict=True))
    if error > 2:
        raise RuntimeError(f"the GPU decodes other pixels than the CPU: {error:.1f} levels apart on average")
    return Finding("works", f"{len(here)} JPEGs are decoded on the GPU, {error:.2f} levels from the CPU's on average")


def _decoded(device: "torch.device") -> list["torch.Tensor"]:
    """Drawn images, decoded on a device."""
    import numpy as np

    from sslrun.data.loader import Loader
    from sslrun.data.order import Sequential
    from sslrun.data.sources.shapes import Shapes
    from sslrun.data.transforms import CenterCrop
    from sslrun.data.views import ViewGroup

    source = Shapes(num_images=20)
    source.open()
    views = [ViewGroup(1, [CenterCrop(32)])]
    loader = Loader(source, views, sampler=Sequential(20), seed=0, batch_size=20, device=device)
    ((_, images),) = loader.decoded([(0, np.arange(20))])
    return images


def deepspeed() -> Finding:
    """Steps of DeepSpeed's executor, against those of the local one."""
    import torch

    if find_spec("deepspeed") is None:
        says = "DeepSpeed is not installed; a run has one process"
        return Finding("missing", says, "for several: pip install deepspeed")
    from sslrun.runtime.deepspeed_executor import DeepSpeedExecutor
    from sslrun.runtime.executor import LocalExecutor

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    weights = []
    os.environ["LOCAL_RANK"] = "0"
    store = torch.distributed.HashStore()
    kinds: dict[Any, dict[str, Any]] = {LocalExecutor: {}, DeepSpeedExecutor: {"zero_stage": 1}}
    for kind, options in kinds.items():
        method, batch = _tiny_method(device)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        if kind is DeepSpeedExecutor:
            torch.distributed.init_process_group("nccl" if cuda else "gloo", store=store, rank=0, world_size=1)
        executor = kind(method, optimizer, device=device, **options)
        for step in range(3):
            _one_step(executor, batch, step)
        executor.check()
        weights.append(executor.full_state())
    torch.distributed.destroy_process_group()
    apart = max(float((own - weights[1][name]).abs().max()) for name, own in weights[0].items())
    if apart > 1e-4:
        raise RuntimeError(f"its weights are {apart:.2g} from those of a run without it")
    version = metadata.version("deepspeed")
    return Finding("works", f"{version}: three steps at ZeRO 1 give the weights of a run without it")


def _tiny_method(device: "torch.device") -> "tuple[Method, Batch]":
    import torch

    from sslrun.contract import Batch, Loss, Method, Progress

    class Regression(Method, listed=False):
        """Regression of a constant."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.Linear(8, 4))  # type: ignore[assignment]

        def forward(self, batch: Batch, progress: Progress, targets: Any) -> Loss:
            return Loss((self.backbone(batch.views[0]).float() - 1).square().mean(), {}, {})

    torch.manual_seed(0)
    method = Regression()
    images = torch.linspace(-1, 1, 8 * 12).view(8, 3, 2, 2)
    return method, Batch([images], torch.arange(8), None).to(device)


def _one_step(executor: Any, batch: "Batch", step: int) -> None:
    from sslrun.contract import Progress

    progress = Progress(step, total_steps=10, steps_per_epoch=10, seed=0)
    (target,) = executor.targets([batch], progress)
    executor.backward(executor.forward(batch, progress, target).value)
    executor.step([0.1])


def training() -> Finding:
    """A short run of a small recipe, as from the command line."""
    import torch

    from sslrun.config import load
    from sslrun.data import dali
    from sslrun.runtime.run_files import METRICS, rows
    from sslrun.training import run

    with in_new_folder():
        if dali.is_installed():
            source, of = '{ type = "Shapes", num_images = 128 }', "JPEGs"
        else:
            write_decoded(Path())
            source, of = '{ type = "CIFAR10", data_prefix = "." }', "decoded images; files need DALI"
        Path("doctor.toml").write_text(RECIPE.format(source=source), encoding="utf-8")
        code = run(load("doctor.toml"), None, None)
        if code != 0:
            raise RuntimeError(f"a small run ends with exit code {code}")
        row = [row for _, row in rows(Path("runs/doctor") / METRICS) if "train/loss" in row][-1]
    if not math.isfinite(row["train/loss"]):
        raise RuntimeError(f"the loss of a small run is {row['train/loss']}")
    device = "GPU" if torch.cuda.is_available() else "CPU"
    return Finding("works", f"{row['step']} steps on the {device}, from {of}")


def write_decoded(folder: Path) -> None:
    """Random images in the format of CIFAR-10."""
    import numpy as np

    random = np.random.default_rng(0)
    for number in range(1, 6):
        content = random.integers(0, 256, (32, 3073), dtype=np.uint8)
        content[:, 0] %= 10
        (folder / f"data_batch_{number}.bin").write_bytes(content.tobytes())


@contextlib.contextmanager
def in_new_folder() -> Iterator[None]:
    """A context whose current folder is new and empty; it is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="sslrun-doctor-") as folder, contextlib.chdir(folder):
        yield
