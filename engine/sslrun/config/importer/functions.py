"""The functions and methods that an old configuration may call: built in here one by one, none of them with an effect
outside the configuration, each of them checked for what it would make.

A function takes the Work to charge and the place to blame, then the call's own arguments. TypeError, ValueError and
LookupError mean what they mean in Python.
"""

import math
import posixpath
import re
import string
from collections.abc import Callable
from typing import Any

from sslrun.config.importer.values import MAX_DEPTH, MAX_SIZE, Row, Table, Work, inside
from sslrun.config.node import Origin
from sslrun.errors import UsageError

_SPEC = re.compile(r"(?:.?[<>=^])?[-+ ]?#?0?\d{0,3}[,_]?(?:\.\d{1,3})?[A-Za-z%]?", re.DOTALL)
_PERCENT = re.compile(r"%(?:\(\w{1,64}\))?[-+ #0]{0,5}\d{0,3}(?:\.\d{1,3})?[diouxXeEfFgGcrsa%]")
_FIELD = re.compile(r"\d{0,3}|[A-Za-z_]\w*")


def is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | None)


def formatted(value: Any, spec: str, conversion: str) -> str:
    """One value in an f-string or in str.format."""
    if not is_scalar(value):
        raise TypeError("only numbers and strings are put into a text")
    if not _SPEC.fullmatch(spec):
        raise ValueError(f"the format {spec!r} is not evaluated here")
    shown = {"": value, "s": str(value), "r": repr(value), "a": ascii(value)}[conversion] if conversion else value
    return format(shown, spec)


def percent(template: str, values: Any) -> str:
    """`template % values`."""
    given = inside(values) if isinstance(values, dict | tuple) else [values]
    if "%" in _PERCENT.sub("", template):
        raise ValueError("this format is not evaluated here")
    if not all(map(is_scalar, given)):
        raise TypeError("only numbers and strings are put into a text")
    if len(template) + sum(len(value) for value in given if isinstance(value, str)) > MAX_SIZE // 10:
        raise ValueError("a format of such a length is not evaluated here")
    return template % values


def _format(template: str, values: list[Any], named: dict[str, Any]) -> str:
    parts = []
    count = 0
    for text, field, spec, conversion in string.Formatter().parse(template):
        parts.append(text)
        if field is None:
            continue
        if not _FIELD.fullmatch(field) or "{" in (spec or ""):
            raise ValueError(f"the field {field!r} is not evaluated here")
        key = field or str(count)
        count += not field
        value = values[int(key)] if key.isdecimal() else named[key]
        parts.append(formatted(value, spec or "", conversion or ""))
    return "".join(parts)


