"""Opening a run, weights or data that somebody else made runs none of their code."""

import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

from small_run import NAME, answer, command, environment
from sslrun.allowed_imports import import_allowed
from sslrun.export.publish import publish

EVIL = "from pathlib import Path\nPath({marker!r}).write_text('it ran')\n"


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture
def run(trained, tmp_path, marker):
    """A run as it comes from somebody else: its recipe names a module, which lies in the run folder."""
    run = Path(shutil.copytree(trained, tmp_path / "runs" / NAME))
    recipe = run / "config.toml"
    recipe.write_text('custom_imports = ["evil_module"]\n' + recipe.read_text())
    (run / "evil_module.py").write_text(EVIL.format(marker=str(marker)))
    return run


VERBS = {
    "knn": ["eval", "knn", "RUN"],
    "checkpoint": ["eval", "spectrum", "RUN/checkpoints/step_00000004"],
    "export": ["export", "RUN", "--to", "safetensors", "-o", "OUT.safetensors"],
    "preview": ["preview", "RUN/config.toml", "-o", "OUT.png"],
    "data check": ["data", "check", "RUN/config.toml"],
    "train": ["RUN/config.toml", "--work-dir", "OUT"],
    "dry run": ["RUN/config.toml", "--dry-run"],
    "overlay": ["eval", "knn", "RUN", "--with", "RUN/config.toml"],
}


def words(verb, run, out):
    return [word.replace("RUN", str(run)).replace("OUT", str(out)) for word in VERBS[verb]]


@pytest.mark.parametrize("verb", VERBS)
def test_a_module_that_a_run_names_is_not_imported(run, tmp_path, marker, verb):
    """Neither from the run folder, nor from the current folder, which may be the run folder."""
    shutil.copy(run / "evil_module.py", tmp_path)
    for folder in (run, tmp_path):
        code, printed = answer(words(verb, run, tmp_path / "out"), folder)
        assert code == 2 and printed.splitlines()[-1].endswith(
            "config.toml:1: custom_imports names evil_module, whose code would run: if you trust it, add "
            "--allow-imports evil_module"
        )
        assert not marker.exists()


@pytest.mark.parametrize("verb", ["knn", "export", "data check"])
def test_the_control_an_allowed_module_is_imported_but_not_from_the_run_folder(run, tmp_path, marker, verb):
    allowed = [*words(verb, run, tmp_path / "out"), "--allow-imports", "evil_module"]
    code, printed = answer(allowed, run)
    assert code == 2 and f"evil_module lies in the run folder {run}, from which no code is imported" in printed
    assert not marker.exists()
    shutil.copy(run / "evil_module.py", tmp_path)
    code, printed = answer(allowed, tmp_path)
    assert code == 0, printed
    assert marker.exists()


def test_publish_and_runs_need_no_module(run, tmp_path, marker):
    shutil.copy(run / "evil_module.py", tmp_path)
    for verb in (["publish", str(run)], ["runs", str(run.parent)], ["config", "print", str(run / "config.toml")]):
        assert answer(verb, tmp_path)[0] == 0
    assert not marker.exists()


def test_a_report_leaves_out_what_needs_the_module_and_says_so(run, tmp_path, marker):
    shutil.copy(run / "evil_module.py", tmp_path)
    code, printed = answer(["report", str(run)], tmp_path)
    assert code == 0 and printed.count("--allow-imports evil_module") == 1 and not marker.exists()
    page = (run / "report.html").read_text()
    assert "--allow-imports evil_module" in page and "<h2>Curves</h2>" in page
    code, printed = answer(["report", str(run), "--allow-imports", "evil_module"], tmp_path)
    assert code == 0 and "allow-imports" not in printed and marker.exists()


def test_a_folder_with_a_recipe_alone_runs_nothing_in_a_report(run, tmp_path, marker):
    """Without rows and checkpoints it is no run yet, but a report reads it."""
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    for folder in (run, tmp_path):
        shutil.copy(run / "evil_module.py", tmp_path)
        code, printed = answer(["report", str(run)], folder)
        assert code == 0 and printed.count("--allow-imports evil_module") == 1 and not marker.exists()


def test_a_project_with_files_of_these_names_is_no_run(run, tmp_path, marker):
    project = tmp_path / "project"
    (project / "checkpoints").mkdir(parents=True)
    (project / "config.toml").write_text("")
    shutil.copy(run / "evil_module.py", project)
    recipe = project / "own.toml"
    recipe.write_text((run / "config.toml").read_text())
    code, printed = answer([str(recipe), "--dry-run"], project)
    assert code == 0 and marker.exists(), printed


