"""Published weights: named by recipe, date and hash, safe to load, complete or absent."""

import errno
import hashlib
import os
import pickle
import re
import shutil
import time
from pathlib import Path

import pytest
import torch

from small_run import NAME, call
from sslrun.errors import UsageError
from sslrun.export.verify import same_bits
from sslrun.runtime import checkpoint


def published(capsys, *words: object) -> Path:
    code, out, err = call(capsys, "publish", *words)
    assert code == 0, err
    return Path(out.removesuffix("\n"))


def refused(capsys, *words: object, code: int = 2) -> str:
    returned, out, err = call(capsys, "publish", *words)
    assert (returned, out) == (code, ""), err
    (line,) = [line for line in err.splitlines() if "damaged" not in line or line.startswith("error: ")]
    return line


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_run_is_published(capsys, run):
    before = {path for path in run.rglob("*") if path.is_file()}
    path = published(capsys, run)
    assert {path for path in run.rglob("*") if path.is_file()} - before == {path}
    match = re.fullmatch(rf"{NAME}_(\d{{8}})-([0-9a-f]{{8}})\.pth", path.name)
    assert match and path.parent == run
    assert match[2] == hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    newest = run / "checkpoints/step_00000006"
    assert match[1] == time.strftime("%Y%m%d", time.gmtime(checkpoint.saved_at(newest)))
    weights, expected = torch.load(path, weights_only=True), checkpoint.load(newest)[0]["model"]
    assert type(weights) is dict and weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert any(name.startswith("queue") for name in weights)


def test_tensors_of_any_dtype_are_published(capsys, run, tmp_path):
    newest = run / "checkpoints/step_00000006"
    tensors, state = checkpoint.load(newest)
    values = torch.randn(2, 3, generator=torch.Generator().manual_seed(1)).abs()
    dtypes = (torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.bool, torch.uint16)
    tensors["model"] |= {f"buffer_{place}": values.to(dtype) for place, dtype in enumerate(dtypes)}
    (tmp_path / NAME).mkdir()
    checkpoint.save(tmp_path / NAME / "checkpoints", 6, tensors, state)
    weights = torch.load(published(capsys, tmp_path / NAME / "checkpoints/step_00000006"), weights_only=True)
    for place, dtype in enumerate(dtypes):
        assert same_bits(weights[f"buffer_{place}"], values.to(dtype))


def test_a_checkpoint_has_one_published_name(capsys, run, tmp_path, monkeypatch):
    first = published(capsys, run)
    data = first.read_bytes()
    assert published(capsys, run) == first and first.read_bytes() == data
    copied = Path(shutil.copytree(run, tmp_path / "elsewhere" / NAME, copy_function=shutil.copyfile))
    for path in copied.rglob("*"):
        os.utime(path, (1e9, 1e9))  # September 2001
    for zone in ("EAST-14", "WEST+12"):  # at any time of the day one of them has another date than UTC
        with monkeypatch.context() as patch:
            patch.setenv("TZ", zone)
            time.tzset()
            again = published(capsys, copied, "-o", tmp_path / "new" / zone)
        time.tzset()
        assert again.parent == tmp_path / "new" / zone
        assert (again.name, again.read_bytes()) == (first.name, data)


def test_another_checkpoint_has_another_name(capsys, run, tmp_path):
    earlier = published(capsys, run / "checkpoints/step_00000004", "-o", tmp_path)
    assert earlier.name != published(capsys, run).name
    weights, expected = torch.load(earlier, weights_only=True), checkpoint.load(run / "checkpoints/step_00000004")[0]
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected["model"].items())


