"""Which rank is missing, and the sentence that says so: pure functions of what was last heard of each rank."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

IN_ORDER = ""
ALMOST = (
    0.8  # of the time without a beat, for a rank that was lost with another: their last beats differ by some seconds
)


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself every few seconds.

    Attributes:
        count: number of the beat. One that stays the same for long is the last of a rank that is lost.
        host: name of its machine.
        pid: its process.
        step: the optimizer step that it works on; 0 before the first one.
        place: how many places of the step it has entered. All ranks enter the same places in the same order, so that
            the rank with the least (step, place) is the one that the others wait for.
        doing: name of the place.
        stood_s: for how long it has made no progress.
        patience_s: for how long it may.
        broken: the error of a collective, after which the rank waits for a verdict.
        ended: None while it runs, `IN_ORDER` after it has left in order, else what it has ended with.
    """

    count: int
    host: str
    pid: int
    step: int
    place: int
    doing: str
    stood_s: float
    patience_s: float
    broken: str = ""
    ended: str | None = None

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: bytes) -> "Beat":
        return Beat(**json.loads(text))


@dataclass(frozen=True)
class Heard:
    """The last beat of a rank, and how long ago it came, by the clock of who listens."""

    beat: Beat
    silent_s: float

    def older(self, seconds: float) -> "Heard":
        return replace(self, silent_s=self.silent_s + seconds)


@dataclass(frozen=True)
class Limits:
    """When a rank counts as missing, in seconds.

    Attributes:
        silence_s: without a beat.
        soon_s: without a beat, after the connection between the ranks has broken.
        grace_s: after a rank has ended with an error. The others mostly have the same error, and end by themselves.
    """

    silence_s: float
    soon_s: float
    grace_s: float


def is_gone(heard: Heard, everyone: Iterable[Heard], limits: Limits) -> bool:
    """Whether a rank has ended, or is silent for so long that it cannot judge others."""
    return heard.beat.ended is not None or heard.silent_s >= _silence_s(everyone, limits)


def verdict(ranks: Mapping[int, Heard], limits: Limits) -> str | None:
    """Why the run cannot go on, in one sentence that names the ranks that are missing; None if none is missing.

    A rank is missing if it has ended with an error and others have not, if its beats have stopped, or if it stands for
    longer than it may while the others have gone on to a place where they wait for it.

    Args:
        ranks: what was last heard of each rank.
        limits: when a rank counts as missing.
    """
    running = {rank: heard for rank, heard in ranks.items() if heard.beat.ended is None}
    if not running:
        return None
    failed = {rank: h for rank, h in ranks.items() if h.beat.ended and h.silent_s >= limits.grace_s}
    if failed:
        first = next(iter(failed.values())).beat
        return f"{names(failed)} ended in {_step(first)}: {first.ended}"
    silence_s = _silence_s(running.values(), limits)
    if any(heard.silent_s >= silence_s for heard in running.values()):
        silent = {rank: heard for rank, heard in running.items() if heard.silent_s >= ALMOST * silence_s}
        hosts = {heard.beat.host for heard in silent.values()}
        processes = "its process has" if len(silent) == 1 else "their processes have"
        others = [heard.beat.step for rank, heard in running.items() if rank not in silent]
        who = missing(silent, min(heard.silent_s for heard in silent.values()), min(others, default=0))
        return (
            f"{who}: {processes} died or stopped, or "
            f"{_joined(sorted(hosts))} {'is' if len(hosts) == 1 else 'are'} cut off"
        )
    last = min((heard.beat.step, heard.beat.place) for heard in running.values())
    behind = {rank: heard for rank, heard in running.items() if (heard.beat.step, heard.beat.place) == last}
    stood_s = min(heard.beat.stood_s for heard in behind.values())
    if all(heard.beat.stood_s >= heard.beat.patience_s for heard in behind.values()):
        if len(behind) < len(running):
            lives = "its process lives, but does" if len(behind) == 1 else "their processes live, but do"
            return f"{missing(behind, stood_s)} (engine.timeout_s): {lives} not go on"
        first = next(iter(behind.values())).beat
        return f"no rank has come back from {_step(first)} ({first.doing}) for {stood_s:.0f} s (engine.timeout_s)"
    for rank, heard in running.items():
        if heard.beat.broken and heard.beat.stood_s >= limits.silence_s:
            here = names({rank: heard})
            return f"the connection between the ranks broke in {_step(heard.beat)}; {here} has: {heard.beat.broken}"
    return None


def missing(ranks: Mapping[int, Heard], for_s: float, step: int = 0) -> str:
    """`rank 3 on host b has not come back from step 1,204 (forward) for 120 s`.

    Args:
        ranks: those that are missing.
        for_s: for how long.
        step: the step in which the others are: a rank that was in an earlier one when it was last heard was in this one
            when it was lost.
    """
    first = min((heard.beat for heard in ranks.values()), key=lambda beat: (beat.step, beat.place))
    where = f"{_step(first)} ({first.doing})" if first.step >= step else f"step {step:,}"
    return f"{names(ranks)} {'has' if len(ranks) == 1 else 'have'} not come back from {where} for {for_s:.0f} s"


def names(ranks: Mapping[int, Heard]) -> str:
    """`rank 3 on host b`, `ranks 4-7 on host b and rank 9 on host c`."""
    of_host: dict[str, list[int]] = {}
    for rank, heard in sorted(ranks.items()):
        of_host.setdefault(heard.beat.host, []).append(rank)
    return _joined([f"{numbered(numbers)} on host {host}" for host, numbers in of_host.items()])


def numbered(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0, 2 and 4-7`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    is_one = len(runs) == 1 and runs[0][0] == runs[0][1]
    texts = [f"{first}" if first == last else f"{first}-{last}" for first, last in runs]
    return f"rank{'' if is_one else 's'} {_joined(texts)}"


def _silence_s(everyone: Iterable[Heard], limits: Limits) -> float:
    is_broken = any(heard.beat.broken for heard in everyone)
    return min(limits.soon_s, limits.silence_s) if is_broken else limits.silence_s


def _step(beat: Beat) -> str:
    return f"step {beat.step:,}" if beat.step else "the start"


def _joined(texts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))
