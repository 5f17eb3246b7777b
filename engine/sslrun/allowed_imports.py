"""Which modules of `custom_imports` are imported: those that the user trusts, since importing a module runs its code.

A training imports the modules that its recipe names. A run, or a file of weights with its recipe, may come from
somebody else. So a recipe in a run folder has nothing imported, and for evaluation, report and export a recipe that is
not in one has installed modules imported only.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sslrun.config import Config
from sslrun.errors import UsageError
from sslrun.runtime.run_files import CHECKPOINTS, CONFIG, METRICS


def import_allowed(modules: Sequence[str]) -> None:
    """Imports modules that the user names on the command line; the current folder is searched too.

    Raises:
        UsageError: there is no such module, it cannot be imported, or its code lies in a run folder.
    """
    for module in modules:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        folder = _folder_of(module)
        if folder is not None and _is_in_run_folder(folder):
            raise UsageError(f"{module} lies in the run folder {folder}, from which no code is imported: move it out")
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UsageError(f"cannot import {module}: {error}") from error


def require_allowed(config: Config, is_for_training: bool) -> None:
    """Checks the modules that a recipe names, and imports those that the command line names by `--set`.

    Args:
        config: a recipe. Where it was set decides: in a run folder, in another file, or on the command line.
        is_for_training: whether files that are not in a run folder may name any module; if not, installed ones only.

    Raises:
        UsageError: a module is not imported yet and may not be imported.
    """
    for index, module in enumerate(config.values.get("custom_imports", ())):
        if module in sys.modules:
            continue
        origin = config.origins(f"custom_imports.{index}")[-1]
        if origin.key is None:  # a --set
            import_allowed([module])
            continue
        is_own = not _is_in_run_folder(Path(origin.layer.chain[0]).resolve().parent)
        if is_own and (is_for_training or _is_installed(module)):
            continue
        raise UsageError(
            f"{origin}: custom_imports names {module}, whose code would run: "
            f"if you trust it, add --allow-imports {module}"
        )


def _is_in_run_folder(folder: Path) -> bool:
    """Whether a folder is a run folder or lies in one."""
    return any(
        (each / CONFIG).is_file() and ((each / METRICS).exists() or any((each / CHECKPOINTS).glob("step_*")))
        for each in (folder, *folder.parents)
    )


def _is_installed(module: str) -> bool:
    """Whether a module is found elsewhere than in the current folder."""
    folder = _folder_of(module)
    return folder is not None and folder != Path.cwd()


def _folder_of(module: str) -> Path | None:
    """The folder in which the search for a module finds it, or its topmost package; None if it has none."""
    spec = importlib.util.find_spec(module.partition(".")[0])  # finding a topmost package runs no code
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve().parent
    return Path(spec.origin or "").resolve().parent
