"""What the state.json of a run's checkpoint holds: everything that a resume needs beside the tensors."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sslrun.errors import UsageError
from sslrun.runtime import checkpoint
from sslrun.runtime.run_files import is_number


@dataclass(frozen=True)
class RunState:
    """The state of a run beside its tensors.

    Attributes:
        step: optimizer steps done.
        num_samples: number of training samples, which the order of samples depends on.
        step_metrics: sums of the metrics since the last row, as `StepMetrics.state` returns them.
        bad_samples: bad images of all ranks, as `BadSamples.state_dict` returns them.
        images: `Source.identity` of the training images; None in checkpoints that were written without it.
        is_measured: whether the measurements that were due at this step were made; a stop may have come before.
    """

    step: int
    num_samples: int
    step_metrics: dict[str, Any]
    bad_samples: dict[str, str]
    images: str | None = None
    is_measured: bool = True


def save(directory: Path, tensors: checkpoint.Tensors, state: RunState) -> None:
    """Writes a run's checkpoint. Raises RunFailed if it could not be written."""
    checkpoint.save(directory, state.step, tensors, asdict(state))


def load(path: Path) -> tuple[checkpoint.Tensors, RunState]:
    """Reads a run's checkpoint.

    Raises:
        UsageError: the path is not a checkpoint, or it is damaged, or its state is not one that a run writes.
        RunFailed: the storage gives errors.
    """
    tensors, state = checkpoint.load(path)
    if not _is_complete(state):
        raise UsageError(f"{path} cannot be loaded: {checkpoint.STATE} is not the state of a run")
    return tensors, RunState(**state)


def _is_complete(state: Any) -> bool:
    if not isinstance(state, dict) or state.keys() | {"images", "is_measured"} != RunState.__annotations__.keys():
        return False
    metrics, bad = state["step_metrics"], state["bad_samples"]
    return (
        _is_count(state["step"])
        and _is_count(state["num_samples"])
        and state["num_samples"] > 0
        and isinstance(state.get("images"), str | None)
        and isinstance(state.get("is_measured", True), bool)
        and isinstance(bad, dict)
        and all(sample.isdecimal() and isinstance(text, str) for sample, text in bad.items())
        and isinstance(metrics, dict)
        and _is_count(metrics.get("steps"))
        and isinstance(metrics.get("sums"), dict)
        and all(_are_numbers(shares) for shares in metrics["sums"].values())
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _are_numbers(shares: Any) -> bool:
    """One number for each rank; those that are not finite are written as such."""
    return isinstance(shares, list) and bool(shares) and all(is_number(n) or isinstance(n, float) for n in shares)
