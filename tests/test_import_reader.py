"""Old configs are read as Python means them, without executing them; everything else is refused with file and line."""

import json
import time
from pathlib import Path

import pytest

from sslrun.config.node import plain
from sslrun.errors import UsageError
from sslrun.importer import import_config
from sslrun.importer.reader import read


def refused(path):
    """The one line with which an import is refused."""
    with pytest.raises(UsageError) as error:
        import_config(path)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    "source",
    [
        "x = [1, -2.5, True, None, 'a' 'b', (1, 2), [], {}, (), +3, not 0, not 'a']",
        "x = dict(a=1, **{'b': 2}, **dict(c=3))\ny = {'a': 1, **dict(b=2), 'a': 3}\nz = dict(x, b=3)",
        "x = [[1] + [2], 'a' + 'b', 8 * 32 // 3 % 7 - 2 ** 3 + 1e-3 / 4 + 0.05 / 8 * 2]",
        "a = [1, 2, 3, 4]\nx = [a[0], a[-1], (1, 2)[1], dict(b=dict(c=a))['b']['c'][1]]",
        "a = [1]\nb = dict(p=a)\na.append(2)\na.extend((3, 4))\na += [5]\nx = b\nx['q'] = 6\nx['p'][0] = 7",
        "a = [1]\nb = dict(p=a)\na = a + [2]\nx = b",
        "import copy\na = [dict(b=[1])]\nc = copy.deepcopy(a)\nc[0]['b'].append(2)\nc[0]['p'] = 0.1\nx = [a, c]",
        "prefetch = False\nx = [1]\nif not prefetch:\n    x.extend([2])\nelse:\n    x = 4",
        "'a docstring'\nlist = 3\nx = [list, 'a byte-order mark is no matter']",
    ],
)
def test_values_are_those_of_python(write, source):
    """Python itself is the reference: these sources are safe to execute."""
    scope: dict = {}
    exec(source, scope)
    assert json.dumps(plain(read(write("a.py", f"\ufeff{source}"))[0])["x"]) == json.dumps(scope["x"])


REFUSED = {  # expressions, and what the message names
    "ListComp": ["[i for i in (1, 2)]"], "DictComp": ["{k: 1 for k in 'ab'}"], "JoinedStr": ["f'{x}'"],
    "Slice": ["[1, 2][:1]"], "Compare": ["1 < 2"], "Lambda": ["lambda: 1"], "NamedExpr": ["(y := 3)"],
    "Call": ["open('touched', 'w')", "__import__('os').system('touch touched')", "eval('1')", "[].sort()"],
    "Constant": ["1j", "b'x'", "..."], "Set": ["{1, 2}"], "Name": ["undefined", "_base_"], "Starred": ["[*[1]]"],
    "has no '__class__'": ["''.__class__"], "has no 'k'": ["{}['k']"], "has no 5": ["[1][5]"],
    "not combined": ["'%s' % 1", "'a' + 1", "-'a'", "[1] * 2"], "division by zero": ["1 / 0"],
    "exponent": ["2 ** 64", "(-8) ** 0.5"], "64 bits": ["2 ** 63"], "a template": ["'{{x}}'", "'\\ud800'"],
    "are strings": ["{1: 2}", "dict([('a', 1)])"],
}  # fmt: skip


@pytest.mark.parametrize(("expression", "what"), [(text, what) for what, texts in REFUSED.items() for text in texts])
def test_expressions_that_are_refused(write, expression, what):
    message = refused(write("a.py", f"x = 1\na = dict(\n    b=1,\n    c={expression},\n    d=[2, 3])"))
    assert message.startswith("a.py:4: ") and what in message, message
    assert not Path("touched").exists()


@pytest.mark.parametrize(
    "statement",
    [
        "while x:\n    x.append(1)", "for i in x:\n    x.append(i)", "with open('touched', 'w') as f:\n    pass",
        "x.sort()", "x[9] = 1", "x, y = 1, 2", "del x[0]", "def f():\n    return x", "class X:\n    pass", "import os",
        "from .other import thing", "x.y = 1", "x += 1", "x = 'ab'[1]", "x = dict(a='ab')['a'][0]",
    ],
)  # fmt: skip
def test_statements_that_are_refused(write, statement):
    assert refused(write("a.py", f"\nx = [1]\n{statement}\n")).startswith("a.py:3: ")
    assert not Path("touched").exists()


