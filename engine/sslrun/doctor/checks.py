"""The checks of `sslrun doctor`. Each is a function without arguments; `python -m sslrun.doctor.checks NAME` runs one.

A check says what works with a `Finding`, or raises; then its error's last line is what the doctor says.
"""

import contextlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslrun.doctor import Finding
from sslrun.errors import UsageError

if TYPE_CHECKING:
    import torch

    from sslrun.contract import Batch, Method

GIB = 2**30
LEAST_MEMORY_GIB, LEAST_DISK_GIB = 2.0, 2.0
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


def libraries() -> Finding:
    """Versions; what only some runs need is missing at most."""
    import numpy
    import torch
    import triton

    says = f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}, "
    return Finding("works", f"{says}numpy {numpy.__version__}")


def driver() -> Finding:
    """NVIDIA's driver, without torch."""
    query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        if Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/version").exists():
            return Finding("works", "a driver is loaded; nvidia-smi, which would say which, is not installed")
        return Finding("missing", "no NVIDIA GPU and driver are found; training runs on the CPU")
    done = subprocess.run(query, capture_output=True, text=True, timeout=40)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip() or done.stdout.strip() or "nvidia-smi lists no GPU").splitlines()[-1]
        raise RuntimeError(last)
    version = lines[0].partition(",")[0]
    gpus = [line.partition(",")[2].strip() for line in lines]
    return Finding("works", f"{version}; {len(gpus)} x {gpus[0]}")


def cuda() -> Finding:
    """A bf16 matrix product on every GPU, against the CPU."""
    import torch

    built = torch.version.cuda
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None and not Path("/dev/nvidia0").exists():
            return Finding("missing", f"torch {torch.__version__} sees no GPU")
        if built is None:
            raise RuntimeError(f"there is a GPU, but torch {torch.__version__} is built without CUDA")
        torch.cuda.init()  # says why
    a = torch.linspace(-1, 1, 256 * 256).view(256, 256)
    right = (a.bfloat16().float() @ a.bfloat16().float()).bfloat16().float()
    for number in range(torch.cuda.device_count()):
        there = a.to(torch.device("cuda", number), torch.bfloat16)
        if not torch.allclose((there @ there).cpu().float(), right, rtol=0.02, atol=0.02):
            raise RuntimeError(f"GPU {number} multiplies wrongly")
    major, minor = torch.cuda.get_device_capability(0)
    bf16 = "" if torch.cuda.is_bf16_supported() else "; it has no bf16, so training is in fp32"
    count = torch.cuda.device_count()
    return Finding("works", f"{built}, {count} GPU(s) of capability {major}.{minor} multiply matrices right{bf16}")


def memory() -> Finding:
    """Free memory of the machine and of its GPUs."""
    import torch

    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")) / GIB
    cores = len(os.sched_getaffinity(0))
    says = f"{available:.1f} GiB free for {cores} cores"
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        says += f"; GPU {number}: {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if available < LEAST_MEMORY_GIB:
        raise RuntimeError(f"{says}; less than {LEAST_MEMORY_GIB:g} GiB")
    return Finding("works", says)


def disk() -> Finding:
    """Free space where runs and the cache go."""
    from sslrun.data.index import cache_dir

    free = {}
    for name, folder in (("work_dirs", Path("work_dirs").absolute()), ("cache", cache_dir())):
        place = next(path for path in (folder, *folder.parents) if path.is_dir())
        with tempfile.TemporaryFile(dir=place):  # whether it can be written to
            free[name] = shutil.disk_usage(place).free / GIB
    says = ", ".join(f"{size:.1f} GiB free for {name}" for name, size in free.items())
    if min(free.values()) < LEAST_DISK_GIB:
        raise RuntimeError(f"{says}; less than {LEAST_DISK_GIB:g} GiB")
    return Finding("works", says)


