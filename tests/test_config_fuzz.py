"""No config causes a traceback: whatever a file or a --set contains, an error is one line and exit code 2."""

import io
import itertools
import math
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import small_run
from sslrun.cli import main
from sslrun.config import dump, load
from sslrun.config.explain import explain
from sslrun.config.node import Key, show
from sslrun.errors import UsageError
from sslrun.session import build

QUICKSTART = small_run.ROOT / "configs" / "quickstart.toml"
ASIDE = ("note: ", "drawing ", "drawn ")  # lines that may precede the output; images are drawn at first use
NIGHTLY, DAILY = 10_000, 150

# Pieces with a meaning to the parser, the merge or the references, so that cases reach all of them.
WORDS = "a b 0 1 _delete_ extends model type data.views.0 [ ] [[ ]] { } ${ ${a} ${a.b} $${ ${env:HOME} true nan -inf"
ODDITIES = '0x_f 1.5 1e999 1979-05-27 """ \'\'\' # "MoCo" \'x\' "\u00e9\\u0000" = = = . , \u00e9 \ufeff'
PIECES = st.sampled_from([*f"{WORDS} {ODDITIES}".split(" "), "9" * 400, *"\n\n\n\t\x00\x85\u2028", "\r\n"])
TEXTS = st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join))
HARSH = ["nan", "inf", "-inf", "0", "-1", "1" + "0" * 30, "1e308", "0.5", '""', '"x"', "true", "[]", "{}", "[[1]]"]


def fails_in_one_line(path: Path, overrides: list[str]) -> None:
    """Loads, prints and explains a config; the only exception may be a UsageError of one line."""
    try:
        config = load(path, overrides)
        dump(config.values)
        explain(config, "")
    except UsageError as error:
        assert str(error) and len(str(error).splitlines()) == 1, repr(str(error))


