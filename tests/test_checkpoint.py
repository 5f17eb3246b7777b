"""Checkpoints: tensors come back to the bit, and no kill, full disk or damaged file loses a good checkpoint."""

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import small_run
from sslrun.errors import RunFailed, UsageError
from sslrun.runtime import checkpoint
from sslrun.runtime.checkpoint import (
    CheckpointConfig,
    damage,
    load,
    load_weights,
    newest_good,
    prune,
    save,
    set_aside_newer,
    sweep,
)
from sslrun.runtime.safetensors_file import require_storable, write_tensors


def example(step: int) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(300, 40, generator=generator)
    return {"model": {"weight": weight}, "optimizer": {"weight.momentum": weight * 2}}, {"step": step}


def save_example(directory: Path, step: int) -> Path:
    return save(directory, step, *example(step))


def assert_is_example(path: Path, step: int) -> None:
    tensors, state = load(path)
    expected, expected_state = example(step)
    assert state == expected_state
    for file in expected:
        assert tensors[file].keys() == expected[file].keys()
        assert all(torch.equal(tensors[file][name], expected[file][name]) for name in expected[file])


def test_any_tensor_comes_back(tmp_path):
    base = torch.randn(4, 6, 5, 3)
    given = {
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base.transpose(0, 1),
        "strided": base[::2, :, 1:],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "whole": base,
        "same storage": base,
        "part of it": base[1],
        "scalar": torch.tensor(3.25),
        "empty": torch.zeros(0, 7),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "inf": torch.tensor([float("inf"), float("nan"), -0.0]),
        "odd bytes": torch.arange(5, dtype=torch.uint8),
    }
    for name, buffer in small_run.buffers_of_every_dtype().items():
        given |= {name: buffer, f"{name}, transposed": buffer.t(), f"{name}, one row": buffer[1]}
        given |= {f"{name}, empty": buffer[:0]}
        if buffer.dtype != torch.float4_e2m1fn_x2:
            given[f"{name}, scalar"] = buffer[0, 0]
    given["conjugate"] = torch.randn(4, dtype=torch.complex128).conj()
    given["negative"] = torch.randn(4, dtype=torch.complex64).conj().imag
    tensors, state = load(save(tmp_path, 1, {"model": given, "optimizer": {}}, {"epoch": 3, "bad": ["a", 1.5, None]}))
    assert state == {"epoch": 3, "bad": ["a", 1.5, None]}
    assert tensors["optimizer"] == {} and tensors["model"].keys() == given.keys()
    for name, tensor in given.items():
        back = tensors["model"][name]
        assert back.dtype == tensor.dtype and back.shape == tensor.shape, name
        assert back.is_contiguous(), name
        assert small_run.bits(back) == small_run.bits(tensor), name


def test_every_dtype_of_torch_is_stored_or_refused_before_training(tmp_path):
    """A buffer's dtype is known before the first step, so a run does not end at its first checkpoint."""
    every = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    storable = {buffer.dtype for buffer in small_run.buffers_of_every_dtype().values()}
    for dtype in every:
        state = {"fine": torch.ones(1), "head.table": torch.empty(2, 2, dtype=dtype)}
        if dtype in storable:
            require_storable(state)
        else:
            with pytest.raises(UsageError, match=rf"'head\.table' has the dtype {dtype}: a checkpoint cannot store it"):
                require_storable(state)
    refused = {str(dtype).removeprefix("torch.").rstrip("0123456789x") for dtype in every - storable}
    assert refused == {"int", "uint", "bits", "qint", "quint"}, "only dtypes below a byte, of raw bits, or quantized"
    assert {torch.int8, torch.uint64, torch.bool, torch.bfloat16, torch.float8_e5m2, torch.complex32} <= storable
    assert len(storable) == 22
    for value, words in (
        (torch.empty((), dtype=torch.float4_e2m1fn_x2), "scalar of dtype torch.float4"),
        (torch.eye(3).to_sparse(), "the layout torch.sparse_coo"),
        ({"extra": 1}, "is a dict, not a tensor"),
    ):
        with pytest.raises(UsageError, match=words):
            require_storable({"x": value})


