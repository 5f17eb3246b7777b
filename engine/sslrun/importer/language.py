"""Evaluates the part of Python that old configs are written in, over its syntax tree. Nothing is executed.

Names, literals, `dict()`, arithmetic, `.append()` and the like, assignments to keys, and `if` with `else`: what
published configs use. Everything else is refused, with file and line: loops, comprehensions, f-strings, slices,
comparisons, functions, imports, calls.
"""

import ast
import operator
from collections.abc import Callable
from typing import Any, NoReturn

from sslrun.config.node import Layer, Origin
from sslrun.errors import UsageError
from sslrun.importer.values import Row, Table, Work, kind_of

MAX_BITS = 4096  # of a whole number that others are computed from

_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_SIGNS: dict[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"list": list, "tuple": tuple, "range": range, "float": float, "int": int}
_WHAT: dict[type, str] = {
    ast.For: "a loop", ast.While: "a loop", ast.ListComp: "a comprehension", ast.DictComp: "a comprehension",
    ast.SetComp: "a comprehension", ast.GeneratorExp: "a comprehension", ast.JoinedStr: "an f-string",
    ast.Slice: "a slice", ast.Compare: "a comparison", ast.Call: "a call of this function", ast.Import: "an import",
    ast.ImportFrom: "an import", ast.FunctionDef: "a function", ast.Lambda: "a function", ast.ClassDef: "a class",
    ast.Constant: "a constant of this type",
}  # fmt: skip