def dry_run(*words: str) -> None:
    """Asserts that the command prints a plan, or one line with exit code 2."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(QUICKSTART), "--dry-run", *words])
    told = [line for line in err.getvalue().splitlines() if not line.startswith(ASIDE)]
    assert (code, len(told)) in ((0, 0), (2, 1)), f"{words}: exit code {code}\n{err.getvalue()}"


def leaves(value: object, key: Key = ()) -> list[Key]:
    """Every key of a config whose value is no table or list."""
    if isinstance(value, dict):
        return [leaf for part, below in value.items() for leaf in leaves(below, (*key, part))]
    if isinstance(value, list):
        return [key, *(leaf for index, below in enumerate(value) for leaf in leaves(below, (*key, str(index))))]
    return [key]


def fuzz(cases: int):
    return settings(
        max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
    )


def files(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    fails_in_one_line(path, [])


def overrides(texts: list[str]) -> None:
    fails_in_one_line(QUICKSTART, texts)


def damaged_recipe(path: Path, cuts: list[tuple[int, int, str]]) -> None:
    """A shipped recipe with some parts replaced."""
    text = (small_run.ROOT / "configs/learn/swav.toml").read_text().replace('"..', f'"{small_run.ROOT}/configs')
    for place, length, piece in cuts:
        place %= len(text)
        text = text[:place] + piece + text[place + length :]
    files(path, text)


CUTS = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 30), st.one_of(PIECES, st.text(max_size=3))), max_size=4)
SETS = st.lists(st.one_of(TEXTS, st.tuples(TEXTS, TEXTS).map("=".join)), max_size=3)


@pytest.mark.parametrize("cases", [DAILY, pytest.param(NIGHTLY, marks=pytest.mark.nightly)])
class TestFuzz:
    def test_files(self, tmp_path, cases):
        fuzz(cases)(given(TEXTS)(lambda text: files(tmp_path / "x.toml", text)))()

    def test_damaged_recipes(self, tmp_path, cases):
        fuzz(cases)(given(CUTS)(lambda cuts: damaged_recipe(tmp_path / "x.toml", cuts)))()

    def test_overrides(self, tmp_path, cases):
        fuzz(cases)(given(SETS)(overrides))()


def deep(folder: Path) -> str:
    return "".join(f"[{'.'.join('a' * n)}]\n" for n in range(1, 1001))


def symlinks(folder: Path) -> str:
    (folder / "one.toml").symlink_to(folder / "two.toml")
    (folder / "two.toml").symlink_to(folder / "one.toml")
    return 'extends = "one.toml"'


def through_a_link(folder: Path) -> str:
    (folder / "me.toml").symlink_to(folder / "x.toml")
    return 'extends = "me.toml"'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed = nan", "x.toml:1: seed: expected a whole number, got the number nan"),
        ("[optimizer]\ntype = 'SGD'\nlr = nan", "x.toml:3: optimizer.lr: expected a number, got the number nan"),
        ("[optimizer]\ntype = 'SGD'\nlr = inf", "x.toml:3: optimizer.lr: expected a number, got the number inf"),
        ("[optimizer]\ntype = 'SGD'\nlr = -1e999", "x.toml:3: optimizer.lr: expected a number, got the number -inf"),
        (
            "[lr]\npolicy = 'CosineRestart'\nperiods = [1]\nrestart_weights = [inf]",
            "x.toml:4: lr.restart_weights.0: expected a number, got the number inf",
        ),
        (
            "[vars]\na = inf\n[lr]\npolicy = 'Exp'\ngamma = '${vars.a}'",
            "x.toml:5: lr.gamma: expected a number, got the number inf",
        ),
        ("seed = 1" + "0" * 30, "x.toml:1: seed: expected a whole number, got the number 1" + "0" * 30),
        ('"s\u00e9ed" = 1', 'x.toml:1: "s\u00e9ed": unknown key of Recipe; did you mean seed?'),
        (deep, "x.toml:1: tables or lists nested more than 64 deep"),
        (symlinks, "x.toml:1: extends: one.toml does not exist"),
        (through_a_link, "extends goes in a circle: x.toml -> x.toml"),
    ],
)
def test_bad_files(tmp_path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.toml").write_text(text(tmp_path) if callable(text) else text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load("x.toml")
    told = str(caught.value)
    assert expected in told and len(told.splitlines()) == 1


@pytest.mark.parametrize("norm_type", ["inf", '"inf"', "-inf", "1e999"])
def test_infinity_is_valid_only_as_a_norm(norm_type):
    """The infinity norm is the largest value; all other numbers of a recipe are finite."""
    override = f"optimizer.grad_clip={{max_norm=1.0,norm_type={norm_type}}}"
    if norm_type == "-inf":
        with pytest.raises(UsageError, match=r'norm_type: expected a number or "inf", got the number -inf$'):
            load(QUICKSTART, [override])
    else:
        assert float(build(load(QUICKSTART, [override])).optimizer.grad_clip.norm_type) == math.inf


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("model.neck.in_channels=100", "model.neck: MoCoV2Neck takes 100 channels (in_channels), but is given 192"),
        ("model.backbone.out_indices=[2]", "model.neck: MoCoV2Neck takes 192 channels (in_channels), but is given 48"),
        (
            "data.views.0.num_views=1",
            "data.views: 1 views of each image (num_views of all groups), but MoCo takes 2",
        ),
        ("global_batch=1000000000000000", "and a batch of at most 16,777,216"),
        ("model.neck.hid_channels=0", "hid_channels is 0, expected 1 or more"),
        ("model.queue_len=1000000000000000", "can't allocate memory"),
    ],
)
def test_errors_that_only_a_plan_detects(capfd, setting, expected):
    """They are detected even if nothing is left to choose, so no run starts that cannot take its first step."""
    for micro_batch in ("auto", "32"):
        words = [str(QUICKSTART), "--dry-run", "--set", setting, "--set", f"engine.micro_batch={micro_batch}"]
        assert main(words) == 2
        out, err = capfd.readouterr()  # of the process: libraries print, too
        told = [line for line in err.splitlines() if not line.startswith(ASIDE)]
        assert out == "" and len(told) == 1 and expected in told[0]


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.nightly) for part in range(1, 12))])
def test_harsh_values_for_every_key(part, tmp_path, monkeypatch):
    """Every key of a recipe is set to NaN, infinities, zero, huge numbers and wrong types, one at a time."""
    monkeypatch.chdir(small_run.ROOT)
    cases = list(itertools.product(leaves(load(QUICKSTART).values), HARSH))
    for key, value in cases[part::12]:
        dry_run("--set", f"{show(key)}={value}")
