"""Importing configurations of MMSelfSup, 0.x and 1.x: read without being executed, converted to a recipe of ours.

Whatever of the old configuration the recipe does not have is reported with its file and line: not converted, converted
but not the same, or left out because nothing depends on it.
"""

import re
from pathlib import Path
from typing import NamedTuple

from sslrun.config.check import TAGS, problems
from sslrun.config.files import shorten
from sslrun.config.importer.convert import SUPERSEDED, convert
from sslrun.config.importer.files import Old, read
from sslrun.config.importer.parts import Part, node
from sslrun.config.importer.report import Report, one_line
from sslrun.config.importer.table import OldTable
from sslrun.config.importer.values import Unknown, Work, Wrapping
from sslrun.config.importer.write import text
from sslrun.config.interpolate import resolve
from sslrun.config.load import committed_schema
from sslrun.config.node import Key, Node, lookup, plain
from sslrun.errors import UsageError

_MISSING = re.compile(r"\w+ is missing; ")  # how the check begins to say that a key is

__all__ = ["Imported", "import_config"]


class Imported(NamedTuple):
    """A recipe made of an old configuration: its text, and what there is to say about it."""

    text: str
    report: Report


def import_config(path: Path, gpus: int | None = None) -> Imported:
    """Converts an old configuration.

    Args:
        path: a Python file of MMSelfSup.
        gpus: number of GPUs that its batch is for; None takes it from the file's name.

    Raises:
        UsageError: one line, where the file cannot be read.
    """
    try:
        return _import(path, gpus)
    except UsageError as error:
        raise UsageError(one_line(str(error))) from None


def _import(path: Path, gpus: int | None) -> Imported:
    if gpus is not None and gpus < 1:
        raise UsageError(f"--gpus must be at least 1, not {gpus}")
    work, report = Work(), Report()
    old = read(path, work)
    wrapping = Wrapping(work, [])
    root = wrapping.node(old.table, old.table.where)
    assert root is not None, "the top level itself is never spoilt"
    top = OldTable(root, (), report)
    recipe = _with_vars(convert(top, path.stem, gpus))
    _leftovers(top, old, wrapping.lost, report)
    recipe = _fitting(Node(recipe, root.origins), report)
    return Imported(text(recipe, report, shorten(path)), report)


def _leftovers(top: OldTable, old: Old, lost: list[tuple[Key, Unknown]], report: Report) -> None:
    """Reports what has no value, and what nothing has taken."""
    for remark in old.remarks:
        report.add(remark.where, (), remark.effect, f"{remark.text}: {remark.reason}")
    lost = [*old.overridden, *lost]
    in_keys = {unknown for key, unknown in lost if key and key[0] in top.asked}
    for key, unknown in lost:
        if key and key[0] not in top.asked and unknown in in_keys:
            continue  # a variable that such a key is made of
        report.lost(unknown.where, key, f"{unknown.text}: {unknown.reason}" if unknown.text else unknown.reason)
    for name, value in top.rest.items():
        if name in old.idle and name in SUPERSEDED:
            report.left(value.where, (name,), f"{SUPERSEDED[name]} says it")
        elif name in old.idle:
            report.lost(value.where, (name,), "nothing here reads it: a key that has no counterpart, or a variable")


def _with_vars(recipe: Part) -> Part:
    """The numbers of Normalize as variables, where all groups of views have the same."""
    views = lookup(Node(recipe, ()), ("data", "views"))
    steps = [step for view in views.value for step in view.value["transforms"].value] if views is not None else []
    normal = [step.value for step in steps if step.value["type"].value == "Normalize"]
    if views is None or not normal or not all({"mean", "std"} <= set(n) and _same(n, normal[0]) for n in normal):
        return recipe
    numbers = {key: normal[0][key] for key in ("mean", "std")}
    shared = {id(n): {**n, **{key: node(f"${{vars.{key}}}", n[key].where) for key in numbers}} for n in normal}
    groups = []
    for view in views.value:
        transforms = view.value["transforms"]
        made = [step._replace(value=shared.get(id(step.value), step.value)) for step in transforms.value]
        groups.append(view._replace(value={**view.value, "transforms": transforms._replace(value=made)}))
    data = recipe["data"]
    images = data._replace(value={**data.value, "views": views._replace(value=groups)})
    return {**recipe, "vars": node(numbers, views.where), "data": images}


def _same(one: Part, other: Part) -> bool:
    return all(plain(one[key]) == plain(other[key]) for key in ("mean", "std"))


def _fitting(root: Node, report: Report) -> Part:
    """The recipe without what its schema does not allow, which is reported; what is missing is reported too."""
    while True:
        found = problems(resolve(root, ""), committed_schema())
        wrong = [problem for problem in found if not _MISSING.match(problem.message)]
        if not wrong:
            for problem in found:
                report.lost(problem.where, problem.key, problem.message)
            recipe: Part = root.value
            return recipe
        for problem in wrong:
            report.lost(*problem)
        for key in sorted({_at_fault(root, problem.key) for problem in wrong}, key=_order, reverse=True):
            root = _without(root, key)  # the last of a list first, so that the places of the others stay


def _at_fault(root: Node, key: Key) -> Key:
    """What is to go where a key is wrong: the table of a wrong class, the whole of a list of numbers."""
    if len(key) > 1 and key[-1] in TAGS:
        key = key[:-1]
    element = lookup(root, key)
    is_of_tables = element is not None and isinstance(element.value, dict)
    return key[:-1] if isinstance(key[-1], int) and not is_of_tables else key


def _order(key: Key) -> list[tuple[int, str]]:
    """Keys in the order of the recipe's lists."""
    return [(part, "") if isinstance(part, int) else (0, part) for part in key]


def _without(table: Node, key: Key) -> Node:
    """A tree without what stands at a key."""
    first, *rest = key
    if isinstance(table.value, list):
        index = int(first)
        kept = [_without(table.value[index], tuple(rest))] if rest else []
        return table._replace(value=[*table.value[:index], *kept, *table.value[index + 1 :]])
    kept_table = {part: value for part, value in table.value.items() if part != first}
    if rest:
        kept_table = {**table.value, first: _without(table.value[first], tuple(rest))}
    return table._replace(value=kept_table)
