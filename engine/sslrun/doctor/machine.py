"""Checks of the machine: what is installed, the GPUs, memory, disk, a C compiler."""

import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from sslrun.doctor import Finding

GIB = 2**30
LEAST_MEMORY_GIB, LEAST_DISK_GIB = 2.0, 2.0


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
