"""Checks whether this machine can train, and what of it works: `sslrun doctor`. Nothing here imports torch.

Each check of `checks.py` runs in a process of its own, with a limit: a library that hangs or ends its process is found
like any other fault. A process answers with a line of JSON.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from sslrun.started import SPINNING

State = Literal["works", "missing", "fails"]

# Of a launcher: a check is a process of its own, whatever the doctor was started by.
_OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True)
class Check:
    """One question to the machine.

    Attributes:
        name: the function in `checks.py`.
        title: what the report calls it.
        limit_s: seconds after which its process is killed.
        advice: what to do if it fails and does not say so itself.
    """

    name: str
    title: str
    limit_s: float
    advice: str


@dataclass(frozen=True)
class Finding:
    """The answer to a check.

    Attributes:
        state: "works", "missing" (not there, and training does without it) or "fails".
        says: what was found, in one sentence.
        advice: what to do; empty if there is nothing to do.
    """

    state: State
    says: str
    advice: str = ""


CHECKS = (
    Check(
        "libraries", "libraries", 60, "run `make install` in a checkout, or install sslrun again with its dependencies"
    ),
    Check("driver", "GPU driver", 60, "install NVIDIA's driver, or ask who runs this machine"),
    Check("cuda", "CUDA", 90, "install a torch for the CUDA version of the driver: https://pytorch.org"),
    Check("memory", "memory", 60, "close other programs"),
    Check("disk", "disk", 30, "free some space, or name another folder with --work-dir and SSLRUN_CACHE"),
    Check("c_compiler", "C compiler", 60, "install gcc"),
    Check("decoding", "DALI decoding", 90, "install the DALI for this CUDA version: `make install`"),
    Check("triton_kernel", "Triton kernel", 120, "install gcc and Python's headers, which Triton needs (python3-dev)"),
    Check("torch_compile", "torch.compile", 300, "train with --set engine.compile=off"),
    Check("collectives", "NCCL, gloo", 90, "several processes need it; NCCL_DEBUG=INFO makes NCCL say more"),
    Check("deepspeed", "DeepSpeed", 120, "several processes need it: pip install deepspeed"),
    Check("training", "training", 180, "the lines above say what is missing"),
)
DECIDES = "training"


def examine(checks: Sequence[Check] = CHECKS) -> Iterator[tuple[Check, Finding]]:
    """Ask all checks, some at a time, and yield their findings in order."""
    workers = max(1, min(4, len(os.sched_getaffinity(0)) // 2))
    with ThreadPoolExecutor(workers, "sslrun-doctor") as pool:
        yield from zip(checks, pool.map(ask, checks), strict=True)


def ask(check: Check) -> Finding:
    """Run a check in a process of its own."""
    roots = [str(Path(__file__).parents[2])]
    kernels = find_spec("sslkernels")
    if kernels is not None and kernels.origin is not None:
        roots.append(str(Path(kernels.origin).parents[1]))
    environment = {key: value for key, value in os.environ.items() if key not in _OF_LAUNCHERS}
    environment.setdefault(*SPINNING)
    environment["PYTHONPATH"] = os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", "sslrun.doctor.checks", check.name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,  # so that all that it starts can be ended with it
    )
    try:
        answer, complaints = process.communicate(timeout=check.limit_s)
    except subprocess.TimeoutExpired:
        return Finding("fails", f"gives no answer within {check.limit_s:g} s", check.advice)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode == 0:
        return Finding(**json.loads(answer.splitlines()[-1]))
    if process.returncode < 0:
        return Finding("fails", f"ends its process ({signal.Signals(-process.returncode).name})", check.advice)
    last = next((line.strip() for line in reversed(complaints.splitlines()) if line.strip()), "without a word")
    return Finding("fails", last[:300], check.advice)


def as_text(check: Check, finding: Finding, width: int) -> str:
    """A finding as one line, folded at `width` columns."""
    words = f"{finding.says}; {finding.advice}" if finding.advice else finding.says
    head = f"{finding.state:9}{check.title:15}"
    return textwrap.fill(words, width, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)


def as_json(findings: Sequence[tuple[Check, Finding]]) -> str:
    """All findings, and whether a training can run."""
    found = {check.name: asdict(finding) for check, finding in findings}
    return json.dumps({"can_train": can_train(findings), "checks": found}, indent=1)


def can_train(findings: Sequence[tuple[Check, Finding]]) -> bool:
    """Whether a training ran here."""
    return any(check.name == DECIDES and finding.state == "works" for check, finding in findings)
