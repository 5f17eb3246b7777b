"""Reads an old config with its bases, as mmcv and mmengine do, without executing any of it.

Read are the names, literals, `dict()`, arithmetic, `.append()`, `.extend()`, assignments to keys and `if` of published
configs. Everything else is refused with file and line: loops, comprehensions, slices, comparisons, calls.
`_base_` names files that are merged below the file: dicts deeply, all else replaced, and `_delete_=True` in a dict
drops what it inherits. `_base_.x` and `{{_base_.x}}` are values of the merged bases.
"""

import ast
import operator
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from sslrun.config.dump import escape
from sslrun.config.files import shorten
from sslrun.config.merge import kind, nearest
from sslrun.config.node import Key, Layer, Node, Origin, show
from sslrun.errors import UsageError

MAX_BYTES = 1 << 18  # of one file
MAX_FILES, MAX_DEPTH = 100, 64  # of the tree of bases; of nested dicts and lists
MAX_SIZE = 100_000  # values evaluated or copied, over all files
MAX_INTEGER = 2**63  # above which TOML has no integers

_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_SIGNS: dict[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
_OWN_NAME = re.compile(r"\{\{\s*(fileDirname|fileBasenameNoExtension|fileBasename|fileExtname)\s*\}\}")


class Old(NamedTuple):
    """An old config, merged.

    Attributes:
        root: the values.
        unread: top-level names that no expression reads: keys of the config, or idle variables.
    """

    root: Node
    unread: set[str]


def read(path: Path) -> Old:
    """Reads an old config. Raises UsageError, one line, for what cannot be read."""
    work = _Work()
    try:
        table = _File(path, (), work).merged()
        return Old(_checked(table, work), work.unread)
    except RecursionError:
        raise UsageError(f"{shorten(path)}: nested too deep") from None


class _Work:
    """Counts files, and values evaluated or copied; knows the names that nothing has read yet."""

    def __init__(self) -> None:
        self.files, self.size, self.unread = 0, 0, set[str]()

    def charge(self, amount: int, where: Origin) -> None:
        """Counts values before they are made. Raises UsageError for what would be too large or take too long."""
        self.size += amount
        if self.size > MAX_SIZE:
            raise UsageError(f"{where}: too large: more than {MAX_SIZE:,} values")


class _File:
    """One file: its names, and the evaluation of its statements. Values are nodes, and changed in place."""

    def __init__(self, path: Path, above: tuple[Path, ...], work: _Work) -> None:
        text = _text(path)
        self.path, self.work = Path(os.path.realpath(path)), work
        self.chain = (*above, self.path)
        if self.path in above:
            raise UsageError(f"_base_ goes in a circle: {' -> '.join(map(shorten, self.chain))}")
        if work.files >= MAX_FILES:
            raise UsageError(f"{shorten(path)}: more than {MAX_FILES} files")
        work.files += 1
        lines: dict[Key, int] = {(line,): line for line in range(1, text.count("\n") + 2)}
        self.layer = Layer(
            work.files, shorten(self.path), str(self.path.parent), tuple(map(shorten, self.chain)), lambda: lines
        )
        self.names: dict[str, Node] = {}
        self.used: set[str] = set()
        self.used_of_base: set[str] = set()
        self.base: Node | None = None
        self.run(_parsed(_OWN_NAME.sub(self.own_name, text), self.layer.source))
        work.unread = (work.unread - self.used_of_base) | (self.names.keys() - self.used)

    def own_name(self, match: re.Match[str]) -> str:
        """The part of the path that `{{fileBasename}}` and the like stand for, as in a string of Python."""
        path = self.path
        parts = {"fileDirname": str(path.parent), "fileBasename": path.name, "fileExtname": path.suffix}
        return repr(parts.get(match[1], path.stem))[1:-1]

    def where(self, node: ast.AST) -> Origin:
        return Origin(self.layer, (getattr(node, "lineno", 1),), None)

    def refuse(self, node: ast.AST, why: str = "") -> NoReturn:
        text = " ".join(ast.unparse(node).split())[:60]
        why = why or f"{type(node).__name__} of Python is not read here, and nothing is executed"
        raise UsageError(f"{self.where(node)}: {text}: {why}")

    def merged(self) -> Node:
        """The names of the file over those of its bases."""
        own = Node(self.names, (Origin(self.layer, (1,), None),))
        return own if self.base is None else _merge(own, self.base, (), self.work)

    def inherit(self, named: Node) -> Node:
        """The bases of the file as one dict; no two of them may set the same name."""
        merged: dict[str, Node] = {}
        for name in named.value if isinstance(named.value, list) else [named]:
            if not isinstance(name.value, str):
                raise UsageError(f"{named.where}: _base_: expected a path or a list of paths")
            path = Path(self.path.parent, name.value)
            if "::" in name.value:
                raise UsageError(
                    f"{named.where}: _base_: {name.value!r} is a file of another package, not at hand here"
                )
            if problem := _problem(path):
                raise UsageError(f"{named.where}: _base_: {problem}")
            base = _File(path, self.chain, self.work).merged()
            for key in base.value.keys() & merged.keys():
                both = f"{base.value[key].where} and {merged[key].where}"
                raise UsageError(f"{named.where}: _base_: {key} is set by two of the bases, at {both}")
            merged |= base.value
        return Node(merged, (named.where,))

    def run(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            match statement:
                case ast.Assign(targets=[ast.Name(id="_base_")], value=value):
                    if self.base is not None:
                        self.refuse(statement, "_base_ is set twice")
                    self.base = self.inherit(self.value(value))
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self.names[name] = self.value(value)
                case ast.Assign(targets=[ast.Subscript() | ast.Attribute() as target], value=value):
                    self.set_part(target, self.value(value))
                case ast.AugAssign(owner, ast.Add(), value) | ast.Expr(
                    ast.Call(ast.Attribute(owner, "extend"), [value], [])
                ):
                    self.extend(statement, owner, self.value(value).value)
                case ast.Expr(ast.Call(ast.Attribute(owner, "append"), [value], [])):
                    self.extend(statement, owner, [self.value(value)])
                case ast.If(test=test, body=body, orelse=other):
                    self.run(body if self.value(test).value else other)
                case ast.Import(names=[ast.alias(name="copy", asname=None)]) | ast.Pass() | ast.Expr(ast.Constant()):
                    pass
                case ast.ImportFrom(module="mmengine.config", names=[ast.alias(name="read_base")]):
                    hint = "Config.fromfile(PATH).dump('whole.py') of mmengine writes one file that can be imported"
                    self.refuse(statement, f"bases by `with read_base()` are not read here; {hint}")
                case _:
                    self.refuse(statement)

    def owner(self, node: ast.expr) -> Any:
        """The dict or list that is changed; that alone does not count as reading its name."""
        used = set(self.used)
        found, self.used = self.value(node).value, used
        return found

    def set_part(self, target: ast.Subscript | ast.Attribute, value: Node) -> None:
        """`owner[key] = value` or `owner.key = value`."""
        owner = self.owner(target.value)
        key = target.attr if isinstance(target, ast.Attribute) else self.value(target.slice).value
        is_index = isinstance(owner, list) and isinstance(key, int) and -len(owner) <= key < len(owner)
        if not is_index and not (isinstance(owner, dict) and isinstance(key, str)):
            self.refuse(target, "there is nothing that could be set")
        owner[key] = value

    def extend(self, statement: ast.stmt, owner: ast.expr, values: Any) -> None:
        target = self.owner(owner)
        if not isinstance(target, list) or not isinstance(values, list):
            self.refuse(statement, "only lists grow")
        self.work.charge(len(values), self.where(statement))
        target.extend(list(values))

    def value(self, node: ast.expr) -> Node:
        """The value of an expression."""
        where = (self.where(node),)
        self.work.charge(1, where[0])
        match node:
            case ast.Constant(value=str() as value) if "{{" in value:
                self.refuse(node, "templates are not read here")
            case ast.Constant(value=bool() | int() | float() | str() | None as value):
                return Node(value, where)
            case ast.Name(id="_base_") if self.base is not None:
                return self.base
            case ast.Name(id=name) if name in self.names:
                self.used.add(name)
                return _at(self.names[name], where)
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return Node([self.value(element) for element in elements], where)
            case ast.Dict(keys=keys, values=values):
                pairs = zip(keys, values, strict=True)
                return self.table(node, [(key and self.value(key).value, value) for key, value in pairs])
            case ast.Call(ast.Name("dict"), [] | [_] as args, keywords):
                first: list[tuple[Any, ast.expr]] = [(None, argument) for argument in args]
                return self.table(node, [*first, *((keyword.arg, keyword.value) for keyword in keywords)])
            case ast.Call(ast.Name("range"), args, []):
                numbers = self.computed(node, range, *(self.value(argument).value for argument in args))
                self.work.charge(-(-abs(numbers.stop - numbers.start) // abs(numbers.step)), where[0])
                return Node([Node(number, where) for number in numbers], where)
            case ast.Call(ast.Attribute(ast.Name("copy"), "deepcopy"), [what], []):
                return self.copied(self.value(what))
            case ast.Set(elts=[ast.Set(elts=[inner])]):  # {{_base_.x}}
                return self.value(inner)
            case ast.Attribute(value=owner, attr=name):
                return self.part(node, self.value(owner), Node(name, where))
            case ast.Subscript(value=owner, slice=index):
                return self.part(node, self.value(owner), self.value(index))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _SIGNS:
                return Node(self.computed(node, _SIGNS[type(op)], self.value(operand).value), where)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return Node(self.arithmetic(node, _OPERATORS[type(op)], self.value(left), self.value(right)), where)
        self.refuse(node)

    def table(self, node: ast.expr, pairs: list[tuple[Any, ast.expr]]) -> Node:
        """A dict of (key, expression); where the key is None, of all that the expression holds."""
        table: dict[str, Node] = {}
        for key, expression in pairs:
            value = self.value(expression)
            if key is None and isinstance(value.value, dict):
                self.work.charge(len(value.value), value.where)
                table |= value.value
            elif isinstance(key, str):
                table[key] = value
            else:
                self.refuse(node, "keys of a dict are strings" if key is not None else f"** {kind(value.value)}")
        return Node(table, (self.where(node),))

    def part(self, node: ast.expr, owner: Node, key: Node) -> Node:
        """`owner.key` or `owner[key]`."""
        if owner is self.base:
            self.used_of_base.add(str(key.value))
        try:
            part = owner.value[key.value]
        except (TypeError, LookupError):
            part = None
        if not isinstance(part, Node):  # nor is a letter of a string
            self.refuse(node, f"{kind(owner.value)} has no {key.value!r}")
        return _at(part, (self.where(node),))

    def arithmetic(self, node: ast.expr, operation: Callable[[Any, Any], Any], left: Node, right: Node) -> Any:
        """Computes with two numbers; also adds two lists or strings, and multiplies one by a number."""
        sizes = [len(side.value) for side in (left, right) if isinstance(side.value, str | list)]
        numbers = [side.value for side in (left, right) if isinstance(side.value, int | float)]
        if operation is operator.pow and len(numbers) == 2 and abs(numbers[1]) > 64:
            self.refuse(node, "a power that is too large")
        is_sum, is_multiple = operation is operator.add, operation is operator.mul and len(sizes) == len(numbers)
        if len(numbers) < 2 and not (len(sizes) == 2 and is_sum) and not is_multiple:
            self.refuse(node, f"{kind(left.value)} and {kind(right.value)} are not combined here")
        factor = numbers[0] if sizes and numbers and isinstance(numbers[0], int) else 1
        self.work.charge(sum(sizes) * max(factor, 0), left.where)
        return self.computed(node, operation, left.value, right.value)

    def computed(self, node: ast.expr, function: Callable[..., Any], *values: Any) -> Any:
        """What a function makes of values; whole numbers that TOML cannot write are refused."""
        try:
            made = function(*values)
        except (TypeError, ValueError, ArithmeticError) as error:
            self.refuse(node, str(error)[:100])
        if isinstance(made, complex) or (isinstance(made, int) and abs(made) >= MAX_INTEGER):
            self.refuse(node, "a number that TOML cannot write")
        return made

    def copied(self, value: Node) -> Node:
        """A copy of a value, with copies of what it holds."""
        self.work.charge(1, value.where)
        if isinstance(value.value, dict):
            return value._replace(value={key: self.copied(below) for key, below in value.value.items()})
        return value._replace(value=[*map(self.copied, value.value)]) if isinstance(value.value, list) else value


def _at(value: Node, where: tuple[Origin, ...]) -> Node:
    """A number or a string belongs to the place that it is used at, a dict or a list to where it was written."""
    return value if isinstance(value.value, dict | list) else Node(value.value, where)


def _merge(new: Node, old: Node, key: Key, work: _Work) -> Node:
    """`new` over `old`, which are dicts."""
    work.charge(len(new.value) + len(old.value), new.where)
    merged: dict[str, Node] = dict(old.value)
    for part, value in new.value.items():
        if isinstance(value.value, dict) and part in merged and not _deletes(value):
            if not isinstance(merged[part].value, dict):
                what = f"a dict cannot go over {_in_words(merged[part])}, set at {merged[part].where}"
                hint = "`_delete_=True` in it would replace that"
                raise UsageError(f"{value.where}: {show((*key, part))}: {what}; {hint}")
            value = _merge(value, merged[part], (*key, part), work)
        merged[part] = value
    return Node(merged, new.origins)


def _deletes(table: Node) -> bool:
    """Whether a dict drops what it inherits."""
    return "_delete_" in table.value and bool(table.value["_delete_"].value)


def _in_words(node: Node) -> str:
    return "None" if node.value is None else kind(node.value)


def _checked(node: Node, work: _Work, depth: int = 0) -> Node:
    """The value without `_delete_`, ready for TOML."""
    work.charge(1, node.where)
    if depth > MAX_DEPTH:
        raise UsageError(f"{node.where}: dicts or lists nested more than {MAX_DEPTH} deep")
    if isinstance(node.value, dict):
        kept = {key: below for key, below in node.value.items() if key != "_delete_"}
        return node._replace(value={key: _checked(below, work, depth + 1) for key, below in kept.items()})
    if isinstance(node.value, list):
        return node._replace(value=[_checked(below, work, depth + 1) for below in node.value])
    if isinstance(node.value, str) and any("\ud800" <= character <= "\udfff" for character in node.value):
        raise UsageError(f"{node.where}: a string that UTF-8 cannot write")
    if isinstance(node.value, int) and abs(node.value) >= MAX_INTEGER:
        raise UsageError(f"{node.where}: a number of more than 64 bits, which TOML cannot write")
    return node._replace(value=escape(node.value))


def _problem(path: Path) -> str:
    """Why a path cannot be read; empty if nothing is known against it."""
    if os.path.isdir(path):
        return f"{shorten(path)} is a folder, not a file"
    if os.path.exists(path):
        return "" if os.path.isfile(path) else f"{shorten(path)} is not a regular file"
    beside = os.listdir(path.parent) if os.path.isdir(path.parent) else []
    return f"{shorten(path)} does not exist{nearest(path.name, [name for name in beside if name.endswith('.py')])}"


def _text(path: Path) -> str:
    """The text of a file. Raises UsageError where there is none."""
    if problem := _problem(path):
        raise UsageError(problem)
    try:
        content = path.read_bytes() if path.stat().st_size <= MAX_BYTES else None
        if content is None:
            raise UsageError(f"{shorten(path)}: more than {MAX_BYTES:,} bytes")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{shorten(path)}: not UTF-8: byte 0x{error.object[error.start]:02x}") from None
    except OSError as error:
        raise UsageError(f"{shorten(path)}: {error.strerror}") from None


def _parsed(text: str, source: str) -> list[ast.stmt]:
    """The statements of a file; `source` is its name for errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a pattern such as "\d" is a warning, on a line of its own
            return ast.parse(text).body
    except SyntaxError as error:
        place = f"{source}:{error.lineno}" if error.lineno else source
        raise UsageError(f"{place}: not Python: {' '.join((error.msg or '').split())}") from None
    except (ValueError, MemoryError, RecursionError) as error:
        raise UsageError(f"{source}: not Python that can be read: {error or 'nested too deep'}") from None