class Scope:
    """The names of one file, and the evaluation of its statements and expressions.

    Attributes:
        names: what each name was set to last.
        used: names that an expression reads.
        used_of_bases: names of the bases that an expression reads.
        bases: the merged bases, once `_base_` is set; `inherit` reads them.
    """

    def __init__(self, layer: Layer, work: Work, inherit: Callable[[Any, Origin], Table]) -> None:
        self.layer, self.work, self.inherit = layer, work, inherit
        self.names = Table(Origin(layer, (1,), None))
        self.used: set[str] = set()
        self.used_of_bases: set[str] = set()
        self.bases: Table | None = None

    def where(self, node: ast.AST) -> Origin:
        return Origin(self.layer, (getattr(node, "lineno", 1),), None)

    def refuse(self, node: ast.AST, why: str = "") -> NoReturn:
        what = _WHAT.get(type(node)) or f"{type(node).__name__} of Python"
        text = " ".join(ast.unparse(node).split())[:60]
        raise UsageError(f"{self.where(node)}: {text}: {why or f'{what} is not read here, and nothing is executed'}")

    def run(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            match statement:
                case ast.Assign(targets=[ast.Name(id="_base_")], value=value):
                    if self.bases is not None:
                        self.refuse(statement, "_base_ is set twice")
                    self.bases = self.inherit(self.value(value), self.where(value))
                case ast.Assign(targets=targets, value=value):
                    made = self.value(value)
                    for target in targets:
                        self.bind(target, made)
                case ast.AugAssign(target=target, op=op, value=value):
                    now = self.owner(target)
                    made = self.arithmetic(statement, op, now, self.value(value))
                    if isinstance(now, Row):
                        now[:] = made
                    else:
                        self.bind(target, made)
                case ast.If(test=test, body=body, orelse=other):
                    self.run(body if self.value(test) else other)
                case ast.Expr(value=ast.Call(func=ast.Attribute(value=owner, attr=name)) as call):
                    self.method(call, self.owner(owner), name)
                case ast.Import(names=[ast.alias(name="copy", asname=None)]) | ast.Pass() | ast.Expr(ast.Constant()):
                    pass
                case ast.With(items=[ast.withitem(context_expr=ast.Call(func=ast.Name(id="read_base")))]):
                    hint = "Config.fromfile(PATH).dump('whole.py') of mmengine writes one file that can be imported"
                    raise UsageError(f"{self.where(statement)}: bases by `with read_base()` are not read here; {hint}")
                case ast.ImportFrom(module="mmengine.config", names=[ast.alias(name="read_base")]):
                    pass  # the `with` that follows says why the file is refused
                case _:
                    self.refuse(statement)

    def bind(self, target: ast.expr, value: Any) -> None:
        """`target = value`."""
        match target:
            case ast.Name(id=name):
                self.names.put(name, value, self.where(target))
            case ast.Attribute(value=owner) | ast.Subscript(value=owner):
                container = self.owner(owner)
                key = target.attr if isinstance(target, ast.Attribute) else self.value(target.slice)
                if isinstance(container, Table) and isinstance(key, str):
                    container.put(key, value, self.where(target))
                elif isinstance(container, Row) and isinstance(key, int) and -len(container) <= key < len(container):
                    container[key] = value
                else:
                    self.refuse(target, "there is nothing that could be set")
            case _:
                self.refuse(target)

    def owner(self, node: ast.expr) -> Any:
        """The value that is changed or added to; that alone does not count as reading its name."""
        root: ast.AST = node
        while isinstance(root, ast.Attribute | ast.Subscript):
            root = root.value
        used = set(self.used)
        value = self.value(node)
        self.used -= {root.id} - used if isinstance(root, ast.Name) else set()
        return value

    def value(self, node: ast.expr) -> Any:
        """The value of an expression."""
        where = self.where(node)
        self.work.charge(1, where)
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as value):
                return value
            case ast.Name(id="_base_") if self.bases is not None:
                return self.bases
            case ast.Name(id=name) if name in self.names:
                self.used.add(name)
                return self.names[name]
            case ast.Name():
                self.refuse(node, "no such name is set before")
            case ast.List(elts=elements):
                return Row([self.value(element) for element in elements], where)
            case ast.Tuple(elts=elements):
                return tuple(self.value(element) for element in elements)
            case ast.Dict(keys=keys, values=values):
                return self.table(
                    node, [(key and self.value(key), value) for key, value in zip(keys, values, strict=True)]
                )
            case ast.Set(elts=[ast.Set(elts=[inner])]):  # {{_base_.x}}
                return self.value(inner)
            case ast.Attribute(value=owner, attr=name):
                return self.part(node, self.value(owner), name)
            case ast.Subscript(value=owner, slice=index):
                return self.part(node, self.value(owner), self.value(index))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _SIGNS:
                value = self.value(operand)
                if not isinstance(op, ast.Not) and not isinstance(value, int | float):
                    self.refuse(node, f"{kind_of(value)} has no sign")
                return _SIGNS[type(op)](value)
            case ast.BinOp(left=left, op=op, right=right):
                return self.arithmetic(node, op, self.value(left), self.value(right))
            case ast.Call(func=ast.Name(id=name)) if name not in self.names:
                return self.call(node, name)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="copy"), attr="copy" | "deepcopy"), args=[what]):
                value = self.value(what)
                return self.copied(value, is_deep=ast.unparse(node.func) == "copy.deepcopy")
            case ast.Call(func=ast.Attribute(value=owner, attr=name)):
                return self.method(node, self.value(owner), name)
        self.refuse(node)

    def table(self, node: ast.expr, pairs: list[tuple[Any, ast.expr]]) -> Table:
        """A dict of (key, expression); where the key is None, of all that the expression holds."""
        table = Table(self.where(node))
        for key, expression in pairs:
            value = self.value(expression)
            if key is None and isinstance(value, Table):
                self.work.charge(len(value), table.where)
                table.put_all(value)
            elif isinstance(key, str):
                table.put(key, value, self.where(expression))
            else:
                self.refuse(node, "keys of a dict are strings" if key is not None else f"** {kind_of(value)}")
        return table

    def part(self, node: ast.expr, owner: Any, key: Any) -> Any:
        """`owner.key` or `owner[key]`."""
        if owner is self.bases and isinstance(key, str):
            self.used_of_bases.add(key)
        if isinstance(owner, Table) and isinstance(key, str) and key in owner:
            return owner[key]
        is_index = isinstance(owner, list | tuple) and isinstance(key, int) and isinstance(node, ast.Subscript)
        if not is_index or not -len(owner) <= key < len(owner):
            self.refuse(node, f"{kind_of(owner)} has no {key!r}")
        return owner[key]

    def call(self, node: ast.Call, name: str) -> Any:
        """A function of Python: `dict`, or one of those that make a list or a number."""
        if name == "dict":
            first = [(None, argument) for argument in node.args[:1]]
            return self.table(node, [*first, *((keyword.arg, keyword.value) for keyword in node.keywords)])
        if name not in _FUNCTIONS or node.keywords:
            self.refuse(node)
        arguments = [self.value(argument) for argument in node.args]
        if any(isinstance(argument, Table) for argument in arguments):
            self.refuse(node)
        try:
            made = _FUNCTIONS[name](*arguments)
            self.work.charge(1 if isinstance(made, int | float) else len(made), self.where(node))
        except (TypeError, ValueError, OverflowError) as error:
            self.refuse(node, str(error)[:100])
        return Row(made, self.where(node)) if isinstance(made, list | range) else made

    def method(self, node: ast.Call, owner: Any, name: str) -> Any:
        """`append`, `extend` and `insert` of a list, `update`, `copy` and `pop` of a dict."""
        arguments = [self.value(argument) for argument in node.args]
        self.work.charge(len(owner) if isinstance(owner, Row | Table) else 1, self.where(node))
        match owner, name, arguments:
            case Row(), "append", [value] if not node.keywords:
                owner.append(value)
            case Row(), "extend", [list() | tuple() as values] if not node.keywords:
                self.work.charge(len(values), self.where(node))
                owner.extend(list(values))
            case Row(), "insert", [int(place), value] if not node.keywords:
                owner.insert(place, value)
            case Table(), "update", [] | [Table()]:
                owner.put_all(self.call(node, "dict"))
            case Table(), "copy", [] if not node.keywords:
                return self.copied(owner, is_deep=False)
            case Table(), "pop", [str(key)] | [str(key), _] if key in owner or len(arguments) == 2:
                return owner.pop(key, arguments[-1])
            case _:
                self.refuse(node)
        return None

    def copied(self, value: Any, is_deep: bool) -> Any:
        """A copy of a dict or a list, with copies of what they hold where it is deep."""
        self.work.charge(1, self.names.where)
        if isinstance(value, Table):
            table = Table(value.where)
            for key, below in value.items():
                table.put(key, self.copied(below, True) if is_deep else below, value.places[key])
            return table
        made = [self.copied(below, True) if is_deep else below for below in value] if isinstance(value, list) else value
        return Row(made, value.where) if isinstance(value, Row) else value

    def arithmetic(self, node: ast.AST, op: ast.operator, left: Any, right: Any) -> Any:
        """`left op right`, of numbers; also the sum of two lists or strings, and a multiple of one."""
        sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
        bits = [side.bit_length() for side in (left, right) if isinstance(side, int)]
        is_sum = len(sizes) == 2 and isinstance(op, ast.Add)
        is_multiple = len(sizes) == len(bits) == 1 and isinstance(op, ast.Mult)
        are_numbers = not sizes and all(isinstance(side, int | float) for side in (left, right))
        if type(op) not in _OPERATORS or not (is_sum or is_multiple or are_numbers):
            self.refuse(node, f"{kind_of(left)} and {kind_of(right)} are not combined here")
        if is_sum or is_multiple:
            times = next((side for side in (left, right) if isinstance(side, int)), 1)
            self.work.charge(sum(sizes) * max(times, 0), self.where(node))
        elif len(bits) == 2 and (bits[0] * right if isinstance(op, ast.Pow) else sum(bits)) > MAX_BITS:
            raise UsageError(f"{self.where(node)}: a number of more than {MAX_BITS} bits")
        try:
            made = _OPERATORS[type(op)](left, right)
        except (TypeError, ArithmeticError) as error:
            self.refuse(node, str(error)[:100])
        if isinstance(made, complex):
            self.refuse(node, "a complex number")
        return Row(made, self.where(node)) if isinstance(made, list) else made
