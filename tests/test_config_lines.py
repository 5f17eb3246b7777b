"""The line scanner compared with tomli: the same key paths, on the right lines."""

import tomli
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from sslrun.config.lines import key_lines

TEXT = '''\
# a comment with = and [brackets]
epochs = 200   # [not a table]
"odd key".'and.dots' = "a # no comment, \\" no end"
[model]                    # 4
neck = { type = "A", sizes = [1, 2] }
backbone.norm_cfg.type = "BN"
[[data.views]]
num_views = 2
transforms = [
  { type = "Crop" },       # 10

  # nothing here
  { type = "Flip", p = 0.5 }, [
    1979-05-27 07:32:00, """
] = } "quoted" ""three\\"""
""""",
  '\\', \'\'\'
[table]
x = 1\'\'\' ],              # 19
]
[[data.views]]
[data.views.limits]
low = -1e3
[[data.views.rows]]
[data]                     # explicit after its own children
drop = true
'''


def paths(value, key=()):
    """Every key path of a parsed document."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for part, below in children:
        yield (*key, part)
        yield from paths(below, (*key, part))


def test_lines_of_every_construct():
    lines = key_lines(TEXT)
    assert set(lines) == set(paths(tomli.loads(TEXT)))
    expected = {
        ("epochs",): 2,
        ("odd key", "and.dots"): 3,
        ("model",): 4,
        ("model", "neck", "sizes", 1): 5,
        ("model", "backbone", "norm_cfg", "type"): 6,
        ("data", "views", 0): 7,
        ("data", "views", 0, "transforms"): 9,
        ("data", "views", 0, "transforms", 0, "type"): 10,
        ("data", "views", 0, "transforms", 1, "p"): 13,
        ("data", "views", 0, "transforms", 2): 13,
        ("data", "views", 0, "transforms", 2, 0): 14,
        ("data", "views", 0, "transforms", 2, 1): 14,
        ("data", "views", 0, "transforms", 2, 2): 17,
        ("data", "views", 0, "transforms", 2, 3): 17,
        ("data", "views", 1): 21,
        ("data", "views", 1, "limits", "low"): 23,
        ("data", "views", 1, "rows", 0): 24,
        ("data", "drop"): 26,
        ("data",): 7,
    }
    assert {key: lines[key] for key in expected} == expected


def test_windows_line_ends_count_once():
    assert key_lines("a = 1\r\n[b]\r\nc = [\r\n 2,\r\n]\r\n") == {
        ("a",): 1,
        ("b",): 2,
        ("b", "c"): 3,
        ("b", "c", 0): 4,
    }


keys = st.text(st.characters(exclude_categories=("Cs",)), max_size=4) | st.sampled_from(
    ["a", "b", "a.b", "0", "=", "#", "]"]
)
strings = st.text(st.characters(exclude_categories=("Cs",)), max_size=8) | st.text("\"'\\#[]{}=\n,ab ", max_size=10)
scalars = (
    st.booleans() | st.integers() | st.floats(allow_nan=False) | strings | st.datetimes() | st.dates() | st.times()
)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(keys, v, max_size=4), max_leaves=12)
documents = st.dictionaries(keys, values, max_size=5)


@settings(max_examples=200, deadline=None)
@given(documents, st.booleans())
def test_finds_every_key_of_what_tomli_w_writes(document, multiline):
    text = tomli_w.dumps(document, multiline_strings=multiline)
    assert set(key_lines(text)) == set(paths(tomli.loads(text)))


@st.composite
def handwritten(draw):
    """(text, line of each key): documents as people write them, with comments, blank lines and odd spacing."""
    lines, expected = [], {}
    gap = st.sampled_from(["", "# [x] = 'y'", "   ", '\t# """'])

    def value(key, indent):
        """Appends a value to the last line, noting where everything inside it starts."""
        form = draw(st.sampled_from(["scalar", "list", "inline", "text"]))
        if form == "scalar" or indent > 3:
            lines[-1] += draw(st.sampled_from(["1", "true", "'#'", '"]"', "1e5", "07:32:00", '"""x"""', "''''a'''"]))
        elif form == "text":
            lines[-1] += '"""'
            lines.extend(draw(st.lists(st.sampled_from(['a = "1"', "[t]", "''' #", '\\"""']), max_size=3)))
            lines.append('"""')
        elif form == "inline":
            lines[-1] += "{"
            for place in range(draw(st.integers(0, 2))):
                lines[-1] += f"{', ' if place else ' '}k{place} = "
                expected[(*key, f"k{place}")] = len(lines)
                value((*key, f"k{place}"), indent + 1)
            lines[-1] += " }"
        else:
            lines[-1] += "["
            for place in range(draw(st.integers(0, 3))):
                if draw(st.booleans()):
                    lines.extend([draw(gap), "  "])
                expected[(*key, place)] = len(lines)
                value((*key, place), indent + 1)
                lines[-1] += " ,"
            lines[-1] += "]"

    def pairs(table):
        for place in range(draw(st.integers(0, 3))):
            lines.extend(draw(st.lists(gap, max_size=2)))
            name = draw(st.sampled_from([f"k{place}", f'"k {place}"', f"'#{place}'"]))
            lines.append(f"  {name} = ")
            key = (*table, name.strip("\"'"))
            expected[key] = len(lines)
            value(key, 0)
            lines[-1] += draw(st.sampled_from(["", "  # comment = [1"]))

    pairs(())
    for number in range(draw(st.integers(0, 3))):
        repeats = draw(st.integers(0, 2))
        for element in range(max(1, repeats)):
            lines.append(f"[[ t{number} ]] # [[x]]" if repeats else f"[ t{number} ]")
            expected.setdefault((f"t{number}",), len(lines))
            table = (f"t{number}", element) if repeats else (f"t{number}",)
            expected.setdefault(table, len(lines))
            pairs(table)
    return "\n".join(lines) + draw(st.sampled_from(["", "\n"])), expected


@settings(max_examples=200, deadline=None)
@given(handwritten())
def test_lines_of_handwritten_documents(written):
    text, expected = written
    assert set(expected) == set(paths(tomli.loads(text)))  # the generator itself is right
    assert key_lines(text) == expected
