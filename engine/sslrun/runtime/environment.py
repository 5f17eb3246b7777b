"""The environment of a run or a measurement: versions, machine, commit, command line."""

import functools
import os
import platform
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = {
    "torch": ("torch",),
    "triton": ("triton",),
    "dali": ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "nvidia-dali-cuda110"),
    "deepspeed": ("deepspeed",),
    "numpy": ("numpy",),
    "safetensors": ("safetensors",),
}


def environment() -> dict[str, Any]:
    """Plain values for env.json and benchmark rows; None for what this machine does not have. Imports torch."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        **versions(),
        **_gpus(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": platform.platform(),
        "host": socket.gethostname(),
        **_commit(),
    }


def versions() -> dict[str, str | None]:
    """Versions of the libraries that compute; None for one that is not installed."""
    return {name: _version(candidates) for name, candidates in PACKAGES.items()}


def _version(candidates: tuple[str, ...]) -> str | None:
    for name in candidates:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _gpus() -> dict[str, Any]:
    import torch  # knows the GPUs without making a CUDA context

    count = torch.cuda.device_count()
    return {
        "cuda": torch.version.cuda,
        "driver": _driver() if count else None,
        "gpus": [torch.cuda.get_device_name(index) for index in range(count)],
    }


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"])


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


@functools.cache
def _commit() -> dict[str, Any]:
    """The commit of the source tree that is running, and whether tracked files were changed since."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    commit = _output([*git, "rev-parse", "HEAD"]) if shutil.which("git") else None
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no"]) if commit else None
    return {"commit": commit, "dirty": None if changed is None else changed != ""}


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