def c_compiler() -> Finding:
    """The C part of exact mode, compiled."""
    from sslrun.data import native

    if native.c_functions() is None:
        return Finding(
            "missing", "no C compiler works; views are made in torch, at a third of the speed", "install gcc"
        )
    return Finding("works", "exact mode's views are compiled")


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


def triton_kernel() -> Finding:
    """A kernel of ours, compiled and compared with torch."""
    import torch

    from sslkernels.info_nce import info_nce, reference

    if not torch.cuda.is_available():
        return Finding("missing", "without a GPU there is nothing to compile; the kernels have CPU forms")
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, 128, generator=generator) for n in (64, 64, 1000)]
    query, key, queue = (torch.nn.functional.normalize(x, dim=1) for x in rows)
    losses, gradients = [], []
    for function, device in ((info_nce, "cuda"), (reference, "cpu")):
        q = query.to(device, copy=True).requires_grad_()
        result = function(q, key.to(device), queue.to(device), 0.2)
        value = result[0] if isinstance(result, tuple) else result
        value.backward()
        assert q.grad is not None
        losses.append(value.item())
        gradients.append(q.grad.cpu())
    apart = float((gradients[0] - gradients[1]).abs().max())
    if not math.isclose(*losses, rel_tol=1e-3) or apart > 1e-4:
        raise RuntimeError(f"the loss kernel gives {losses[0]:.5f} where torch gives {losses[1]:.5f}")
    return Finding("works", "the loss kernel compiles and agrees with torch")


def torch_compile() -> Finding:
    """A compiled layer and its gradient, against the same in eager mode."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()).to(device)
    x = torch.randn(32, 64, device=device)
    begin, gradients = time.monotonic(), []
    for function in (layer, torch.compile(layer, dynamic=False)):
        layer.zero_grad()
        function(x).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None])
    seconds = time.monotonic() - begin
    if not all(torch.allclose(one, two, rtol=1e-2, atol=1e-3) for one, two in zip(*gradients, strict=True)):
        raise RuntimeError("compiled code computes other gradients")
    off = "" if device.type == "cuda" else "; off on the CPU unless engine.compile is on"
    return Finding("works", f"compiled a layer and its gradient in {seconds:.0f} s{off}")


def collectives() -> Finding:
    """A sum over processes: one for each GPU by NCCL, or two on the CPU by gloo."""
    import torch

    cuda = torch.cuda.is_available()
    ranks = torch.cuda.device_count() if cuda else 2
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_sum_over_ranks, (ranks, cuda, f"{folder}/store"), nprocs=ranks)
    if not cuda:
        return Finding("works", "two processes have summed over gloo; NCCL needs a GPU")
    alone = "; more GPUs would tell more" if ranks == 1 else ""
    return Finding("works", f"{ranks} process(es) have summed over NCCL {_nccl_version()}{alone}")


def _sum_over_ranks(rank: int, ranks: int, cuda: bool, store: str) -> None:
    import torch
    import torch.distributed as dist

    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    x = torch.full((2**20,), float(rank + 1), device="cuda" if cuda else "cpu")
    dist.all_reduce(x)
    assert bool((x == ranks * (ranks + 1) / 2).all()), "the sum over processes is wrong"
    dist.destroy_process_group()


def _nccl_version() -> str:
    import torch

    return ".".join(map(str, torch.cuda.nccl.version()))


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
            _write_decoded(Path())
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


def _write_decoded(folder: Path) -> None:
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


ALL: tuple[Callable[[], Finding], ...] = (
    libraries, driver, cuda, memory, disk, c_compiler, decoding, triton_kernel, torch_compile, collectives, deepspeed,
    training,
)  # fmt: skip


def main(name: str) -> int:
    """Run a check and write its finding; the last line of stderr says why there is none."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    (check,) = (check for check in ALL if check.__name__ == name)
    try:
        finding = check()
    except UsageError as error:
        print(error, file=sys.stderr)
        return 1
    answers.write(json.dumps(asdict(finding)) + "\n")
    answers.flush()
    os._exit(0)  # the destructors of libraries are not what is asked


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
