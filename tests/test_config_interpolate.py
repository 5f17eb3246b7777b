"""References: `${...}` resolved after all merging and every --set."""

import pytest

from sslrun.config import load
from sslrun.errors import UsageError


@pytest.fixture
def resolved(tmp_path, monkeypatch):
    """The values of a text in x.toml (which extends base.toml), without a schema."""
    monkeypatch.chdir(tmp_path)

    def resolve(text, *overrides, base=""):
        (tmp_path / "base").mkdir(exist_ok=True)
        (tmp_path / "base/b.toml").write_text(base)
        (tmp_path / "x.toml").write_text(f'extends = "base/b.toml"\n{text}')
        return load("x.toml", overrides, {}).values

    return resolve


@pytest.fixture
def refused(resolved):
    def refuse(text, *overrides, base=""):
        with pytest.raises(UsageError) as caught:
            resolved(text, *overrides, base=base)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refuse


def test_a_whole_string_takes_the_value_with_its_type(resolved):
    values = resolved('a = { n = 1, l = [1.5, true] }\nb = "${a.n}"\nc = "${a.l}"\nd = "${ a.l.1 }"\ne = "${a}"')
    assert values["b"] == 1 and type(values["b"]) is int
    assert values["d"] is True
    assert values["e"] == {"n": 1, "l": [1.5, True]}


def test_a_table_is_a_deep_copy(resolved):
    values = resolved('a = { l = [1] }\nb = "${a}"\nc = "${a.l}"')
    values["a"]["l"].append(2)
    assert values["b"] == {"l": [1]} and values["c"] == [1]


def test_inside_a_string(resolved):
    values = resolved('n = 8\nx = 0.5\ny = true\ns = "in1k"\nname = "${n}xb-${x}-${y}_${s}$${n} $1 $"')
    assert values["name"] == "8xb-0.5-true_in1k${n} $1 $"


def test_an_override_reaches_every_reference_to_it(resolved):
    base = '[vars]\nk = 10000\n[head]\nnum_classes = "${vars.k}"\n[bank]\nnum_classes = "${head.num_classes}"'
    values = resolved("", "vars.k=100", base=base)
    assert values["head"] == values["bank"] == {"num_classes": 100}


def test_a_reference_given_by_set_and_into_lists(resolved):
    values = resolved(
        "[[views]]\nsize = 224\n[[views]]\nsize = 96\n", "crop=${views.1.size}", "views.0.size=${views.1.size}"
    )
    assert values["crop"] == 96 and values["views"][0]["size"] == 96


def test_through_a_reference_to_a_table(resolved):
    assert resolved('a = "${b}"\nb = { c = "${d}", e = "$${d}" }\nd = 3\nx = "${a.c}"\ny = "${a.e}"')["x"] == 3
    assert resolved('a = "${b}"\nb = { e = "$${d}" }\ny = "${a.e}"')["y"] == "${d}"


def test_quoted_keys(resolved):
    assert resolved('"a.b" = 1\nc = \'${"a.b"}\'')["c"] == 1


def test_tables_that_refer_into_each_other_are_no_cycle(resolved):
    values = resolved('a = { x = "${b}", z = 1 }\nb = { y = "${a.z}" }')
    assert values == {"a": {"x": {"y": 1}, "z": 1}, "b": {"y": 1}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('a = "${a}"', "x.toml:2: a: references go in a circle: a -> a"),
        ('a = "${b}"\nb = "x${c.0}"\nc = ["${a}"]', "x.toml:2: a: references go in a circle: a -> b -> c.0 -> a"),
        ('a = { b = "${a}" }', "x.toml:2: a.b: references go in a circle: a.b -> a.b"),
    ],
)
def test_cycles_are_printed(refused, text, expected):
    assert refused(text) == expected


DOUBLING = {
    "lists": ["['${{a{}}}', '${{a{}}}']", "[1]"],
    "tables": ["{{ x = '${{a{}}}', y = '${{a{}}}' }}", "{ x = 1 }"],
    "strings": ["'${{a{}}}${{a{}}}'", "'x'"],
}


