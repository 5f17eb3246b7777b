"""`sslrun list`: all components and their keys, as text within the width and as JSON."""

import json

import pytest

from sslrun.cli import main
from sslrun.config.dump import inline
from sslrun.config.listing import as_json, list_component
from sslrun.config.schema_reader import classes, committed_schema, first_sentence, kinds

SCHEMA = committed_schema()
COMPONENTS = [(kind, name) for kind, union in kinds(SCHEMA).items() for name in classes(union)]


@pytest.fixture
def listed(capsys, monkeypatch):
    """What `sslrun list WORDS` prints on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*words):
        assert main(["list", *words]) == 0
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method"], "there is no kind of component and no component called 'method'; did you mean methods?"),
        (
            ["losses", "X"],
            "there is no kind of component called 'losses'; there are backbones, decoders, ",
        ),
        (["methods", "MoCov2"], "there is no 'MoCov2' among the methods; did you mean MoCo"),
        (["methods", "MoCov2", "--json"], "there is no 'MoCov2' among the methods; did you mean MoCo"),
        (["necks", "Zzz"], "there is no 'Zzz' among the necks; `sslrun list necks` names them"),
    ],
)
def test_a_misspelled_name(capsys, words, message):
    assert main(["list", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}") and not captured.out and len(captured.err.splitlines()) == 1


def test_the_name_of_a_component_is_found_in_whatever_kind(listed):
    for kind, name in COMPONENTS:
        words = [name.lower()] if sum(name.lower() == other.lower() for _, other in COMPONENTS) == 1 else [kind, name]
        assert listed(*words).startswith(f"{name}, of the {kind}")


def test_the_kinds(listed):
    wanted = ["methods", "backbones", "necks", "heads", "transforms", "sources", "optimizers", "schedules"]
    assert {*wanted, "norms"} <= kinds(SCHEMA).keys()
    text = " ".join(listed().split())
    for kind, union in kinds(SCHEMA).items():
        assert f"{kind} {', '.join(classes(union))}" in text
    assert json.loads(listed("--json"))["norms"] == ["BN", "SyncBN"]


def test_a_kind_is_a_line_for_each_class(listed):
    for kind in kinds(SCHEMA):
        check_kind(listed, kind)


def check_kind(listed, kind):
    text = listed(kind)
    assert max(map(len, text.splitlines())) <= 80
    began = [line.split()[0] for line in text.splitlines() if line[:3].strip()]
    assert began == list(classes(kinds(SCHEMA)[kind]))
    for name in began:
        sentence = first_sentence(SCHEMA["$defs"][f"{kind}.{name}"]["description"])
        assert f"{name} {sentence}" in " ".join(text.split())
    assert [row["name"] for row in json.loads(listed(kind, "--json"))] == began


def test_a_component_is_listed_with_all_that_the_schema_has():
    assert len(COMPONENTS) > 50
    for kind, name in COMPONENTS:
        check_component(kind, name, list_component(SCHEMA, kind, name, 80), as_json(SCHEMA, kind, name))


def test_the_command_prints_a_component(listed):
    assert listed("heads", "ContrastiveHead") == list_component(SCHEMA, "heads", "ContrastiveHead", 80) + "\n"
    assert listed("heads", "ContrastiveHead", "--json") == as_json(SCHEMA, "heads", "ContrastiveHead") + "\n"


def check_component(kind, name, text, json_text):
    assert max(map(len, text.splitlines())) <= 80 or name == "LatentCrossCorrelationHead"  # which has a formula
    shown, table = " ".join(text.split()), SCHEMA["$defs"][f"{kind}.{name}"]
    assert shown.startswith(f"{name}, of the {kind} ({table['x-module']}) {table['description']}")
    assert " ".join(table.get("x-docs", "").split()) in shown
    rows = {row["name"]: row for row in json.loads(json_text)["keys"]}
    assert list(rows) == list(table["properties"])[1:]
    for key, row in rows.items():
        asked = table["properties"][key]
        given = f"{key} = {inline(asked['default'])}" if "default" in asked else key
        takes = row["type"] + ("; required" if row["required"] else "")
        assert f"{given} {takes} {asked['description']}" in shown
        assert row.get("default") == asked.get("default") and row["required"] == (key in table["required"])


def test_the_keys_of_inner_tables_are_listed(listed):
    lines = listed("optimizers", "SGD").splitlines()
    place = lines.index("  grad_clip                   a table")
    assert lines[place + 2] == "        max_norm              a number; required"


def test_paragraphs_are_filled_and_formulas_are_left_alone(listed):
    lines = listed("heads", "LatentCrossCorrelationHead").splitlines()
    assert "    C = A^T B / rows,   loss = sum_i (1 - C_ii)^2 + lambd sum_i sum_{j != i} C_ij^2" in lines


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("Momentum contrast. More.", "Momentum contrast."),
        ("By Chen et al. 2020 (arXiv 2002.05709, eq. 1). It has", "By Chen et al. 2020 (arXiv 2002.05709, eq. 1)."),
        ("Which way up? Gidaris", "Which way up?"),
        ("No stop", "No stop"),
    ],
)
def test_the_first_sentence(text, first):
    assert first_sentence(text) == first