def test_a_recipe_reached_by_extends_counts_as_the_runs(run, tmp_path, marker):
    (run / "base.toml").write_text('custom_imports = ["evil_module"]\n')
    recipe = run / "config.toml"
    recipe.write_text('extends = "base.toml"\n' + recipe.read_text().partition("\n")[2])
    shutil.copy(run / "evil_module.py", tmp_path)
    code, printed = answer(["eval", "knn", str(run)], tmp_path)
    assert code == 2 and "base.toml:1: custom_imports names evil_module" in printed and not marker.exists()


def test_weights_with_a_recipe_of_ones_own_import_installed_modules_only(run, trained, tmp_path, marker):
    weights = publish(trained, tmp_path)
    recipe = tmp_path / "own.toml"
    recipe.write_text((run / "config.toml").read_text())
    verb = ["eval", "knn", str(weights), "--recipe", str(recipe)]
    here, installed = tmp_path / "here", tmp_path / "installed"
    for folder in (here, installed):
        folder.mkdir()
        (folder / "evil_module.py").write_text(EVIL.format(marker=str(marker)))
    code, printed = answer(verb, here)
    assert code == 2 and "own.toml:1: custom_imports names evil_module" in printed and not marker.exists()
    (here / "evil_module.py").unlink()
    code, printed = answer(["eval", "knn", str(weights), "--recipe", str(run / "config.toml")], installed)
    assert code == 2 and not marker.exists(), "the recipe of a run"
    subprocess.run(
        command(verb[0], *verb[1:]), cwd=here, env={**environment(), "PYTHONPATH": str(installed)}, check=True
    )
    assert marker.exists()


def test_a_module_named_on_the_command_line_is_imported(run, tmp_path, marker):
    shutil.copy(run / "evil_module.py", tmp_path)
    code, printed = answer(["eval", "knn", str(run), "--set", "custom_imports=['evil_module']"], tmp_path)
    assert code == 0 and marker.exists(), printed


def test_a_module_that_does_not_exist_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^cannot import no_such_module: No module named 'no_such_module'$"):
        import_allowed(["no_such_module"])


class Attack:
    """Unpickling it writes the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.write_text, (self.marker, "it ran"))


def test_pickled_weights_run_nothing(trained, tmp_path, marker):
    file, archive = tmp_path / "weights.pth", tmp_path / "plain.pth"
    torch.save({"backbone.conv1.weight": Attack(marker)}, file)
    archive.write_bytes(pickle.dumps({"state_dict": Attack(marker)}))
    recipe = str(trained.parents[1] / f"{NAME}.toml")
    for path in (file, archive):
        for verb in (
            ["eval", "knn", str(path), "--recipe", recipe],
            ["export", str(path), "--recipe", recipe, "--to", "safetensors", "-o", "out.safetensors"],
            ["import-weights", str(path), "-o", "out.safetensors"],
            [recipe, "--work-dir", str(tmp_path / "new"), "--set", f"load_from={path}"],
            [recipe, "--work-dir", str(tmp_path / "new"), f"--resume={path}"],
            [recipe, "--work-dir", str(tmp_path / "new"), "--set", f"resume_from={path}"],
        ):
            code, printed = answer(verb, tmp_path)
            assert code == 2 and printed.splitlines()[-1].startswith("error: ") and "Traceback" not in printed, verb
            assert not marker.exists(), verb
    pickle.loads(archive.read_bytes())
    assert marker.exists(), "the control: the attack works"


@pytest.mark.parametrize("kind", ["CIFAR10", "CIFAR100"])
def test_pickled_images_run_nothing(tmp_path, marker, kind):
    names = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
    for name in names if kind == "CIFAR10" else ["train", "test"]:
        (tmp_path / name).write_bytes(pickle.dumps({b"data": Attack(marker), b"labels": [0], b"fine_labels": [0]}))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"data.source = {{ type = '{kind}', data_prefix = '{tmp_path}' }}\n")
    code, printed = answer(["data", "check", str(recipe)], tmp_path)
    assert code == 2 and printed.splitlines()[-1].startswith("error: ") and "Traceback" not in printed
    assert not marker.exists()


def test_an_archive_with_members_outside_writes_nothing(tmp_path):
    """MoCo's authors call a checkpoint .tar; a real archive is no checkpoint, and nothing is unpacked."""
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    (tmp_path / "payload").write_text("payload")
    with tarfile.open(inside / "weights.tar", "w") as archive:
        archive.add(tmp_path / "payload", arcname="../escaped")
    code, printed = answer(["import-weights", str(inside / "weights.tar"), "-o", "out.safetensors"], inside)
    assert code == 2 and printed.startswith("error: ") and "Traceback" not in printed
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b"]
    assert [path.name for path in inside.iterdir()] == ["weights.tar"]