def test_complex64_is_plain_safetensors_and_metadata_stays(tmp_path):
    tensors = {"a": torch.randn(3, dtype=torch.complex64), "b": torch.randn(3, dtype=torch.complex128)}
    write_tensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    plain = load_file(tmp_path / "x.safetensors")
    assert torch.equal(plain["a"], tensors["a"]) and torch.equal(plain["b"], torch.view_as_real(tensors["b"]))
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    assert small_run.bits(load_weights(tmp_path / "x.safetensors")["b"]) == small_run.bits(tensors["b"])


def test_the_files_are_plain_safetensors_and_json(tmp_path):
    path = save_example(tmp_path, 1234)
    assert path == tmp_path / "step_00001234"
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert torch.equal(load_file(path / "model.safetensors")["weight"], example(1234)[0]["model"]["weight"])
    assert json.loads((path / "state.json").read_text()) == {"step": 1234}


# Counts the system calls of a save, and kills the process (SIGKILL) just before the n-th, in one fork for each n.
KILLER = """
import builtins, hashlib, os, shutil, signal, sys
sys.path.insert(0, sys.argv[2]); sys.path.insert(0, sys.argv[3])
from pathlib import Path
from sslrun.runtime import checkpoint, durable
from test_checkpoint import save_example

root = Path(sys.argv[1])
calls = []

def killing(module, name, at):
    original = getattr(module, name)
    def call(*args, **kwargs):
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(name)
        return original(*args, **kwargs)
    setattr(module, name, call)

def save_and_prune(at):
    for module, name in [(os, "mkdir"), (builtins, "open"), (hashlib, "sha256"), (os, "fsync"), (os, "rename"),
                         (os, "unlink"), (os, "rmdir")]:
        killing(module, name, at)
    save_example(root / str(at), 3)
    checkpoint.prune(root / str(at), 2)
    return calls

at = 0
while True:
    for step in (1, 2):
        save_example(root / str(at), step)
    child = os.fork()
    if child == 0:
        done = save_and_prune(at)
        (root / "calls.txt").write_text(" ".join(done))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
    at += 1
"""


def test_a_kill_at_any_point_leaves_a_good_checkpoint(tmp_path):
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLER, str(tmp_path), str(here), str(here.parent / "engine")]
    subprocess.run(command, check=True, timeout=120)
    calls = (tmp_path / "calls.txt").read_text().split()
    assert calls[0] == "mkdir" and calls.count("open") == 4 and calls.count("rename") == 2 and "rmdir" in calls
    assert calls.index("rename") > len(calls) - 1 - calls[::-1].index("open")  # renamed after the last file
    newest = []
    for at in range(len(calls) + 1):
        directory = tmp_path / str(at)
        good = newest_good(directory)
        assert good is not None
        assert_is_example(good, int(good.name[-1]))
        assert all(damage(path) is None for path in checkpoint.steps(directory).values()), (
            "a half-written checkpoint is visible"
        )
        newest.append(int(good.name[-1]))
        sweep(directory)
        assert all(path.name.removeprefix("step_").isdecimal() for path in directory.iterdir())
        save_example(directory, 4)
        prune(directory, 2)
        assert len(checkpoint.steps(directory)) == 2 and newest_good(directory).name == "step_00000004"
    assert newest == [2] * (calls.index("rename") + 1) + [3] * (len(calls) - calls.index("rename"))


def test_files_are_synced_before_the_folder_is_renamed(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def record_rename(source, target):
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    save_example(tmp_path / "checkpoints", 7)
    files = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
    assert events == [*files, "step_00000007.tmp", "rename", "checkpoints"]


def truncate(path: Path) -> None:
    os.truncate(path / "model.safetensors", 1000)


def flip_one_bit(path: Path) -> None:
    data = bytearray((path / "optimizer.safetensors").read_bytes())
    data[len(data) // 2] ^= 16
    (path / "optimizer.safetensors").write_bytes(data)


def remove_a_file(path: Path) -> None:
    (path / "model.safetensors").unlink()


def break_manifest(path: Path) -> None:
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:-20])


def empty_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"")


def manifest_of_a_list(path: Path) -> None:
    (path / "manifest.json").write_text("[1, 2]")


