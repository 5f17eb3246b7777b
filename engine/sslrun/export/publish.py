"""Files that others load, made from what a run saved."""

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sslrun.errors import RunFailed, UsageError
from sslrun.runtime import checkpoint
from sslrun.runtime.durable import sync_directory


def publish(run: Path, directory: Path | None = None) -> Path:
    """Write a run's weights as `{config_name}_{date}-{hash}.pth`; returns the file, which was read back and compared.

    It holds the model's tensors by name, a momentum teacher and a queue included, and nothing else:
    `torch.load(path, weights_only=True)` and `load_from = "path"` take it. The date is the day (UTC) on which the
    checkpoint was saved, the hash the first 8 hexadecimal digits of the file's SHA-256: however often it is published,
    a checkpoint has one name.

    Args:
        run: a run folder, of which the newest good checkpoint is taken, or a checkpoint in one.
        directory: where the file goes, made if it is not there; None is the run folder.

    Raises:
        UsageError: there is no good checkpoint in a run folder, or the directory cannot be made.
        RunFailed: the file could not be written, or did not read back as it was written; it is gone again.
    """
    found = checkpoint.find(run)
    parent = found.resolve().parent
    if parent.name != "checkpoints":
        raise UsageError(f"{found} is not in the checkpoints folder of a run, which has the name of its recipe")
    weights = checkpoint.load_weights(found)
    directory = directory or parent.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{directory} cannot be written: {error.strerror}") from error
    day = time.strftime("%Y%m%d", time.gmtime(checkpoint.saved_at(found)))
    path = _write(directory, f"{parent.parent.name}_{day}", weights)
    wrong = _difference(path, weights)
    if wrong is not None:
        path.unlink()
        raise RunFailed(f"{path} did not read back as it was written ({wrong}), and was removed")
    return path


def _write(directory: Path, name: str, weights: Mapping[str, Tensor]) -> Path:
    """The file under its own hash: all of it is on the disk before it has its name."""
    beside = directory / f"{name}.{os.getpid()}.tmp"
    try:
        with open(beside, "wb") as file:
            # The same tensors must give the same bytes: names in order, and no path, which torch would write into them.
            torch.save({key: weights[key] for key in sorted(weights)}, file)
            file.flush()
            os.fsync(file.fileno())
        with open(beside, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        path = directory / f"{name}-{digest[:8]}.pth"
        os.replace(beside, path)
        sync_directory(directory)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's, about what became of its file on a full disk
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or str(cause).partition("\n")[0]
        raise RunFailed(f"{directory / name} could not be written: {reason}") from error
    finally:
        beside.unlink(missing_ok=True)
    return path


def _difference(path: Path, weights: Mapping[str, Tensor]) -> str | None:
    """What a published file does not give back as it should; None if every name and every bit is there."""
    try:
        back = checkpoint.load_weights(path)
    except UsageError as error:
        return str(error)
    if back.keys() != weights.keys():
        return f"other names: {', '.join(sorted(back.keys() ^ weights.keys())[:3])}"
    return next((name for name in weights if not _equal(back[name], weights[name])), None)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Bit by bit, so that a NaN equals itself."""
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)))
