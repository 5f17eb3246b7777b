"""Learning rates as pure functions of the step. Nothing here has state, so a resume needs only the step.

A step number counts the optimizer steps done: `value(base, 0, ...)` is the rate of the first step. The policies are in
`policies.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sslrun.config.component import Component
from sslrun.errors import UsageError
from sslrun.scheduled import Position, at


@dataclass(frozen=True, kw_only=True)
class Schedule(Component, kind="schedules", tag="policy"):
    """A learning-rate policy with an optional warm-up.

    Args:
        by: unit of the policy: "epoch" changes the learning rate once per epoch, as mmcv does by default; "iter" at
            every step. Warm-up changes it at every step in either case.
        warmup: shape of the warm-up from `warmup_ratio` times the policy's rate to the policy's rate: "constant" keeps
            the low rate, "linear" rises linearly, "exp" by equal factors; no warm-up if not given.
        warmup_iters: length of the warm-up in optimizer steps.
        warmup_epochs: length of the warm-up in epochs, instead of `warmup_iters`.
        warmup_ratio: first learning rate of the warm-up divided by the policy's rate; above 0, at most 1.
        after_warmup: whether the policy starts where the warm-up ends, as in MMSelfSup 1.x and in the papers of MAE and
            MoCo v3; if false, it starts with the run, as in mmcv.
    """

    by: Literal["epoch", "iter"] = "epoch"
    warmup: Literal["constant", "linear", "exp"] | None = None
    warmup_iters: int = 0
    warmup_epochs: float = 0.0
    warmup_ratio: float = 0.1
    after_warmup: bool = False

    def __post_init__(self) -> None:
        if self.warmup_iters < 0 or self.warmup_epochs < 0:
            raise UsageError("warmup_iters and warmup_epochs cannot be negative")
        if self.warmup is not None and (self.warmup_iters > 0) == (self.warmup_epochs > 0):
            raise UsageError("warmup needs its length: either warmup_iters or warmup_epochs, above 0")
        if self.warmup is None and (self.warmup_iters or self.warmup_epochs or self.after_warmup):
            raise UsageError('warmup_iters, warmup_epochs and after_warmup do nothing without warmup = "linear"')
        if not 0 < self.warmup_ratio <= 1:
            raise UsageError(f"warmup_ratio must be above 0 and at most 1, not {self.warmup_ratio}")

    def value(self, base: float, step: int, steps_per_epoch: int, total_steps: int) -> float:
        """The learning rate of one step.

        Args:
            base: the base learning rate of the parameter group.
            step: optimizer steps done before this one.
            steps_per_epoch: optimizer steps per epoch.
            total_steps: optimizer steps of the whole run.
        """
        unit = self._unit(steps_per_epoch)
        at = step // unit * unit
        warmup_steps, skipped = self._warmup_steps(steps_per_epoch)
        regular = self.regular(base, max(at - skipped, 0), unit, max(total_steps - skipped, 1))
        return regular if step >= warmup_steps else regular * self._warmup_factor(step / warmup_steps)

    def regular(self, base: float, at: int, unit: int, total_steps: int) -> float:
        """The policy without warm-up.

        Args:
            base: the base learning rate of the parameter group.
            at: optimizer steps done; with by = "epoch" those before the current epoch.
            unit: optimizer steps in the unit of `by`.
            total_steps: optimizer steps of the policy.
        """
        raise NotImplementedError

    def reach(self, unit: int) -> int | None:
        """Number of steps that the policy is defined for; None if it has no end. `unit` is that of `regular`."""
        return None

    def check(self, steps_per_epoch: int, total_steps: int) -> None:
        """Raise UsageError if the policy ends before the run does."""
        _, skipped = self._warmup_steps(steps_per_epoch)
        reach, length = self.reach(self._unit(steps_per_epoch)), total_steps - skipped
        if reach is not None and reach < length:
            raise UsageError(
                f"lr: {type(self).__name__} ends after {reach} steps ({reach / steps_per_epoch:g} epochs), but has to "
                f"last for {length} ({length / steps_per_epoch:g} epochs)"
            )

    def warmup_steps(self, steps_per_epoch: int) -> int:
        """Number of optimizer steps of the warm-up."""
        return self._warmup_steps(steps_per_epoch)[0]

    def _warmup_steps(self, steps_per_epoch: int) -> tuple[int, int]:
        """Number of steps of the warm-up, and number of these before the start of the policy."""
        steps = self.warmup_iters or round(self.warmup_epochs * steps_per_epoch)
        return steps, steps if self.after_warmup else 0

    def _warmup_factor(self, fraction: float) -> float:
        """Factor of the policy's rate after this fraction of the warm-up."""
        match self.warmup:
            case "constant":
                return self.warmup_ratio
            case "exp":
                return self.warmup_ratio ** (1 - fraction)
        return 1 - (1 - fraction) * (1 - self.warmup_ratio)

    def _unit(self, steps_per_epoch: int) -> int:
        """Steps in the unit of `by`."""
        return steps_per_epoch if self.by == "epoch" else 1


def learning_rates(groups: Sequence[Mapping[str, Any]], schedule: Schedule, position: Position) -> list[float | None]:
    """The learning rate of every parameter group for one step; None for a group that is still frozen.

    Groups with `fix_lr` keep their base learning rate. A ramp begins with 0 at the first step after the freeze.
    """

    def steps(group: Mapping[str, Any], name: str) -> int:
        iters, epochs = group.get(f"{name}_iters", 0), group.get(f"{name}_epochs", 0)
        return iters or round(epochs * position.steps_per_epoch)

    def rate(group: Mapping[str, Any]) -> float | None:
        done, ramp = position.step - steps(group, "freeze"), steps(group, "ramp")
        if done < 0:
            return None
        initial = at(group["initial_lr"], position) * (done / ramp if done < ramp else 1.0)
        if group["fix_lr"]:
            return initial
        return schedule.value(initial, position.step, position.steps_per_epoch, position.total_steps)

    return [rate(group) for group in groups]


def weight_decays(groups: Sequence[Mapping[str, Any]], position: Position) -> list[float]:
    """The weight decay of every parameter group for one step."""
    return [at(group["initial_weight_decay"], position) for group in groups]
