"""The schema for editors, which see single files before anything is merged or resolved."""

import functools
import json
import os
import tomllib
from pathlib import Path

import jsonschema
import pytest

from sslrun.cli import main
from sslrun.config import load
from sslrun.config.dump import dump
from sslrun.config.editor import EDITOR_PATH
from sslrun.config.schema_reader import SCHEMA_PATH, committed_schema
from sslrun.errors import UsageError

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.toml"))
RECIPES = [path for path in FILES if not {"_base_", "benchmarks"} & set(path.parts)]
EDITOR = json.loads(EDITOR_PATH.read_text())
VALIDATOR = jsonschema.Draft7Validator(EDITOR)
MOCOV2, SWAV = "configs/mocov2.toml", "configs/swav.toml"


def flagged(file):
    """(key, message) of each error that an editor shows for a file, given as text or as parsed values."""
    errors = VALIDATOR.iter_errors(tomllib.loads(file) if isinstance(file, str) else file)
    return [(".".join(map(str, error.absolute_path)), error.message) for error in errors]


def paths(value, path=()):
    """The path, keys and indices, of every value inside a value."""
    for part in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, part)
        yield from paths(value[part], (*path, part))


def unexpected(key):
    return f"Additional properties are not allowed ('{key}' was unexpected)"


def put(value, path, new):
    """A copy of a value with another value at a path."""
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(value[path[0]], path[1:], new) if path[1:] else new
    return copy


def misspelled(value, path):
    """A copy of a value in which the key at a path has an x appended."""
    if path[1:]:
        return put(value, path[:1], misspelled(value[path[0]], path[1:]))
    return {(key + "x" if key == path[0] else key): below for key, below in value.items()}


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_schema_is_valid_and_its_references_resolve():
    jsonschema.Draft7Validator.check_schema(EDITOR)
    references = {found for found in _found(EDITOR, "$ref")}
    for reference in references:
        here = EDITOR
        for part in reference.removeprefix("#/").split("/"):
            here = here[part]
    assert len(references) > 100


def _found(value, key):
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _found(part, key)
    if isinstance(value, dict) and isinstance(value.get(key), str):
        yield value[key]


def test_each_definition_is_one_line():
    """So that a difference between two versions of a schema can be read."""
    for path in (EDITOR_PATH, SCHEMA_PATH):
        schema = json.loads(path.read_text())
        lines = path.read_text().splitlines()
        for name, definition in schema["$defs"].items():
            line = f"{json.dumps(name)}: {json.dumps(definition)}"
            assert line in lines or f"{line}," in lines, name


def test_every_file_that_ships_is_clean_and_points_to_the_schema():
    """They are TOML 1.0 as well: tomllib reads them."""
    assert len(FILES) > 100
    for path in FILES:
        text = path.read_text()
        assert flagged(text) == [], path
        relative = os.path.relpath(EDITOR_PATH, path.parent)
        expected = f"#:schema {relative if relative.startswith('../') else './' + relative}"
        assert text.splitlines()[0] == expected, path


def test_whole_recipes_are_valid_by_both_schemas():
    """The editor's schema accepts all that runs. By another validator, schema.json accepts exactly whole recipes."""
    jsonschema.Draft202012Validator.check_schema(committed_schema())
    validator = jsonschema.Draft202012Validator(committed_schema())
    for path in RECIPES:
        values = load(path).values
        assert flagged(tomllib.loads(dump(values))) == [], path
        assert not list(validator.iter_errors(values)), path
    values = load(SWAV).values
    for wrong in (misspelled(values, ("model", "backbone", "depth")), put(values, ("data", "views", 0), 3)):
        assert not validator.is_valid(wrong)


def test_any_value_may_be_a_reference():
    values = load(MOCOV2).values
    for path in paths(values):
        is_tag = path[-1] in ("type", "policy")
        if path[0] != "vars" and not is_tag:
            assert flagged(put(values, path, "${vars.x}")) == [], path


def test_a_misspelled_key_is_marked_at_any_depth():
    """Each key of a whole recipe in turn is marked once, in its table."""
    values = load(SWAV).values
    tried = 0
    for path in paths(values):
        if path[0] == "vars" or isinstance(path[-1], int) or path[-1] in ("type", "policy"):
            continue
        marked = flagged(misspelled(values, path))
        assert marked == [(".".join(map(str, path[:-1])), unexpected(f"{path[-1]}x"))], path
        tried += 1
    assert tried > 50


def test_a_wrong_type_is_marked_at_its_key():
    values = load(MOCOV2).values
    for path in paths(values):
        if path[0] != "vars":  # which may hold anything
            here = functools.reduce(lambda inside, part: inside[part], path, values)
            marked = flagged(put(values, path, 2024 if isinstance(here, bool) else False))
            assert {key for key, _ in marked} == {".".join(map(str, path))}, path