@pytest.mark.parametrize(
    "source",
    [
        "x = range(0, 10**9)", "x = 'a' * 10**9", "x = 9**9**9", "x = 9\n" + "x = x ** 63\n" * 9,
        "x = 'ab'\n" + "x = x + x\n" * 40, "x = [1]\n" + "x = [x, x]\n" * 60, "x = [1]\n" + "x.extend(x)\n" * 60,
        "x = {'a': 1}\n" + "x = dict(a=x, b=x)\n" * 60, "x = [1]\nx.append(x)", "x = " + "[" * 150 + "]" * 150,
        "import copy\nx = [1]\n" + "x = [copy.deepcopy(x), copy.deepcopy(x)]\n" * 40, "x = a" + ".b" * 50000,
        "x = " + "(" * 50000 + ")" * 50000, "x = " + "9" * 5000,
    ],
)  # fmt: skip
def test_time_depth_and_size_are_bounded(write, source):
    started = time.process_time()
    assert refused(write("a.py", source + "\n")).startswith("a.py")
    assert time.process_time() - started < 20  # and not the age of the universe


def test_values_of_bases(write):
    write("base/a.py", "m = dict(a=1, b=dict(c=2, d=[1, 2]), e=dict(f=1))\nk = 5\nv = dict(p=[1])\nw = [v]\nu = 9")
    write("b.py", "other = 1")
    path = write(
        "c.py",
        "_base_ = ['base/a.py', './b.py']\n"
        "m = dict(b=dict(d=[3]), e=dict(_delete_=True, g=2), n=dict(_delete_=True, o=[dict(_delete_=True, p=1)]))\n"
        "n = [{{_base_.u}}, _base_.m.b.d + [7]]\nk = dict(_delete_=True, l=1)\n_base_.v.p.append(2)\n_base_.v.q = 3",
    )
    values, unread = read(path)
    assert plain(values) == {
        "m": {"a": 1, "b": {"c": 2, "d": [3]}, "e": {"g": 2}, "n": {"o": [{"p": 1}]}},
        "n": [9, [1, 2, 7]], "k": {"l": 1}, "other": 1, "u": 9,
        "v": {"p": [1, 2], "q": 3}, "w": [{"p": [1, 2], "q": 3}],  # live objects, as in mmengine
    }  # fmt: skip
    assert str(values.value["n"].value[0].where) == "c.py:3", "a number belongs to the place that it is used at"
    assert unread == {"n", "k", "w", "other"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.py": b"x = '\xff'"}, "a.py:1: not Python: (unicode error) 'utf-8' codec can't decode byte 0xff"),
        ({"a.py": b"x = 1\0"}, "null bytes"),
        ({"a.py": b"x = (1,\n"}, "a.py:1: not Python: '(' was never closed"),
        ({"ab.py": b""}, "a.py: No such file or directory; did you mean ab.py?"),
        ({"a.py/b.py": b""}, "a.py: Is a directory"),
        ({"a.py": b"_base_ = 'b.py'", "b.py": b"_base_ = 'a.py'"}, "nested too deep, or its bases go in a circle"),
        ({"a.py": b"\n_base_ = 'bases/moco.py'", "bases/mocov2.py": b""},
         "a.py:2: _base_: bases/moco.py: No such file or directory; did you mean mocov2.py?"),
        ({"a.py": b"_base_ = ['b.py', 'c.py']", "b.py": b"x = 1", "c.py": b"\nx = 2"}, "x is set by two of the bases"),
        ({"a.py": b"_base_ = 'b.py'\nm = dict(\n    n=dict(o=1))", "b.py": b"m = dict(n=None)"},
         "a.py:3: m.n: a dict over something else, set at b.py:1; `_delete_=True` would replace that"),
        ({"a.py": b"_base_ = 3"}, "a.py:1: _base_: 3: No such file or directory"),
        ({"a.py": b"_base_ = 'b.py'\nx = {{_base_.z}}", "b.py": b"y = 1"}, "a.py:2: _base_.z: a table has no 'z'"),
        ({"a.py": b"_base_ = 'b\\n.py'"}, "a.py:1: _base_: b\\n.py: No such file or directory"),
        ({"a.py": b"from mmengine.config import read_base"}, "import read_base: ImportFrom of Python is not"),
    ],
)  # fmt: skip
def test_files_that_are_refused(write, files, message):
    for name, content in files.items():
        write(name, "").write_bytes(content)
    assert message in refused(Path("a.py"))


def test_odd_paths():
    assert "null byte" in refused(Path("a\0b.py")) and "File name too long" in refused(Path("x" * 500))
