"""Checkpoints: folders `step_00001234` with tensors (safetensors), JSON, and a manifest of sizes and hashes.

A kill never leaves a half-written folder of that name: all files are written and synced under another name, the
manifest last, and then the folder is renamed. Nothing is pickled. One process writes (rank 0 of the run that holds the
run folder's lock); any number of processes may read.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from safetensors import SafetensorError

from sslrun.config.paths import stated
from sslrun.errors import RunFailed, UsageError
from sslrun.runtime.durable import read_patiently, sync_directory, write_file
from sslrun.runtime.run_files import CHECKPOINTS
from sslrun.runtime.safetensors_file import read_tensors, write_tensors

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST_BYTES = 2**20  # of the longest manifest that is read
MANIFEST = "manifest.json"
STATE = "state.json"
FILES = ("model.safetensors", "optimizer.safetensors", STATE)
PREFIX = "step_"
PUBLISHED = re.compile(r".*_\d{8}-([0-9a-f]{8})\.pth")  # {config_name}_{date}-{hash}.pth
UNFINISHED, DELETED, SET_ASIDE = ".tmp", ".del", ".aside"

Tensors = dict[str, dict[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The `[checkpoint]` table: when a run is saved. It is always saved at its end and on a signal to stop.

    The state is copied between two steps, and written while training goes on. The copy takes as much memory of the host
    as a checkpoint takes of the disk.

    Attributes:
        interval: epochs or optimizer steps between two checkpoints, by the unit in `by`.
        by: unit of `interval`: "epoch" or "iter" (optimizer steps).
        max_keep_ckpts: number of newest checkpoints to keep; -1 keeps all.
    """

    interval: int = 10
    by: Literal["epoch", "iter"] = "epoch"
    max_keep_ckpts: int = 3

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise UsageError(f"interval must be at least 1, not {self.interval}")
        if self.max_keep_ckpts < 1 and self.max_keep_ckpts != -1:
            raise UsageError(f"max_keep_ckpts must be at least 1, or -1 for all, not {self.max_keep_ckpts}")

    def is_due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether a checkpoint is due after `step` optimizer steps."""
        return step > 0 and step % (self.interval * (steps_per_epoch if self.by == "epoch" else 1)) == 0


def save(directory: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: dict[str, Any]) -> Path:
    """Write one checkpoint, wait until it is on the disk, and return its folder. Any thread may call it.

    A good checkpoint of the same step is kept as it is: a run has one state at a step.

    Args:
        directory: the run's `checkpoints` folder; created in the run folder if it does not exist.
        step: optimizer steps done.
        tensors: for "model" and "optimizer", tensors by name. They may be on any device, strided, and share
            storage. `load` returns the same bits and shapes, contiguous.
        state: everything else, as JSON values.

    Raises:
        RunFailed: the checkpoint could not be written (disk full, read-only, quota). Older ones are untouched.
    """
    folder = directory / f"{PREFIX}{step:08d}"
    if folder.exists() and damage(folder) is None:
        return folder
    beside = folder.with_name(folder.name + UNFINISHED)
    try:
        directory.mkdir(exist_ok=True)  # not its parents: a run folder that was removed is not made anew
        if beside.exists():
            shutil.rmtree(beside)
        beside.mkdir()
        files = {f"{name}.safetensors": write_tensors(beside / f"{name}.safetensors", t) for name, t in tensors.items()}
        files[STATE] = _write_json(beside / STATE, state)
        _write_json(beside / MANIFEST, {"format": FORMAT, "step": step, "time": time.time(), "files": files})
        sync_directory(beside)
        if folder.exists():
            _delete(folder)
        os.rename(beside, folder)
        sync_directory(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(beside)
        raise RunFailed(
            f"the checkpoint of step {step} could not be written to {directory}: {error.strerror or error}; "
            "older checkpoints are untouched"
        ) from error
    return folder


def load(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read a checkpoint's tensors (on the CPU, contiguous) and its JSON state.

    The tensors may be private memory maps of the file. Copy them to their destination.

    Raises:
        UsageError: the path is not a checkpoint, or the checkpoint is damaged.
        RunFailed: the storage gives errors.
    """
    reason = damage(path)
    if reason is not None:
        raise UsageError(f"{path} cannot be loaded: {reason}")
    try:
        return read_patiently(path, _content)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be loaded: {error}") from error


