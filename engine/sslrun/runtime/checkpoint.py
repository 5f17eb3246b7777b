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
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from sslrun.errors import RunFailed, UsageError
from sslrun.runtime.durable import sync_directory, write_file
from sslrun.runtime.run_files import CHECKPOINTS

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
PREFIX = "step_"
PUBLISHED = re.compile(r".*_\d{8}-([0-9a-f]{8})\.pth")  # {config_name}_{date}-{hash}.pth
UNFINISHED, DELETED, SET_ASIDE = ".tmp", ".del", ".aside"

Tensors = dict[str, dict[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The `[checkpoint]` table: when a run is saved. It is always saved at its end and on a signal to stop.

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
    """Write one checkpoint, wait until it is on the disk, and return its folder.

    A good checkpoint of the same step is kept as it is: a run has one state at a step.

    Args:
        directory: the run's `checkpoints` folder; created if it does not exist.
        step: optimizer steps done.
        tensors: for each file ("model", "optimizer"), tensors by name. They may be on any device, strided, and share
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
        directory.mkdir(parents=True, exist_ok=True)
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
    """
    reason = damage(path)
    if reason is not None:
        raise UsageError(f"{path} cannot be loaded: {reason}")
    files = json.loads((path / MANIFEST).read_bytes())["files"]
    tensors = {name.removesuffix(".safetensors"): read_tensors(path / name) for name in files if name != STATE}
    return tensors, json.loads((path / STATE).read_bytes())


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The model's tensors of a checkpoint, of a run's newest good checkpoint, or of a .safetensors or .pth file.

    A .pth file is read with `weights_only=True` and must hold tensors by name. If it has the name of published weights,
    its content is compared with the hash in the name.

    Raises:
        UsageError: the path does not exist, is of another kind, or is damaged.
    """
    if path.suffix == ".safetensors":
        try:
            return read_tensors(path)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{path} cannot be loaded: {error}") from error
    if path.suffix == ".pth":
        return _load_pth(path)
    return load(find(path))[0]["model"]


def saved_at(path: Path) -> float:
    """When a checkpoint was saved, in seconds since 1970. A copy of a checkpoint has the time of the original."""
    manifest = path / MANIFEST
    written: float = json.loads(manifest.read_bytes()).get("time", manifest.stat().st_mtime)
    return written


def damage(path: Path) -> str | None:
    """Why a checkpoint is damaged; None if every byte is as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']!r}, this version reads {FORMAT}"
        if (named := _step(path)) is not None and named != manifest["step"]:
            return f"{MANIFEST} belongs to step {manifest['step']}"
        if STATE not in manifest["files"]:
            return f"{MANIFEST} does not list {STATE}"
        for name, expected in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            with open(path / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return f"{name} is not what was written (its hash differs)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is unreadable"
    return None


def steps(directory: Path) -> dict[int, Path]:
    """The checkpoints of a folder by step, ascending, including damaged ones."""
    by_step = {step: path for path in directory.glob(f"{PREFIX}*") if (step := _step(path)) is not None}
    return dict(sorted(by_step.items()))


def newest_good(directory: Path) -> Path | None:
    """The newest undamaged checkpoint, None if there is none. Each newer damaged one is a warning."""
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
        raise UsageError(f"{path} is neither a checkpoint nor a run folder with a good one")
    return newest


def prune(directory: Path, max_keep: int) -> None:
    """Delete all but the newest `max_keep` checkpoints; -1 keeps all. A failed deletion is only a warning."""
    if max_keep == -1:
        return
    for path in list(steps(directory).values())[:-max_keep]:
        try:
            _delete(path)
        except OSError as error:
            logger.warning("old checkpoint %s could not be deleted: %s", path, error.strerror or error)


def set_aside_newer(directory: Path, step: int) -> None:
    """Rename the checkpoints after a step, so that a run that continues from it does not later resume from them.

    They are damaged, or their steps will be computed again. One that is set aside replaces an earlier one of its step.
    """
    for path in [path for at, path in steps(directory).items() if at > step]:
        aside = path.with_name(path.name + SET_ASIDE)
        if aside.exists():
            _delete(aside)
        os.rename(path, aside)
        logger.warning(
            "checkpoint %s is newer than step %d, from which the run continues: kept as %s", path, step, aside.name
        )
    if directory.exists():
        sync_directory(directory)


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
            weights = _unpickled(file)
    except OSError as error:
        raise UsageError(f"{path} cannot be loaded: {error.strerror}") from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise UsageError(f"{path} cannot be loaded: it does not hold tensors by name and nothing else")
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


# safetensors' names of torch's dtypes. Complex dtypes without a name are stored as their real view.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float4_e2m1fn_x2: "F4",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_AS_REAL = (torch.complex32, torch.complex128)
_COMPLEX = "complex"  # metadata key: JSON list of the tensors that are stored as their real view


def require_storable(state: Mapping[str, Any]) -> None:
    """Check that every entry of a model's `state_dict()` can be written to a checkpoint. Called before training.

    Raises:
        UsageError: an entry cannot be written; the message has its name and its dtype.
    """
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            kind = f"is a {type(value).__name__}, not a tensor"
        elif value.layout != torch.strided:
            kind = f"has the layout {value.layout}"
        elif value.dtype == torch.float4_e2m1fn_x2 and value.dim() == 0:
            kind = f"is a scalar of dtype {value.dtype}, which is half a byte to a reader"
        elif value.dtype not in _DTYPES and value.dtype not in _AS_REAL:
            kind = f"has the dtype {value.dtype}"
        else:
            continue
        raise UsageError(
            f"model state {name!r} {kind}: a checkpoint cannot store it; use another dtype, or register the buffer "
            "with persistent=False if it can be recomputed"
        )


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write a safetensors file (8 bytes header length, JSON header, raw bytes) and return its manifest entry.

    The library's own writer is not used: it refuses tensors that share storage or are strided, needs all of them on the
    CPU at once, and its file could be hashed only by reading it back. This one copies one tensor at a time, wide dtypes
    first so that the data stays aligned.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    as_real = [name for name in order if tensors[name].dtype in _AS_REAL]
    about = dict(metadata or {}) | ({_COMPLEX: json.dumps(as_real)} if as_real else {})
    header: dict[str, Any] = {"__metadata__": about} if about else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {**_entry(tensor), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for data in (len(text).to_bytes(8, "little"), text):
            file.write(data)
            digest.update(data)
        for name in order:
            whole = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous()
            raw = whole.reshape(-1).view(torch.uint8).numpy()
            file.write(raw.data)
            digest.update(raw.data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": 8 + len(text) + end, "sha256": digest.hexdigest()}


def _entry(tensor: torch.Tensor) -> dict[str, Any]:
    """`dtype` and `shape` of a tensor in a safetensors header."""
    shape = list(tensor.shape)
    if tensor.dtype in _AS_REAL:
        return {"dtype": _DTYPES[tensor.dtype.to_real()], "shape": [*shape, 2]}
    if tensor.dtype == torch.float4_e2m1fn_x2:  # torch counts pairs, safetensors single values
        shape[-1] *= 2
    return {"dtype": _DTYPES[tensor.dtype], "shape": shape}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that `write_tensors`, or any other program, wrote in the safetensors format.

    Raises:
        OSError, SafetensorError: the file cannot be read.
    """
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        as_real = json.loads((file.metadata() or {}).get(_COMPLEX, "[]"))
    return tensors | {name: torch.view_as_complex(tensors[name]) for name in as_real}
