"""Where the time of optimizer steps goes: `sslrun train --profile N`.

After the first steps, which compile and choose algorithms, N steps are timed by their places (`heartbeat.at`), which
follow each other without a gap, so that their times add up to the whole. The next N steps are recorded with torch's
profiler, which slows them down: these give the trace and the times of operators. Rank 0 does so; the run goes on.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile

from sslrun.runtime import heartbeat
from sslrun.runtime.run_files import PROFILE

logger = logging.getLogger("sslrun")

SKIPPED = 3  # steps of the process before the first that counts
OPERATORS = 20  # as many are listed
NAME = 64  # characters of a name in the table
BETWEEN = "before the step"  # the place where a step begins
TRACE, TABLE = "trace.json.gz", "table.txt"


@contextlib.contextmanager
def profiled(steps: int, run_folder: Path | None, device: torch.device, global_batch: int) -> Iterator[None]:
    """Profiles the steps that are done inside; does nothing if `steps` is 0 or the rank has no run folder.

    Args:
        steps: number of steps to time, and of those to record after them.
        run_folder: where `profile/` is written.
        device: of the run.
        global_batch: samples of a step.
    """
    if not steps or run_folder is None:
        yield
        return
    profile_of_run = Profile(steps, run_folder / Path(PROFILE).parent, device, global_batch)
    with heartbeat.watched(profile_of_run.at):
        try:
            yield
        finally:
            profile_of_run.close()


class Profile:
    """Times and records the steps of a run; `at` gets each place of each step."""

    def __init__(self, steps: int, folder: Path, device: torch.device, global_batch: int) -> None:
        self.steps, self.folder, self.device, self.global_batch = steps, folder, device, global_batch
        self.begun = 0  # steps of this process
        self.parts = Parts()
        self._recorder: profile | None = None
        self._span: record_function | None = None
        self._is_over = False

    def at(self, doing: str) -> None:
        """The main thread enters a place."""
        if self._is_over:
            return
        if doing == BETWEEN:
            self.begun += 1
            if self.begun == SKIPPED + 1:
                self._wait()
                self.parts.start(doing)
                return
            if self.begun == SKIPPED + self.steps + 1:
                self._wait()
                self.parts.stop()
                self._recorder = profile(activities=self._activities())
                self._recorder.start()
            elif self.begun == SKIPPED + 2 * self.steps + 1:
                self.close()
                return
        if self._recorder is not None:
            self._enter(doing)
        else:
            self.parts.enter(doing)

    def close(self) -> None:
        """Write what there is, if it is not written."""
        if self._is_over:
            return
        self._is_over = True
        if self._recorder is None:
            logger.warning("no profile: the run ended before step %d of this start was done", SKIPPED + self.steps + 1)
            return
        self._wait()
        self._leave()
        self._recorder.stop()
        recorded = min(self.begun - SKIPPED - self.steps, self.steps)
        found = self._found(self._recorder.key_averages(), recorded)
        try:
            self.folder.mkdir(exist_ok=True)
            self._recorder.export_chrome_trace(str(self.folder / TRACE))
            (self.folder / Path(PROFILE).name).write_text(json.dumps(found), encoding="utf-8")
            (self.folder / TABLE).write_text("\n".join([*table(found), ""]), encoding="utf-8")
        except (OSError, RuntimeError) as error:  # which is no reason to end the run
            logger.warning("the profile could not be written: %s", error)
            return
        largest = sorted(found["parts"].items(), key=lambda part: -part[1])[:3]
        shares = ", ".join(f"{100 * ms / found['step_ms']:.0f} % {name}" for name, ms in largest)
        logger.info("profile: %.1f ms a step, %s; %s", found["step_ms"], shares, self.folder / TABLE)

    def _found(self, events: EventList, recorded: int) -> dict[str, Any]:
        """The contents of profile.json."""
        parts_ms = {name: 1e3 * seconds / self.steps for name, seconds in self.parts.seconds.items()}
        places = {*parts_ms, BETWEEN}
        listed = [each for each in events if each.key not in places and not each.key.startswith("ProfilerStep")]
        on_host = [each for each in listed if each.device_type == torch.autograd.DeviceType.CPU]
        on_device = [each for each in listed if each.device_type != torch.autograd.DeviceType.CPU]
        is_cuda = self.device.type == "cuda"
        scale = 1e-3 / max(recorded, 1)  # from microseconds of all steps to milliseconds of one
        operators = [
            {
                "name": each.key,
                "calls": each.count / max(recorded, 1),
                "ms": each.self_cpu_time_total * scale,
                **({"device_ms": each.self_device_time_total * scale} if is_cuda else {}),
            }
            for each in on_host
        ]
        operators.sort(key=lambda each: -each["device_ms" if is_cuda else "ms"])
        return {
            "device": self.device.type,
            "steps": self.steps,
            "recorded_steps": recorded,
            "global_batch": self.global_batch,
            "step_ms": sum(parts_ms.values()),
            "parts": parts_ms,
            "operators": operators[:OPERATORS],
            "host_ms": sum(each["ms"] for each in operators),
            **({"device_ms": sum(each.self_device_time_total for each in on_device) * scale} if is_cuda else {}),
        }

    def _activities(self) -> list[ProfilerActivity]:
        return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]

    def _enter(self, doing: str) -> None:
        self._leave()
        self._span = record_function(doing)
        self._span.__enter__()

    def _leave(self) -> None:
        if self._span is not None:
            self._span.__exit__(None, None, None)
            self._span = None

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Parts:
    """Seconds by the name of a place. Between `start` and `stop` every moment belongs to one place.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._place: str | None = None
        self._since = 0.0

    def start(self, doing: str) -> None:
        """Begin at a place."""
        self._place, self._since = doing, self._clock()

    def enter(self, doing: str) -> None:
        """Leave the place for another; nothing before `start`."""
        if self._place is None:
            return
        now = self._clock()
        self.seconds[self._place] = self.seconds.get(self._place, 0.0) + now - self._since
        self._place, self._since = doing, now

    def stop(self) -> None:
        """Leave the last place."""
        self.enter("")
        self._place = None


