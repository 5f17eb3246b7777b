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
from sslrun.importer.notes import NOTES
from sslrun.importer.old import Effect, OldTable, Report, node, one_line, walk_types
from sslrun.importer.ours import Part
from sslrun.importer.reader import Old, read
from sslrun.importer.write import text

_MISSING = re.compile(r"\w+ is missing; ")  # how the check begins to say that a key is
_SUPERSEDED = {  # keys of 0.x that say nothing beside those of 1.x
    "optimizer": "optim_wrapper",
    "optimizer_config": "optim_wrapper",
    "lr_config": "param_scheduler",
    "data": "train_dataloader",
    "runner": "train_cfg",
    "checkpoint_config": "default_hooks",
    "log_config": "default_hooks",
}

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
        old = read(path)
    except UsageError as error:
        raise UsageError(one_line(str(error))) from None
    report = Report()
    top = OldTable(old.root, (), report, framework(plain(old.root), set(walk_types(old.root))))
    recipe = _with_vars(convert(top, path.stem, gpus))
    _leftovers(top, old)
    fitting, missing = _fitting(Node(recipe, old.root.origins), report)
    return Imported(text(fitting, report, shorten(path)), report, _why(missing, report))


def _leftovers(top: OldTable, old: Old) -> None:
    """Reports what nothing has taken: keys that have no counterpart, and variables that nothing reads."""
    report = top.report
    variables = {name: value for name, value in top.rest.items() if name not in NOTES[""]}
    idle = {name: value for name, value in variables.items() if name in old.unread}
    used = {repr(plain(below)) for key, below in walk(old.root) if len(key) > 1} if idle else set()
    for name, value in idle.items():
        if name in _SUPERSEDED:
            report.add(Effect.LEFT, value.where, (name,), f"{_SUPERSEDED[name]} says it")
        elif isinstance(value.value, str | list | dict) and value.value and repr(plain(value)) in used:
            report.add(Effect.LEFT, value.where, (name,), "a variable, whose value stands where it was used")
        else:
            text = "nothing here reads it: a key that has no counterpart, or a variable"
            report.add(Effect.LOST, value.where, (name,), text)
    top.rest = {name: value for name, value in top.rest.items() if name not in variables}
    report.finish()


def _with_vars(recipe: Part) -> Part:
    """Moves mean and std of Normalize to `[vars]`, where all groups of views have the same."""
    views = lookup(Node(recipe, ()), ("data", "views"))
    steps = [step.value for view in views.value for step in view.value["transforms"].value] if views else []
    normal = [step for step in steps if step["type"].value == "Normalize"]
    numbers = [{key: step[key] for key in ("mean", "std")} for step in normal if {"mean", "std"} <= set(step)]
    if views is None or not numbers or len(numbers) < len(normal):
        return recipe
    if any(plain(Node(these, ())) != plain(Node(numbers[0], ())) for these in numbers):
        return recipe
    for step in normal:
        step |= {key: node(f"${{vars.{key}}}", step[key].where) for key in ("mean", "std")}
    return {**recipe, "vars": node(numbers[0], views.where)}


def _fitting(root: Node, report: Report) -> tuple[Part, list[str]]:
    """Removes and reports what the schema does not allow; also returns the required keys that are missing."""
    while True:
        found = list(problems(resolve(root, ""), committed_schema()))
        wrong = [problem for problem in found if not _MISSING.match(problem.message)]
        for problem in wrong or found:
            report.add(Effect.LOST, *problem)
        if not wrong:
            return root.value, [".".join(map(str, (*p.key, p.message.partition(" ")[0]))) for p in found]
        root = _without(root, {_at_fault(root, problem.key) for problem in wrong})


def _why(missing: list[str], report: Report) -> str:
    """Says which required keys a recipe lacks, and why where that is the model."""
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


def _without(node: Node, wrong: set[Key], key: Key = ()) -> Node:
    """The tree without the values at some keys."""
    if isinstance(node.value, dict):
        kept = {part: below for part, below in node.value.items() if (*key, part) not in wrong}
        return node._replace(value={part: _without(below, wrong, (*key, part)) for part, below in kept.items()})
    if isinstance(node.value, list):
        places = [index for index in range(len(node.value)) if (*key, index) not in wrong]
        return node._replace(value=[_without(node.value[index], wrong, (*key, index)) for index in places])
    return node
