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
from sslrun.importer.old import Effect

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


class Replace(ast.NodeTransformer):
    """Puts other values in some places of a syntax tree."""

    def __init__(self, source, count):
        self.source, self.seen = source, -1
        self.places = {source.randrange(400) for _ in range(count)}

    def visit(self, node):
        if isinstance(node, ast.Constant | ast.Dict | ast.List | ast.Tuple | ast.Call):
            self.seen += 1
            if self.seen in self.places:
                return ast.parse(self.source.choice(REPLACEMENTS), mode="eval").body
        return self.generic_visit(node)


def mutated(text, source):
    """A configuration with some of its values replaced; now and then it is cut or spliced instead."""
    if source.random() < 0.2:
        cut = source.randrange(len(text))
        return text[:cut] + source.choice(["", "(", "\n", "'", "\0", ")", "{{", "#", "\t", "\udcff"]) + text[cut + 1 :]
    try:
        return ast.unparse(Replace(source, source.choice([1, 1, 2, 4, 8])).visit(ast.parse(text)))
    except ValueError:  # what cannot be written back, such as a lone surrogate
        return text


def survives(path):
    """Imports a file: a recipe that is TOML, and loads but for what its head says is missing; or one line."""
    try:
        imported = import_config(path)
    except UsageError as error:
        message = str(error)
        assert message and len(message.splitlines()) == 1 and message.isprintable(), message
        return
    findings = [finding.line() for effect in Effect for finding in imported.report.findings(effect)]
    assert all(len(line.splitlines()) == 1 and line.isprintable() for line in findings), findings
    tomllib.loads(imported.text)
    new = path.with_name("new.toml")
    new.write_text(imported.text, encoding="utf-8")
    try:
        load(new)
    except UsageError as error:
        missing = [line.split(": ", 1)[1] for line in findings if " is missing; " in line]
        assert any(line in str(error) for line in missing), error


@pytest.mark.parametrize("count", [100, pytest.param(8000, marks=pytest.mark.nightly)])
def test_mutations(tmp_path, count):
    """Some files of a copy of all old configs are changed; one of those that have bases is imported."""
    for path, text in TEXTS.items():
        (tmp_path / path.relative_to(OLD)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path.relative_to(OLD)).write_text(text, encoding="utf-8")
    for seed in range(count):
        source = random.Random(seed)
        started = source.choice(STARTED)
        bases = [
            path for path in TEXTS if path.parent.parent == started.parent and f"_base_/{path.name}" in TEXTS[started]
        ]
        changed = source.choice([started, *bases])
        copied = tmp_path / changed.relative_to(OLD)
        copied.write_bytes(mutated(TEXTS[changed], source).encode(errors="surrogateescape"))
        try:
            survives(tmp_path / started.relative_to(OLD))
        except BaseException as error:
            error.add_note(f"seed {seed}: {changed.relative_to(OLD)}")
            raise
        copied.write_text(TEXTS[changed], encoding="utf-8")
