"""Python expressions without Python: the part of the language that configurations are written in, evaluated over its
syntax tree, never executed.

Literals, dict() and the like, variables, operators, comparisons, conditional expressions, f-strings and the other ways
of formatting, slices, comprehensions, and the methods of lists, dicts and strings in `methods.py`. Anything else raises
CannotEvaluate, which becomes an Unknown where a value is kept, so that one call in one key does not cost the others.
What would be large is refused before it is made: UsageError.
"""

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sslrun.config.importer import functions
from sslrun.config.importer.values import MAX_BITS, CannotEvaluate, Row, Table, Unknown, Work, at_line
from sslrun.config.node import Layer, Origin
from sslrun.errors import UsageError

MAX_NESTING = 64  # of expressions in each other

_UNARY: dict[type, Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Invert: operator.invert,
}
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitOr: operator.or_,
    ast.BitAnd: operator.and_,
    ast.BitXor: operator.xor,
}
_COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass(frozen=True)
class Foreign:
    """What a name means after `import`, `def` or `class`: `name` is its full name, with dots."""

    name: str


class Scope:
    """The names of one file, and what an expression in it means.

    Attributes:
        names: what each name was set to last.
        used: names that were read, of the file's own.
        used_of_bases: keys that were read from the bases.
        bases: what `_base_` means: the merged bases, once they are read.
    """

    def __init__(self, layer: Layer, lines: list[str], work: Work) -> None:
        self.layer, self.lines, self.work = layer, lines, work
        self.names: dict[str, Any] = {}
        self.used: set[str] = set()
        self.used_of_bases: set[str] = set()
        self.bases: Table | None = None
        self.depth = 0

    def where(self, node: ast.AST) -> Origin:
        return at_line(self.layer, getattr(node, "lineno", 1))

    def cannot(self, node: ast.AST, reason: str) -> CannotEvaluate:
        line = self.lines[getattr(node, "lineno", 1) - 1 :][:1]
        text = line[0].encode()[getattr(node, "col_offset", 0) :].decode(errors="replace").strip() if line else ""
        return CannotEvaluate(Unknown(self.where(node), text[:60] + ("..." if len(text) > 60 else ""), reason))

    def kept(self, node: ast.expr) -> Any:
        """A value that is kept in a key, a list or a name: Unknown where there is none."""
        try:
            return self.value(node)
        except CannotEvaluate as error:
            return error.unknown

    def value(self, node: ast.expr) -> Any:
        """What an expression means. Raises CannotEvaluate, and UsageError for what is too large."""
        self.work.charge(1, self.where(node))
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise UsageError(f"{self.where(node)}: expressions nested more than {MAX_NESTING} deep")
        try:
            value = self._evaluated(node)
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            if isinstance(error, UsageError):
                raise
            raise self.cannot(node, _reason(error)) from None
        finally:
            self.depth -= 1
        if isinstance(value, Unknown):
            raise CannotEvaluate(value)
        if isinstance(value, Table | Row) and value.spoilt is not None:
            raise CannotEvaluate(value.spoilt)
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise UsageError(f"{self.where(node)}: a number of more than {MAX_BITS} bits")
        if not isinstance(value, bool | int | float | str | None | Table | Row | tuple):
            raise self.cannot(node, f"a value of the kind {type(value).__name__} is no part of a configuration")
        return value

    def _evaluated(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return self._name(node, name)
            case ast.Dict():
                return self._dict(node)
            case ast.List(elts=elements):
                return Row(self._elements(elements), self.where(node))
            case ast.Tuple(elts=elements):
                return tuple(self._elements(elements))
            case ast.Set(elts=[ast.Set(elts=[reference])]):  # {{_base_.x}}
                return self.value(reference)
            case ast.Call():
                return self._call(node)
            case ast.Attribute() | ast.Subscript():
                return self._part(node)
            case ast.UnaryOp(op=op, operand=operand):
                return _UNARY[type(op)](self.value(operand))
            case ast.BinOp(left=left, op=op, right=right):
                return self._binary(node, type(op), self.value(left), self.value(right))
            case ast.BoolOp(op=op, values=values):
                return self._either(isinstance(op, ast.Or), values)
            case ast.Compare():
                return self._compared(node)
            case ast.IfExp(test=test, body=body, orelse=other):
                return self.value(body if self.value(test) else other)
            case ast.JoinedStr(values=parts):
                text = "".join(self._formatted(part) for part in parts)
                self.work.charge(len(text), self.where(node))
                return text
            case ast.ListComp(elt=element, generators=loops):
                row = Row((), self.where(node))
                self._comprehend(loops, lambda: row.append(self.kept(element)))
                return row
            case ast.DictComp(key=key, value=value, generators=loops):
                table = Table(self.where(node))
                self._comprehend(loops, lambda: table.put(self._key(key), self.kept(value), self.where(key)))
                return table
        raise self.cannot(node, "is not evaluated here")

    def _name(self, node: ast.expr, name: str) -> Any:
        self.used.add(name)
        if name == "_base_" and self.bases is not None:
            return self.bases
        if name not in self.names:
            raise self.cannot(node, f"{name} has no value here")
        value = self.names[name]
        if isinstance(value, Foreign):
            raise self.cannot(node, f"{value.name} is Python of its own, and nothing is executed")
        return value

    def _dict(self, node: ast.Dict) -> Table:
        table = Table(self.where(node))
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                self._merge_into(table, value)
            else:
                table.put(self._key(key), self.kept(value), self.where(key))
        return table

    def _key(self, node: ast.expr) -> Any:
        key = self.value(node)
        if not isinstance(key, bool | int | float | str | None):
            raise self.cannot(node, "a key must be a string")
        return key

    def _merge_into(self, table: Table, node: ast.expr) -> None:
        """`**other` in a dict."""
        other = self.value(node)
        if not isinstance(other, Table):
            raise self.cannot(node, "is no dict")
        self.work.charge(len(other), self.where(node))
        table.take_over(other)

    def _elements(self, nodes: list[ast.expr]) -> list[Any]:
        """The elements of a list or a tuple, `*other` opened."""
        elements: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                elements += self.sequence(node.value)
            else:
                elements.append(self.kept(node))
        return elements

    def sequence(self, node: ast.expr) -> list[Any]:
        """The elements of an expression that is to be gone through."""
        value = self.value(node)
        if isinstance(value, dict | str | list | tuple):
            self.work.charge(len(value), self.where(node))
            return list(value)
        raise self.cannot(node, "cannot be gone through")

    def _binary(self, node: ast.expr, op: type, left: Any, right: Any) -> Any:
        if op is ast.Mod and isinstance(left, str):
            return functions.percent(left, right)
        self._check_size(node, op, left, right)
        both = (left, right)
        if op in (ast.Add, ast.Mult) and any(isinstance(side, Row) for side in both):
            return Row(_BINARY[op](*both), self.where(node))
        if any(isinstance(side, Table) for side in both) or op not in _BINARY:
            raise self.cannot(node, "these operands have no such operation here")
        return _BINARY[op](*both)

    def _check_size(self, node: ast.expr, op: type, left: Any, right: Any) -> None:
        """Refuses an operation whose result would be large, before it is done."""
        where = self.where(node)
        sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
        numbers = [abs(side) for side in (left, right) if isinstance(side, int)]
        if op is ast.Add and sizes:
            self.work.charge(sum(sizes), where)
        elif op is ast.Mult and sizes and numbers:
            self.work.charge(min(sizes[0] * numbers[0], 2 * MAX_BITS**2), where)
        elif len(numbers) == 2 and (
            (op is ast.Pow and right > 0 and numbers[0] > 1 and numbers[0].bit_length() * right > 2 * MAX_BITS)
            or (op is ast.LShift and numbers[1] > MAX_BITS)
        ):
            raise UsageError(f"{where}: a number of more than {MAX_BITS} bits")

    def _either(self, is_or: bool, nodes: list[ast.expr]) -> Any:
        """`a or b or c`, `a and b and c`."""
        value: Any = None
        for node in nodes:
            value = self.value(node)
            if bool(value) == is_or:
                break
        return value

    def _compared(self, node: ast.Compare) -> bool:
        left = self.value(node.left)
        for op, after in zip(node.ops, node.comparators, strict=True):
            right = self.value(after)
            if not self._holds(node, op, left, right):
                return False
            left = right
        return True

    def _holds(self, node: ast.expr, op: ast.cmpop, left: Any, right: Any) -> bool:
        match op:
            case ast.Eq() | ast.NotEq():
                return self._equal(node, left, right) == isinstance(op, ast.Eq)
            case ast.Is() | ast.IsNot():
                if left is not None and right is not None and not isinstance(left, bool):
                    raise self.cannot(node, "`is` tells only None, True and False")
                return (left is right) == isinstance(op, ast.Is)
            case ast.In() | ast.NotIn():
                if isinstance(right, str) and isinstance(left, str):
                    found = left in right
                elif isinstance(right, dict | list | tuple):
                    found = any(self._equal(node, left, element) for element in right)
                else:
                    raise self.cannot(node, "nothing can be in that")
                return found == isinstance(op, ast.In)
        if not all(isinstance(side, bool | int | float | str) for side in (left, right)):
            raise self.cannot(node, "only numbers and strings have an order")
        return bool(_COMPARISONS[type(op)](left, right))

    def _equal(self, node: ast.expr, left: Any, right: Any) -> bool:
        """`==`, at the price of what is compared: equal parts may be reached very often."""
        self.work.charge(1, self.where(node))
        for side in (left, right):
            if isinstance(side, Unknown):
                raise CannotEvaluate(side)
        if isinstance(left, dict) and isinstance(right, dict):
            return left.keys() == right.keys() and all(self._equal(node, left[k], right[k]) for k in left)
        if isinstance(left, list | tuple) and isinstance(right, list | tuple):
            same_kind = isinstance(left, list) == isinstance(right, list)
            pairs = zip(left, right, strict=False)
            return same_kind and len(left) == len(right) and all(self._equal(node, a, b) for a, b in pairs)
        if isinstance(left, dict | list | tuple) or isinstance(right, dict | list | tuple):
            return False
        return bool(left == right)

    def _formatted(self, part: ast.expr) -> str:
        """One part of an f-string."""
        match part:
            case ast.Constant(value=str(text)):
                return text
            case ast.FormattedValue(value=inner, conversion=conversion, format_spec=spec):
                asked = self.value(spec) if spec is not None else ""
                return functions.formatted(self.value(inner), asked, "" if conversion == -1 else chr(conversion))
        raise self.cannot(part, "is not evaluated here")

    def _comprehend(self, loops: list[ast.comprehension], action: Callable[[], None]) -> None:
        """Does something at every turn of the loops of a comprehension, whose names are its own."""
        outside = dict(self.names)
        self.work.charge(len(outside), at_line(self.layer, 1))
        try:
            self._loop(loops, action)
        finally:
            self.names = outside

    def _loop(self, loops: list[ast.comprehension], action: Callable[[], None]) -> None:
        if not loops:
            action()
            return
        for element in self.sequence(loops[0].iter):
            self.bind(loops[0].target, element)
            if all(self.value(condition) for condition in loops[0].ifs):
                self._loop(loops[1:], action)

    def bind(self, target: ast.expr, value: Any) -> None:
        """`target = value`."""
        where = self.where(target)
        match target:
            case ast.Name(id=name):
                self.names[name] = value
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                values = inside_of(value, len(targets))
                if values is None:
                    raise self.cannot(target, f"is not set from {len(targets)} values")
                for inner, part in zip(targets, values, strict=True):
                    self.bind(inner, part)
            case ast.Attribute(value=owner, attr=name):
                table = self.value(owner)
                if not isinstance(table, Table):
                    raise self.cannot(target, "is no key of a dict")
                table.put(name, value, where)
            case ast.Subscript(value=owner, slice=index):
                container = self.value(owner)
                if isinstance(container, Table):
                    container.put(self._key(index), value, where)
                elif isinstance(container, Row) and isinstance(place := self.value(index), int):
                    if not -len(container) <= place < len(container):
                        raise self.cannot(target, f"the list has {len(container)} elements")
                    container[place] = value
                else:
                    raise self.cannot(target, "cannot be set")
            case _:
                raise self.cannot(target, "cannot be set")

    def _part(self, node: ast.Attribute | ast.Subscript) -> Any:
        """`a.b`, `a["b"]`, `a[0]`, `a[1:2]`."""
        if isinstance(node, ast.Attribute):
            owner = self.value(node.value)
            if isinstance(owner, Table) and node.attr in owner:
                return self._found(owner, node.attr)
            raise self.cannot(node, f"there is no {node.attr}")
        owner = self.value(node.value)
        if isinstance(node.slice, ast.Slice):
            bounds = [self.value(b) if b is not None else None for b in _bounds(node.slice)]
            if not isinstance(owner, str | Row | tuple) or not all(isinstance(b, int | None) for b in bounds):
                raise self.cannot(node, "has no such part")
            self.work.charge(len(owner), self.where(node))
            piece = owner[slice(*bounds)]
            return Row(piece, owner.where) if isinstance(owner, Row) else piece
        index = self._key(node.slice)
        if isinstance(owner, Table):
            return self._found(owner, index)
        if not isinstance(owner, str | Row | tuple) or not isinstance(index, int):
            raise self.cannot(node, "has no such part")
        return owner[index]

    def _found(self, owner: Table, key: Any) -> Any:
        if owner is self.bases:
            self.used_of_bases.add(key)
        return owner[key]

    def _call(self, node: ast.Call) -> Any:
        function = node.func
        dotted = self._imported(function)
        if dotted is None and isinstance(function, ast.Attribute):
            owner = self.value(function.value)
            if isinstance(owner, Table) and owner is self.bases and node.args:
                self.used_of_bases.add(self._key(node.args[0]))
            arguments, named = self._arguments(node)
            return functions.method(self.work, self.where(node), owner, function.attr, arguments, named)
        name = dotted or (function.id if isinstance(function, ast.Name) and function.id not in self.names else "")
        if name == "dict":
            return self._dict_call(node)
        if name not in functions.FUNCTIONS:
            raise self.cannot(node, "a function that is not known here, and nothing is executed")
        arguments, named = self._arguments(node)
        return functions.FUNCTIONS[name](self.work, self.where(node), *arguments, **named)

    def _imported(self, function: ast.expr) -> str | None:
        """The full name of a function that is reached through an import."""
        parts: list[str] = []
        while isinstance(function, ast.Attribute):
            parts.append(function.attr)
            function = function.value
        bound = self.names.get(function.id) if isinstance(function, ast.Name) else None
        return ".".join([bound.name, *reversed(parts)]) if isinstance(bound, Foreign) else None

    def _arguments(self, node: ast.Call) -> tuple[list[Any], dict[str, Any]]:
        positional: list[Any] = []
        for argument in node.args:
            if isinstance(argument, ast.Starred):
                positional += self.sequence(argument.value)
            else:
                positional.append(self.value(argument))
        named = self._dict_call(ast.copy_location(ast.Call(node.func, [], node.keywords), node))
        for value in [*positional, *named.values()]:
            if isinstance(value, Unknown):
                raise CannotEvaluate(value)
        if not all(isinstance(name, str) for name in named):
            raise self.cannot(node, "names of arguments are strings")
        return positional, dict(named)

    def _dict_call(self, node: ast.Call) -> Table:
        """`dict(...)`: another dict or pairs, then keys."""
        table = Table(self.where(node))
        if len(node.args) > 1 or any(isinstance(argument, ast.Starred) for argument in node.args):
            raise self.cannot(node, "dict() takes one dict, or a list of pairs")
        for argument in node.args:
            given = self.value(argument)
            if isinstance(given, Table):
                self._merge_into(table, argument)
                continue
            for pair in self.sequence(argument):
                if not isinstance(pair, list | tuple) or len(pair) != 2 or not functions.is_scalar(pair[0]):
                    raise self.cannot(argument, "is no list of pairs of a key and a value")
                table.put(pair[0], pair[1], self.where(argument))
        for keyword in node.keywords:
            if keyword.arg is None:
                self._merge_into(table, keyword.value)
            else:
                table.put(keyword.arg, self.kept(keyword.value), self.where(keyword))
        return table


def inside_of(value: Any, count: int) -> list[Any] | None:
    """The parts of a value that is to be taken apart into so many; None where it cannot be."""
    if isinstance(value, Unknown):
        return [value] * count
    return list(value) if isinstance(value, list | tuple | str) and len(value) == count else None


def _bounds(node: ast.Slice) -> list[ast.expr | None]:
    return [node.lower, node.upper, node.step]


def _reason(error: Exception) -> str:
    """Python's own words for what is wrong with an operation, on one line."""
    text = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    return " ".join(text.split())[:100] or type(error).__name__
