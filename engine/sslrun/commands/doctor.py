"""The verb `doctor`."""

import argparse
from typing import Any

from sslrun.commands.arguments import DONE, FINDINGS, width


def add(verbs: Any) -> None:
    """Add the verb's parser."""
    doctor = verbs.add_parser(
        "doctor",
        help="say what of this machine works for training, and what to do about the rest",
        description="Check GPU driver, CUDA, memory, disk, C compiler, DALI decoding, a Triton kernel, torch.compile, "
        "NCCL or gloo, and DeepSpeed, and train a small network for a moment. Each check runs in a process of its own, "
        "with a limit; all take about a minute. A line says `works`, `missing` (training does without it) or `fails`, "
        "and what to do. Exit codes: 0 the small training worked, 1 it did not.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(call=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from sslrun.doctor import as_json, as_text, can_train, examine

    findings = []
    for check, finding in examine():
        findings.append((check, finding))
        if not args.json:
            print(as_text(check, finding, width()), flush=True)
    if args.json:
        print(as_json(findings))
    return DONE if can_train(findings) else FINDINGS
