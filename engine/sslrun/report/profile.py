"""Where the time of a profiled run's steps went (`sslrun train --profile N`)."""

import json
from typing import Any

from sslrun.number_format import number
from sslrun.report.html import Child, element, table
from sslrun.report.reported_run import ReportedRun
from sslrun.runtime.run_files import PROFILE, content_of

SHOWN = 10  # operators


def has_profile(run: ReportedRun) -> bool:
    """Whether a run was profiled."""
    return (run.path / PROFILE).is_file()


def profile(run: ReportedRun) -> list[Child]:
    """Tables of the parts of a step and of the operators that took the most time."""
    try:
        found: dict[str, Any] = json.loads(content_of(run.path / PROFILE))
        step_ms, is_cuda = found["step_ms"], "device_ms" in found
        parts = [[name, number(ms), f"{100 * ms / step_ms:.1f} %"] for name, ms in found["parts"].items()]
        parts.append(["sum", number(step_ms), "100 %"])
        operators = [
            [element("code", each["name"]), number(each["calls"]), number(each["ms"])]
            + ([number(each["device_ms"])] if is_cuda else [])
            for each in found["operators"][:SHOWN]
        ]
        lead = (
            f"{found['steps']} steps of {found['global_batch']} images: {number(step_ms)} ms a step, "
            f"{number(1e3 * found['global_batch'] / step_ms)} images/s."
        )
        note = f"Operators are from {found['recorded_steps']} further steps, which torch's profiler slows down."
        if is_cuda:
            note = (
                f"Parts are the host's time, which runs ahead of the GPU; the GPU computed for "
                f"{number(found['device_ms'])} ms of a step. {note}"
            )
    except OSError as error:
        return [element("p", f"Left out: {PROFILE}: {error.strerror}.", class_="note")]
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return [element("p", f"Left out: {PROFILE} is damaged.", class_="note")]
    head = ["operator", "calls a step", "own ms a step", *(["GPU ms"] if is_cuda else [])]
    return [
        element("p", lead),
        table(["part of a step", "ms", "share"], parts, class_="figures"),
        table(head, operators, class_="figures"),
        element("p", note, class_="note"),
    ]
