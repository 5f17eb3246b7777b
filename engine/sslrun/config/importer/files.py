"""Reading an old configuration with all its bases, as mmcv and mmengine do, without executing any of it.

A file is a sequence of assignments; `_base_` names files that are merged below it: dicts deeply, all else replaced, and
`_delete_ = True` in a dict drops what it inherits. `{{_base_.x}}` and `_base_.x` are values of the merged bases,
`{{fileDirname}}` and its like stand for parts of the file's name. Statements that are not evaluated here are noted, and
whatever they may have changed counts as unknown.
"""

import ast
import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from sslrun.config.files import shorten
from sslrun.config.importer.evaluate import Foreign, Scope
from sslrun.config.importer.functions import MODULES
from sslrun.config.importer.report import Effect
from sslrun.config.importer.values import DELETE, CannotEvaluate, Numbers, Row, Table, Unknown, Work, at_line, spoil
from sslrun.config.merge import kind, nearest
from sslrun.config.node import Key, Layer, Origin, show
from sslrun.errors import UsageError

MAX_BYTES = 1 << 18
MAX_FILES = 100
MAX_CHAIN = 32

_FILE_TEMPLATE = re.compile(r"\{\{\s*(fileDirname|fileBasenameNoExtension|fileBasename|fileExtname)\s*\}\}")
_ENVIRONMENT = re.compile(r"\{\{['\"]?\s*\$(\w+)\s*:\s*([^\s'\"}]*)\s*['\"]?\}\}")


class Remark(NamedTuple):
    """Something in a file that has no value: where, its text, and what became of it."""

    where: Origin
    text: str
    reason: str
    effect: Effect


class Old(NamedTuple):
    """An old configuration, merged.

    Attributes:
        table: the whole of it.
        files: every file read, bases before the file that names them.
        remarks: statements that were not evaluated.
        idle: names that were set and that nothing has read, with the places.
        overridden: what a dict of a file went over and could not be evaluated, by key.
    """

    table: Table
    files: list[Path]
    remarks: list[Remark]
    idle: dict[str, Origin]
    overridden: list[tuple[Key, Unknown]]


def read(started: Path, work: Work) -> Old:
    """An old configuration. Raises UsageError, one line, where it cannot be read."""
    reader = _Reader(work)
    if not os.path.isfile(started):
        raise UsageError(_missing(started))
    try:
        table = reader.file(started, ())
    except RecursionError:
        raise UsageError(f"{shorten(started)}: nested too deep") from None
    idle = {name: where for name, where in reader.set_in.items() if name not in reader.used_of_bases}
    return Old(table, reader.files, reader.remarks, idle, reader.overridden)