def table(found: Mapping[str, Any]) -> list[str]:
    """One page of text: the parts of a step, which add up, then the operators with the largest times of their own.

    Args:
        found: the contents of profile.json.
    """
    step_ms = found["step_ms"]
    rate = 1e3 * found["global_batch"] / step_ms
    lines = [
        f"{found['steps']} steps of {found['global_batch']} images on {found['device']}: "
        f"{step_ms:.2f} ms a step, {rate:.1f} images/s",
        "",
        f"{'part of a step':<{NAME}}{'ms':>10}{'share':>9}",
        *(f"{name:<{NAME}}{ms:>10.2f}{100 * ms / step_ms:>7.1f} %" for name, ms in found["parts"].items()),
        f"{'sum':<{NAME}}{step_ms:>10.2f}{100.0:>7.1f} %",
        "",
    ]
    if "device_ms" in found:
        lines += [
            "Parts are the host's time: it runs ahead of the GPU, and waits where it reads a result.",
            f"The GPU computed for {found['device_ms']:.2f} ms of a step.",
            "",
        ]
    lines += [
        f"Operators, from {found['recorded_steps']} further steps under torch's profiler, which slows them down",
        f"{'operator':<{NAME}}{'calls':>10}{'ms':>10}" + (f"{'GPU ms':>10}" if "device_ms" in found else ""),
    ]
    for each in found["operators"]:
        device = f"{each['device_ms']:>10.2f}" if "device_ms" in each else ""
        lines.append(f"{each['name'][: NAME - 2]:<{NAME}}{each['calls']:>10.1f}{each['ms']:>10.2f}{device}")
    return lines
