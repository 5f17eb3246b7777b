"""A Python without libraries that only some users have, as on an image with torch and little else."""

import os
from collections.abc import Sequence
from pathlib import Path

_HIDES = '''
from importlib.machinery import PathFinder


class Hidden:
    """An object, not a function: pytest makes it an attribute of a class."""

    find = PathFinder.find_spec

    def __call__(self, name, path=None, target=None):
        return None if name in {names!r} else Hidden.find(name, path, target)


PathFinder.find_spec = Hidden()
'''


def environment_without(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Variables for a process in which these modules are not installed.

    Args:
        folder: new or empty; Python reads a file in it at its start.
        names: of modules: `nvidia.dali`.
    """
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_HIDES.format(names=tuple(names)), encoding="utf-8")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


BARE = ("nvidia.dali", "deepspeed")
