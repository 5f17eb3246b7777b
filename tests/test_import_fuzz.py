"""No input makes an import of old configs end in a traceback, or go on for long: a recipe, or one line.

A few cases in the suite, thousands in `make test-nightly`.
"""

import ast
import random
import tomllib
from pathlib import Path

import pytest

from sslrun.config import load
from sslrun.errors import UsageError
from sslrun.importer import import_config

OLD = Path(__file__).with_name("old_configs")
TEXTS = {path: path.read_text(encoding="utf-8") for path in sorted(OLD.rglob("*.py"))}
STARTED = [path for path in TEXTS if path.parent.name != "_base_"]

# What may stand in place of a value of a configuration that is otherwise in order.
REPLACEMENTS = [
    "None", "-1", "0", "2**70", "1e400", "''", "'x'", "'${'", "'\\ud800'", "True", "[]", "{}", "()", "[[1]]",
    "[dict()]", "dict(type=1)", "dict(type='ResNet')", "dict(type='SyncBN')", "dict(_delete_=True)", "f()", "x",
    "_base_", "0.5", "_base_.model", "{{_base_.data}}", "range(10**9)", "'a' * 10**9", "9**9**9", "[1, 'a', None]",
    "1.5", "16", "'a\\nb'", "'bicubic'", "'epoch'", "'MoCo'", "'SwAV'", "'NonLinearNeck'",
    "dict(a=dict(b=dict(c=1)))", "'\\x00'", "1j", "-5", "[dict(type='ColorJitter', hue=0.1)]", "'(a+)+$'", "'['",
    "[x for x in y]", "lambda: 0", "(not x) + 1", "'{{x}}'",
]  # fmt: skip


def mutated(text, source):
    """A configuration with some of its values replaced; now and then it is cut or spliced instead."""
    if source.random() < 0.2:
        cut = source.randrange(len(text))
        return text[:cut] + source.choice(["", "(", "\n", "'", "\0", ")", "{{", "#", "\t", "\udcff"]) + text[cut + 1 :]
    for _ in range(source.choice([1, 1, 2, 4, 8])):
        values = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant | ast.List | ast.Call)]
        if not values:
            break
        value, lines = source.choice(values), text.splitlines(keepends=True)
        start = sum(map(len, lines[: value.lineno - 1])) + value.col_offset
        end = sum(map(len, lines[: value.end_lineno - 1])) + value.end_col_offset
        text = f"{text[:start]}({source.choice(REPLACEMENTS)}){text[end:]}"
    return text


def survives(path):
    """Imports a file: a recipe that is TOML, and loads but for what its head says is missing; or one line."""
    try:
        imported = import_config(path)
    except UsageError as error:
        assert str(error) and len(str(error).splitlines()) == 1 and str(error).isprintable(), error
        return
    lines = imported.report.lines()
    assert all(len(line.splitlines()) == 1 and line.isprintable() for line in lines), lines
    new = path.with_name("new.toml")
    new.write_text(imported.text, encoding="utf-8")
    tomllib.loads(imported.text)
    try:
        load(new)
    except UsageError as error:
        missing = [line.split(": not converted: ")[1] for line in lines if " is missing; " in line]
        assert any(line in str(error) for line in missing), error


@pytest.mark.parametrize("count", [100, pytest.param(8000, marks=pytest.mark.nightly)])
def test_mutations(tmp_path, count):
    """One file of a copy of all old configs is changed, and imported, or one is that has it as a base."""
    for path, text in TEXTS.items():
        (tmp_path / path.relative_to(OLD)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path.relative_to(OLD)).write_text(text, encoding="utf-8")
    for seed in range(count):
        source = random.Random(seed)
        started = source.choice(STARTED)
        beside = [path for path in TEXTS if path.parent.parent == started.parent]
        changed = source.choice([started, *(path for path in beside if f"_base_/{path.name}" in TEXTS[started])])
        copied = tmp_path / changed.relative_to(OLD)
        try:
            copied.write_bytes(mutated(TEXTS[changed], source).encode(errors="surrogateescape"))
            survives(tmp_path / started.relative_to(OLD))
        except BaseException as error:
            error.add_note(f"seed {seed}: {changed.relative_to(OLD)}")
            raise
        copied.write_text(TEXTS[changed], encoding="utf-8")
