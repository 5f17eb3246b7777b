"""TAB completes verbs, options, recipes, keys, values, runs and names, in the shells themselves."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import small_run
from sslrun.cli import main
from terminal import Terminal


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a recipe, a run and other things."""
    (tmp_path / "mine.toml").write_text('extends = "sslrun:mocov2"\n')
    (tmp_path / "my images").mkdir()
    (tmp_path / "notes.txt").touch()
    run = tmp_path / "work_dirs/first_run"
    run.mkdir(parents=True)
    (run / "state.json").write_text("{}")
    (run / "config.toml").write_text("epochs = 3\n[model]\ntype = 'SimCLR'\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def completed(capsys, *words: str) -> list[str]:
    capsys.readouterr()
    assert main(["completion", "--words", *words]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.split("\n")[:-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["conf"], ["config"]),
        (["config", "expl"], ["explain"]),
        (["moco"], ["mocov1", "mocov2", "mocov3"]),
        (["sslrun:mocov2"], ["sslrun:mocov2"]),
        (["mi"], ["mine.toml"]),
        (["train", "mi"], ["mine.toml"]),
        (["mine.toml", "--res"], ["--resume", "--restart"]),
        (["mine.toml", "--resume", "--dr"], ["--dry-run"]),
        (["mine.toml", "--devices", ""], ["auto"]),
        (["mine.toml", "--devices=a"], ["--devices=auto"]),
        (["mine.toml", "--set", "eng"], ["engine."]),
        (["mine.toml", "--set", "engine.dev"], ["engine.device="]),
        (["mine.toml", "--set", "engine.device=c"], ["engine.device=cpu", "engine.device=cuda"]),
        (["mine.toml", "--set", "model.queue"], ["model.queue_len="]),  # of its class
        (["mine.toml", "--set=model.queue"], ["--set=model.queue_len="]),
        (["mine.toml", "--set", "data.views.0.num"], ["data.views.0.num_views="]),
        (["config", "explain", "mine.toml", "model.backbone.dep"], ["model.backbone.depth"]),
        (["eval", "kn"], ["knn"]),
        (["embed", "r", "im", "--devices", "a"], ["auto"]),
        (["eval", "knn", "work_dirs/f"], ["work_dirs/first_run"]),
        (["eval", "knn", "w"], ["work_dirs/first_run", "work_dirs/"]),
        (["report", "work_dirs/first_run", "work_dirs/"], ["work_dirs/first_run"]),
        (["export", "x", "--to", "ti"], ["timm"]),
        (["list", "bac"], ["backbones"]),
        (["list", "backbones", "Res"], ["ResNet"]),
        (["list", "recipes", "quick"], ["quickstart"]),
        (["runs", "--sort", "knn"], ["knn/top1_pct"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["data", "check", "my"], ["my images/"]),
        (["nonsense", "--set", "bro[ken"], []),
        (["mine.toml", "--set", "nowhere.x"], []),
        (["--set", ""], None),  # of no recipe: the keys at the top
        (["--rest"], ["--restart"]),
    ],
)
def test_the_candidates(capsys, here, words, expected):
    found = completed(capsys, *words)
    if expected is None:
        assert {"epochs=", "seed="} <= {*found}
    else:
        assert [each for each in found if each] == expected


def test_hidden_options_are_not_offered_and_all_others_are(capsys, here):
    found = completed(capsys, "report", "--")
    assert {"--no-images", "--help", "--allow-imports"} <= {*found} and "--no-pictures" not in found


@pytest.mark.parametrize("words", [["mine.toml", "--set", "model.backbone."], ["eval", "knn", ""], [""]])
def test_a_tab_takes_little_time(here, words):
    code = "import sys; from sslrun.cli import main; main(sys.argv[1:])\n"
    code += "assert not {'torch', 'numpy', 'tqdm'} & set(sys.modules), 'heavy imports'"
    environment = {**os.environ, "PYTHONPATH": str(small_run.ROOT / "engine")}
    command = [sys.executable, "-c", code, "completion", "--words", *words]
    before = os.times()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    after = os.times()  # of the processor: other processes take time too
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.6


# A line that a user types up to TAB, and the words that the shell then has; "X" is typed after TAB.
TYPED = [
    ("conf", ["config", "X"]),
    ("mine.toml --dry", ["mine.toml", "--dry-run", "X"]),
    ("mine.toml --set engine.dev", ["mine.toml", "--set", "engine.device=X"]),
    ("mine.toml --set engine.device=cu", ["mine.toml", "--set", "engine.device=cuda", "X"]),
    ("mine.toml --set=engine.dev", ["mine.toml", "--set=engine.device=X"]),
    ("sslrun:quick", ["sslrun:quickstart", "X"]),
    ("report work_dirs/f", ["report", "work_dirs/first_run", "X"]),
    ("data check my", ["data", "check", "my images/X"]),
]
SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], 'eval "$(sslrun completion bash)"'),
    "zsh": (["zsh", "-f", "-i"], 'bindkey -e; autoload -U compinit; compinit -u; eval "$(sslrun completion zsh)"'),
}


@pytest.fixture
def environment(here) -> dict[str, str]:
    folder = here / "bin"
    folder.mkdir()
    (folder / "sslrun").write_text(f'#!/bin/sh\nexec {sys.executable} -m sslrun "$@"\n')
    (folder / "sslrun").chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(small_run.ROOT / "engine"),
        "HOME": str(here),
        "TERM": "dumb",
        "LC_ALL": "C.UTF-8",
    }


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"needs {shell}")


@pytest.mark.parametrize("shell", [pytest.param(name, marks=needs(name)) for name in SHELLS])
def test_tab_in_the_shell(here, environment, shell):
    command, setup = SHELLS[shell]
    terminal = Terminal(command, 200, environment, cwd=here)
    try:
        terminal.press(f"{setup}; PS1='$ '; show() {{ printf '<%s>' \"$@\"; echo; }}; show ready\n")
        terminal.read(lambda: "<ready>" in terminal.text, timeout_s=120)
        for typed, words in TYPED:
            place = len(terminal.text)
            terminal.press(f"sslrun {typed}\t")
            terminal.press("X\x01show \n")  # at the beginning of the line: what are its words?
            terminal.read(lambda place=place: re.search(r"<sslrun>.*>\r\n", terminal.text[place:]), timeout_s=60)
            (shown,) = re.findall(r"<(sslrun>.*)>\r\n", terminal.text[place:])
            assert shown.split("><") == ["sslrun", *words], typed
    finally:
        terminal.close()


@needs("fish")
def test_tab_in_fish(here, environment):
    lines = [f"echo \"> $(string join ' ' -- (complete -C 'sslrun {typed}'))\"" for typed, _ in TYPED[:-1]]
    script = "\n".join(["sslrun completion fish | source", *lines])
    done = subprocess.run(["fish", "--no-config", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "> config",
        "> --dry-run",
        "> engine.device=",
        "> engine.device=cuda",
        "> --set=engine.device=",
        "> sslrun:quickstart",
        "> work_dirs/first_run",
    ], done.stderr


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_each_script_says_where_it_goes(capsys, name):
    assert main(["completion", name]) == 0
    assert f"sslrun completion {name}" in capsys.readouterr().out.split("\n", 3)[1 if name == "zsh" else 0]
