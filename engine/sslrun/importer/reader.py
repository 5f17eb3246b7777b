"""Reads an old config with its bases, as mmcv and mmengine do, without executing any of it.

Read are the names, literals, `dict()`, arithmetic, `.append()`, `.extend()`, assignments to keys and `if` of published
configs. Everything else is refused with file and line: loops, comprehensions, slices, comparisons, calls.
`_base_` names files that are merged below the file: dicts deeply, all else replaced, and `_delete_=True` in a dict
drops what it inherits. `_base_.x` and `{{_base_.x}}` are values of the merged bases.
"""

import ast
import operator
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from sslrun.config.dump import escape
from sslrun.config.files import shorten
from sslrun.config.merge import kind, nearest
from sslrun.config.node import Key, Layer, Node, Origin, show, walk
from sslrun.errors import UsageError

MAX_SIZE, MAX_DEPTH = 20_000, 64  # values in a file, letters in a string; dicts and lists in each other
MAX_EXPONENT = 64

_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_,
}  # fmt: skip


def read(path: Path) -> tuple[Node, set[str]]:
    """Reads an old config: its values, and the top-level names that no expression reads (keys, or idle variables).

    Raises:
        UsageError: one line, for what cannot be read.
    """
    try:
        file = _File(path, ())
        return _copied(file.merged, "_delete_", escape), file.unread
    except RecursionError:
        raise UsageError(f"{shorten(path)}: nested too deep, or its bases go in a circle") from None


class _File:
    """One file: the evaluation of its statements. Values are nodes, and changed in place.

    Attributes:
        merged: the values of the file over those of its bases.
        unread: names in them that no expression reads.
    """

    def __init__(self, path: Path, above: tuple[str, ...], named_at: str = "") -> None:
        tree = _parsed(path, named_at)
        lines: dict[Key, int] = {(n.lineno,): n.lineno for n in ast.walk(tree) if isinstance(n, ast.stmt | ast.expr)}
        shown = (*above, shorten(Path(os.path.realpath(path))))
        self.path, self.layer = path, Layer(len(shown), shown[-1], str(path.parent), shown, lambda: lines)
        self.base, self.names, self.unread = Node({}, (self.where(tree),)), dict[str, Node](), set[str]()
        for statement in tree.body:
            self.run(statement)
        self.merged = _merge(_bounded(Node(self.names, (self.where(tree),))), _bounded(self.base), ())

    def where(self, node: ast.AST) -> Origin:
        return Origin(self.layer, (getattr(node, "lineno", 1),), None)

    def refuse(self, node: ast.AST, why: str = "") -> NoReturn:
        text = " ".join(ast.unparse(node).split())[:60]
        why = why or f"{type(node).__name__} of Python is not read here, and nothing is executed"
        raise UsageError(f"{self.where(node)}: {text}: {why}")

    def run(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=[ast.Name(id="_base_")], value=value):
                named = self.value(value)
                for name in named.value if isinstance(named.value, list) else [named]:
                    base = _File(self.path.parent / str(name.value), self.layer.chain, f"{name.where}: _base_: ")
                    for key in base.merged.value.keys() & self.base.value.keys():
                        self.refuse(statement, f"{key} is set by two of the bases")
                    self.base.value.update(base.merged.value)
                    self.unread |= base.unread
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self.names[name] = self.value(value)
                self.unread.add(name)
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript() as target], value=value):
                owner, key = self.place(target)
                owner[key] = self.value(value)
            case ast.Expr(ast.Call(ast.Attribute(owner, "append"), [value], [])):
                self.extend(statement, self.value(owner).value, [self.value(value)])
            case ast.Expr(ast.Call(ast.Attribute(owner, "extend"), [more], [])) | ast.AugAssign(owner, ast.Add(), more):
                self.extend(statement, self.value(owner).value, self.value(more).value)
            case ast.If(test=test, body=body, orelse=other):
                for inner in body if self.value(test).value else other:
                    self.run(inner)
            case ast.Expr(ast.Constant()) | ast.Import([ast.alias("copy", None)]):
                pass
            case _:
                self.refuse(statement)

    def extend(self, statement: ast.stmt, owner: Any, values: Any) -> None:
        if not isinstance(owner, list) or not isinstance(values, list) or len(owner) + len(values) > MAX_SIZE:
            self.refuse(statement, f"only lists grow here, up to {MAX_SIZE:,}")
        owner.extend(list(values))

    def place(self, node: ast.Attribute | ast.Subscript) -> tuple[Any, Any]:
        """The dict or list of `owner.key` or `owner[key]`, and the key, which is there or is a new one of a dict."""
        owner = self.value(node.value).value
        key = node.attr if isinstance(node, ast.Attribute) else self.value(node.slice).value
        is_key = isinstance(owner, dict) and isinstance(key, str) and (key in owner or isinstance(node.ctx, ast.Store))
        if not is_key and not (isinstance(owner, list) and isinstance(key, int) and -len(owner) <= key < len(owner)):
            self.refuse(node, f"{kind(owner)} has no {key!r}")
        if owner is self.base.value:
            self.unread.discard(key)
        return owner, key

    def value(self, node: ast.expr) -> Node:
        """The value of an expression: a number or a string, or a dict or list at the place where it was written."""
        found = self.evaluated(node)
        if isinstance(found, Node) and isinstance(found.value, dict | list):
            return found
        value = found.value if isinstance(found, Node) else found
        if isinstance(value, str) and ("{{" in value or value.encode(errors="ignore").decode() != value):
            self.refuse(node, "a template, or a string that UTF-8 cannot write")
        if (len(value) > MAX_SIZE) if isinstance(value, str | list) else isinstance(value, int) and abs(value) >= 2**63:
            self.refuse(node, "more than 64 bits, or too long")
        return Node(value, (self.where(node),))

    def evaluated(self, node: ast.expr) -> Any:
        """What an expression says: something new, or the node of something that has a name."""
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as value):
                return value
            case ast.Name(id="_base_") if self.base.value:
                return self.base
            case ast.Name(id=name) if name in self.names:
                self.unread.discard(name)
                return self.names[name]
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return [self.value(element) for element in elements]
            case ast.Dict(keys=keys, values=values):
                return self.table(node, [key and self.value(key).value for key in keys], values)
            case ast.Call(ast.Name("dict"), [] | [_] as args, keywords):
                pairs = [*((None, argument) for argument in args), *((pair.arg, pair.value) for pair in keywords)]
                return self.table(node, [key for key, _ in pairs], [value for _, value in pairs])
            case ast.Call(ast.Name("range"), [ast.Constant(0), ast.Constant(int() as count)], []) if count < MAX_SIZE:
                return [Node(number, (self.where(node),)) for number in range(count)]  # gpu_ids of dumped configs
            case ast.Call(ast.Attribute(ast.Name("copy"), "deepcopy"), [argument], []):
                return _copied(_bounded(self.value(argument)))
            case ast.Set(elts=[ast.Set(elts=[inner])]):  # {{_base_.x}}
                return self.value(inner)
            case ast.Attribute() | ast.Subscript():
                owner, key = self.place(node)
                return owner[key]
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
                return self.computed(node, op, [self.value(operand).value])
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return self.computed(node, op, [self.value(left).value, self.value(right).value])
        self.refuse(node)

    def table(self, node: ast.expr, keys: list[Any], values: list[ast.expr]) -> dict[str, Node]:
        """A dict of expressions by their keys; where a key is None, of all that the expression holds."""
        table: dict[str, Node] = {}
        for key, value in zip(keys, map(self.value, values), strict=True):
            if not isinstance(value.value if key is None else key, dict if key is None else str):
                self.refuse(node, "keys of a dict are strings, and ** is for dicts")
            table |= value.value if key is None else {key: value}
        return table

    def computed(self, node: ast.expr, op: ast.AST, values: list[Any]) -> Any:
        """What an operator makes of numbers; two strings or two lists can be added, and `not` takes anything."""
        takes_others = isinstance(op, ast.Not) or (isinstance(op, ast.Add) and {*map(type, values)} in ({str}, {list}))
        if not takes_others and not all(isinstance(value, int | float) for value in values):
            self.refuse(node, f"{' and '.join(map(kind, values))}: not combined here")
        if isinstance(op, ast.Pow) and values[1] not in range(MAX_EXPONENT):
            self.refuse(node, f"an exponent is a whole number below {MAX_EXPONENT} here")
        try:
            return _OPERATORS[type(op)](*values)
        except ArithmeticError as error:
            self.refuse(node, str(error))