def _content(path: Path) -> tuple[Tensors, dict[str, Any]]:
    files = _manifest(path)["files"]
    tensors = {name.removesuffix(".safetensors"): read_tensors(path / name) for name in files if name != STATE}
    return tensors, json.loads((path / STATE).read_bytes())


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The model's tensors of a checkpoint, of a run's newest good checkpoint, or of a .safetensors or .pth file.

    A .pth file, and a file of any other name, is read with `weights_only=True` and must hold tensors by name. If it has
    the name of published weights, its content is compared with the hash in the name.

    Raises:
        UsageError: the path does not exist, is of another kind, or is damaged.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # reading a pipe would wait for its writer
        raise UsageError(f"{path} cannot be loaded: it is neither a file nor a folder")
    if path.suffix == ".safetensors":
        try:
            return read_tensors(path)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{path} cannot be loaded: {error}") from error
    if path.suffix == ".pth" or path.is_file():
        return _load_pth(path)
    if (path / "config.json").is_file() and not (path / MANIFEST).is_file():
        raise UsageError(f"{path} cannot be loaded: it is a folder of another program; {foreign_hint(path)}")
    return load(find(path))[0]["model"]


def foreign_hint(path: Path) -> str:
    """How weights of another project are brought into the form that is loaded here."""
    command = f"sslrun import-weights {shlex.quote(str(path))} -o NEW.safetensors"
    return f"weights of another project are brought in by `{command}`"


def _manifest(path: Path) -> Any:
    """The manifest of a checkpoint. ValueError: it is not JSON, or longer than any."""
    with open(path / MANIFEST, "rb") as file:
        content = file.read(MANIFEST_BYTES + 1)
    if len(content) > MANIFEST_BYTES:
        raise ValueError(f"it has more than {MANIFEST_BYTES:,} bytes")
    return json.loads(content)


def saved_at(path: Path) -> float:
    """When a checkpoint was saved, in seconds since 1970. A copy of a checkpoint has the time of the original."""
    written: float = _manifest(path)["time"]
    return written


def damage(path: Path) -> str | None:
    """Why a checkpoint is damaged; None if every byte is as it was written.

    Raises:
        RunFailed: the storage gives errors, so whether it is damaged is not known.
    """
    return read_patiently(path, _damage)


