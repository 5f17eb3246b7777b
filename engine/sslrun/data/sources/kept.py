"""Lists of image files that are kept in the cache folder, so that a start need not walk through the folders again.

A list is used as long as the folders and text files that it was made from have the times and lengths that they had
then, and may be read.
"""

import functools
import hashlib
import inspect
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslrun.data import table, waiting
from sslrun.data.index import cache_dir, say_not_kept
from sslrun.data.sources import file_sizes, seen
from sslrun.data.sources.base import digest_of
from sslrun.data.sources.paths import Kept, Paths

if TYPE_CHECKING:
    from sslrun.data.sources.files import FileSource

_VERSION = 2
SMALL = 10_000
"""Images of a source that is not worth waiting for its folders to settle: it is listed anew at the next start."""

_PATHS = ("data_prefix", "ann_file", "class_file")  # arguments of sources


def listed(source: "FileSource", anew: Callable[[], Paths], may_write: bool) -> Paths:
    """The paths of a source: those that are kept, or those that are listed anew, which are then kept.

    Sets the source's labels, class names and remarks. Of the processes that need the same list at the same time, one
    makes it and the others wait.

    Args:
        source: a class of this package; others are listed anew at each start.
        anew: lists the samples.
        may_write: whether a new list may be kept.
    """
    path = _place(source)
    if path is None:
        return anew()
    wait = waiting.Wait()
    if (kept := _kept(source, path, wait)) is not None:
        return kept
    if not may_write:
        return anew()
    with table.locked(path, wait) as problem:
        if (kept := _kept(source, path, wait)) is not None:
            return kept
        start = time.time_ns()
        paths = anew()
        if problem is not None:
            say_not_kept(problem)
            return paths
        if len(paths) == 0 or paths.seen is None or not paths.seen.has_times():
            return paths
        if len(paths) > SMALL and not paths.seen.is_settled(start):
            time.sleep(seen.SETTLED_S)
            start = time.time_ns()
            paths = anew()
        if paths.seen is None or not paths.seen.is_settled(start):
            return paths
        return _keep(source, paths, path, wait)


def _keep(source: "FileSource", paths: Paths, path: Path, wait: waiting.Wait) -> Paths:
    """Write the table of a new list; the caller holds its lock."""
    assert paths.seen is not None
    columns = {"names": paths.blob, "ends": paths.ends, **paths.seen.columns()}
    if source.labels is not None:
        columns["labels"] = source.labels
    own_id = os.urandom(16).hex()
    about = {
        "id": own_id,
        "code": _code(),
        "root": paths.root,
        "class_names": source.class_names,
        "remarks": list(source.remarks),
    }
    try:
        if (before := table.load(path)) is not None:
            old = Paths.of(before.about["root"], before.columns["names"], before.columns["ends"])
            file_sizes.carry_over(path, (old, before.about["id"]), (paths, own_id), wait)
        table.write(path, columns, about)
    except OSError as error:
        say_not_kept(error)
        return paths
    written = table.load(path)
    return paths if written is None else _mapped(source, path, written)


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


@functools.cache
def _code() -> str:
    """A digest of the code that makes lists: another one may make other lists."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _kept(source: "FileSource", path: Path, wait: waiting.Wait) -> Paths | None:
    found = table.load(path)
    if found is None or found.about["code"] != _code() or not os.path.isdir(found.about["root"]):
        return None
    return None if seen.has_changed(found.columns, wait) else _mapped(source, path, found)


def _mapped(source: "FileSource", path: Path, found: table.Table) -> Paths:
    found.drop_pages()
    source.labels = found.columns.get("labels")
    source.class_names, source.remarks = found.about["class_names"], found.about["remarks"]
    paths = Paths.of(found.about["root"], found.columns["names"], found.columns["ends"])
    paths.kept = Kept(path, found.about["id"], found)
    return paths
