"""What the ranks of a run must have alike. Ranks that differ would train something that no recipe describes."""

import hashlib
import importlib.util
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sslrun.errors import UsageError
from sslrun.runtime import distributed
from sslrun.runtime.environment import versions
from sslrun.runtime.run_folder import config_changes

SHOWN = 3  # differences in a message


def require_agreement(what: str, facts: dict[str, Any]) -> None:
    """Compares plain values, such as a recipe, with those of rank 0. Does nothing in a run of one process.

    Args:
        what: names the values, for the message: "recipe".
        facts: the values, by name; tables and lists of them too.

    Raises:
        UsageError: on every rank, if one has other values than rank 0. The message names the first such rank, its
            machine, and what differs.
    """
    if distributed.world_size() == 1:
        return
    expected = distributed.broadcast_object(facts)
    differences = [text for _, text in config_changes(expected, facts)]
    for rank, (host, found) in enumerate(distributed.gather_objects((socket.gethostname(), differences))):
        if found:
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            error = UsageError(
                f"rank {rank} on {host} has another {what} than rank 0: {'; '.join(found[:SHOWN])}{more}; "
                "all ranks must be started with the same"
            )
            error.is_common = True
            raise error


def code(modules: Iterable[str]) -> dict[str, Any]:
    """Digests of the code that a run executes, and the versions of its libraries.

    Args:
        modules: the user's modules that the recipe imports.
    """
    digests = {name: _digest(_files_of(name)) for name in ("sslrun", "sslkernels", *modules)}
    return {"source files of": digests, "version of": versions()}


def _files_of(module: str) -> list[Path]:
    """The source files of a package, or of a module."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        return []
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    found = [file for folder in folders for pattern in ("*.py", "*.c") for file in folder.rglob(pattern)]
    return sorted(found) or [Path(spec.origin or "")]


def _digest(files: list[Path]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        if file.is_file():
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
