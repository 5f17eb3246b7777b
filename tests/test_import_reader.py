"""Old configurations are read as Python means them, without it: what cannot be is reported, what is large refused."""

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
    """What an expression means, as Python means it."""

    @pytest.mark.parametrize(
        "source",
        [
            "x = [1, -2.5, True, None, 'a' 'b', (1, 2), [], {}, ()]",
            "x = dict(a=1, **{'b': 2}, **dict(c=3))",
            "x = {'a': 1, **dict(b=2), 'a': 3}",
            "x = dict([('a', 1), ('b', 2)], c=3)",
            "x = [1, *[2, 3], *(4,)]",
            "x = [1] + [2] * 3 + list((3, 4))",
            "x = 8 * 32 // 3 % 7 - 2 ** 3 + 1e-3 / 4 + (1 << 4) + (6 & 3 | 8 ^ 1)",
            "x = 0.05 / 8 * 2 * 2 * 4",
            "x = not 0 or 5 and 'yes'",
            "x = 'a' if 1 < 2 <= 2 != 3 else 'b'",
            "x = [1 in [1, 2], 'b' not in 'abc', 'k' in dict(k=1), None is None, 1 == 1.0, 2 in (1, 3)]",
            "a, b = ([1, {'a': (2,)}] for _ in (1, 2)) if False else ([1, {'a': (2,)}], [1, {'a': (2,)}])\nx = a == b",
            "a = 'lr'\nx = f'{a}_{0.5:.2f}_{3:03d}_{a!r}_{{}}'",
            "x = 'b%d-%s-%.2f-%(k)s' % dict(k=1) if False else 'b%d-%s' % (3, 'x')",
            "x = '{}-{:>4}-{n}-{0}'.format('a', 3, n=2) if False else '{0}-{1:>4}-{n}'.format('a', 3, n=2)",
            "x = 'a,b'.replace(',', '-').upper().split('-') + ['-'.join(['c', 'd'])]",
            "x = [i * j for i in range(3) for j in (1, 2) if i != j]",
            "x = {k: len(k) for k in ('a', 'bc')}",
            "x = [round(v * 255, 1) for v in [0.485, 0.456]]",
            "x = [max(1, 2), min([3, 4]), sum([1, 2]), abs(-3), int('5'), float('1.5'), str(2), bool(0)]",
            "a = [1, 2, 3, 4]\nx = [a[0], a[-1], a[1:3], a[::-1], 'abc'[1], (1, 2)[1]]",
            "a = dict(b=dict(c=[1, 2]))\nx = [a['b']['c'][1], a.get('z', 7), list(a.keys())]",
            "a = [1]\nb = dict(p=a)\na.append(2)\nx = b",
            "a = [1]\nb = dict(p=a)\na += [2]\nx = b",
            "a = [1]\nb = dict(p=a)\na = a + [2]\nx = b",
            "a = dict(b=[1])\nc = a.copy()\nc['b'].append(2)\nc['d'] = 1\nx = [a, c]",
            "import copy\na = dict(b=[1])\nc = copy.deepcopy(a)\nc['b'].append(2)\nx = [a, c]",
            "from copy import deepcopy as twin\na = [[1], [1]]\nb = twin(a)\nb[0].append(2)\nx = [a, b]",
            "import os.path as osp\nx = osp.join('data', 'imagenet', 'train')",
            "import os\nx = os.path.join('a', '/b')",
            "x = [3, 1]\nx.insert(0, 9)\nx.extend((5, 6))\nx.pop()\nx.remove(1)\nx.reverse()",
            "x = dict(a=1)\nx.update(dict(b=2), c=3)\nx.setdefault('d', 4)\nx.pop('a')",
            "a, (b, c) = 1, [2, 3]\nx = [c, b, a]",
            "x = []\nfor i, n in enumerate(['a', 'b']):\n    if i:\n        x.append(n)\n    else:\n        x += [i]",
            "prefetch = False\nx = [1]\nif not prefetch:\n    x.extend([2])\nelif x:\n    x = 3\nelse:\n    x = 4",
            "a = b = [1]\na.append(2)\nx = b",
            "x: int = 3\nx *= 2\nx -= 1\nx **= 2",
            "x = dict(a=1, b=2)\ndel x['a']\ny = 1\ndel y",
            "list = 3\nx = list",
        ],
    )
    def test_is_that_of_python(self, write, source):
        """Python itself is the reference: these sources are safe to execute."""
        path = write("a.py", source)
        scope: dict = {}
        exec(source, scope)
        values, problems = evaluated(path)
        assert json.dumps(values["x"]) == json.dumps(scope["x"])
        assert problems == []

    def test_names_of_the_file(self, write):
        path = write("some/moco_8xb32.py", "a = '{{fileBasename}}'\nb = '{{ fileBasenameNoExtension }}{{fileExtname}}'")
        assert evaluated(path)[0] == {"a": "moco_8xb32.py", "b": "moco_8xb32.py"}
        path = write("c.py", "a = '{{fileDirname}}'")
        assert evaluated(path)[0] == {"a": str(path.parent)}

    def test_the_environment_is_not_read(self, write, monkeypatch):
        monkeypatch.setenv("ROOT", "/secret")
        values, problems = evaluated(write("a.py", "\nroot = '{{$ROOT:data/x}}'\nn = {{$N:8}} * 2"))
        assert values == {"root": "data/x", "n": 16}
        assert problems[0].startswith("a.py:2: {{$ROOT:data/x}}: the environment is not read")


