"""No input makes an import of old configs end in a traceback, or go on for long: a recipe, or one line.

A few cases in the suite, 10,000 and more in `make test-nightly`.
"""

import ast
import random
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sslrun.config import load
from sslrun.errors import UsageError
from sslrun.importer import import_config
from sslrun.importer.old import Effect

OLD = Path(__file__).with_name("old_configs")
FILES = sorted(path for form in ("v0", "v1") for path in (OLD / form).rglob("*.py"))
TEXTS = {path: path.read_text(encoding="utf-8") for path in FILES}

few = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
many = settings(max_examples=4000, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))


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


# Pieces of the language, also in places where they make no sense.
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from(["ResNet", "type", "_delete_", "${a}", "{{_base_.x}}", "\n", "16", "1e3", "cosine"]),
).map(repr)  # fmt: skip
names = st.sampled_from(["x", "y", "model", "data", "_base_", "dict", "lr", "print", "copy", "__class__"])
FORMS = [
    "[{0}, {1}]", "({0}, {1})", "dict(a={0}, b={1})", "dict({0}, **{1})", "{{'type': {0}, {2!r}: {1}}}", 
    "({0} {3} {1})",
    "(-{0})", "(not {0})", "{0}.{2}", "{0}[{1}]", "{0}[{1}:]", "range({0})", "list({0})", "float({0})", "int({0})",
    "copy.deepcopy({0})", "{0}.append({1})", "{0}.extend({1})", "{0}.update({1})", "{0}.pop({1})", "{0}.copy()",
    "[{0} for x in {1}]", "(lambda: {0})()", "{{{{{0}}}}}", "*{0}",
]  # fmt: skip


def larger(inner):
    """Expressions made of expressions."""
    operators = st.sampled_from(["+", "-", "*", "/", "//", "%", "**", "<<", "<", "in", "and", "if x else"])
    parts = st.tuples(st.sampled_from(FORMS), inner, inner, names, operators)
    return parts.map(lambda part: part[0].format(*part[1:]))


expressions = st.recursive(scalars | names, larger, max_leaves=12)
STATEMENTS = [
    "{2} = {0}", "{2} += {0}", "{2} *= {0}", "{2}.{3} = {0}", "{2}[{0}] = {1}", "{0}", "if {0}:\n    {2} = {1}",
    "for x in {0}:\n    {1}", "import copy", "import os", "del x", "pass", "def x(): pass", "x, y = x",
]  # fmt: skip
statements = st.tuples(st.sampled_from(STATEMENTS), expressions, expressions, names, names)
programs = st.lists(statements.map(lambda part: part[0].format(*part[1:])), max_size=8).map("\n".join)

# What may stand in place of a value of a configuration that is otherwise in order.
REPLACEMENTS = [
    "None", "-1", "0", "2**70", "1e400", "float('nan')", "''", "'x'", "'${'", "'\\ud800'", "True", "[]", "{}", "()",
    "[[1]]", "[dict()]", "dict(type=1)", "dict(type='ResNet')", "dict(type='SyncBN')", "dict(_delete_=True)", "f()",
    "x", "_base_", "_base_.model", "{{_base_.data}}", "range(10**9)", "'a' * 10**9", "9**9**9", "[1, 'a', None]",
    "1.5", "16", "'bicubic'", "'epoch'", "'MoCo'", "'SwAV'", "'NonLinearNeck'", "dict(a=dict(b=dict(c=1)))", "0.5",
    "[dict(type='ColorJitter', hue=0.1)]", "'\\x00'", "'a\\nb'", "1j", "-5", "'(a+)+$'", "'.*.*.*.*x'", "'['",
]  # fmt: skip


class Replace(ast.NodeTransformer):
    """Puts other values in some places of a syntax tree."""

    def __init__(self, source, count):
        self.source = source
        self.places = {source.randrange(400) for _ in range(count)}
        self.seen = -1

    def visit(self, node):
        if isinstance(node, ast.Constant | ast.Dict | ast.List | ast.Tuple | ast.Call):
            self.seen += 1
            if self.seen in self.places:
                return ast.parse(self.source.choice(REPLACEMENTS), mode="eval").body
        return self.generic_visit(node)


def mutated(text, seed):
    """A configuration with some of its values replaced; now and then it is cut or spliced too."""
    source = random.Random(seed)
    if source.random() < 0.2:
        cut = source.randrange(len(text))
        return text[:cut] + source.choice(["", "(", "\n", "'", "\0", ")", "{{", "#", "\t", "\ud7ff"]) + text[cut + 1 :]
    try:
        return ast.unparse(Replace(source, source.choice([1, 1, 2, 4, 8])).visit(ast.parse(text)))
    except ValueError:  # what cannot be written back, such as a lone surrogate
        return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of all old configs."""
    root = tmp_path_factory.mktemp("fuzz")
    for path, text in TEXTS.items():
        copied = root / path.relative_to(OLD)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_text(text, encoding="utf-8")
    return root


def try_mutated(folder, path, seed):
    """One file changed; what is imported is that file, or one that has it among its bases."""
    copied = folder / path.relative_to(OLD)
    started = copied
    if copied.parent.name == "_base_":
        users = [p for p, text in TEXTS.items() if f"_base_/{path.name}" in text and p.parent.parent == OLD]
        started = folder / random.Random(seed).choice(users or [path]).relative_to(OLD)
    try:
        copied.write_text(mutated(TEXTS[path], seed), encoding="utf-8")
        survives(started)
    finally:
        copied.write_text(TEXTS[path], encoding="utf-8")


def try_program(folder, content):
    path = folder / "program_8xb32.py"
    path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="replace"))
    survives(path)


ANYTHING = st.binary(max_size=2000) | st.text(max_size=2000).map(lambda text: text.encode(errors="surrogatepass"))
MUTATIONS = (st.sampled_from(FILES), st.integers(0, 2**32))


@few
@given(programs | ANYTHING)
def test_programs(tmp_path_factory, content):
    try_program(tmp_path_factory.getbasetemp(), content)


@few
@given(*MUTATIONS)
def test_mutations(folder, path, seed):
    try_mutated(folder, path, seed)


@pytest.mark.nightly
@many
@given(programs | ANYTHING)
def test_many_programs(tmp_path_factory, content):
    try_program(tmp_path_factory.getbasetemp(), content)


@pytest.mark.nightly
@many
@given(*MUTATIONS)
def test_many_mutations(folder, path, seed):
    try_mutated(folder, path, seed)
