"""Compiles the played CUDA device, and runs a rehearsal in a process that has it."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("played_cuda.cpp")
PATH = [str(ROOT / folder) for folder in ("engine", "kernels", "tests")]


class CannotPlay(Exception):
    """There is no C++ compiler, or this torch cannot be given a played device."""


def compiled(folder: Path) -> Path:
    """The played device as a library in `folder`; CannotPlay with the reason if it cannot be made or used."""
    import torch

    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise CannotPlay("there is no C++ compiler (CXX, c++, g++, clang++)")
    if torch.version.cuda or torch.version.hip:
        raise CannotPlay("this torch has CUDA of its own")
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_folder, library = Path(spec.origin).parent, folder / "played_cuda.so"
    headers = (torch_folder / "include", torch_folder / "include/torch/csrc/api/include")
    libraries = torch_folder / "lib"
    abi = int(torch.compiled_with_cxx11_abi())
    made = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
        + [f"-I{header}" for header in headers]
        + [str(SOURCE), "-o", str(library), f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10"],
        capture_output=True,
        text=True,
    )
    if made.returncode != 0:
        raise CannotPlay(f"{SOURCE.name} does not compile against torch {torch.__version__}:\n{made.stderr[-2000:]}")
    return library


def environment(library: Path) -> dict[str, str]:
    """Environment of a process whose torch has the played device."""
    ours = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    path = [*PATH, *filter(None, [ours.get("PYTHONPATH")])]
    return ours | {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def run(library: Path, module: str, *arguments: str, timeout_s: float = 600) -> list[Any]:
    """Runs `python -m module arguments` with the played device; returns the JSON of each line that it prints.

    Raises:
        AssertionError: it failed; the message is what it printed.
    """
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    done = subprocess.run(
        command, env=environment(library), cwd=ROOT, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, f"{' '.join(command[3:])}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
