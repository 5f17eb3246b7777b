"""sslrun away from its checkout: recipes by name, commands that exist where the user stands, and the wheel."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from small_run import ROOT, call
from sslrun.config import load, recipes
from sslrun.errors import UsageError
from sslrun.started import program


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path / "empty"


def test_every_recipe_has_a_name_that_loads_anywhere_and_a_description(elsewhere, capsys):
    names = list(recipes.names())
    files = {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in (ROOT / "configs").rglob("*.toml")}
    assert set(names) == {name for name in files if not name.startswith("_base_")} and len(names) == len(set(names))
    assert names[0] == "barlowtwins" and names.index("swav") < names.index("learn/swav")
    for name in (name for name in names if not name.startswith("benchmarks/")):
        assert load(f"sslrun:{name}").path == recipes.FOLDER / f"{name}.toml"
    listed = json.loads(call(capsys, "list", "recipes", "--json")[1])
    assert [row["name"] for row in listed] == names and all(len(row["description"]) > 20 for row in listed)
    assert "  mocov2\n" in call(capsys, "list", "recipes")[1]
    assert call(capsys, "list", "recipes", "quickstart")[1] == (ROOT / "configs/quickstart.toml").read_text()


def test_a_shipped_recipe_is_extended_overlaid_and_started_by_name(elsewhere, capsys):
    Path("mine.toml").write_text('extends = ["sslrun:_base_/models/mocov2", "sslrun:quickstart.toml"]\nseed = 7\n')
    assert load("mine.toml").values == load(ROOT / "configs/quickstart.toml").values | {"seed": 7}
    overlaid = load("quickstart", overlays=["sslrun:benchmarks/linear_8xb32-steplr-100e_in1k"])
    assert overlaid.name == "quickstart" and overlaid.values["eval"]["linear"]["epochs"] == 100
    assert call(capsys, "config", "print", "sslrun:mocov2")[1] == call(capsys, "config", "print", "mocov2")[1]
    os.mkdir("mocov2")
    assert load("mocov2").name.startswith("mocov2_resnet50"), "a folder is no recipe"
    Path("simclr").write_text("seed = 5\n")
    with pytest.raises(UsageError, match=r"simclr:1: model is missing"):
        load("simclr")  # a file of the name comes first
    code, out, _ = call(capsys, "quickstart", "--dry-run")
    assert code == 0 and out.startswith("quickstart\n")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("sslrun:mocv2", "sslrun:mocv2: no recipe of this name ships with sslrun; did you mean mocov2"),
        ("mocv2", "mocv2: No such file or directory; did you mean mocov2"),
        ("configs/mocov2.toml", "configs/mocov2.toml: No such file or directory; sslrun:mocov2 ships with sslrun"),
        ("sslrun:../configs/mocov2", "no recipe of this name"),
        ("sslrun:", "no recipe of this name"),
        ("bad.toml", "bad.toml:1: extends: sslrun:mocv2: no recipe of this name"),
        ("old.toml", "old.toml:1: extends: configs/mocov2.toml does not exist; sslrun:mocov2 ships with sslrun"),
    ],
)
def test_a_name_that_no_recipe_has_is_answered_with_the_nearest(elsewhere, capsys, word, expected):
    Path("bad.toml").write_text('extends = "sslrun:mocv2"\n')
    Path("old.toml").write_text('extends = "configs/mocov2.toml"\n')
    code, _, err = call(capsys, "config", "print", word)
    assert code == 2 and expected in err and len(err.splitlines()) == 1


def test_commands_name_the_program_as_the_user_can_type_it(tmp_path, monkeypatch):
    for name in ("venv/bin", "check out/bin"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "sslrun").write_text("#!/bin/sh\n")
        (tmp_path / name / "sslrun").chmod(0o755)
    installed, own = tmp_path / "venv/bin/sslrun", tmp_path / "check out/bin/sslrun"
    for folder, started, path, expected in (
        (tmp_path, installed, installed.parent, "sslrun"),
        (tmp_path, installed, "/nowhere", "venv/bin/sslrun"),
        (own.parent, installed, "/nowhere", str(installed)),
        (own.parents[1], own, installed.parent, "bin/sslrun"),
        (own.parent, "sslrun", installed.parent, "./sslrun"),
        (tmp_path, own, installed.parent, "'check out/bin/sslrun'"),
        (tmp_path, tmp_path / "sslrun/__main__.py", installed.parent, "sslrun"),
    ):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PATH", str(path))
        monkeypatch.setattr(sys, "argv", [str(started)])
        assert program() == expected


@pytest.mark.parametrize(
    "entry",
    [
        "from sslrun.cli import start; start()",
        "import runpy; runpy.run_module('sslrun', run_name='__main__')",
        f"import runpy; runpy.run_path({str(ROOT / 'bin/sslrun')!r}, run_name='__main__')",
        "import sslrun; sslrun.train('sslrun:mocov2')",
        "from sslrun import Method",
    ],
    ids=["installed script", "python -m sslrun", "bin/sslrun", "the Python API", "a user's own component"],
)
def test_every_entry_limits_spinning_before_torch_is_imported(tmp_path, entry):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(
        "import os, sys\nprint(os.environ['GOMP_SPINCOUNT'], flush=True)\nos._exit(0)\n"
    )
    roots = [str(tmp_path), str(ROOT / "engine"), str(ROOT / "kernels")]
    code = f"import sys; sys.argv = ['sslrun', 'quickstart', '--dry-run']; {entry}"
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    for own, expected in (({}, "4000\n"), ({"GOMP_SPINCOUNT": "7"}, "7\n")):
        environment |= {"PYTHONPATH": os.pathsep.join(roots)} | own
        assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout == (
            expected
        )


PARTS = ("sslrun", "sslkernels", "sslrun.data.masks", "sslrun.methods.mae", "sslrun.report.html")


@pytest.mark.nightly
def test_the_wheel_trains_and_reports_from_an_empty_folder(tmp_path, images, elsewhere):
    """The wheel alone: its files are unpacked beside the dependencies, and nothing of the checkout is on the path."""
    copy = tmp_path / "checkout"
    left_out = {".git", ".venv", ".venv-peers", "build", "work_dirs", "data"}
    shutil.copytree(ROOT, copy, symlinks=True, ignore=lambda folder, _: left_out if Path(folder) == ROOT else set())
    has_setuptools = find_spec("setuptools") and int(metadata.version("setuptools").partition(".")[0]) >= 77
    isolation = ["--no-build-isolation"] if has_setuptools else []
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", *isolation, "-q", "-w", str(tmp_path), str(copy)]
    subprocess.run(pip, check=True, timeout=600)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    shutil.rmtree(copy)
    script = tmp_path / "bin/sslrun"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nfrom sslrun.cli import start\nstart()\n")
    script.chmod(0o755)
    environment = os.environ | {
        "PYTHONPATH": str(site),
        "PATH": f"{script.parent}:{os.environ['PATH']}",
        "SSLRUN_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }

    def run(*words: str) -> str:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    where = run(sys.executable, "-c", f"import {', '.join(PARTS)}; print({', '.join(f'{p}.__file__' for p in PARTS)})")
    assert where.count(str(site)) == len(PARTS), where  # and not those of the checkout that is installed as editable
    recipe = """
        extends = "sslrun:quickstart"
        epochs = 1
        global_batch = 8
        model.queue_len = 8
        monitor._delete_ = true
        [data]
        _delete_ = ["holdout"]
        samples_per_gpu = 4
        source = { _delete_ = true, type = "ImageFolder", data_prefix = "IMAGES" }
        """
    Path("mine.toml").write_text(textwrap.dedent(recipe).replace("IMAGES", str(images)))
    schema = Path(run("sslrun", "config", "schema", "--editor").rstrip())
    assert schema.is_file() and schema.is_relative_to(site)
    assert run("sslrun", "completion", "--words", "quicks") == "quickstart\n"
    assert "on 2 x cpu" in run("sslrun", "mine.toml", "--devices", "2", "--set", "engine.device=cpu")
    shutil.rmtree("work_dirs")
    advice = run("sslrun", "mine.toml")
    assert "look at it:         sslrun report work_dirs/mine" in advice
    assert list((tmp_path / "cache").glob("pixels-*.so")), "pixels.c came with the wheel"
    assert "report.html" in run("sslrun", "report", "work_dirs/mine")
    run(sys.executable, "-m", "sslrun", "mocov2", "--dry-run")