def _merge(new: Node, old: Node, key: Key) -> Node:
    """`new` over `old`, which are dicts."""
    merged = dict(old.value)
    for part, value in new.value.items():
        deletes = isinstance(value.value, dict) and "_delete_" in value.value and value.value["_delete_"].value
        if isinstance(value.value, dict) and part in merged and not deletes:
            if not isinstance(merged[part].value, dict):
                what = f"a dict over something else, set at {merged[part].where}; `_delete_=True` would replace that"
                raise UsageError(f"{value.where}: {show((*key, part))}: {what}")
            value = _merge(value, merged[part], (*key, part))
        merged[part] = value
    return Node(merged, new.origins)


def _bounded(node: Node) -> Node:
    """A value that is neither too large nor nested too deep. Raises UsageError for any other."""
    for count, (key, below) in enumerate(walk(node)):
        if count > MAX_SIZE or len(key) > MAX_DEPTH:
            raise UsageError(f"{below.where}: more than {MAX_SIZE:,} values, or nested more than {MAX_DEPTH} deep")
    return node


def _copied(node: Node, dropped: str = "", change: Callable[[Any], Any] = lambda value: value) -> Node:
    """A copy of a value without one key, and with its numbers and strings changed."""
    if isinstance(node.value, dict):
        value: Any = {key: _copied(below, dropped, change) for key, below in node.value.items() if key != dropped}
    else:
        is_list = isinstance(node.value, list)
        value = [_copied(below, dropped, change) for below in node.value] if is_list else change(node.value)
    return node._replace(value=value)


def _parsed(path: Path, named_at: str) -> ast.Module:
    """The syntax tree of a file; `named_at` says in a message what names the file."""
    try:
        with warnings.catch_warnings(action="ignore"):  # a pattern such as "\d" is a warning, on a line of its own
            return ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise UsageError(f"{shorten(path)}:{error.lineno or 1}: not Python: {error.msg}") from None
    except (OSError, ValueError, MemoryError) as error:
        hint = nearest(path.name, [other.name for other in path.parent.glob("*.py") if other != path])
        raise UsageError(f"{named_at}{shorten(path)}: {getattr(error, 'strerror', None) or error}{hint}") from None
