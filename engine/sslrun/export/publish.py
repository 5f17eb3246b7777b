"""`sslrun publish`: a run's weights as one file, named by recipe, date and hash."""

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sslrun.errors import RunFailed, UsageError
from sslrun.export.tensor_files import save_pth
from sslrun.export.verify import same_bits
from sslrun.runtime import checkpoint
from sslrun.runtime.durable import sync_directory
from sslrun.runtime.run_files import CHECKPOINTS, run_folder_of


def publish(run: Path, directory: Path | None = None) -> Path:
    """Write a run's weights as `{config_name}_{date}-{hash}.pth`; returns the file, which was read back and compared.

    The file holds the model's tensors by name, including a momentum teacher and a queue, and nothing else:
    `torch.load(path, weights_only=True)` and `load_from = "path"` take it. The date is the day (UTC) on which the
    checkpoint was saved, the hash the first 8 hexadecimal digits of the file's SHA-256. A checkpoint that is published
    again gets the same name.

    Args:
        run: a run folder, whose newest good checkpoint is published, or a checkpoint in one.
        directory: where the file goes, created if it does not exist; None is the run folder.

    Raises:
        UsageError: there is no good checkpoint in a run folder, or the directory cannot be made.
        RunFailed: the file could not be written, or did not read back as it was written; it was removed.
    """
    source = checkpoint.find(run)
    folder = run_folder_of(source.resolve())
    if folder is None:
        raise UsageError(f"{source} is not in the {CHECKPOINTS} folder of a run, which has the name of its recipe")
    weights = checkpoint.load_weights(source)
    directory = directory or folder
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{directory} cannot be written: {error.strerror}") from error
    day = time.strftime("%Y%m%d", time.gmtime(checkpoint.saved_at(source)))
    path = _write(directory, f"{folder.name}_{day}", weights)
    difference = _difference(path, weights)
    if difference is not None:
        path.unlink()
        raise RunFailed(f"{path} did not read back as it was written ({difference}), and was removed")
    return path


def _write(directory: Path, name: str, weights: Mapping[str, Tensor]) -> Path:
    """Writes the file and names it by its hash, once all of it is on the disk."""
    beside = directory / f"{name}.{os.getpid()}.tmp"
    try:
        # The same tensors must give the same bytes: sorted names, and no path, which torch would write into them.
        save_pth(beside, {key: weights[key] for key in sorted(weights)})
        with open(beside, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        path = directory / f"{name}-{digest[:8]}.pth"
        os.replace(beside, path)
        sync_directory(directory)
    except OSError as error:
        raise RunFailed(f"{directory / name} could not be written: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)
    return path


def _difference(path: Path, weights: Mapping[str, Tensor]) -> str | None:
    """How a published file differs from the weights; None if every name and every bit is there."""
    try:
        back = checkpoint.load_weights(path)
    except UsageError as error:
        return str(error)
    if back.keys() != weights.keys():
        return f"other names: {', '.join(sorted(back.keys() ^ weights.keys())[:3])}"
    return next((name for name in weights if not same_bits(back[name], weights[name])), None)
