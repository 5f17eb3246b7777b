"""Old configs are read as Python means them, without executing them; everything else is refused with file and line."""

import json
import time
from pathlib import Path

import pytest

from old_config import evaluated
from sslrun.errors import UsageError
from sslrun.importer import import_config


def refused(path):
    """The one line with which an import is refused."""
    with pytest.raises(UsageError) as error:
        import_config(path)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


class TestLanguage:
    @pytest.mark.parametrize(
        "source",
        [
            "x = [1, -2.5, True, None, 'a' 'b', (1, 2), [], {}, (), +3, not 0]",
            "x = dict(a=1, **{'b': 2}, **dict(c=3))",
            "x = {'a': 1, **dict(b=2), 'a': 3}",
            "x = dict(dict(a=1, b=2), b=3)",
            "x = [1] + [2] * 3 + list((3, 4)) + list(range(3)) + [float('inf'), int(2.5)]",
            "x = 8 * 32 // 3 % 7 - 2 ** 3 + 1e-3 / 4 + 0.05 / 8 * 2",
            "a = [1, 2, 3, 4]\nx = [a[0], a[-1], (1, 2)[1], dict(b=dict(c=a))['b']['c'][1]]",
            "a = [1]\nb = dict(p=a)\na.append(2)\na.extend((3, 4))\na.insert(0, 9)\nx = b",
            "a = [1]\nb = dict(p=a)\na += [2]\nx = b",
            "a = [1]\nb = dict(p=a)\na = a + [2]\nx = b",
            "a = dict(b=[1])\nc = a.copy()\nc['b'].append(2)\nc['d'] = 1\nx = [a, c]",
            "import copy\na = [dict(b=[1])]\nc = copy.deepcopy(a)\nc[0]['b'].append(2)\nc[0]['p'] = 0.1\nx = [a, c]",
            "x = dict(a=1)\nx.update(dict(b=2), c=3)\nx.pop('a')\nx['b'] = [4]\nx['b'][0] = 5",
            "prefetch = False\nx = [1]\nif not prefetch:\n    x.extend([2])\nelse:\n    x = 4",
            "prefetch = True\nif not prefetch:\n    x = 1\nelif prefetch:\n    x = 2\nelse:\n    x = 3",
            "a = x = [1]\na.append(2)",
            "x = 3\nx *= 2\nx -= 1",
            "'a docstring'\nlist = 3\npass\nx = list",
        ],
    )
    def test_is_that_of_python(self, write, source):
        """Python itself is the reference: these sources are safe to execute."""
        scope: dict = {}
        exec(source, scope)
        assert json.dumps(evaluated(write("a.py", source))["x"]) == json.dumps(scope["x"])

    @pytest.mark.parametrize(
        ("expression", "what"),
        [
            ("[i for i in (1, 2)]", "a comprehension"), ("{k: 1 for k in 'ab'}", "a comprehension"),
            ("f'{x}'", "an f-string"), ("[1, 2][:1]", "a slice"), ("1 < 2", "a comparison"),
            ("lambda: 1", "a function"), ("print(1)", "a call"), ("open('touched', 'w')", "a call"),
            ("__import__('os').system('touch touched')", "a call"), ("eval('1')", "a call"),
            ("1j", "a constant"), ("b'x'", "a constant"), ("...", "a constant"), ("{1, 2}", "Set"),
            ("undefined", "no such name"), ("(y := 3)", "NamedExpr"),
            ("[*[1]]", "Starred"), ("''.__class__", "has no '__class__'"), ("[].sort()", "a call"),
            ("'a,b'.split(',')", "a call"), ("'%s' % 1", "are not combined"), ("1 / 0", "division by zero"),
            ("'a' + 1", "are not combined"), ("[1][5]", "has no 5"), ("{}['k']", "has no 'k'"), ("-'a'", "has no sign"),
            ("int('x')", "invalid literal"), ("range(1, 2, 0)", "must not be zero"), ("dict([('a', 1)])", "** a list"),
            ("{1: 2}", "keys of a dict are strings"), ("1 if x else 2", "IfExp"), ("x and 1", "BoolOp"),
            ("2 ** 64", "more than 64 bits"), ("'\\ud800'", "UTF-8 cannot write"), ("(-8) ** 0.5", "complex"),
        ],
    )  # fmt: skip
    def test_expressions_that_are_refused(self, write, expression, what):
        path = write("a.py", f"x = 1\na = dict(\n    b=1,\n    c={expression},\n    d=[2, 3])")
        message = refused(path)
        assert message.startswith("a.py:4: ") and what in message, message
        assert not Path("touched").exists()

    @pytest.mark.parametrize(
        "statement",
        [
            "while x:\n    x.append(1)", "for i in x:\n    x.append(i)", "try:\n    x = 1\nexcept Exception:\n    pass",
            "with open('touched', 'w') as f:\n    pass", "x.sort()", "change(x)", "x[9] = 1", "x, y = 1, 2", "del x[0]",
            "assert x", "def f():\n    return x", "class X:\n    pass", "import os", "from .other import thing",
            "x: int = 3", "x.y = 1", "x += 1", "global x", "(x)", "5 .a = 1",
        ],
    )  # fmt: skip
    def test_statements_that_are_refused(self, write, statement):
        assert refused(write("a.py", f"\nx = [1]\n{statement}\n")).startswith("a.py:3: ")
        assert not Path("touched").exists()

    def test_names_of_the_file(self, write):
        path = write("some/moco_8xb32.py", "a = '{{fileBasename}}'\nb = '{{ fileBasenameNoExtension }}{{fileExtname}}'")
        assert evaluated(path) == {"a": "moco_8xb32.py", "b": "moco_8xb32.py"}
        path = write("c.py", "a = '{{fileDirname}}'")
        assert evaluated(path) == {"a": str(path.parent)}

    def test_the_environment_is_not_read(self, write, monkeypatch):
        monkeypatch.setenv("ROOT", "/secret")
        path = write("a.py", "\nroot = '{{$ROOT:data/x}}'\nn = {{$N:8}} * 2")
        assert evaluated(path) == {"root": "data/x", "n": 16}
        assert any("a.py:2: changed: {{$ROOT:data/x}}: the environment is not read" in line
                   for line in import_config(path).report.lines())  # fmt: skip


