"""Learning rates as pure functions of the step: nothing here has state, so a resume needs nothing but the step.

The policies are mmcv's, with its arithmetic. A step number counts optimiser steps done: `value(base, 0, ...)` is used
for the first step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sslrun.config.component import Component
from sslrun.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Schedule(Component, kind="schedules", tag="policy"):
    """A learning-rate policy with an optional warm-up.

    Args:
        by: "epoch" holds the value within an epoch, as mmcv does by default; "iter" changes it at every step. Warm-up
            goes by iteration in either case.
        warmup: "linear" raises the rate from `warmup_ratio` times the policy's value to the policy's value.
        warmup_iters: length of the warm-up in optimiser steps.
        warmup_epochs: length of the warm-up in epochs, instead of `warmup_iters`.
        warmup_ratio: where the warm-up begins, as a part of the policy's value; above 0, at most 1.
    """

    by: Literal["epoch", "iter"] = "epoch"
    warmup: Literal["linear"] | None = None
    warmup_iters: int = 0
    warmup_epochs: float = 0.0
    warmup_ratio: float = 0.1

    def __post_init__(self) -> None:
        if self.warmup_iters < 0 or self.warmup_epochs < 0:
            raise UsageError("warmup_iters and warmup_epochs cannot be negative")
        if self.warmup is not None and (self.warmup_iters > 0) == (self.warmup_epochs > 0):
            raise UsageError("warmup needs its length: either warmup_iters or warmup_epochs, above 0")
        if self.warmup is None and (self.warmup_iters or self.warmup_epochs):
            raise UsageError('warmup_iters and warmup_epochs do nothing without warmup = "linear"')
        if not 0 < self.warmup_ratio <= 1:
            raise UsageError(f"warmup_ratio must be above 0 and at most 1, not {self.warmup_ratio}")

    def value(self, base: float, step: int, steps_per_epoch: int, total_steps: int) -> float:
        """The learning rate of one step.

        Args:
            base: the learning rate that the recipe states for the parameter group.
            step: optimiser steps done before this one.
            steps_per_epoch: optimiser steps per epoch.
            total_steps: optimiser steps of the whole run.
        """
        at = step if self.by == "iter" else step // steps_per_epoch * steps_per_epoch
        regular = self.regular(base, at, steps_per_epoch, total_steps)
        warmup_steps = self.warmup_iters or round(self.warmup_epochs * steps_per_epoch)
        if step >= warmup_steps:
            return regular
        return regular * (1 - (1 - step / warmup_steps) * (1 - self.warmup_ratio))

    def regular(self, base: float, at: int, steps_per_epoch: int, total_steps: int) -> float:
        """The policy without warm-up, at step `at` (with by = "epoch": the first step of the current epoch)."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The stated learning rate, all along."""

    def regular(self, base: float, at: int, steps_per_epoch: int, total_steps: int) -> float:
        return base


@dataclass(frozen=True, kw_only=True)
class CosineAnnealing(Schedule):
    """Half a cosine from the stated learning rate down to `min_lr`, reached at the end of the run.

    Args:
        min_lr: where it ends. A group whose rate is below it is raised to it, as in mmcv.
    """

    min_lr: float = 0.0

    def regular(self, base: float, at: int, steps_per_epoch: int, total_steps: int) -> float:
        return _cosine(base, self.min_lr, min(at / total_steps, 1.0))


@dataclass(frozen=True, kw_only=True)
class Step(Schedule):
    """The learning rate is multiplied by `gamma` at each of some points of the run.

    Args:
        step: where, in the unit of `by` (epochs or iterations); a number below 1 is a fraction of the run.
        gamma: the factor.
    """

    step: list[float]
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.step or min(self.step) <= 0:
            raise UsageError("step must list epochs, iterations or fractions of the run, all above 0")

    def regular(self, base: float, at: int, steps_per_epoch: int, total_steps: int) -> float:
        unit = steps_per_epoch if self.by == "epoch" else 1
        passed = sum(at >= (point * total_steps if point < 1 else point * unit) for point in self.step)
        return base * self.gamma**passed


@dataclass(frozen=True, kw_only=True)
class Cyclic(Schedule):
    """Cosine up to a peak and down again, some times over the run (Smith 2017, with cosines for the triangles).

    Args:
        by: "iter" changes the rate at every step, "epoch" holds it within an epoch.
        target_ratio: the peak and the end of a cycle, as multiples of the stated learning rate.
        cyclic_times: number of cycles in the run.
        step_ratio_up: the rising part of a cycle; from 0 to below 1.
    """

    by: Literal["epoch", "iter"] = "iter"
    target_ratio: tuple[float, float] = (10.0, 1e-4)
    cyclic_times: int = 1
    step_ratio_up: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cyclic_times < 1:
            raise UsageError(f"cyclic_times must be at least 1, not {self.cyclic_times}")
        if not 0 <= self.step_ratio_up < 1:
            raise UsageError(f"step_ratio_up must be from 0 to below 1, not {self.step_ratio_up}")

    def regular(self, base: float, at: int, steps_per_epoch: int, total_steps: int) -> float:
        peak, end = self.target_ratio
        cycle = max(total_steps // self.cyclic_times, 1)  # steps left over begin one more cycle, as in mmcv
        up = int(self.step_ratio_up * cycle)
        at %= cycle
        if at < up:
            return _cosine(base, base * peak, at / up)
        return _cosine(base * peak, base * end, (at - up) / (cycle - up))


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + 0.5 * (start - end) * (math.cos(math.pi * fraction) + 1)


def learning_rates(
    groups: Sequence[Mapping[str, Any]], schedule: Schedule, step: int, steps_per_epoch: int, total_steps: int
) -> list[float | None]:
    """The rate of every parameter group for one step: a group with `fix_lr` keeps the one that it started with, and a
    group that is frozen until later has None."""

    def rate(group: Mapping[str, Any]) -> float | None:
        if step < group["freeze_iters"]:
            return None
        initial: float = group["initial_lr"]
        return initial if group["fix_lr"] else schedule.value(initial, step, steps_per_epoch, total_steps)

    return [rate(group) for group in groups]
