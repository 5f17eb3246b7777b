"""Converts Python configs of OpenSelfSup, MMSelfSup and MMPretrain to recipes, without executing them.

Whatever of the old config the recipe does not have is reported with its file and line: not converted, converted but
not the same, or left out because nothing depends on it.
"""

import re
from pathlib import Path
from typing import NamedTuple

from sslrun.config.check import TAGS, problems
from sslrun.config.files import shorten
from sslrun.config.interpolate import resolve
from sslrun.config.node import Key, Node, lookup, plain, walk
from sslrun.config.schema_reader import committed_schema
from sslrun.errors import UsageError
from sslrun.importer.convert import convert
from sslrun.importer.defaults import framework
from sslrun.importer.notes import LEFT, USUAL, WHY
from sslrun.importer.old import Effect, OldTable, Report, node, one_line
from sslrun.importer.reader import read
from sslrun.importer.write import text

_MISSING = re.compile(r"\w+ is missing; ")  # how the check begins to say that a key is
__all__ = ["Imported", "import_config"]


class Imported(NamedTuple):
    """A recipe made of an old config.

    Attributes:
        text: the recipe, as TOML.
        report: what there is to say about the conversion.
        missing: what the recipe needs and does not have, and why, in one line; empty where it can be run.
    """

    text: str
    report: Report
    missing: str


def import_config(path: Path, gpus: int | None = None) -> Imported:
    """Converts an old config.

    Args:
        path: a Python file.
        gpus: number of GPUs that its batch is for; None takes it from the file's name.

    Raises:
        UsageError: one line, where the file cannot be read.
    """
    if gpus is not None and gpus < 1:
        raise UsageError(f"--gpus must be at least 1, not {gpus}")
    try:
        root, unread = read(path)
    except UsageError as error:
        raise UsageError(one_line(str(error))) from None
    report = Report()
    types = {value.value for key, value in walk(root) if key[-1:] == ("type",) and isinstance(value.value, str)}
    top = OldTable(root, (), report, framework(plain(root), types))
    recipe = convert(top, path.stem, gpus)
    _with_vars(recipe)
    _leftovers(top, unread)
    missing = _fit(Node(recipe, root.origins), report)
    return Imported(text(recipe, report, shorten(path)), report, missing)


def _leftovers(top: OldTable, unread: set[str]) -> None:
    """Reports what nothing has taken: keys that have no counterpart, and variables that nothing reads."""
    variables = {name for name in top.rest if ("top", name) not in LEFT | USUAL | WHY}
    used = {repr(plain(below)) for key, below in walk(top.node) if len(key) > 1} if variables & unread else set()
    for name in [name for name in top.rest if name in variables & unread]:
        value = top.peek(name)
        if ("idle", name) in LEFT:
            top.leave(LEFT["idle", name], name)
        elif isinstance(value, str | list | dict) and value and repr(value) in used:
            top.leave("a variable, whose value stands where it was used", name)
        else:
            top.lost("nothing here reads it: a key that has no counterpart, or a variable", name)
    top.rest = {name: value for name, value in top.rest.items() if name not in variables}
    top.report.finish()


def _with_vars(recipe: dict[str, Node]) -> None:
    """Moves mean and std of Normalize to `[vars]`, where all groups of views have the same."""
    views = lookup(Node(recipe, ()), ("data", "views"))
    steps = [step.value for view in views.value for step in view.value["transforms"].value] if views else []
    normal = [step for step in steps if step["type"].value == "Normalize"]
    numbers = [{key: step[key] for key in ("mean", "std") if key in step} for step in normal]
    if views and numbers and len({repr(plain(Node(these, ()))) for these in numbers}) == 1 and len(numbers[0]) == 2:
        recipe["vars"] = node(numbers[0], views.where)
        for step in normal:
            step |= {key: node(f"${{vars.{key}}}", views.where) for key in ("mean", "std")}


def _fit(root: Node, report: Report) -> str:
    """Removes and reports what the schema does not allow; returns in one line what is missing then, and why."""
    while True:
        found = list(problems(resolve(root, ""), committed_schema()))
        wrong = [problem for problem in found if not _MISSING.match(problem.message)]
        for problem in wrong or found:
            report.add(Effect.LOST, *problem)
        if not wrong:
            break
        for key in sorted({_at_fault(root, problem.key) for problem in wrong}, reverse=True):  # parts before wholes
            if (holder := lookup(root, key[:-1])) is not None and lookup(root, key) is not None:
                holder.value.pop(key[-1])
    missing = [".".join(map(str, (*problem.key, problem.message.partition(" ")[0]))) for problem in found]
    reasons = [finding.text for finding in report.findings(Effect.LOST) if finding.key[:1] == ("model",)]
    reason = f": {reasons[0]}" if reasons and missing[:1] == ["model"] else ""
    return one_line(f"no {', no '.join(missing)}{reason}") if missing else ""


def _at_fault(root: Node, key: Key) -> Key:
    """The key to remove where a key is wrong: that of the table with a wrong class, or of the whole list of numbers."""
    if len(key) > 1 and key[-1] in TAGS:
        key = key[:-1]
    element = lookup(root, key)
    is_of_tables = element is not None and isinstance(element.value, dict)
    return key[:-1] if isinstance(key[-1], int) and not is_of_tables else key
