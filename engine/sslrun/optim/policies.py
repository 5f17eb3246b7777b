"""The learning-rate policies of the `[lr]` table: those of mmcv, with its arithmetic.

Each is a function of the step alone; arguments are those of `Schedule.regular`.
"""

from dataclasses import dataclass
from typing import Literal

from sslrun.errors import UsageError
from sslrun.optim.schedules import Schedule
from sslrun.scheduled import anneal

Anneal = Literal["cos", "linear"]


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The base learning rate throughout the run."""

    def regular(self, base: float, at: int, unit: int, total_steps: int) -> float:
        return base


@dataclass(frozen=True, kw_only=True)
class Step(Schedule):
    """The learning rate is multiplied by `gamma` at given points of the run, or at equal intervals.

    Args:
        step: where the rate changes, in the unit of `by` (epochs or iterations): a list of points, in which a number
            below 1 is a fraction of the run; or one number, the interval between changes.
        gamma: factor of the learning rate at each change.
        min_lr: lowest learning rate.
    """

    step: int | list[float]
    gamma: float = 0.1
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.step, int):
            if self.step < 1:
                raise UsageError(f"step must be at least 1, not {self.step}")
        elif not self.step or min(self.step) <= 0:
            raise UsageError("step must list epochs, iterations or fractions of the run, all above 0")
        _not_negative(gamma=self.gamma, min_lr=self.min_lr)

    def regular(self, base: float, at: int, unit: int, total_steps: int) -> float:
        if isinstance(self.step, int):
            passed = at // (self.step * unit)
        else:
            passed = sum(at >= (point * total_steps if point < 1 else point * unit) for point in self.step)
        return max(base * self.gamma**passed, self.min_lr)


@dataclass(frozen=True, kw_only=True)
class Exp(Schedule):
    """The learning rate is multiplied by `gamma` after every epoch or iteration.

    Args:
        gamma: factor of the learning rate.
    """

    gamma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _not_negative(gamma=self.gamma)

    def regular(self, base: float, at: int, unit: int, total_steps: int) -> float:
        return base * self.gamma ** (at / unit)


@dataclass(frozen=True, kw_only=True)
class Inv(Schedule):
    """The base learning rate times (1 + gamma t) ** -power, t in epochs or iterations.

    Args:
        gamma: factor of t; the larger, the sooner the rate falls.
        power: exponent; the larger, the more steeply the rate falls.
    """

    gamma: float
    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _not_negative(gamma=self.gamma, power=self.power)

    def regular(self, base: float, at: int, unit: int, total_steps: int) -> float:
        return base * (1 + self.gamma * at / unit) ** -self.power


@dataclass(frozen=True, kw_only=True)
class Annealing(Schedule, listed=False):
    """A policy from the base learning rate down to a last one.

    Args:
        min_lr: last learning rate. As in mmcv, a parameter group with a lower base rate is raised to it.
        min_lr_ratio: last learning rate divided by the base one, instead of `min_lr`.
    """

    min_lr: float = 0.0
    min_lr_ratio: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _not_negative(min_lr=self.min_lr, min_lr_ratio=self.min_lr_ratio or 0.0)
        if self.min_lr and self.min_lr_ratio is not None:
            raise UsageError("min_lr and min_lr_ratio are both set; set only one of them")

    def end(self, base: float) -> float:
        """The last learning rate of a group whose base learning rate is `base`."""
        return self.min_lr if self.min_lr_ratio is None else base * self.min_lr_ratio


@dataclass(frozen=True, kw_only=True)
class Poly(Annealing):
    """From the base learning rate to the last one as (1 - t / T) ** power; a power of 1 is linear.

    Args:
        power: exponent; above 1 the rate falls faster at first, below 1 faster at the end.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0:
            raise UsageError(f"power must be above 0, not {self.power}")

    def regular(self, base: float, at: int, unit: int, total_steps: int) -> float:
        end = self.end(base)
        return end + (base - end) * (1 - min(at / total_steps, 1.0)) ** self.power


@dataclass(frozen=True, kw_only=True)
class CosineAnnealing(Annealing):
    """Half a cosine from the base learning rate to the last one, over the whole run."""

    def regular(self, base: float, at: int, unit: int, total_steps: int) -> float:
        return anneal("cos", base, self.end(base), at / total_steps)


@dataclass(frozen=True, kw_only=True)
class FlatCosineAnnealing(Annealing):
    """The base learning rate for the first part of the run, then half a cosine to the last one.

    Args:
        start_percent: start of the cosine as a fraction of the run (0.75 is three quarters), rounded to the unit of
            `by`; 0 to below 1.
    """

    start_percent: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start_percent < 1:
            raise UsageError(f"start_percent is a fraction of the run, from 0 to below 1, not {self.start_percent}")

    def regular(self, base: float, at: int, unit: int, total_steps: int) -> float:
        start = round(total_steps / unit * self.start_percent) * unit
        return base if at < start else anneal("cos", base, self.end(base), _part(at, start, total_steps))