def _range(work: Work, where: Origin, *bounds: Any) -> Row:
    numbers = range(*bounds)
    work.charge(max(0, min((numbers.stop - numbers.start) // numbers.step + 1, 2 * MAX_SIZE)), where)
    return Row(numbers, where)


def _list(work: Work, where: Origin, values: Any = ()) -> Row:
    return Row(_elements(work, where, values), where)


def _tuple(work: Work, where: Origin, values: Any = ()) -> tuple[Any, ...]:
    return tuple(_elements(work, where, values))


def _elements(work: Work, where: Origin, values: Any) -> list[Any]:
    if not isinstance(values, dict | list | tuple | str):
        raise TypeError("that cannot be gone through")
    work.charge(len(values), where)
    return list(values)


def _zip(work: Work, where: Origin, *sequences: Any) -> Row:
    return Row(zip(*(_elements(work, where, s) for s in sequences), strict=False), where)


def _enumerate(work: Work, where: Origin, values: Any, start: int = 0) -> Row:
    return Row(enumerate(_elements(work, where, values), start), where)


def _len(work: Work, where: Origin, value: Any) -> int:
    return len(value)


def _number(kind: Callable[..., Any]) -> Callable[..., Any]:
    """int, float, str, bool, abs: of one scalar."""

    def function(work: Work, where: Origin, *values: Any) -> Any:
        if len(values) > 1 or not all(map(is_scalar, values)):
            raise TypeError(f"{kind.__name__} of one number or string is evaluated here, and nothing else")
        return kind(*values)

    return function


def _round(work: Work, where: Origin, value: Any, digits: Any = None) -> Any:
    if not isinstance(value, int | float) or not (digits is None or (isinstance(digits, int) and abs(digits) < 100)):
        raise TypeError("round takes a number, and a small number of digits")
    return round(value, digits)


def _of_numbers(kind: Callable[..., Any]) -> Callable[..., Any]:
    """min, max and sum: of a list of numbers, or of several."""

    def function(work: Work, where: Origin, *values: Any) -> Any:
        numbers = _elements(work, where, values[0] if len(values) == 1 else values)
        if not all(isinstance(number, int | float) for number in numbers):
            raise TypeError(f"{kind.__name__} of numbers is evaluated here, and of nothing else")
        return kind(numbers)

    return function


def _deepcopy(work: Work, where: Origin, value: Any) -> Any:
    return _copied(work, where, value, {}, 0)


def _copied(work: Work, where: Origin, value: Any, done: dict[int, Any], depth: int) -> Any:
    """A copy in which what was one object is one object again."""
    work.charge(1, where)
    if depth > MAX_DEPTH:
        raise UsageError(f"{where}: tables or lists nested more than {MAX_DEPTH} deep")
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, Table):
        done[id(value)] = table = Table(value.where)
        table.spoilt = value.spoilt
        for key, below in value.items():
            table.put(key, _copied(work, where, below, done, depth + 1), value.place(key))
        return table
    if isinstance(value, Row):
        done[id(value)] = row = Row((), value.where)
        row.spoilt = value.spoilt
        row += [_copied(work, where, below, done, depth + 1) for below in value]
        return row
    if isinstance(value, tuple):
        return tuple(_copied(work, where, below, done, depth + 1) for below in value)
    return value


def _copy(work: Work, where: Origin, value: Any) -> Any:
    if isinstance(value, Table):
        work.charge(len(value), where)
        table = Table(value.where)
        table.take_over(value)
        return table
    if isinstance(value, Row):
        work.charge(len(value), where)
        return Row(value, value.where)
    return value


def _join(work: Work, where: Origin, *parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise TypeError("paths are strings")
    work.charge(sum(map(len, parts)), where)
    return posixpath.join(*parts)


def _path(function: Callable[[str], str]) -> Callable[..., Any]:
    def of_path(work: Work, where: Origin, path: Any) -> str:
        if not isinstance(path, str):
            raise TypeError("a path is a string")
        return function(path)

    return of_path


def _math(function: Callable[[Any], Any]) -> Callable[..., Any]:
    def of_number(work: Work, where: Origin, number: Any) -> Any:
        if not isinstance(number, int | float):
            raise TypeError("a number is expected")
        return function(number)

    return of_number


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "list": _list,
    "tuple": _tuple,
    "range": _range,
    "zip": _zip,
    "enumerate": _enumerate,
    "len": _len,
    "int": _number(int),
    "float": _number(float),
    "str": _number(str),
    "bool": _number(bool),
    "abs": _number(abs),
    "round": _round,
    "min": _of_numbers(min),
    "max": _of_numbers(max),
    "sum": _of_numbers(sum),
    "copy.copy": _copy,
    "copy.deepcopy": _deepcopy,
    "os.path.join": _join,
    "os.path.basename": _path(posixpath.basename),
    "os.path.dirname": _path(posixpath.dirname),
    "math.ceil": _math(math.ceil),
    "math.floor": _math(math.floor),
    "math.sqrt": _math(math.sqrt),
}
MODULES = {"os", *(name.rpartition(".")[0] for name in FUNCTIONS if "." in name)}  # imports that need no word

_OF_LISTS = {"append", "extend", "insert", "pop", "remove", "copy", "index", "count", "reverse", "clear"}
_OF_DICTS = {"update", "copy", "get", "pop", "setdefault", "keys", "values", "items", "clear"}
_OF_STRINGS = {"format", "join", "replace", "lower", "upper", "strip", "lstrip", "rstrip", "split", "startswith"}
_OF_STRINGS |= {"endswith", "removeprefix", "removesuffix"}


def method(work: Work, where: Origin, owner: Any, name: str, values: list[Any], named: dict[str, Any]) -> Any:
    """`owner.name(*values, **named)`."""
    if isinstance(owner, Table) and name in _OF_DICTS:
        return _of_dict(work, where, owner, name, values, named)
    if isinstance(owner, Row) and name in _OF_LISTS and not named:
        return _of_list(work, where, owner, name, values)
    if isinstance(owner, str) and name in _OF_STRINGS and (name == "format" or not named):
        return _of_string(work, where, owner, name, values, named)
    raise TypeError(f"the method {name} is not evaluated here")


def _of_list(work: Work, where: Origin, row: Row, name: str, values: list[Any]) -> Any:
    work.charge(len(row), where)
    if name == "copy":
        return Row(row, row.where)
    if name == "extend" and len(values) == 1:
        row += _elements(work, where, values[0])
        return None
    if name in ("remove", "index", "count") and not all(map(is_scalar, values)):
        raise TypeError(f"{name} of a number or a string is evaluated here, and of nothing else")
    return getattr(row, name)(*values)


def _of_dict(work: Work, where: Origin, table: Table, name: str, values: list[Any], named: dict[str, Any]) -> Any:
    work.charge(len(table) + len(named), where)
    if name == "copy":
        return _copy(work, where, table)
    if name in ("keys", "values", "items"):
        return Row(getattr(table, name)(*values), where)
    if name == "update":
        if len(values) > 1 or not all(isinstance(value, Table) for value in values):
            raise TypeError("update takes one dict, and keys")
        for other in values:
            work.charge(len(other), where)
            table.take_over(other)
        for key, value in named.items():
            table.put(key, value, where)
        return None
    if named or not all(map(is_scalar, values[:1])):
        raise TypeError(f"{name} takes a key")
    if name == "setdefault" and values and values[0] not in table:
        table.places[values[0]] = where
    return getattr(table, name)(*values)


def _of_string(work: Work, where: Origin, text: str, name: str, values: list[Any], named: dict[str, Any]) -> Any:
    work.charge(len(text), where)
    if name == "format":
        made = _format(text, values, named)
    elif name == "join":
        (parts,) = values
        elements = _elements(work, where, parts)
        if not all(isinstance(part, str) for part in elements):
            raise TypeError("only strings are joined")
        work.charge(min(len(text) * len(elements) + sum(map(len, elements)), 2 * MAX_SIZE), where)
        return text.join(elements)
    else:
        if not all(map(is_scalar, values)):
            raise TypeError(f"{name} takes strings")
        if name == "replace" and len(values) > 1 and isinstance(values[1], str):
            work.charge(min((len(text) + 1) * (len(values[1]) + 1), 2 * MAX_SIZE), where)
        made = getattr(text, name)(*values)
    if isinstance(made, list):
        return Row(made, where)
    work.charge(len(made) if isinstance(made, str) else 1, where)
    return made
