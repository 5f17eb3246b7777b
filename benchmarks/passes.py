"""Times passes over batches by the clock and by processor time. Standard library only, since peers use it too."""

import itertools
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Pass(NamedTuple):
    """What a number of batches took.

    Attributes:
        wall_s: seconds by the clock.
        core_s: processor time of this process and its workers.
        other_load: number of cores that were busy with other work meanwhile.
    """

    wall_s: float
    core_s: float
    other_load: float


def timed_pass(batches: Iterable[Any], warm_up: int) -> Pass:
    """Take all batches; those after the first `warm_up`, at least one, are timed."""
    times = [(time.perf_counter(), processor_s(), busy_s()) for _ in batches]
    assert len(times) > warm_up > 0
    wall_s, core_s, all_s = (last - first for first, last in zip(times[warm_up - 1], times[-1], strict=True))
    return Pass(wall_s, core_s, max(0.0, (all_s - core_s) / wall_s))


def processor_s() -> float:
    """Processor time of this process and its workers."""
    ticks = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks * TICK_S


def busy_s() -> float:
    """Seconds that the cores of this machine have worked, all processes together."""
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(rest)) * TICK_S


class RepeatedBatches:
    """Indices of a DataLoader's batches: `count` of them, over the images again and again."""

    def __init__(self, images: int, batch_size: int) -> None:
        self.images, self.batch_size, self.count = images, batch_size, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        indices = itertools.cycle(range(self.images))
        return (list(itertools.islice(indices, self.batch_size)) for _ in range(self.count))
