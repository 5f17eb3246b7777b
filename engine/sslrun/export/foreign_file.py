"""Reads a foreign checkpoint: a file of torch or safetensors, or a Hugging Face folder.

A checkpoint of torch is read with its restricted reader, which calls only torch's own functions that make tensors.
Other objects beside the weights (argparse.Namespace, numpy's numbers, omegaconf's tables) are neither imported nor
called: an inert object takes the place of each.
"""

import contextlib
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sslrun.errors import UsageError
from sslrun.export.tensor_files import KEY
from sslrun.runtime.safetensors_file import read_tensors

CONFIG = "config.json"
_FILES = ("model.safetensors", "pytorch_model.bin")  # of a Hugging Face folder, in order of preference
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class ForeignFile:
    """What a foreign checkpoint holds.

    Attributes:
        content: as it was saved.
        tensors: every tensor by its path in the content; without the names that torch.compile and FSDP put in between.
        unread: names of the classes of objects in it that were not constructed.
        config: config.json of a Hugging Face folder; {} if there is none.
        backbone: the `[model.backbone]` table that a file of ours has in its metadata; {} in others' files.
    """

    content: Any
    tensors: dict[str, Tensor]
    unread: list[str] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)
    backbone: Mapping[str, Any] = field(default_factory=dict)


class _Inert:
    """Takes the place of an object that is not a tensor: accepts whatever a pickle does to it, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def open_foreign(path: Path) -> ForeignFile:
    """Read a checkpoint. A file in a Hugging Face folder is read with the folder's config.json.

    Raises:
        UsageError: it is not a checkpoint, is damaged, or needs more than tensors, containers and inert objects.
    """
    folder = path if path.is_dir() else path.parent
    is_of_folder = path.is_dir() or path.name in _FILES
    config = _json(folder / CONFIG) if is_of_folder and (folder / CONFIG).is_file() else {}
    content: Any = {}
    unread: list[str] = []
    metadata = ""
    for file in _parts(path) if path.is_dir() else [path]:
        part, classes = read(file)
        unread += classes
        metadata = metadata or _metadata(file, part)
        content = {**content, **part} if path.is_dir() and isinstance(part, Mapping) else part
    return ForeignFile(content, _flat(content), sorted(set(unread)), config, _backbone(metadata))


def read(path: Path) -> tuple[Any, list[str]]:
    """The content of one file, and the names of the classes in it that were not constructed.

    Raises:
        UsageError: it is not a checkpoint, is damaged, or needs more than tensors, containers and inert objects.
    """
    unknown: list[str] = []
    try:
        if _is_safetensors(path):
            return read_tensors(path), unknown
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about pickles of other versions
            return _unpickled(path, unknown), unknown
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # arbitrary bytes make the reader raise anything
        raise UsageError(f"{path} cannot be read: it is damaged, or holds more than weights") from error


def _unpickled(path: Path, unknown: list[str]) -> Any:
    """What torch saved; adds the names of the classes that torch refuses to `unknown`."""
    with contextlib.suppress(ValueError, RuntimeError):  # newer files list them
        unknown += sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    while True:
        names = [name for cls in unknown for name in (cls, f"builtins.{cls}")]
        try:
            with torch.serialization.safe_globals([(_Inert, name) for name in names]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            refused = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            if refused is None or refused[1] in unknown:
                raise
            unknown.append(refused[1])


def _parts(folder: Path) -> list[Path]:
    """The files of weights in a Hugging Face folder.

    Raises:
        UsageError: it is no such folder.
    """
    if not (folder / CONFIG).is_file():
        raise UsageError(
            f"{folder} has no {CONFIG}, so it is not a Hugging Face folder; it cannot be read: Is a directory"
        )
    for name in _FILES:
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            names = set(map(str, _json(folder / f"{name}.index.json").get("weight_map", {}).values()))
            return sorted(folder / Path(part).name for part in names)
    raise UsageError(f"{folder} has neither {' nor '.join(_FILES)}")


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} is not a table")
    return value


def _metadata(path: Path, content: Any) -> str:
    """What `sslrun export` and `import-weights` wrote beside the weights, as JSON; "" in others' files."""
    if _is_safetensors(path):
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(KEY, "")
    own = getattr(content, "_metadata", None)
    own = own.get("") if isinstance(own, Mapping) else None
    text = own.get(KEY) if isinstance(own, Mapping) else None
    return text if isinstance(text, str) else ""


def _backbone(metadata: str) -> Mapping[str, Any]:
    """The `[model.backbone]` table in our metadata."""
    with contextlib.suppress(ValueError, RecursionError):
        about = json.loads(metadata)
        if isinstance(about, dict) and isinstance(about.get("backbone"), dict):
            return about["backbone"]
    return {}


def _flat(content: Any) -> dict[str, Tensor]:
    """Every tensor by its path, keys joined by dots; a dict that is reached by several paths counts by the first."""
    tensors: dict[str, Tensor] = {}
    visited: set[int] = set()

    def visit(content: Any, place: str) -> None:
        if isinstance(content, Tensor):
            tensors[_WRAPPERS.sub("", place)] = content
        elif isinstance(content, Mapping) and id(content) not in visited and place.count(".") < 100:
            visited.add(id(content))
            for key, value in content.items():
                visit(value, f"{place}.{key}" if place else str(key))

    visit(content, "")
    return tensors