class TestLimits:
    """Time, depth and size are bounded: one line, at once."""

    @pytest.mark.parametrize(
        "source",
        [
            "x = range(10**9)", "x = list(range(10**18))", "x = 'a' * 10**9", "x = [0] * 10**9", "x = (1,) * 10**9",
            "x = 9**9**9", "x = 2 ** 10**9", "x = 10**1000 * 10**1000", "x = 'ab' * 9999\n" + "x = x + x\n" * 40,
            "x = [1]\n" + "x = [x, x]\n" * 60, "x = {'a': 1}\n" + "x = dict(a=x, b=x)\n" * 60,
            "x = [1]\n" + "x.extend(x)\n" * 60, "x = [1]\nx.append(x)", "x = dict()\nx['x'] = x",
            "import copy\nx = [1]\n" + "x = [copy.deepcopy(x), copy.deepcopy(x)]\n" * 40,
            "x = " + "[" * 150 + "]" * 150, "x = " + "dict(a=" * 90 + "1" + ")" * 90,
            "x = " + "(" * 50000 + ")" * 50000, "x = a" + ".b" * 50000, "x = " + "not " * 50000 + "1",
            "x = [\n" + "1,\n" * 70_000 + "]\n" + "y = x + x + x", "x = " + "9" * 5000, "# " + "x" * 300_000,
        ],
    )  # fmt: skip
    def test_bombs(self, write, source):
        started = time.process_time()
        assert refused(write("a.py", source + "\n")).startswith("a.py")
        assert time.process_time() - started < 20  # and not the age of the universe

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"x = '\xff'", "not UTF-8: byte 0xff"),
            (b"x = 1\0", "not Python"),
            (b"x = (1,\n", "a.py:1: not Python: '(' was never closed"),
            (b"\x80\x02}q\x00.", "not UTF-8"),
        ],
    )
    def test_files_that_are_not_python(self, write, content, message):
        write("a.py", "").write_bytes(content)
        assert message in refused(Path("a.py"))

    def test_no_file(self, write, tmp_path):
        write("mocov2.py", "")
        assert refused(Path("moco2.py")) == "moco2.py does not exist; did you mean mocov2.py?"
        assert refused(tmp_path).endswith("is a folder, not a file")
        assert refused(Path("/dev/null")).endswith("/dev/null is not a regular file")
        assert "does not exist" in refused(Path("a\0b.py")) and "does not exist" in refused(Path("x" * 500))
        assert evaluated(write("a.py", "\ufeffx = 1")) == {"x": 1}, "a byte-order mark is no matter"