def test_load_from_takes_it_and_notices_damage(capsys, trained, run, tmp_path):
    path, recipe = published(capsys, run), trained.parents[1] / f"{NAME}.toml"
    still = ["max_iters=1", "optimizer.lr=0.0", "model.momentum=1.0", "monitor.knn_interval=0", f"load_from={path}"]
    words = [recipe, *(word for override in still for word in ("--set", override)), "--work-dir", tmp_path / "tuned"]
    code, _, err = call(capsys, *words)
    assert code == 0 and f"weights from {path}; all of them fit" in err
    weights = checkpoint.load(tmp_path / "tuned" / NAME / "checkpoints/step_00000001")[0]["model"]
    expected = torch.load(path, weights_only=True)
    assert all(torch.equal(weights[name], expected[name]) for name in expected if name.endswith("weight"))

    flip(path)
    code, _, err = call(capsys, *words[:-1], tmp_path / "again")
    assert code == 2 and err.splitlines() == [
        f"error: {path} cannot be loaded: it is damaged, its SHA-256 does not begin with {path.stem[-8:]}"
    ]


def test_without_a_checkpoint(capsys, run):
    shutil.rmtree(run / "checkpoints")
    line = refused(capsys, run)
    assert line == f"error: {run} is neither a checkpoint nor a run folder with a good one"
    assert "nowhere does not exist" in refused(capsys, "nowhere")
    assert not list(run.rglob("*.pth"))


def test_a_damaged_checkpoint_is_skipped_or_refused(capsys, run):
    newest, before = run / "checkpoints/step_00000006", run / "checkpoints/step_00000004"
    flip(newest / "model.safetensors")
    code, out, err = call(capsys, "publish", run)
    assert code == 0 and "step_00000006 is damaged" in err
    assert torch.equal(
        torch.load(out.strip(), weights_only=True)["backbone.conv1.weight"],
        checkpoint.load(before)[0]["model"]["backbone.conv1.weight"],
    )
    assert "model.safetensors is not what was written" in refused(capsys, newest)
    flip(before / "state.json")
    assert "nor a run folder with a good one" in refused(capsys, run)


def test_a_checkpoint_outside_a_run_folder_has_no_name(capsys, run, tmp_path):
    lone = shutil.copytree(run / "checkpoints/step_00000006", tmp_path / "step_00000006")
    assert "is not in the checkpoints folder of a run" in refused(capsys, lone)


def test_a_failed_write_leaves_no_file(capsys, run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    assert f"{tmp_path / 'file'} cannot be written" in refused(capsys, run, "-o", tmp_path / "file")

    def full(weights, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def wrong(weights, file, save=torch.save):
        save({name: tensor + (name == "backbone.conv1.weight") for name, tensor in weights.items()}, file)

    def incomplete(weights, file, save=torch.save):
        save({name: tensor for name, tensor in weights.items() if name != "backbone.conv1.weight"}, file)

    for broken, reason in (
        (full, "could not be written: No space left on device"),
        (wrong, "did not read back as it was written (backbone.conv1.weight), and was removed"),
        (incomplete, "did not read back as it was written (other names: backbone.conv1.weight), and was removed"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", broken)
            assert reason in refused(capsys, run, "-o", tmp_path / "out", code=1)
        assert list((tmp_path / "out").iterdir()) == []


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


NO_WEIGHTS = {
    "code": pickle.dumps(Bomb(), protocol=2),
    "nothing": b"",
    "no archive": b"PK\x03\x04 and no more",
    "numbers": pickle.dumps({"epoch": 3}, protocol=2),
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_other_pth_files_are_refused_and_run_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    Path("x.pth").write_bytes(NO_WEIGHTS[kind])
    if kind == "nothing":
        reason = "it is not a file of weights$"
    else:
        reason = "it does not hold tensors by name and nothing else; .* `sslrun import-weights x.pth -o .*$"
    with pytest.raises(UsageError, match=rf"^x\.pth cannot be loaded: {reason}"):
        checkpoint.load_weights(Path("x.pth"))
    assert not Path("exploded").exists()


def test_a_missing_file_is_an_error():
    with pytest.raises(UsageError, match=r"^nowhere\.pth cannot be loaded: No such file or directory$"):
        checkpoint.load_weights(Path("nowhere.pth"))