def no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def state_not_listed(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["state.json"]
    (path / "manifest.json").write_text(json.dumps(manifest))


def only_the_state_listed(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {"state.json": manifest["files"]["state.json"]}
    (path / "manifest.json").write_text(json.dumps(manifest))


def deep_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("[" * 100_000)


def a_pipe_as_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")


def a_pipe_as_state(path: Path) -> None:
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")


def a_pipe_as_tensors(path: Path) -> None:
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")


def files_elsewhere(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../step_00000001/state.json"] = manifest["files"]["state.json"]
    (path / "manifest.json").write_text(json.dumps(manifest))


def a_file_in_place_of_the_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a folder")


def another_checkpoints_files(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step_00000001"), path)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (truncate, "model.safetensors has 1000 bytes instead of"),
        (flip_one_bit, "optimizer.safetensors is not what was written"),
        (remove_a_file, "model.safetensors is missing"),
        (break_manifest, "manifest.json is unreadable"),
        (empty_manifest, "manifest.json is unreadable"),
        (manifest_of_a_list, "manifest.json is unreadable"),
        (no_manifest, "manifest.json is missing"),
        (state_not_listed, "does not list state.json"),
        (only_the_state_listed, "does not list model.safetensors"),
        (deep_manifest, "manifest.json is unreadable"),
        (a_pipe_as_manifest, "manifest.json is not a file"),
        (a_pipe_as_state, "state.json is not a file"),
        (a_pipe_as_tensors, "lists 'model.safetensors', which is not a file of the checkpoint"),
        (files_elsewhere, "lists '../step_00000001/state.json', which is not a file of the checkpoint"),
        (a_file_in_place_of_the_folder, "it is not a folder"),
        (another_checkpoints_files, "belongs to step 1"),
    ],
)
def test_damage_is_named_and_the_checkpoint_before_it_used(tmp_path, caplog, harm, words):
    for step in (1, 2, 3):
        save_example(tmp_path, step)
    harm(tmp_path / "step_00000003")
    with caplog.at_level(logging.WARNING):
        assert newest_good(tmp_path) == tmp_path / "step_00000002"
    assert len(caplog.records) == 1 and words in caplog.text and "step_00000003" in caplog.text
    with pytest.raises(UsageError, match=words):
        load(tmp_path / "step_00000003")


def test_another_format_is_refused(tmp_path, monkeypatch):
    path = save_example(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    assert "its format is 1, this version reads 2" in str(damage(path))


def test_no_good_checkpoint(tmp_path):
    assert newest_good(tmp_path / "not there") is None
    save_example(tmp_path, 1)
    truncate(tmp_path / "step_00000001")
    assert newest_good(tmp_path) is None
    with pytest.raises(UsageError, match="neither a checkpoint nor a run folder"):
        checkpoint.find(tmp_path)
    with pytest.raises(UsageError, match=r"manifest\.json is missing"):
        load(tmp_path)


def test_find(tmp_path):
    path = save_example(tmp_path / "checkpoints", 5)
    assert checkpoint.find(tmp_path) == checkpoint.find(tmp_path / "checkpoints") == checkpoint.find(path) == path


def test_a_damaged_checkpoint_of_the_same_step_is_replaced_a_good_one_kept(tmp_path):
    path = save_example(tmp_path, 1)
    inode = (path / "model.safetensors").stat().st_ino
    save_example(tmp_path, 1)
    assert (path / "model.safetensors").stat().st_ino == inode
    flip_one_bit(path)
    save_example(tmp_path, 1)
    assert_is_example(path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_retention(tmp_path):
    for step in range(1, 8):
        save_example(tmp_path, step * 50_000_000)  # more digits than the name pads
        prune(tmp_path, 3)
    assert list(checkpoint.steps(tmp_path)) == [250_000_000, 300_000_000, 350_000_000]
    prune(tmp_path, -1)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failed_deletion_is_a_warning_and_is_repeated_at_the_next_start(tmp_path, caplog, monkeypatch):
    for step in (1, 2):
        save_example(tmp_path, step)

    def refuse(path, *args, **kwargs):
        raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(shutil, "rmtree", refuse)
        prune(tmp_path, 1)
        sweep(tmp_path)
    assert [r.message.count("Device or resource busy") for r in caplog.records] == [1, 1]
    assert list(checkpoint.steps(tmp_path)) == [2]
    assert (tmp_path / "step_00000001.del").exists()
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000002"]


def test_a_full_disk_leaves_the_old_checkpoints_and_no_partial_one(tmp_path):
    save_example(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(RunFailed, match=r"checkpoint of step 2 could not be written .*File too large") as error:
            save_example(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    assert_is_example(newest_good(tmp_path), 1)
    save_example(tmp_path, 2)
    assert_is_example(newest_good(tmp_path), 2)


def test_a_folder_that_cannot_be_created_fails_in_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(RunFailed, match="could not be written"):
        save_example(tmp_path / "checkpoints", 1)


def test_going_back_sets_newer_checkpoints_aside(tmp_path):
    for step in (10, 20, 30):
        save_example(tmp_path, step)
    flip_one_bit(tmp_path / "step_00000030")
    set_aside_newer(tmp_path, 10)
    assert newest_good(tmp_path) == tmp_path / "step_00000010"
    assert damage(tmp_path / "step_00000020.aside") is None
    save_example(tmp_path, 20)
    set_aside_newer(tmp_path, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step_00000010",
        "step_00000020.aside",
        "step_00000030.aside",
    ]


def test_weights_alone(tmp_path):
    path = save_example(tmp_path / "checkpoints", 5)
    for place in (tmp_path, path, path / "model.safetensors"):
        weights = load_weights(place)
        assert weights.keys() == {"weight"} and torch.equal(weights["weight"], example(5)[0]["model"]["weight"])
    truncate(path)
    for place in (path, path / "model.safetensors", tmp_path / "missing.safetensors", tmp_path / "missing"):
        with pytest.raises(UsageError) as error:
            load_weights(place)
        assert str(place) in str(error.value) and "\n" not in str(error.value)


def test_when_a_checkpoint_is_due():
    by_epoch = CheckpointConfig(interval=2)
    assert [step for step in range(41) if by_epoch.is_due(step, 10)] == [20, 40]
    by_iter = CheckpointConfig(interval=15, by="iter")
    assert [step for step in range(41) if by_iter.is_due(step, 10)] == [15, 30]
    for wrong in ({"interval": 0}, {"max_keep_ckpts": 0}, {"max_keep_ckpts": -2}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            CheckpointConfig(**wrong)


METHOD = """
import torch
import small_run
from sslrun import Backbone, Loss, Method


class Buffered(Method):
    num_views = 2

    def __init__(self, backbone: Backbone, bad_dtype: str = "") -> None:
        super().__init__()
        self.backbone = backbone
        for name, buffer in small_run.buffers_of_every_dtype().items():
            self.register_buffer(name, buffer.clone())
        if bad_dtype:
            self.register_buffer("table", torch.empty(2, dtype=getattr(torch, bad_dtype)))

    def forward(self, batch, progress, targets):
        return Loss(self.backbone(batch.views[0])[-1].square().mean(), {}, {})

    def after_step(self, progress, carry):
        for name, buffer in self.named_buffers():
            if name.startswith("a_"):
                raw = buffer.view(torch.uint8)
                raw.copy_(raw.logical_not() if buffer.dtype == torch.bool else raw + 37)
"""


def test_buffers_of_every_dtype_are_resumed_to_the_bit(capsys, tmp_path, images, monkeypatch):
    (tmp_path / "buffered.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    backbone = '{ type = "ResNet", depth = 18, base_width = 4, stem = "small" }'
    model = f'[model]\ntype = "Buffered"\nbackbone = {backbone}\n'
    recipe = small_run.write_recipe(tmp_path, images, steps=3, model=model)
    recipe.write_text(f'custom_imports = ["buffered"]\n{recipe.read_text()}')
    unmonitored = ("--set", "monitor.knn_interval=0")
    small_run.train(recipe, *unmonitored, "--work-dir", str(tmp_path / "straight"))
    small_run.train(recipe, *unmonitored, "--set", "max_iters=1")
    small_run.train(recipe, *unmonitored, "--resume")
    ends = [
        checkpoint.load(tmp_path / f"{run}/small/checkpoints/step_00000003")[0]["model"] for run in ("straight", "runs")
    ]
    start = small_run.buffers_of_every_dtype()
    for name, buffer in start.items():
        straight, resumed = (small_run.bits(end[name]) for end in ends)
        assert straight == resumed, name
        assert straight != small_run.bits(buffer), f"{name} was never changed: the comparison says nothing"

    for dry in ((), ("--dry-run",)):
        words = (recipe, "--work-dir", tmp_path / "bad", "--set", "model.bad_dtype=int4", *dry)
        code, _, err = small_run.call(capsys, *words)
        assert code == 2 and "model state 'table' has the dtype torch.int4: a checkpoint cannot store it" in err
    assert not (tmp_path / "bad/small/metrics.jsonl").exists()