@dataclass(frozen=True, kw_only=True)
class CosineRestart(Annealing):
    """Half cosines one after another, each down to the last learning rate (Loshchilov & Hutter 2017, arXiv 1608.03983).

    Args:
        periods: length of each cosine in the unit of `by`; together at least as long as the run.
        restart_weights: start of each cosine, from 0 (the last learning rate) to 1 (the base one); 1 for each by
            default.
    """

    periods: list[int]
    restart_weights: list[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.periods or min(self.periods) < 1:
            raise UsageError("periods must list lengths in epochs or iterations, all at least 1")
        if self.restart_weights is not None and len(self.restart_weights) != len(self.periods):
            raise UsageError(
                f"periods has {len(self.periods)} entries and restart_weights {len(self.restart_weights)}; "
                "each period needs one weight"
            )

    def reach(self, unit: int) -> int:
        return sum(self.periods) * unit

    def regular(self, base: float, at: int, unit: int, total_steps: int) -> float:
        weights = self.restart_weights or [1.0] * len(self.periods)
        begin, end = 0, self.end(base)
        for period, weight in zip(self.periods, weights, strict=True):
            if at < begin + period * unit:
                return anneal("cos", end + weight * (base - end), end, (at - begin) / (period * unit))
            begin += period * unit
        return end


@dataclass(frozen=True, kw_only=True)
class Cyclic(Schedule):
    """Cycles in which the learning rate rises to a peak and falls again (Smith 2017, arXiv 1506.01186).

    Args:
        by: "iter" changes the rate at every step, "epoch" holds it within an epoch.
        target_ratio: peak and end of a cycle, as multiples of the base learning rate; if it is one number, the peak,
            the end is 1e-5 of it.
        cyclic_times: number of cycles in the run.
        step_ratio_up: fraction of a cycle in which the rate rises, 0 to below 1.
        anneal_strategy: shape of rise and fall: half cosines ("cos") or straight lines ("linear").
        gamma: factor by which the distance between peak and base learning rate shrinks with each cycle; above 0, at
            most 1.
    """

    by: Literal["epoch", "iter"] = "iter"
    target_ratio: float | tuple[float, float] = (10.0, 1e-4)
    cyclic_times: int = 1
    step_ratio_up: float = 0.4
    anneal_strategy: Anneal = "cos"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cyclic_times < 1:
            raise UsageError(f"cyclic_times must be at least 1, not {self.cyclic_times}")
        if not 0 <= self.step_ratio_up < 1:
            raise UsageError(f"step_ratio_up must be from 0 to below 1, not {self.step_ratio_up}")
        if not 0 < self.gamma <= 1:
            raise UsageError(f"gamma must be above 0 and at most 1, not {self.gamma}")

    def regular(self, base: float, at: int, unit: int, total_steps: int) -> float:
        ratios = self.target_ratio
        top, bottom = ratios if isinstance(ratios, tuple) else (ratios, ratios / 1e5)
        length = max(total_steps // self.cyclic_times, 1)  # steps left over begin one more cycle, as in mmcv
        up = int(self.step_ratio_up * length)
        cycle, at = divmod(at, length)
        peak = base * (1 + self.gamma**cycle * (top - 1))
        if at < up:
            return anneal(self.anneal_strategy, base, peak, at / up)
        return anneal(self.anneal_strategy, peak, base * bottom, _part(at, up, length))


@dataclass(frozen=True, kw_only=True)
class OneCycle(Schedule):
    """From a small learning rate up to the base one and down to almost 0 (Smith & Topin 2018, arXiv 1708.07120), as in
    torch and mmcv. The optimizer's `lr` is their max_lr.

    Args:
        by: "iter" changes the rate at every step, "epoch" holds it within an epoch.
        total_steps: optimizer steps of the cycle, at least those of the run; by default those of the run.
        pct_start: fraction of the cycle in which the rate rises, 0 to 1.
        anneal_strategy: shape of rise and fall: half cosines ("cos") or straight lines ("linear").
        div_factor: base learning rate divided by the first one.
        final_div_factor: first learning rate divided by the last one.
        three_phase: whether the rate first falls back to its first value as fast as it rose, and then to the last one.
    """

    by: Literal["epoch", "iter"] = "iter"
    total_steps: int | None = None
    pct_start: float = 0.3
    anneal_strategy: Anneal = "cos"
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.pct_start <= 1:
            raise UsageError(f"pct_start is a fraction of the cycle, from 0 to 1, not {self.pct_start}")
        if not min(self.div_factor, self.final_div_factor) > 0:
            raise UsageError(
                f"div_factor is {self.div_factor} and final_div_factor {self.final_div_factor}, expected both above 0"
            )

    def reach(self, unit: int) -> int | None:
        return self.total_steps

    def regular(self, base: float, at: int, unit: int, total_steps: int) -> float:
        total = self.total_steps or total_steps
        first = base / self.div_factor
        last = first / self.final_div_factor
        phases = [(self.pct_start * total - 1, first, base), (total - 1, base, last)]  # (last step, start, end)
        if self.three_phase:
            phases[1:] = [(2 * self.pct_start * total - 2, base, first), (total - 1, first, last)]
        begin = 0.0
        for until, start, end in phases:
            if at <= until:
                return anneal(self.anneal_strategy, start, end, _part(at, begin, until))
            begin = until
        return last


def _part(at: float, begin: float, end: float) -> float:
    """Position of `at` between two points, 0 to 1; 1 if the points are equal."""
    return (at - begin) / (end - begin) if end > begin else 1.0


def _not_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise UsageError(f"{name} cannot be {value}")