class TestBases:
    """`_base_`, merged as mmcv merges."""

    def test_merge(self, write):
        write("base/a.py", "m = dict(a=1, b=dict(c=2, d=[1, 2]), e=dict(f=1))\nn = [1]\nk = 5")
        write("b.py", "other = 1")
        path = write(
            "c.py",
            "_base_ = ['base/a.py', './b.py']\n"
            "m = dict(b=dict(d=[3]), e=dict(_delete_=True, g=2), n=dict(_delete_=True, o=[dict(_delete_=True, p=1)]))\n"
            "n = [2]\nk = dict(_delete_=True, l=1)",
        )
        assert evaluated(path) == {
            "m": {"a": 1, "b": {"c": 2, "d": [3]}, "e": {"g": 2}, "n": {"o": [{"p": 1}]}},
            "n": [2],
            "k": {"l": 1},
            "other": 1,
        }

    def test_values_of_bases(self, write):
        write("a.py", "n = 10\nd = dict(s=32, p=[1])\nv = dict(d=d)")
        path = write(
            "b.py",
            "_base_ = 'a.py'\nx = {{_base_.n}}\ny = [{{ _base_.d.s }}, _base_.d['p'] + [2], _base_.v.d.p[0]]\n"
            "_base_.d.s = 64\n_base_.d.p.append(7)\nz = dict(_base_.d, s=1)\nq = '{{_base_.n}}'",
        )
        values = evaluated(path)
        assert values["x"] == 10 and values["y"] == [32, [1, 2], 1] and values["z"] == {"s": 1, "p": [1, 7]}
        assert values["d"] == values["v"]["d"] == {"s": 64, "p": [1, 7]}, "a live object, as in mmengine"
        assert values["q"] == "{{_base_.n}}", "a reference in quotes is no reference"

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"a.py": "_base_ = 'b.py'", "b.py": "_base_ = 'a.py'"}, "_base_ goes in a circle: a.py -> b.py -> a.py"),
            ({"a.py": "\n_base_ = 'bases/moco.py'", "bases/mocov2.py": ""},
             "a.py:2: _base_: bases/moco.py does not exist; did you mean mocov2.py?"),
            ({"a.py": "_base_ = 'x'", "x/y.py": ""}, "a.py:1: _base_: x is a folder, not a file"),
            ({"a.py": "_base_ = 'x.yml'", "x.yml": ""}, "a.py:1: _base_: x.yml is not a Python file"),
            ({"a.py": "_base_ = ['b.py', 'c.py']", "b.py": "x = 1", "c.py": "\nx = 2"},
             "a.py:1: _base_: x is set by two of the bases, at c.py:2 and b.py:1"),
            ({"a.py": "_base_ = 'b.py'\nm = dict(\n    n=dict(o=1))", "b.py": "m = dict(n=3)"},
             "a.py:3: m.n: a dict cannot go over the number 3, set at b.py:1; `_delete_=True` in it would replace"),
            ({"a.py": "_base_ = 'b.py'\nm = dict(o=1)", "b.py": "m = None"}, "a dict cannot go over None"),
            ({"a.py": "_base_ = 'mmdet::x/y.py'"}, "'mmdet::x/y.py' is a file of another package"),
            ({"a.py": "_base_ = 3"}, "a.py:1: _base_: expected a path or a list of paths"),
            ({"a.py": "_base_ = 'b.py'\n_base_ = 'b.py'", "b.py": ""}, "_base_ is set twice"),
            ({"a.py": "_base_ = 'b.py'\nx = {{_base_.z}}", "b.py": ""}, "a.py:2: _base_.z: a table has no 'z'"),
            ({"a.py": "_base_ = 'b\\n.py'"}, "a.py:1: _base_: b\\n.py does not exist"),
            ({"a.py": "from mmengine.config import read_base\nwith read_base():\n    from .b import *"},
             "a.py:2: bases by `with read_base()` are not read here"),
            ({"a.py": "_base_ = 'b0.py'", **{f"b{i}.py": f"_base_ = 'b{i + 1}.py'" for i in range(40)}},
             "more than 32 files in a row"),
        ],
    )  # fmt: skip
    def test_mistakes(self, write, files, message):
        for name, text in files.items():
            write(name, text)
        assert message in refused(Path("a.py"))

    def test_links_in_a_circle(self, write, tmp_path):
        write("sub/a.py", "_base_ = '../again/sub/a.py'")
        (tmp_path / "again").symlink_to(tmp_path)
        assert "goes in a circle" in refused(Path("sub/a.py"))
        (tmp_path / "self.py").symlink_to("self.py")
        assert "does not exist" in refused(Path("self.py"))