class _Reader:
    """The files read so far, and what there is to say about them."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.files: list[Path] = []
        self.remarks: list[Remark] = []
        self.set_in: dict[str, Origin] = {}
        self.used_of_bases: set[str] = set()
        self.overridden: list[tuple[Key, Unknown]] = []

    def file(self, path: Path, above: tuple[Path, ...]) -> Table:
        """One file with its bases merged below it."""
        path = Path(os.path.realpath(path))
        chain = (*above, path)
        if path in above:
            raise UsageError(f"_base_ goes in a circle: {' -> '.join(map(shorten, chain))}")
        if len(chain) > MAX_CHAIN or len(self.files) >= MAX_FILES:
            raise UsageError(f"{shorten(path)}: more than {MAX_CHAIN} files in a row or {MAX_FILES} in all")
        text = _text(path)
        layer = Layer(len(self.files), shorten(path), str(path.parent), tuple(map(shorten, chain)), Numbers)
        text = self._filled_in(text, layer, path)
        scope = Scope(layer, re.split(r"\r\n|\r|\n", text), self.work)
        body = _parsed(text, layer)
        places = _Statements(self, scope, chain).run(body)
        self.files.append(path)
        table = Table(at_line(layer, 1))
        for name, value in scope.names.items():
            if not name.startswith("__") and name != "_base_" and not isinstance(value, Foreign):
                table.put(name, value, places[name])
        self.used_of_bases |= scope.used_of_bases
        self.set_in |= {name: table.place(name) for name in table if name not in scope.used}
        return table if scope.bases is None else self.merge(table, scope.bases, ())

    def bases(self, named: Any, where: Origin, chain: tuple[Path, ...]) -> Table:
        """All bases of a file as one table; they may not have a name in common."""
        names = list(named) if isinstance(named, list | tuple) else [named]
        if not all(isinstance(name, str) for name in names):
            raise UsageError(f"{where}: _base_: expected a path or a list of paths")
        merged = Table(where)
        for name in names:
            if "::" in name:
                raise UsageError(f"{where}: _base_: {name!r} is a file of another package, which is not at hand here")
            path = Path(where.layer.folder, name)
            if not os.path.isfile(path):
                raise UsageError(f"{where}: _base_: {_missing(path)}")
            if path.suffix != ".py":
                raise UsageError(f"{where}: _base_: {shorten(path)} is no Python file")
            base = self.file(path, chain)
            for key in base:
                if key in merged:
                    both = f"{base.place(key)} and {merged.place(key)}"
                    raise UsageError(f"{where}: _base_: {key} is set by two of the bases, at {both}")
            merged.take_over(base)
        return merged

    def merge(self, new: Table, old: Table, key: Key) -> Table:
        """`new` over `old`, as mmcv merges."""
        self.work.charge(len(new) + len(old), new.where)
        if len(key) > MAX_CHAIN:
            raise UsageError(f"{new.where}: tables nested too deep")
        merged = Table(new.where)
        merged.spoilt = new.spoilt or old.spoilt
        merged.take_over(old)
        for part, value in new.items():
            before = old.get(part)
            if part == DELETE:
                continue
            if isinstance(value, Table) and part in old and not value.get(DELETE):
                if isinstance(before, Unknown):
                    self.overridden.append(((*key, part), before))
                elif not isinstance(before, Table):
                    what = f"a dict cannot go over {kind_of(before)}, set at {old.place(part)}"
                    hint = "`_delete_=True` in it would replace that"
                    raise UsageError(f"{new.place(part)}: {show(tuple(map(str, (*key, part))))}: {what}; {hint}")
                else:
                    value = self.merge(value, before, (*key, part))
            merged.put(part, value, new.place(part))
        return merged

    def _filled_in(self, text: str, layer: Layer, path: Path) -> str:
        """`{{fileBasename}}` and its like, and `{{$NAME:default}}`, which is its default here."""
        parts = {
            "fileDirname": str(path.parent),
            "fileBasename": path.name,
            "fileBasenameNoExtension": path.stem,
            "fileExtname": path.suffix,
        }
        if _FILE_TEMPLATE.search(text):
            if re.search(r"['\"\\\n\r{}]", str(path)):
                raise UsageError(f"{layer.source}: a path with quotes or backslashes cannot be filled into a template")
            text = _FILE_TEMPLATE.sub(lambda match: parts[match[1]], text)

        def default(match: re.Match[str]) -> str:
            where = at_line(layer, text.count("\n", 0, match.start()) + 1)
            reason = f"the environment is not read: {match[2]!r} stands for it; ${{env:{match[1]},...}} would read it"
            self.remarks.append(Remark(where, match[0], reason, Effect.CHANGED))
            return match[2]

        return _ENVIRONMENT.sub(default, text)


class _Statements:
    """Goes through the statements of one file."""

    def __init__(self, reader: _Reader, scope: Scope, chain: tuple[Path, ...]) -> None:
        self.reader, self.scope, self.chain = reader, scope, chain
        self.places: dict[str, Origin] = {}

    def run(self, body: list[ast.stmt]) -> dict[str, Origin]:
        """Where each name was set last."""
        for statement in body:
            self.scope.work.charge(1, self.scope.where(statement))
            try:
                self._statement(statement)
            except CannotEvaluate as error:
                self._give_up(statement, error.unknown)
        return self.places

    def _statement(self, statement: ast.stmt) -> None:
        scope = self.scope
        match statement:
            case ast.Assign(targets=[ast.Name(id="_base_")], value=value):
                self._bases(scope.value(value), scope.where(statement))
            case ast.Assign(targets=targets, value=value):
                kept = scope.kept(value)
                for target in targets:
                    self._bind(target, kept)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._bind(target, scope.kept(value))
            case ast.AugAssign(target=target, op=op, value=value):
                self._augmented(statement, target, op, value)
            case ast.If(test=test, body=body, orelse=other):
                self.run(body if scope.value(test) else other)
            case ast.For(target=target, iter=sequence, body=body, orelse=[]) if not _jumps(statement):
                for element in scope.sequence(sequence):
                    self._bind(target, element)
                    self.run(body)
            case ast.Import(names=names):
                for alias in names:
                    whole = alias.name if alias.asname else alias.name.partition(".")[0]
                    self._import(statement, alias.asname or whole, whole)
            case ast.ImportFrom(module=module, names=names):
                for alias in names:
                    self._import(statement, alias.asname or alias.name, f"{module or '.'}.{alias.name}")
            case ast.Expr(value=ast.Constant()) | ast.Pass():
                pass
            case ast.Expr(value=ast.Call() as call):
                used = set(scope.used)
                scope.value(call)
                if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
                    scope.used -= {call.func.value.id} - used  # a list that is only added to has not been read
            case ast.Delete(targets=targets):
                for target in targets:
                    self._delete(target)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                scope.names[name] = Foreign(f"def {name}")
                self._remark(scope.cannot(statement, "is not evaluated; nothing is executed").unknown)
            case ast.With(items=[ast.withitem(context_expr=ast.Call(func=ast.Name(id="read_base")))]):
                hint = "Config.fromfile(PATH).dump('whole.py') of mmengine writes one file that can be imported"
                raise UsageError(f"{scope.where(statement)}: bases by `with read_base()` are not read here; {hint}")
            case _:
                raise scope.cannot(statement, "is not evaluated here")

    def _bases(self, named: Any, where: Origin) -> None:
        if self.scope.bases is not None:
            raise UsageError(f"{where}: _base_ is set twice")
        if any(isinstance(name, Unknown) for name in (named if isinstance(named, list | tuple) else [named])):
            raise UsageError(f"{where}: _base_: what it names cannot be evaluated here")
        self.scope.bases = self.reader.bases(named, where, self.chain)

    def _bind(self, target: ast.expr, value: Any) -> None:
        self.scope.bind(target, value)
        for name in _names_set(target):
            self.places[name] = self.scope.where(target)

    def _augmented(self, statement: ast.stmt, target: ast.expr, op: ast.operator, value: ast.expr) -> None:
        """`target += value`; a list is extended in place, as in Python."""
        now = self.scope.value(_read(target))
        if isinstance(now, Row) and isinstance(op, ast.Add):
            now += self.scope.sequence(value)
        else:
            self._bind(target, self.scope.value(ast.copy_location(ast.BinOp(_read(target), op, value), statement)))

    def _import(self, statement: ast.stmt, name: str, imported: str) -> None:
        self.scope.names[name] = Foreign(imported)
        self.places.pop(name, None)
        if imported not in MODULES and imported.rpartition(".")[0] not in MODULES:
            self._remark(self.scope.cannot(statement, "imports are not followed").unknown, Effect.LEFT)

    def _delete(self, target: ast.expr) -> None:
        match target:
            case ast.Name(id=name) if name in self.scope.names:
                del self.scope.names[name]
            case ast.Subscript(value=owner, slice=index):
                container, key = self.scope.value(owner), self.scope.value(index)
                if isinstance(container, Table) and isinstance(key, str) and key in container:
                    del container[key]
                    return
                raise self.scope.cannot(target, "cannot be deleted here")
            case _:
                raise self.scope.cannot(target, "cannot be deleted here")

    def _give_up(self, statement: ast.stmt, unknown: Unknown) -> None:
        """A statement is not evaluated: what it sets, or may change, is unknown from here on."""
        at = self.scope.cannot(statement, "").unknown
        unknown = Unknown(at.where, at.text, unknown.reason)
        self._remark(unknown)
        for node in ast.walk(statement):
            self.scope.work.charge(1, at.where)
            if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                spoil(self.scope.names.get(node.target.id), unknown, self.scope.work)  # += extends a list in place
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                if node.id == "_base_":
                    raise UsageError(f"{at.where}: _base_: what it names cannot be evaluated here")
                self.scope.names[node.id] = unknown
                self.places[node.id] = at.where
            elif isinstance(node, ast.Name) and node.id in self.scope.names:
                spoil(self.scope.names[node.id], unknown, self.scope.work)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "_base_":
                inherited = self.scope.bases
                spoil(inherited.get(node.attr) if inherited is not None else None, unknown, self.scope.work)

    def _remark(self, unknown: Unknown, effect: Effect = Effect.LOST) -> None:
        self.reader.remarks.append(Remark(unknown.where, unknown.text, unknown.reason, effect))


def _jumps(loop: ast.stmt) -> bool:
    return any(isinstance(node, ast.Break | ast.Continue) for node in ast.walk(loop))


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "None"
    return "a list" if isinstance(value, tuple) else kind(value)


def _text(path: Path) -> str:
    if not os.path.isfile(path):
        raise UsageError(_missing(path))
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UsageError(f"{shorten(path)}: {size:,} bytes; at most {MAX_BYTES:,} are read")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{shorten(path)}: not UTF-8: byte 0x{error.object[error.start]:02x}") from None
    except OSError as error:
        raise UsageError(f"{shorten(path)}: {error.strerror}") from None


def _missing(path: Path) -> str:
    """Why a path is not one of a file."""
    if os.path.isdir(path):
        return f"{shorten(path)} is a folder, not a file"
    if os.path.exists(path):
        return f"{shorten(path)} is no file"
    beside = os.listdir(path.parent) if os.path.isdir(path.parent) else []
    return f"{shorten(path)} does not exist{nearest(path.name, [name for name in beside if name.endswith('.py')])}"


def _parsed(text: str, layer: Layer) -> list[ast.stmt]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a pattern such as "\d" is a warning, on a line of its own
            return ast.parse(text).body
    except SyntaxError as error:
        place = f"{layer.source}:{error.lineno}" if error.lineno else layer.source
        raise UsageError(f"{place}: no Python: {' '.join((error.msg or '').split())}") from None
    except (ValueError, MemoryError, RecursionError) as error:
        raise UsageError(f"{layer.source}: no Python that can be read: {error or 'nested too deep'}") from None


def _names_set(target: ast.expr) -> list[str]:
    if isinstance(target, ast.Name):
        return [target.id]
    if isinstance(target, ast.Tuple | ast.List):
        return [name for inner in target.elts for name in _names_set(inner)]
    return []


def _read(target: ast.expr) -> ast.expr:
    """The expression that reads what a target sets."""
    match target:
        case ast.Name(id=name):
            read: ast.expr = ast.Name(name, ast.Load())
        case ast.Attribute(value=owner, attr=name):
            read = ast.Attribute(owner, name, ast.Load())
        case ast.Subscript(value=owner, slice=index):
            read = ast.Subscript(owner, index, ast.Load())
        case _:
            return target
    return ast.copy_location(read, target)
