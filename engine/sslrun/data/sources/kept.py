"""Lists of image files that are kept in the cache folder, so that a start need not walk through the folders again.

A list is used as long as the folders and text files that it was made from have the times and lengths that they had
then. A folder's times change when something in it is added, removed or renamed.
"""

import inspect
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sslrun.data import table, waiting
from sslrun.data.index import cache_dir, looked_at
from sslrun.data.sources.base import digest_of, may_pass

if TYPE_CHECKING:
    from sslrun.data.sources.files import FileSource, Paths

logger = logging.getLogger("sslrun")

Stamp = list[int]
"""Length and times of a folder or a file, in bytes and ns."""

_VERSION = 1
_PATHS = ("data_prefix", "ann_file", "class_file")  # arguments of sources
# A folder that changed just before it was listed may change again without another time: file systems count in steps of
# up to 2 s.
SETTLED_S = 2.0


def stamp(path: str) -> Stamp | None:
    """Length and times of what is at a path; None if there is nothing.

    Raises:
        OSError: the storage gives errors.
    """
    try:
        status = os.stat(path)
    except ValueError:  # a null byte in the name
        return None
    except OSError as error:
        if may_pass(error):
            raise
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def listed(source: "FileSource", anew: Callable[[], "Paths"]) -> "Paths":
    """The paths of a source: those that are kept, or those that are listed anew, which are then kept.

    Sets the source's labels, class names and remarks. Of the processes that need the same list at the same time, one
    makes it and the others wait.

    Args:
        source: a class of this package; others are listed anew at each start.
        anew: lists the samples.
    """
    path = _place(source)
    if path is None:
        return anew()
    wait = waiting.Wait()
    if (kept := _kept(source, path, wait)) is not None:
        return kept
    with table.locked(path, wait) as is_writable:
        if (kept := _kept(source, path, wait)) is not None:
            return kept
        start = time.time_ns()
        paths = anew()
        if not is_writable:
            logger.info("the list of images is not kept: %s cannot be written", path.parent)
            return paths
        if len(paths) == 0 or not _is_settled(paths.seen, start):
            return paths
        columns = {"names": paths.blob, "ends": paths.ends}
        if source.labels is not None:
            columns["labels"] = source.labels
        about = {
            "id": os.urandom(16).hex(),
            "root": paths.root,
            "class_names": source.class_names,
            "remarks": list(source.remarks),
            "seen": paths.seen,
        }
        try:
            table.write(path, columns, about)
        except OSError as error:
            logger.info("the list of images is not kept: %s", error)
            return paths
        mapped = _mapped(source, path, table.load(path))
    return paths if mapped is None else mapped


def _place(source: "FileSource") -> Path | None:
    """Where a source's list is kept; None for a class that may list in ways that are not known here."""
    if not type(source).__module__.startswith("sslrun.") or source.has_bands:
        return None
    values: dict[str, Any] = {}
    for name in list(inspect.signature(type(source).__init__).parameters)[1:]:
        if not hasattr(source, name):
            return None
        value = getattr(source, name)
        values[name] = os.path.abspath(value) if name in _PATHS and value is not None else value
    text = f"{_VERSION} {type(source).__qualname__} {sorted(values.items())!r}"
    return cache_dir() / "index" / f"{digest_of([os.fsencode(text)])}.names"


def _kept(source: "FileSource", path: Path, wait: waiting.Wait) -> "Paths | None":
    found = table.load(path)
    if found is None or not _is_same(found.about["seen"], wait):
        return None
    return _mapped(source, path, found)


def _mapped(source: "FileSource", path: Path, found: table.Table | None) -> "Paths | None":
    from sslrun.data.sources.files import Paths

    if found is None:
        return None
    source.labels = found.columns.get("labels")
    source.class_names, source.remarks = found.about["class_names"], found.about["remarks"]
    paths = Paths.of(found.about["root"], found.columns["names"], found.columns["ends"])
    paths.kept = path, found.about["id"]
    return paths


def _is_same(seen: Mapping[str, Stamp | None], wait: waiting.Wait) -> bool:
    """Whether folders and files still have the times and lengths that they had."""
    names = list(seen)

    def unchanged(ids: np.ndarray) -> bool:
        waiting.note(names[int(ids[0])])
        return all(stamp(names[i]) == seen[names[i]] for i in ids.tolist())

    return all(looked_at(unchanged, np.arange(len(names)), wait))


def _is_settled(seen: Mapping[str, Stamp | None] | None, start_ns: int) -> bool:
    """Whether all changes after the listing will show in the times."""
    if seen is None:
        return False
    newest = max((max(one[1:]) for one in seen.values() if one is not None), default=0)
    return newest < start_ns - SETTLED_S * 1e9