class TestUnknown:
    """What cannot be evaluated is reported where it stands, costs only itself, and is never executed."""

    @pytest.mark.parametrize(
        "expression",
        [
            "open('touched', 'w')", "__import__('os').system('touch touched')", "eval('1')", "exec('1')",
            "(lambda: 1)()", "print('x')", "foo.bar", "undefined", "1j", "b'x'", "...", "{1, 2}", "(y := 3)",
            "[1, 2].sort()", "'a'.encode()", "''.__class__", "().__class__.__bases__", "dict.__init__",
            "'{0.__class__}'.format(1)", "f'{[1]}'", "'%s' % [1]", "1 / 0", "'a' + 1", "[1][5]", "{}['k']", "-'a'",
            "int('x')", "int([1])", "[] < []", "1 @ 2", "sum(['a'])", "range('a')", "max([])", "zip(1)", "dict(1)",
            "dict(1, 2)", "{[]: 1}", "(-8) ** 0.5", "float('1e999') // 0", "2.0 ** 1e6", "[1, 2].index([1])", "{**[1]}",
            "'{:{}}'.format(1, 2)", "f'{1:>{2}}'.x", "'a'.format_map({})", "(i for i in [1])", "{i for i in [1]}",
            "[i async for i in x]", "__file__", "__name__", "_base_", "type(1)", "getattr({}, 'x')", "'a' is 'a'",
            "range()", "range(1, 2, 0)", "range(1, 2, 3, 4)", "range(2.0)",
            "os.environ['HOME']", "os.path.exists('a')", "copy.copy.copy({})", "not_imported.path.join('a')",
        ],
    )  # fmt: skip
    def test_expression(self, write, expression):
        path = write("a.py", f"import os, copy\nx = 1\na = dict(\n    b=1,\n    c={expression},\n    d=[2, 3])")
        values, problems = evaluated(path)
        assert values == {"x": 1, "a": {"b": 1, "d": [2, 3]}}
        assert len(problems) == 1 and problems[0].startswith("a.py:5: a.c: "), problems
        assert not Path("touched").exists()

    @pytest.mark.parametrize(
        ("statement", "gone"),
        [
            ("while x:\n    x.append(1)", "x"),
            ("for i in x:\n    break", "x"),
            ("for i in unknown():\n    x.append(i)", "x"),
            ("try:\n    x.append(1)\nexcept Exception:\n    pass", "x"),
            ("with open('touched', 'w') as f:\n    x.append(1)", "x"),
            ("x.sort()", "x"),
            ("change(x)", "x"),
            ("if unknown():\n    x = 3", "x only"),
            ("if unknown():\n    x.append(3)", "x"),
            ("x[0] = unknown", None),
            ("x[9] = 1", "x"),
            ("x += unknown()", "x"),
            ("x, y = unknown()", "x only"),
            ("x, *y = [1, 2]", "x only"),
            ("x = unknown()", "x only"),
            ("del x[0]", "x"),
            ("global x", None),
            ("assert x", "x"),
            ("raise ValueError(x)", "x"),
            ("match x:\n    case _: x.append(1)", "x"),
            ("def f():\n    return x", None),
            ("class X:\n    pass", None),
            ("import json", None),
            ("from .other import thing", None),
            ("print('hello')", None),
        ],
    )
    def test_statement(self, write, statement, gone):
        """What a statement may have changed is unknown from there on, wherever it went before."""
        path = write("a.py", f"x = [1]\nkeep = dict(alias=x, other=2)\n{statement}\n")
        values, problems = evaluated(path)
        assert problems and all(":3: " in problem for problem in problems), problems
        assert values["keep"]["other"] == 2
        assert ("x" in values) == (gone is None) and ("alias" in values["keep"]) == (gone != "x")
        assert not Path("touched").exists()

    def test_of_variables_reaches_all_that_is_made_of_them(self, write):
        path = write("a.py", "import math\nlr = compute(3)\nopt = dict(lr=lr, twice=[2 * lr], wd=math.sqrt(4))")
        values, problems = evaluated(path)
        assert values == {"opt": {"twice": [], "wd": 2.0}}
        assert {problem.split(": ")[1] for problem in problems} == {"lr", "opt.lr", "opt.twice.0"}
        assert all(problem.startswith("a.py:2: ") for problem in problems)

    def test_what_toml_cannot_write(self, write):
        path = write("a.py", "a = dict(\n    big=2 ** 64,\n    odd='\\ud800',\n    ok=2 ** 63 - 1)\nb = {1: 2, 'c': 3}")
        values, problems = evaluated(path)
        assert values == {"a": {"ok": 2**63 - 1}, "b": {"c": 3}}
        assert [problem.split(": ")[:2] for problem in problems] == [
            ["a.py:2", "a.big"], ["a.py:3", "a.odd"], ["a.py:5", "b"],
        ]  # fmt: skip