def _damage(path: Path) -> str | None:
    try:
        for name in (MANIFEST, STATE):
            if (path / name).exists() and not (path / name).is_file():  # reading a pipe would wait for its writer
                return f"{name} is not a file"
        manifest = _manifest(path)
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']!r}, this version reads {FORMAT}"
        if (named := _step(path)) is not None and named != manifest["step"]:
            return f"{MANIFEST} belongs to step {manifest['step']}"
        if missing := [name for name in FILES if name not in manifest["files"]]:
            return f"{MANIFEST} does not list {missing[0]}"
        for name, expected in manifest["files"].items():
            if Path(name).name != name or ((path / name).exists() and not (path / name).is_file()):
                return f"{MANIFEST} lists {name!r}, which is not a file of the checkpoint"
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            with open(path / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return f"{name} is not what was written (its hash differs)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except NotADirectoryError:
        return "it is not a folder"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is unreadable"
    return None


def steps(directory: Path) -> dict[int, Path]:
    """The checkpoints of a folder by step, ascending, including damaged ones; none if there is no such folder.

    Raises:
        RunFailed: the storage gives errors, so which checkpoints there are is not known.
    """
    try:
        names = read_patiently(directory, os.listdir)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    by_step = {step: directory / name for name in names if (step := _step(directory / name)) is not None}
    return dict(sorted(by_step.items()))


def newest_good(directory: Path) -> Path | None:
    """The newest undamaged checkpoint, None if there is none. Each newer damaged one is a warning.

    Raises:
        RunFailed: the storage gives errors. A checkpoint that cannot be read now is never passed over for an older one.
    """
    for path in reversed(steps(directory).values()):
        reason = damage(path)
        if reason is None:
            return path
        logger.warning("checkpoint %s is damaged (%s); trying the one before it", path, reason)
    return None


def find(path: Path) -> Path:
    """The checkpoint at a user's path, which is a checkpoint, a folder of checkpoints, or a run folder.

    Of several checkpoints it is the newest good one.

    Raises:
        UsageError: there is none.
    """
    if (path / MANIFEST).is_file() or path.name.startswith(PREFIX):
        return path
    newest = newest_good(path / CHECKPOINTS) or newest_good(path)
    if newest is None:
        what = " is neither a checkpoint nor a run folder with a good one" if path.exists() else " does not exist"
        raise UsageError(stated(path, what))
    return newest


def prune(directory: Path, max_keep: int) -> None:
    """Delete all but the newest `max_keep` checkpoints; -1 keeps all. A failed deletion is only a warning."""
    if max_keep == -1:
        return
    try:
        old = list(steps(directory).values())[:-max_keep]
    except RunFailed as error:
        logger.warning("old checkpoints could not be deleted: %s", error)
        return
    for path in old:
        try:
            _delete(path)
        except OSError as error:
            logger.warning("old checkpoint %s could not be deleted: %s", path, error.strerror or error)


def set_aside_newer(directory: Path, step: int) -> None:
    """Rename the checkpoints after a step, so that a run that continues from it does not later resume from them.

    They are damaged, or their steps will be computed again. One that is set aside replaces an earlier one of its step.

    Raises:
        RunFailed: one could not be renamed.
    """
    newer = [path for at, path in steps(directory).items() if at > step]
    for path in newer:
        aside = path.with_name(path.name + SET_ASIDE)
        try:
            if aside.exists():
                _delete(aside)
            os.rename(path, aside)
            sync_directory(directory)
        except OSError as error:
            raise RunFailed(f"checkpoint {path} could not be set aside: {error.strerror or error}") from error
        logger.warning(
            "checkpoint %s is newer than step %d, from which the run continues: kept as %s", path, step, aside.name
        )


def sweep(directory: Path) -> None:
    """Remove the remains of killed saves and deletions. Called when a run starts and holds its lock."""
    for path in [*directory.glob(f"{PREFIX}*{UNFINISHED}"), *directory.glob(f"{PREFIX}*{DELETED}")]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            logger.warning("%s, left by a killed run, could not be deleted: %s", path, error.strerror or error)


def _step(path: Path) -> int | None:
    """The step in a checkpoint's name; None for any other name, such as that of an unfinished or set-aside one."""
    digits = path.name.removeprefix(PREFIX)
    return int(digits) if path.name.startswith(PREFIX) and digits.isdecimal() else None


def _load_pth(path: Path) -> dict[str, torch.Tensor]:
    published = PUBLISHED.fullmatch(path.name)
    try:
        with open(path, "rb") as file:
            if published and not hashlib.file_digest(file, "sha256").hexdigest().startswith(published[1]):
                raise UsageError(
                    f"{path} cannot be loaded: it is damaged, its SHA-256 does not begin with {published[1]}"
                )
            file.seek(0)
            head = file.read(9)
            file.seek(0)
            weights = _unpickled(file)
    except OSError as error:
        raise UsageError(f"{path} cannot be loaded: {error.strerror}") from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        if not (head.startswith((b"PK\x03\x04", b"\x80")) or head.endswith(b"{")):  # torch's, a pickle, safetensors
            raise UsageError(f"{path} cannot be loaded: it is not a file of weights")
        raise UsageError(
            f"{path} cannot be loaded: it does not hold tensors by name and nothing else; {foreign_hint(path)}"
        )
    return weights


def _unpickled(file: IO[bytes]) -> Any:
    """The value that torch.save wrote, if it can be read without running code; else None."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # on other files the reader may fail in any way
        return None


def _delete(path: Path) -> None:
    """Rename, then delete: a half-deleted folder must not look like a checkpoint."""
    doomed = path.with_name(path.name + DELETED)
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(path, doomed)
    sync_directory(path.parent)
    shutil.rmtree(doomed)


def _write_json(path: Path, value: Any) -> dict[str, Any]:
    data = json.dumps(value, indent=1).encode()
    write_file(path, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