ALLOWED = {
    "a base gives the rest": 'extends = "x.toml"\nepochs = 3',
    "two bases": 'extends = ["a.toml", "b.toml"]',
    "a class that a base gives": "[model]\nqueue_len = 3\nbackbone = { depth = 18, base_width = 24 }",
    "an element of a list": "[data.views.0.transforms.1]\np = 0.0",
    "elements of a list of numbers": "[model]\nbackbone.out_indices.0 = 3",
    "a list for a list": "data.views = []",
    "dropping a table": "[model]\n_delete_ = true\ntype = 'SimCLR'",
    "dropping keys": '_delete_ = ["epochs"]\nmax_iters = 5\n[data.views.0.transforms]\n_delete_ = ["1"]',
    "a user's class": 'custom_imports = ["my"]\n[model.head]\ntype = "MyHead"\nsize = { a = [1, "x"] }',
    "a user's transform": '[[data.views]]\ntransforms = [{ type = "Mine", x = 1 }, { type = "Resize", size = 3 }]',
    "a user's method": '[model]\ntype = "Mine"\nbackbone = { type = "ResNet", depth = 18 }\nbanana = 1',
    "a user's schedule": 'lr = { policy = "Mine", x = 1 }',
    "anything in vars": "[vars]\na = 1\nb.c = [{ d = 2 }]",
    "an environment variable": 'work_dir = "${env:WORK}/x"\nseed = "${env:SEED,3}"',
    "a whole number for a number": "optimizer.lr = 1",
    "a number or a source": "data.holdout = 0.1",
    "a source for a number": 'data.holdout = { type = "Shapes", split = "test" }',
    "a whole number or auto": 'engine.micro_batch = "auto"',
}


@pytest.mark.parametrize("text", ALLOWED.values(), ids=ALLOWED.keys())
def test_valid_files_are_not_marked(text):
    assert flagged(text) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epocs = 3", [("", unexpected("epocs"))]),
        ('[model]\ntype = "MoCo"\nquue_len = 1', [("model", unexpected("quue_len"))]),
        ("[model]\nquue_len = 1", [("model", unexpected("quue_len"))]),
        ('[model.head]\ntype = "ContrastiveHead"\ntemp = 1', [("model.head", unexpected("temp"))]),
        ("[model.backbone]\ndpth = 18", [("model.backbone", unexpected("dpth"))]),
        ("[data.views.0.transforms.1]\npp = 1", [("data.views.0.transforms.1", unexpected("pp"))]),
        ("[[data.views]]\nnum_view = 2", [("data.views.0", unexpected("num_view"))]),
        ('global_batch = "many"', [("global_batch", "'many' is not of type 'integer'")]),
        ("log.interval = true", [("log.interval", "True is not of type 'integer', 'string'")]),
        ('_delete_ = "all"', [("_delete_", "'all' is not of type 'boolean', 'array'")]),
        ("model = 3", [("model", "3 is not of type 'object', 'string'")]),
        ('model = "MoCo"', [("model", "'MoCo' does not match '\\\\$\\\\{'")]),
        ("extends = 3", [("extends", "3 is not of type 'string', 'array'")]),
    ],
)
def test_errors_are_marked_at_their_keys(text, expected):
    marked = flagged(text)
    assert set(expected) <= set(marked) and {key for key, _ in marked} == {key for key, _ in expected}


def test_a_table_over_a_list_has_indices_as_keys():
    assert [key for key, _ in flagged("[data.views]\nfirst = 1")] == ["data.views"]


def test_an_unknown_option_is_answered_with_the_valid_ones():
    assert ("engine.precision", "'fp61' is not one of ['auto', 'fp32', 'bf16', 'fp64']") in flagged(
        'engine.precision = "fp61"'
    )


def test_values_that_are_marked_do_not_load(tmp_path):
    path = tmp_path / "x.toml"
    for key, value in (("epochs", "3.5"), ("data.prefetch", '"two"'), ("engine.precision", '"fp61"')):
        path.write_text(dump(load(MOCOV2).values))
        with pytest.raises(UsageError):
            load(path, [f"{key}={value}"])
        assert flagged(f"{key} = {value}")


def test_the_command_prints_the_schema_and_the_path_of_the_editors(capsys, tmp_path, monkeypatch):
    assert main(["config", "schema"]) == 0
    assert capsys.readouterr().out == SCHEMA_PATH.read_text() and committed_schema()["$ref"] == "#/$defs/Recipe"
    monkeypatch.chdir(tmp_path)
    assert main(["config", "schema", "--editor"]) == 0
    assert capsys.readouterr().out == f"{ROOT / 'configs/editor.schema.json'}\n"