@pytest.mark.parametrize("form", DOUBLING)
def test_references_that_double_each_other_have_a_limit(resolved, refused, form):
    """A few lines could otherwise make more values than fit into the memory."""
    line, last = DOUBLING[form]

    def chain(length: int) -> str:
        return "\n".join(f"a{i} = {line.format(i + 1, i + 1)}" for i in range(length)) + f"\na{length} = {last}"

    assert refused(chain(60)).endswith("references make more than 1,048,576 values and characters")
    assert set(resolved(chain(10))) == {f"a{i}" for i in range(11)}


def test_many_references_to_one_long_value_have_the_same_limit(resolved, refused):
    lines = ["a = '" + "x" * 10_000 + "'", "b = '" + "${a}" * 100 + "'", "c = [" + "'${a}', " * 4 + "]"]
    text = "\n".join(lines)
    assert len(resolved(text)["b"]) == 1_000_000
    assert refused(text + "\nd = '${a}'").startswith("x.toml:5: d: references make more than")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('v = { mean = 1 }\n[t]\nx = "${v.men}"', "x.toml:4: t.x: ${v.men}: there is no v.men; did you mean mean?"),
        ('l = [1]\nx = "${l.1}"', "x.toml:3: x: ${l.1}: there is no l.1"),
        ('l = 1\nx = "${l.y}"', "x.toml:3: x: ${l.y}: there is no l.y"),
        ('l = [1]\nx = "a${l}"', "x.toml:3: x: ${l} is a list and can only be a whole string, not part of one"),
        ('t = {}\nx = "a${t}"', "x.toml:3: x: ${t} is a table and can only be a whole string, not part of one"),
        ('x = "a${b"', "x.toml:2: x: 'a${b' has a ${ without its }; a literal ${ is written $${"),
        ('x = "${a b}"', "x.toml:2: x: ${a b}: 'a b' is not a key; "
         "a key is names joined by dots, such as data.views.0.num_views"),
        ('x = "${config.nmae}"', "x.toml:2: x: ${config.nmae}: there is no config"),
        ('x = "${env:NOT_SET_HERE}"', "x.toml:2: x: the environment variable NOT_SET_HERE is not set; "
         "${env:NOT_SET_HERE,default} gives a default"),
    ],
)  # fmt: skip
def test_what_cannot_be_resolved(refused, text, expected):
    assert refused(text) == expected


def test_the_error_names_the_base_that_contains_the_reference(refused):
    assert refused("", base='\n\nx = "${nope}"') == "base/b.toml:3: x: ${nope}: there is no nope"


def test_the_environment_is_typed_like_set(resolved, refused, monkeypatch):
    monkeypatch.setenv("N", "8")
    monkeypatch.setenv("L", "[1, { a = 2 }]")
    monkeypatch.setenv("S", "/data/x y")
    monkeypatch.setenv("TRICK", "${n}")
    monkeypatch.setenv("BAD", "8x")
    values = resolved(
        'n = "${env:N}"\nl = "${env:L}"\ns = "${env:S}/in1k"\nt = "${env:TRICK}"\n'
        'd = "${env:UNSET,0.5}"\ne = "${env:UNSET,}"\ni = "b${env:N}"\nj = "b${env:BAD}"'
    )
    assert values == {
        "n": 8, "l": [1, {"a": 2}], "s": "/data/x y/in1k", "t": "${n}", "d": 0.5, "e": "", "i": "b8", "j": "b8x",
    }  # fmt: skip
    assert refused('x = "${env:BAD}"').startswith("x.toml:2: x: ${env:BAD}: '8x' is not a TOML value (")


def test_name_and_folder(resolved, tmp_path):
    values = resolved(
        'here = "${config.dir}/a"\nname = "${config.name}"', "set=${config.dir}", base='there = "${config.dir}"'
    )
    assert values == {"there": f"{tmp_path}/base", "here": f"{tmp_path}/a", "name": "x", "set": str(tmp_path)}
