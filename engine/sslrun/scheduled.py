"""Numbers of a recipe that may change over a run: a number, or a table that says how it changes.

They are functions of the step alone, so a resume needs nothing but the step. The learning rate has policies of its own
(`sslrun.optim`), which use the same courses.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from sslrun.errors import UsageError


class Position(Protocol):
    """A position in a run, such as `sslrun.Progress`."""

    @property
    def step(self) -> int: ...
    @property
    def total_steps(self) -> int: ...
    @property
    def steps_per_epoch(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Scheduled:
    """A number that changes over the run: from `start` to `end`.

    Attributes:
        schedule: the course: "cosine" (half a cosine), "linear", "step" (`start`, then at once `end`) or "constant"
            (`start`).
        start: the number where the course begins, after the warm-up.
        end: the number where the course ends, and from there on; not needed for "constant".
        epochs: length of the course in epochs; by default it ends with the run.
        iters: length of the course in optimizer steps, instead of `epochs`.
        warmup_epochs: epochs before the course in which the number rises from `warmup_start` to `start`.
        warmup_iters: optimizer steps of the warm-up, instead of `warmup_epochs`.
        warmup_start: the number at the first step of the warm-up.
        by: "iter" changes the number at every step, "epoch" holds it within an epoch.
    """

    schedule: Literal["cosine", "linear", "step", "constant"]
    start: float
    end: float | None = None
    epochs: float = 0.0
    iters: int = 0
    warmup_epochs: float = 0.0
    warmup_iters: int = 0
    warmup_start: float = 0.0
    by: Literal["iter", "epoch"] = "iter"

    def __post_init__(self) -> None:
        if min(self.epochs, self.iters, self.warmup_epochs, self.warmup_iters) < 0:
            raise UsageError("the lengths of a schedule cannot be negative")
        if (self.epochs and self.iters) or (self.warmup_epochs and self.warmup_iters):
            raise UsageError("a schedule has its length, and its warm-up's, in epochs or in iters, not in both")
        if self.end is None and self.schedule != "constant":
            raise UsageError(f'schedule = "{self.schedule}" needs end, the number where it ends')
        if self.schedule == "step" and not (self.epochs or self.iters):
            raise UsageError('schedule = "step" needs epochs or iters: when `end` replaces `start`')

    def at(self, position: Position) -> float:
        """The number at a position of the run."""
        unit = position.steps_per_epoch if self.by == "epoch" else 1
        step = position.step // unit * unit
        warmup = self.warmup_iters or round(self.warmup_epochs * position.steps_per_epoch)
        if step < warmup:
            return anneal("linear", self.warmup_start, self.start, step / warmup)
        if self.end is None or self.schedule == "constant":
            return self.start
        length = self.iters or round(self.epochs * position.steps_per_epoch) or position.total_steps - warmup
        fraction = (step - warmup) / length if length > 0 else 1.0
        if self.schedule == "step":
            return self.end if fraction >= 1 else self.start
        return anneal("cos" if self.schedule == "cosine" else "linear", self.start, self.end, fraction)

    def times(self, factor: float) -> "Scheduled":
        """The schedule of this number times a factor."""
        end = None if self.end is None else self.end * factor
        return replace(self, start=self.start * factor, end=end, warmup_start=self.warmup_start * factor)

    def extremes(self) -> list[float]:
        """Numbers between which all of its values are."""
        has_warmup = self.warmup_epochs or self.warmup_iters
        return [self.start, *([] if self.end is None else [self.end]), *([self.warmup_start] if has_warmup else [])]


Number = float | Scheduled


def at(number: Number, position: Position) -> float:
    """A number of a recipe at a position of the run."""
    return number.at(position) if isinstance(number, Scheduled) else number


def extremes(number: Any) -> list[Any]:
    """Numbers between which all values of a number are; anything else alone."""
    return number.extremes() if isinstance(number, Scheduled) else [number]


def plain(number: Any) -> Any:
    """The first number of a schedule; anything else as it is."""
    return number.start if isinstance(number, Scheduled) else number


def product(number: Number, factor: Number) -> Number:
    """Their product, of which one at most changes over the run."""
    if isinstance(number, Scheduled):
        if isinstance(factor, Scheduled):
            raise UsageError("a factor that has a schedule cannot multiply a number that has one")
        return number.times(factor)
    return factor.times(number) if isinstance(factor, Scheduled) else number * factor


def anneal(course: Literal["cos", "linear"], start: float, end: float, fraction: float) -> float:
    """From `start` to `end` as `fraction` goes from 0 to 1, and no further: half a cosine or a straight line."""
    fraction = min(fraction, 1.0)
    if course == "linear":
        return start + (end - start) * fraction
    return end + 0.5 * (start - end) * (math.cos(math.pi * fraction) + 1)