class TestLimits:
    """Time, depth and size are bounded: one line, at once."""

    @pytest.mark.parametrize(
        "source",
        [
            "x = range(10**9)", "x = list(range(10**18))", "x = range(0, 10**30, 3)", "x = 'a' * 10**9",
            "x = [0] * 10**9", "x = (1,) * 10**9", "x = 9**9**9", "x = 2 ** 10**9", "x = 1 << 10**9", "x = -7 << 9**9",
            "x = 10**1000 * 10**1000", "x = [i for i in range(99999) for j in range(99999)]",
            "a = [0] * 9999\nx = [a + a for i in range(9999)]", "x = 'ab' * 9999\n" + "x = x + x\n" * 40,
            "x = [1]\n" + "x = [x, x]\n" * 60, "x = {'a': 1}\n" + "x = dict(a=x, b=x)\n" * 60,
            "x = [1]\n" + "x = x + x\n" * 60, "x = [1]\nx.append(x)", "x = dict()\nx['x'] = x",
            "x = [1]\n" + "x = [x, x]\n" * 40 + "y = x == [x, x]", "x = ','.join(['a' * 9999] * 9999)",
            "x = 'a' * 50000\nx = x.replace('a', x)", "x = [1]\nfor i in range(99999):\n    x += x",
            "import copy\nx = [1]\n" + "x = [copy.deepcopy(x), copy.deepcopy(x)]\n" * 40,
            "x = " + "[" * 150 + "]" * 150, "x = " + "dict(a=" * 90 + "1" + ")" * 90, "x = " + "-" * 200 + "1",
            "x = " + "1 + " * 500 + "1", "x = " + "not " * 50000 + "1", "x = " + "(" * 50000 + ")" * 50000,
            "x = a" + ".b" * 50000, "x = " + "lambda: " * 9999 + "1", "x = " + "1 if 1 else " * 20000 + "1",
            "x = [\n" + "1,\n" * 70_000 + "]\n" + "y = [x for i in range(50)]\n", "x = " + "9" * 5000,
            "x = [1]\nx = [1] and " + "[" * 60 + "x" + "]" * 60 + "\nx = [" * 5 + "]" * 5,
        ],
    )  # fmt: skip
    def test_bombs(self, write, source):
        started = time.process_time()
        message = refused(write("a.py", source + "\n"))
        assert message.startswith("a.py")
        assert time.process_time() - started < 20  # and not the age of the universe

    def test_a_big_file(self, write):
        assert "bytes; at most 262,144 are read" in refused(write("a.py", "# " + "x" * 300_000))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"x = '\xff'", "not UTF-8: byte 0xff"),
            (b"x = 1\0", "no Python"),
            (b"x = (1,\n", "a.py:1: no Python: '(' was never closed"),
            (b"a = 1\n<<<<<<< HEAD\nb = 2\n", "a.py:2: no Python: invalid syntax"),
            (b"\x80\x02}q\x00.", "not UTF-8"),
        ],
    )
    def test_no_python(self, write, content, message):
        write("a.py", "").write_bytes(content)
        assert message in refused(Path("a.py"))

    def test_no_file(self, write, tmp_path):
        write("mocov2.py", "")
        assert refused(Path("moco2.py")) == "moco2.py does not exist; did you mean mocov2.py?"
        assert refused(tmp_path).endswith("is a folder, not a file")
        assert refused(Path("/dev/null")).endswith("/dev/null is no file")
        assert "does not exist" in refused(Path("a\0b.py")) and "does not exist" in refused(Path("x" * 500))

    def test_a_byte_order_mark_is_no_matter(self, write):
        assert evaluated(write("a.py", "\ufeffx = 1"))[0] == {"x": 1}


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
        values, problems = evaluated(path)
        assert values == {
            "m": {"a": 1, "b": {"c": 2, "d": [3]}, "e": {"g": 2}, "n": {"o": [{"p": 1}]}},
            "n": [2],
            "k": {"l": 1},
            "other": 1,
        }
        assert problems == []

    def test_values_of_bases(self, write):
        write("a.py", "n = 10\nd = dict(s=32, p=[1])\nv = dict(d=d)")
        path = write(
            "b.py",
            "_base_ = 'a.py'\nx = {{_base_.n}}\ny = [{{ _base_.d.s }}, _base_.d['p'] + [2], _base_.v.d.p[0]]\n"
            "_base_.d.s = 64\n_base_.d.p.append(7)\nz = dict(_base_.d, s=1)",
        )
        values, problems = evaluated(path)
        assert values["x"] == 10 and values["y"] == [32, [1, 2], 1] and values["z"] == {"s": 1, "p": [1, 7]}
        assert values["d"] == values["v"]["d"] == {"s": 64, "p": [1, 7]}, "a live object, as in mmengine"
        assert problems == []

    def test_a_reference_in_quotes_is_no_reference(self, write):
        write("a.py", "n = 10")
        values, _ = evaluated(write("b.py", "_base_ = 'a.py'\nx = '{{_base_.n}}'\ny = {{_base_.z}}"))
        assert values == {"n": 10, "x": "{{_base_.n}}"}

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"a.py": "_base_ = 'b.py'", "b.py": "_base_ = 'a.py'"}, "_base_ goes in a circle: a.py -> b.py -> a.py"),
            ({"a.py": "_base_ = 'a.py'"}, "_base_ goes in a circle: a.py -> a.py"),
            ({"a.py": "\n_base_ = 'bases/moco.py'", "bases/mocov2.py": ""},
             "a.py:2: _base_: bases/moco.py does not exist; did you mean mocov2.py?"),
            ({"a.py": "_base_ = 'x'", "x/y.py": ""}, "a.py:1: _base_: x is a folder, not a file"),
            ({"a.py": "_base_ = 'x.yml'", "x.yml": ""}, "a.py:1: _base_: x.yml is no Python file"),
            ({"a.py": "_base_ = ['b.py', 'c.py']", "b.py": "x = 1", "c.py": "\nx = 2"},
             "a.py:1: _base_: x is set by two of the bases, at c.py:2 and b.py:1"),
            ({"a.py": "_base_ = 'b.py'\nm = dict(\n    n=dict(o=1))", "b.py": "m = dict(n=3)"},
             "a.py:3: m.n: a dict cannot go over the number 3, set at b.py:1; `_delete_=True` in it would replace"),
            ({"a.py": "_base_ = 'b.py'\nm = dict(o=1)", "b.py": "m = None"}, "a dict cannot go over None"),
            ({"a.py": "_base_ = 'mmdet::x/y.py'"}, "'mmdet::x/y.py' is a file of another package"),
            ({"a.py": "_base_ = 3"}, "a.py:1: _base_: expected a path or a list of paths"),
            ({"a.py": "_base_ = [f()]"}, "a.py:1: _base_: what it names cannot be evaluated here"),
            ({"a.py": "_base_ = f()"}, "a.py:1: _base_: what it names cannot be evaluated here"),
            ({"a.py": "_base_ = 'b.py'\n_base_ = 'b.py'", "b.py": ""}, "a.py:2: _base_ is set twice"),
            ({"a.py": "_base_ = 'b\\0.py'"}, "does not exist"),
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
