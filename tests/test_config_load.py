"""extends, merging, --set and their errors. Schema checks are in test_config_schema."""

import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sslrun.config import load
from sslrun.config.dump import escape, inline
from sslrun.config.node import show
from sslrun.errors import UsageError

texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=6)
leaves = st.integers() | st.booleans() | st.floats(allow_nan=False) | texts | st.datetimes()
nested = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3), max_leaves=8)

ANYTHING: dict = {}  # the schema that accepts every key


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files, `write("a.toml", text)`, into the current folder."""
    monkeypatch.chdir(tmp_path)

    def write_file(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write_file


def values(path, *overrides):
    return load(path, overrides, ANYTHING).values


def message(path, *overrides):
    """The error of a load; it is one line."""
    with pytest.raises(UsageError) as caught:
        load(path, overrides, ANYTHING)
    text = str(caught.value)
    assert "\n" not in text
    return text


class TestExtends:
    def test_later_files_override_earlier_ones(self, write):
        write("base.toml", "a = 1\nb = 1\n[t]\nx = 1\ny = 1\n")
        write("other.toml", "b = 2\n[t]\ny = 2\nz = [1, 2]\n")
        main = write("main.toml", 'extends = ["base.toml", "other.toml"]\n[t]\nz = [3]\n')
        assert values(main) == {"a": 1, "b": 2, "t": {"x": 1, "y": 2, "z": [3]}}

    def test_paths_are_relative_to_the_naming_file(self, write):
        write("base/deep.toml", "a = 1")
        write("base/mid.toml", 'extends = "deep.toml"\nb = 1')
        main = write("recipes/x/main.toml", 'extends = "../../base/mid.toml"\nc = 1')
        assert values(main) == {"a": 1, "b": 1, "c": 1}
        assert [p.name for p in load(main, (), ANYTHING).files] == ["deep.toml", "mid.toml", "main.toml"]

    def test_a_shared_base_does_not_undo_a_sibling(self, write):
        write("runtime.toml", 'v = "runtime"\nw = "runtime"')
        write("left.toml", 'extends = "runtime.toml"\nv = "left"')
        write("right.toml", 'extends = "runtime.toml"\nw = "right"')
        main = write("main.toml", 'extends = ["left.toml", "right.toml"]')
        assert values(main) == {"v": "left", "w": "right"}
        assert [p.name for p in load(main, (), ANYTHING).files] == [
            "runtime.toml",
            "left.toml",
            "right.toml",
            "main.toml",
        ]

    def test_cycle_is_printed(self, write):
        write("a.toml", 'extends = "b.toml"')
        write("b.toml", 'extends = "c.toml"')
        write("c.toml", 'extends = "b.toml"')
        assert message("a.toml") == "extends goes in a circle: b.toml -> c.toml -> b.toml"

    def test_a_file_that_extends_itself(self, write):
        write("a.toml", 'extends = "./a.toml"')
        assert message("a.toml") == "extends goes in a circle: a.toml -> a.toml"

    def test_missing_base_names_line_chain_and_the_nearest_file(self, write):
        write("base/runtime.toml", "")
        write("mid.toml", '# comment\nextends = [\n  "base/runtime.toml",\n  "base/runtme.toml",\n]')
        write("main.toml", 'extends = "mid.toml"')
        assert message("main.toml") == (
            "mid.toml:2: extends: base/runtme.toml does not exist; did you mean runtime.toml? "
            "(files: main.toml -> mid.toml -> base/runtme.toml)"
        )

    def test_a_folder_is_not_a_base(self, write):
        write("base/x.toml", "")
        write("main.toml", 'extends = "base"')
        assert message("main.toml") == "main.toml:1: extends: base is a folder, not a file (files: main.toml -> base)"

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("extends = 3", "main.toml:1: extends: expected a path or a list of paths, got the number 3"),
            ("extends = [true]", "main.toml:1: extends: expected a path or a list of paths, got the boolean true"),
            ('extends = "${a}.toml"', "main.toml:1: extends: '${a}.toml': references are not resolved here"),
        ],
    )
    def test_what_extends_takes(self, write, line, expected):
        write("main.toml", line)
        assert message("main.toml") == expected


class TestUnreadableFiles:
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"\xef\xbb\xbfa = 1", "x.toml:1: begins with a byte-order mark; save the file as UTF-8 without one"),
            (b"a = 1\nb = '\xff'\n", "x.toml:2: not UTF-8: byte 0xff"),
            (b"a = 1\nb = \n", "x.toml:2: Invalid value (column 5)"),
            (b"a = 1\n\na = 2\n", "x.toml:3: Cannot overwrite a value (column 6)"),
            (b"a = [1,\n2", "x.toml:2: Unclosed array (column 2)"),
            (b"a = 1\nb = 1" + b"0" * 5000, "x.toml:2: a number of more than 4,300 digits"),
            (
                b'a = "[["\n# [[\nb = """\n[["""\nc = ' + b"[" * 70 + b"]" * 70,
                "x.toml:5: tables or lists nested more than 64 deep",
            ),
            (b"\n" + b".".join([b"a"] * 70) + b" = 1", "x.toml:2: tables or lists nested more than 64 deep"),
            (b'a = 1\nextends = "b\\u0000.toml"', r"x.toml:2: extends: 'b\x00.toml' is not a path"),
            (b"a = " + b"[" * 5000, "x.toml:1: tables or lists nested more than 64 deep"),
            (b"a = " + b"[" * 70 + b"]" * 70, "x.toml:1: tables or lists nested more than 64 deep"),
            (b".".join([b"a"] * 70) + b" = 1", "x.toml:1: tables or lists nested more than 64 deep"),
            (b"#" * (2 << 20), "x.toml: 2,097,152 bytes; a recipe has at most 1,048,576"),
        ],
    )
    def test_one_line_with_the_place(self, write, content, expected):
        write("x.toml", content)
        assert message("x.toml") == expected

    def test_overrides_and_references_can_be_too_deep(self, write):
        expected = "x.toml: tables, lists or references are nested too deep"
        assert message(write("x.toml", ""), ".".join(["a"] * 2000) + "=1") == expected
        chain = "".join(f'a{n} = ["${{a{n + 1}}}"]\n' for n in range(1000))
        assert message(write("x.toml", f"{chain}a1000 = 1")) == expected

    def test_sixty_levels_are_fine(self, write):
        write("x.toml", ".".join(["a"] * 60) + " = 1")
        assert message("x.toml", "a.b=[").startswith("--set a.b=[: '[' is not a TOML value")
        assert values("x.toml")["a"]["a"]

    def test_no_such_file(self, write):
        write("mocov2.toml", "")
        assert message("mocov3.toml") == "mocov3.toml: No such file or directory; did you mean mocov2.toml?"

    def test_a_folder(self, write):
        write("configs/x.toml", "")
        assert message("configs") == "configs: Is a directory"

    def test_error_in_a_base_prints_the_chain(self, write):
        write("base.toml", "a = ?")
        write("main.toml", 'extends = "base.toml"')
        assert message("main.toml") == "base.toml:1: Invalid value (column 5) (files: main.toml -> base.toml)"


LIST = """\
[[views]]
transforms = [
  { type = "Crop", size = 224 },
  { type = "Jitter", p = 0.8, hue = 0.1 },
]
sizes = [1, 2, 3]
"""


class TestMerge:
    def merged(self, write, base, text, *overrides):
        write("base.toml", base)
        return values(write("main.toml", 'extends = "base.toml"\n' + text), *overrides)

    def failed(self, write, base, text):
        write("base.toml", base)
        write("main.toml", 'extends = "base.toml"\n' + text)
        return message("main.toml")

    def test_digit_keys_edit_elements(self, write):
        result = self.merged(write, LIST, "[views.0.transforms.1]\np = 0.0\n[views.0.sizes]\n0 = 7\n2 = 9\n")
        assert result["views"][0]["transforms"] == [
            {"type": "Crop", "size": 224},
            {"type": "Jitter", "p": 0.0, "hue": 0.1},
        ]
        assert result["views"][0]["sizes"] == [7, 2, 9]

    def test_an_element_can_be_replaced_whole(self, write):
        result = self.merged(write, LIST, '[views.0.transforms.1]\n_delete_ = true\ntype = "Flip"\n')
        assert result["views"][0]["transforms"][1] == {"type": "Flip"}

    def test_elements_can_be_dropped_while_others_are_edited(self, write):
        result = self.merged(write, LIST, '[views.0.transforms]\n1 = { p = 1.0 }\n_delete_ = ["0"]\n')
        assert result["views"][0]["transforms"] == [{"type": "Jitter", "p": 1.0, "hue": 0.1}]

    def test_a_list_replaces_a_list(self, write):
        assert self.merged(write, LIST, "[[views]]\nsizes = []\n") == {"views": [{"sizes": []}]}

    def test_digit_keys_where_no_list_is_stay_a_table(self, write):
        assert self.merged(write, "[t]\n0 = 1\n", "[t]\n1 = 2\n") == {"t": {"0": 1, "1": 2}}

    def test_delete_everything_inherited(self, write):
        text = '[neck]\n_delete_ = true\ntype = "B"\n[neck.own]\n_delete_ = true\nx = 1\n'
        assert self.merged(write, '[neck]\ntype = "A"\nnum_layers = 2\n', text) == {
            "neck": {"type": "B", "own": {"x": 1}}
        }

    def test_delete_some_keys(self, write):
        base = "[t]\na = 1\nb = 2\nc = { d = 1 }\n"
        assert self.merged(write, base, '[t]\n_delete_ = ["a", "c"]\nc = { e = 2 }\n') == {"t": {"b": 2, "c": {"e": 2}}}

    def test_delete_at_the_top_level(self, write):
        assert self.merged(write, "epochs = 3\na = 1\n", '_delete_ = ["epochs"]\nmax_iters = 5\n') == {
            "a": 1,
            "max_iters": 5,
        }

    def test_delete_without_inherited_keys_is_dropped(self, write):
        text = "x = [{ _delete_ = true, a = 1 }]\n[t]\n_delete_ = true\n[u]\n_delete_ = false\n[v]\n_delete_ = ['q']\n"
        assert self.merged(write, "", text) == {"x": [{"a": 1}], "t": {}, "u": {}, "v": {}}

    def test_delete_true_lets_a_table_replace_anything(self, write):
        assert self.merged(write, "a = 3\nb = [1]", "[a]\n_delete_ = true\nx = 1\n[b]\n_delete_ = true\n") == {
            "a": {"x": 1},
            "b": {},
        }

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (
                "[views.0.transforms.2]\np = 0.0",
                "main.toml:2: views.0.transforms.2: index 2 does not exist, "
                "the list set at base.toml:2 has 2 elements (files: main.toml -> base.toml)",
            ),
            (
                "[views]\n1.p = 0",
                "main.toml:3: views.1: index 1 does not exist, "
                "the list set at base.toml:1 has 1 element (files: main.toml -> base.toml)",
            ),
            (
                "[views.first]",
                "main.toml:2: views: a table cannot replace a list set at base.toml:1; "
                "a table over a list names its elements: 0, 1, ... (files: main.toml -> base.toml)",
            ),
            (
                "[views.0.transforms.0.size]\nx = 1",
                "main.toml:2: views.0.transforms.0.size: a table cannot replace the number 224 set at base.toml:3; "
                "drop the value first: `_delete_ = true` in this table (files: main.toml -> base.toml)",
            ),
            (
                "views = { 0 = 3 }",
                "main.toml:2: views.0: the number 3 cannot replace the table set at base.toml:1 "
                "(files: main.toml -> base.toml)",
            ),
            (
                '[views.0]\n_delete_ = ["transform"]',
                "main.toml:2: views.0: _delete_ names 'transform', which is not inherited; did you mean transforms? "
                "(files: main.toml -> base.toml)",
            ),
            (
                "[views.0]\n_delete_ = 1",
                "main.toml:3: views.0._delete_: expected true or a list of keys, got the number 1",
            ),
        ],
    )
    def test_what_cannot_be_merged(self, write, text, expected):
        assert self.failed(write, LIST, text) == expected

    @pytest.mark.parametrize("text", ["t = [1]", 't = "x"', "t = true"])
    def test_only_a_table_replaces_a_table(self, write, text):
        said = self.failed(write, "[t]\na = 1", text)
        assert "cannot replace the table set at base.toml:1" in said
        assert '; drop the table first: `_delete_ = ["t"]` at the top level (files' in said
        assert self.merged(write, "[t]\na = 1", f'_delete_ = ["t"]\n{text}')["t"] != {"a": 1}

    def test_the_hint_how_to_replace_a_table_works(self, write):
        main = write("x.toml", "[data]\nholdout = { type = 'Shapes' }")
        said = message(main, "data.holdout=0.1")
        drop = """--set 'data._delete_=["holdout"]'"""
        assert said == (
            "--set data.holdout=0.1: data.holdout: the number 0.1 cannot replace the table set at x.toml:2; "
            f"drop the table first: {drop}"
        )
        assert values(main, shlex.split(drop)[1], "data.holdout=0.1") == {"data": {"holdout": 0.1}}

    def test_siblings_that_disagree_print_both_chains(self, write):
        write("left.toml", "x = 1")
        write("right.toml", "[x]")
        write("main.toml", 'extends = ["left.toml", "right.toml"]')
        assert message("main.toml") == (
            "right.toml:1: x: a table cannot replace the number 1 set at left.toml:1; "
            "drop the value first: `_delete_ = true` in this table "
            "(files: main.toml -> right.toml; main.toml -> left.toml)"
        )

    def test_origins_are_a_chain(self, write):
        write("base.toml", "\nepochs = 200\n[t]\na = 1\n")
        write("main.toml", 'extends = "base.toml"\nepochs = 400\n[t]\nb = 2\n')
        config = load("main.toml", ["epochs=800", "t.a=3"], ANYTHING)
        chains = {key: [str(o) for o in config.origins(key)] for key in ("epochs", "t", "t.a", "t.b")}
        assert chains == {
            "epochs": ["base.toml:2", "main.toml:2", "--set epochs=800"],
            "t": ["base.toml:3", "main.toml:3", "--set t.a=3"],
            "t.a": ["base.toml:4", "--set t.a=3"],
            "t.b": ["main.toml:4"],
        }

    def test_a_deleted_key_has_no_earlier_origins(self, write):
        write("base.toml", "[t]\na = 1\n")
        write("main.toml", 'extends = "base.toml"\n[t]\n_delete_ = true\na = 2\n')
        config = load("main.toml", (), ANYTHING)
        assert [str(o) for o in config.origins("t.a")] == ["main.toml:4"]
        assert [str(o) for o in config.origins("t")] == ["base.toml:1", "main.toml:2"]


class TestOverrides:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("a=1", {"a": 1}),
            ("a = -1.5e3 ", {"a": -1500.0}),
            ("a=true", {"a": True}),
            ("a='True'", {"a": "True"}),
            ("a=Trueish", {"a": "Trueish"}),
            ("a=f(x)", {"a": "f(x)"}),
            ("a=x,y", {"a": "x,y"}),
            ("a=(x)", {"a": "(x)"}),
            ("a=nan_is_text", {"a": "nan_is_text"}),
            ("a=path/to=x y", {"a": "path/to=x y"}),
            ("a=", {"a": ""}),
            ("a='1'", {"a": "1"}),
            ("a=[1, 'b', { c = 2 }]", {"a": [1, "b", {"c": 2}]}),
            ("a.b.c={ d = [] }", {"a": {"b": {"c": {"d": []}}}}),
            ("a.\"b=c\".'d.e'=1", {"a": {"b=c": {"d.e": 1}}}),
            ("a=0x10", {"a": 16}),
            ("a=1 # seconds", {"a": 1}),
            ("a=abc # no comment", {"a": "abc # no comment"}),
        ],
    )
    def test_values(self, write, text, expected):
        assert values(write("x.toml", ""), text) == expected

    @pytest.mark.parametrize(
        "value", ["[1, 2", "{a = }", '"x', "'x", "12abc", "-x", "+", "true-ish", "0.1.2", "2024_run"]
    )
    def test_a_text_that_begins_like_toml_must_be_toml(self, write, value):
        text = message(write("x.toml", ""), f"a={value}")
        assert text.startswith(f"--set a={value}: {value!r} is not a TOML value (")
        assert text.endswith(f"put a string in quotes: '\"{value}\"'")

    @pytest.mark.parametrize(
        ("value", "in_toml"),
        [
            ("True", "true"),
            ("False", "false"),
            ("(1, 2)", "[1, 2]"),
            ("1, 2", "[1, 2]"),
            ("1.", "1.0"),
            ("-.5", "-0.5"),
            ("[('train', 1)]", '[["train", 1]]'),
            ("{'a': [True]}", "{ a = [true] }"),
            ("[(train,1),(val,1)]", '[["train", 1], ["val", 1]]'),
            ("dict(type=BN)", '{ type = "BN" }'),
            ("dict(type='BN', requires_grad=True)", '{ type = "BN", requires_grad = true }'),
        ],
    )
    def test_python_syntax_is_answered_with_toml_syntax(self, write, value, in_toml):
        main = write("x.toml", "")
        assert message(main, f"a={value}").startswith(f"--set a={value}: in TOML {value} is written {in_toml}")
        assert values(main, f"a={in_toml}") == values(write("y.toml", f"a = {in_toml}"))
        write("x.toml", f"b = 1\na = {value}")
        assert re.fullmatch(rf"x.toml:2: .* \(column \d+\); in TOML {re.escape(value)} is written .*", message(main))

    @pytest.mark.parametrize("value", ["None", "null", "[1, None]", "dict(a=None)"])
    def test_none_is_answered_with_how_a_key_is_dropped(self, write, value):
        main = write("x.toml", "[t]\na = 1\nb = 2")
        said = message(main, f"t.a={value}")
        assert said.startswith(f"--set t.a={value}: TOML has no None: leave the key out, or drop an inherited one with")
        if value in ("None", "null"):
            assert values(main, shlex.split(said.partition(" with --set ")[2])[0]) == {"t": {"b": 2}}
        assert "TOML has no None" in message(write("y.toml", f"t = {{ x = 1, a = {value} }}"))

    def test_a_python_config_is_answered_with_the_verb_that_converts_it(self, write):
        assert message(write("x.py", "model = dict(type='MoCo')")) == (
            "x.py:1: Invalid value (column 9); `sslrun config import` converts configs of MMSelfSup"
        )

    def test_an_error_that_is_not_python_syntax_has_no_hint(self, write):
        for line in ("a = 1 2", "a = 1 'x'", "a = [1 2]", "a = nope", "a = [1, x]]", "a = f(x)"):
            assert message(write("x.toml", line)).endswith(")")

    @pytest.mark.parametrize("text", ["epochs", "=3", "", "[a]", "a b=1", "a..b=1", "a=1\nb=2", ".a=1"])
    def test_texts_that_are_no_assignment(self, write, text):
        assert "expected KEY=VALUE on one line" in message(write("x.toml", ""), text)

    def test_order_and_depth(self, write):
        main = write("x.toml", LIST)
        result = values(main, "views.0.transforms.1.p=0.5", "views.0.transforms.1={ p = 0.25 }", "views.0.sizes.1=9")
        assert result["views"][0]["transforms"][1] == {"type": "Jitter", "p": 0.25, "hue": 0.1}
        assert result["views"][0]["sizes"] == [1, 9, 3]

    def test_delete(self, write):
        assert values(write("x.toml", "[t]\na = 1\nb = 2"), "t._delete_=['a']") == {"t": {"b": 2}}

    def test_extends_cannot_be_set(self, write):
        assert message(write("x.toml", ""), "extends=y.toml") == "--set extends=y.toml: extends is read from files only"

    @settings(max_examples=60, deadline=None)
    @given(texts, nested)
    def test_set_equals_a_one_line_file(self, tmp_path_factory, key, value):
        line = f"{show(('t', key))} = {inline(escape(value))}"
        folder = tmp_path_factory.mktemp("x")
        (folder / "empty.toml").write_text("")
        (folder / "line.toml").write_text(line, encoding="utf-8")
        assert values(folder / "empty.toml", line) == values(folder / "line.toml")


class TestName:
    def test_an_alias_carries_the_name_of_its_recipe(self, write):
        write("selfsup/mocov2_resnet50_8xb32-coslr-200e_in1k.toml", "a = 1")
        write("mocov2.toml", '# short name\nextends = "selfsup/mocov2_resnet50_8xb32-coslr-200e_in1k.toml"')
        write("again.toml", 'extends = ["mocov2.toml"]')
        for path in ("mocov2.toml", "again.toml"):
            assert load(path, ["a=2"], ANYTHING).name == "mocov2_resnet50_8xb32-coslr-200e_in1k"

    def test_a_file_with_content_is_no_alias(self, write):
        write("base.toml", "a = 1")
        write("other.toml", "b = 1")
        assert load(write("own.toml", 'extends = "base.toml"\na = 2'), (), ANYTHING).name == "own"
        assert load(write("two.toml", 'extends = ["base.toml", "other.toml"]'), (), ANYTHING).name == "two"
        assert load(Path("base.toml").absolute(), (), ANYTHING).name == "base"
