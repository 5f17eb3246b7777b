"""Files of a run that are damaged, forged or of another form: one line and exit code 2, and whole ones are used."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from small_run import NAME, call, metrics, saved


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a finished run of 6 steps, with checkpoints at the steps 4 and 6."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / NAME))


@pytest.fixture
def resume(run, capsys, tmp_path):
    """Resumes the run: (exit code, the last line of stderr)."""

    def start():
        recipe = tmp_path / f"{NAME}.toml"
        shutil.copy(run / "config.toml", recipe)
        code, _, errors = call(capsys, recipe, "--work-dir", run.parent, "--set", "max_iters=7", "--resume")
        return code, errors.splitlines()[-1]

    return start


def sign(path: Path) -> None:
    """Makes the manifest agree with the files, as if they had been written so."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(3), "is (3,) torch.float32, backbone.bn1.bias is (4,)"),
        (torch.zeros(()), "is () torch.float32, backbone.bn1.bias is (4,)"),
    ],
)
def test_optimizer_state_of_another_shape(run, resume, value, words):
    file = saved(run, 6) / "optimizer.safetensors"
    save_file({**load_file(file), "backbone.bn1.bias/momentum_buffer": value}, file)
    sign(saved(run, 6))
    code, line = resume()
    assert (
        code == 2
        and "of another model or optimizer than the recipe's: the optimizer state does not fit: " in line
        and words in line
    )


STATES = {
    "without a step": lambda state: state.pop("step"),
    "with a word for a step": lambda state: state.update(step="6"),
    "with a negative step": lambda state: state.update(step=-4),
    "with true for a step": lambda state: state.update(step=True),
    "without samples": lambda state: state.update(num_samples=0),
    "with samples of null": lambda state: state.update(num_samples=None),
    "with a list of bad samples": lambda state: state.update(bad_samples=[]),
    "with a bad sample of a word": lambda state: state.update(bad_samples={"a": "b"}),
    "with no metrics": lambda state: state.update(step_metrics=None),
    "with metrics of words": lambda state: state.update(step_metrics={"steps": 1, "sums": {"loss": "x"}}),
    "with metrics of no rank": lambda state: state.update(step_metrics={"steps": 1, "sums": {"loss": []}}),
    "with one key more": lambda state: state.update(more=1),
}


@pytest.mark.parametrize("state", STATES)
def test_a_state_that_no_run_writes(run, resume, capsys, state):
    file = saved(run, 6) / "state.json"
    content = json.loads(file.read_text())
    STATES[state](content)
    file.write_text(json.dumps(content))
    sign(saved(run, 6))
    message = f"error: {saved(run, 6)} cannot be loaded: state.json is not the state of a run"
    assert resume() == (2, message)
    code, _, errors = call(capsys, "eval", "spectrum", run)
    assert (code, errors.strip()) == (2, message)


@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"{", b"[" * 100_000, b"\xff"])
def test_a_state_that_is_no_table(run, resume, content):
    (saved(run, 6) / "state.json").write_bytes(content)
    sign(saved(run, 6))
    code, line = resume()
    assert code == 2 and line.startswith(f"error: {saved(run, 6)} cannot be loaded: ")


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_tensors_that_are_no_safetensors(run, resume, name):
    (saved(run, 6) / f"{name}.safetensors").write_bytes(b"abc")
    sign(saved(run, 6))
    code, line = resume()
    assert code == 2 and line.startswith(f"error: {saved(run, 6)} cannot be loaded: Error while deserializing header")


def test_rows_that_no_run_writes_do_not_end_a_resume(run, resume):
    odd = ['{"step": null, "epoch": null}', "{}", "[]", '{"step": "x", "wall_s": []}', '{"wall_s": 1e999}', "5", "{"]
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n".join(odd) + "\n")
    assert resume()[0] == 0
    assert metrics(run)[-1]["step"] == 7


@pytest.mark.parametrize(
    ("record", "damaged"),
    [
        (5, "precision, micro_batch, threads"),
        ({}, "precision, micro_batch, threads"),
        ({"precision": "fp8", "micro_batch": 16, "threads": 1}, "precision"),
        ({"precision": "fp32", "micro_batch": "a", "threads": -3, "tf32": 1}, "micro_batch, threads, tf32"),
        ({"precision": ["fp32"], "micro_batch": 7, "threads": True}, "precision, micro_batch, threads"),
    ],
)
def test_choices_of_the_machine_of_another_form_are_chosen_anew(run, resume, caplog, record, damaged):
    (run / "machine.json").write_text(json.dumps({"cpu x 1": record}))
    assert resume()[0] == 0
    warned = [each.message for each in caplog.records if "machine.json" in each.message]
    assert warned == [f"machine.json records no usable {damaged}: chosen anew"]
