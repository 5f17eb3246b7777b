"""Backbones are imported from foreign checkpoints to the bit; nothing in such a file is executed.

The layouts are written down here, tensor by tensor, from what those programs save.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import tomli
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import small_run
from foreign_checkpoints import CHECKPOINTS, NET, OTHER, SMALL, TRANSFORMER, linear, under
from small_run import call
from sslrun.export.foreign_file import read
from sslrun.nn.resnet import ResNet
from sslrun.nn.vit import VisionTransformer
from sslrun.runtime import checkpoint
from sslrun.runtime.safetensors_file import write_tensors


def refused(capsys, path, *words, code=2) -> str:
    new = path.with_name("new.safetensors")
    returned, out, err = call(capsys, "import-weights", path, "-o", new, *words)
    assert (returned, out) == (code, ""), err
    assert not new.exists()
    (line,) = err.splitlines()
    return line.removeprefix("error: ")


@pytest.mark.parametrize("whose", CHECKPOINTS)
def test_the_backbone_is_found(capsys, tmp_path, whose):
    content, expected, origin, table, words = CHECKPOINTS[whose]
    path, new = tmp_path / "checkpoint.pth", tmp_path / "out/new.safetensors"
    torch.save(content, path)
    code, out, err = call(capsys, "import-weights", path, "-o", new)
    assert (code, out) == (0, f"{new}\n"), err
    tensors = load_file(new)
    assert tensors.keys() == under("backbone.", expected).keys()
    assert all(torch.equal(tensors[f"backbone.{name}"], tensor) for name, tensor in expected.items())
    first, *rest = err.splitlines()
    assert first.startswith("recognized: ") and origin in first and "missing: nothing" in rest
    for word in words:
        assert word in err, err
    about = json.loads(safe_open(new, "pt").metadata()["sslrun"])
    assert table.items() <= about["backbone"].items()

    # What is printed is a backbone that takes the file, strictly.
    (line,) = [line.strip() for line in rest if "model.backbone" in line]
    keys = tomli.loads(line)["model"]["backbone"]
    backbone = {"ResNet": ResNet, "VisionTransformer": VisionTransformer}[keys.pop("type")](**keys)
    backbone.load_state_dict({name.removeprefix("backbone."): tensor for name, tensor in tensors.items()})


def test_a_run_starts_from_it(capsys, images, tmp_path):
    torch.save({**SMALL, **linear("fc")}, tmp_path / "theirs.pth")
    new = tmp_path / "new.safetensors"
    assert call(capsys, "import-weights", tmp_path / "theirs.pth", "-o", new)[0] == 0
    still = [
        "optimizer.lr=0.0",
        "model.momentum=1.0",
        "monitor.knn_interval=0",
        f"load_from={new}",
        "load_strict=false",
    ]
    overrides = [word for override in still for word in ("--set", override)]
    code, _, err = call(capsys, small_run.write_recipe(tmp_path, images, steps=1), *overrides)
    assert code == 0 and "missing" in err  # the neck, the queue
    weights = checkpoint.load(tmp_path / "runs/small/checkpoints/step_00000001")[0]["model"]
    for name in (name for name in SMALL if name.endswith("weight")):
        assert torch.equal(weights[f"backbone.{name}"], SMALL[name])
        assert torch.equal(weights[f"key_backbone.{name}"], SMALL[name])  # the teacher begins as its student


def test_files_of_the_old_format_and_safetensors_are_read(capsys, tmp_path):
    content = CHECKPOINTS["DINO transformer"][0]
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert call(capsys, "import-weights", tmp_path / "old.pth", "-o", tmp_path / "old.safetensors")[0] == 0
    save_file({**NET, **linear("fc")}, tmp_path / "theirs.safetensors")
    assert call(capsys, "import-weights", tmp_path / "theirs.safetensors", "-o", tmp_path / "new.safetensors")[0] == 0
    assert torch.equal(load_file(tmp_path / "old.safetensors")["backbone.norm.bias"], TRANSFORMER["norm.bias"])
    assert torch.equal(load_file(tmp_path / "new.safetensors")["backbone.bn1.bias"], NET["bn1.bias"])


def test_one_of_several_networks_is_chosen_by_prefix(capsys, tmp_path):
    path, new = tmp_path / "moco.pth", tmp_path / "new.safetensors"
    torch.save(CHECKPOINTS["MoCo"][0], path)
    for prefix in ("module.encoder_k", "state_dict.module.encoder_k."):
        code, _, err = call(capsys, "import-weights", path, "-o", new, "--prefix", prefix, "--force")
        assert code == 0 and "chosen by --prefix (state_dict.module.encoder_k.)" in err
        assert torch.equal(load_file(new)["backbone.conv1.weight"], OTHER["conv1.weight"])
    new.unlink()
    line = refused(capsys, path, "--prefix", "encoder")
    assert "no one network 'encoder': state_dict.module.encoder_k, state_dict.module.encoder_q" in line
    torch.save({"net_a": NET, "net_b": OTHER}, path)
    assert refused(capsys, path).endswith("holds several networks, --prefix says which: net_a, net_b")


def test_missing_tensors_are_listed(capsys, tmp_path):
    path, new = tmp_path / "x.pth", tmp_path / "new.safetensors"
    absent = ["norm.weight", "norm.bias"]
    torch.save({name: tensor for name, tensor in TRANSFORMER.items() if name not in absent}, path)
    code, _, err = call(capsys, "import-weights", path, "-o", new)
    assert code == 0 and "missing: norm.weight, norm.bias" in err.splitlines()
    assert not set(under("backbone.", dict.fromkeys(absent))) & load_file(new).keys()
    # Counters, which torch has since 0.4.1, mean nothing to a trained network.
    torch.save({name: tensor for name, tensor in NET.items() if "num_batches" not in name}, path)
    code, _, err = call(capsys, "import-weights", path, "-o", new, "--force")
    assert code == 0 and "missing: nothing" in err
    assert load_file(new)["backbone.bn1.num_batches_tracked"] == 0


def test_half_precision_becomes_single(capsys, tmp_path):
    path, new = tmp_path / "x.pth", tmp_path / "new.safetensors"
    torch.save({name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in NET.items()}, path)
    assert call(capsys, "import-weights", path, "-o", new)[0] == 0
    tensors = load_file(new)
    assert tensors["backbone.conv1.weight"].dtype == torch.float32
    assert torch.equal(tensors["backbone.conv1.weight"], NET["conv1.weight"].half().float())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**NET, "layer1.0.se.fc.weight": torch.zeros(2, 2)}, "layer1.0.se.fc.weight is part of a network that"),
        ({**TRANSFORMER, "blocks.0.ls1.gamma": torch.zeros(16)}, "blocks.0.ls1.gamma is (16,) instead of (192,)"),
        ({**TRANSFORMER, "register_tokens": torch.zeros(1, 4, 16)}, "reg_token is (1, 4, 16) instead of (1, 4, 192)"),
        ({**TRANSFORMER, "pos_embed": torch.zeros(1, 18, 192)}, "pos_embed has 18 places"),
        ({**NET, "layer2.1.bn1.running_mean": torch.zeros(16)}, "layer2.1.bn1.running_mean is (16,) instead of (8,)"),
        ({n: t for n, t in NET.items() if ".1.conv" not in n and ".1.bn" not in n}, "a ResNet of (1, 1, 1, 1) basic"),
        ({**NET, "conv1.weight": torch.zeros(4, 3, 5, 5)}, "whose first convolution is 5x5"),
        ({"features.0.weight": torch.zeros(2)}, "names are known here; its names begin like features.0.weight"),
        ({"epoch": 3}, "it holds no tensors by name"),
        ({**NET, "layer1.0.conv2.weight": torch.zeros(3)}, "layer1.0.conv2.weight is (3,) instead of"),
    ],
)  # fmt: skip
def test_other_networks_are_refused(capsys, tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    assert message in refused(capsys, tmp_path / "x.pth")


class Bomb:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("hidden", ["beside", "instead"])
def test_nothing_in_a_file_is_executed(capsys, tmp_path, monkeypatch, hidden, is_zip):
    monkeypatch.chdir(tmp_path)
    bombs = [
        Bomb((eval, ("open('exploded', 'w')",))),
        Bomb((subprocess.run, (["touch", "exploded"],))),
        Bomb((os.mkdir, ("exploded",))),
        Bomb((print, ("exploded",))),
    ]
    for bomb in bombs:
        content = {"state_dict": under("module.encoder_q.", NET), "args": bomb} if hidden == "beside" else bomb
        torch.save(content, "x.pth", _use_new_zipfile_serialization=is_zip)
        code, out, err = call(capsys, "import-weights", "x.pth", "-o", "new.safetensors", "--force")
        assert not Path("exploded").exists() and "exploded" not in out + err
        assert code in (0, 2) and "Traceback" not in err
        assert code == 2 or "not read, not executed: " in err
        assert hidden == "beside" or code == 2


def test_complex_tensors_of_our_own_files_are_complex_again(capsys, tmp_path):
    """safetensors has no complex128; such a tensor is a head's here, and one of the backbone's is refused."""
    table = torch.randn(3, 2, dtype=torch.complex128)
    path = tmp_path / "x.safetensors"
    write_tensors(path, {**NET, "head.table": table})
    assert torch.equal(read(path)[0]["head.table"], table)
    assert call(capsys, "import-weights", path, "-o", tmp_path / "other.safetensors")[0] == 0
    write_tensors(path, {**NET, "bn1.bias": torch.zeros(NET["bn1.bias"].shape, dtype=torch.complex128)})
    assert "bn1.bias does not hold plain numbers" in refused(capsys, path)


def test_a_damaged_file_is_an_error_of_one_line(capsys, tmp_path):
    path = tmp_path / "x.pth"
    for is_zip in (True, False):
        torch.save(CHECKPOINTS["MoCo"][0], path, _use_new_zipfile_serialization=is_zip)
        whole = path.read_bytes()
        for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            assert "x.pth cannot be read: it is damaged, or holds more than weights" in refused(capsys, path)
    save_file(NET, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:1000])
    assert "x.safetensors cannot be read: " in refused(capsys, tmp_path / "x.safetensors")
    assert refused(capsys, tmp_path / "none.pth").endswith("none.pth cannot be read: No such file or directory")
    assert refused(capsys, tmp_path).endswith("cannot be read: Is a directory")


def test_a_file_is_replaced_only_by_force(capsys, tmp_path):
    path, new = tmp_path / "x.pth", tmp_path / "new.safetensors"
    torch.save(NET, path)
    new.write_text("mine")
    code, _, err = call(capsys, "import-weights", path, "-o", new)
    assert code == 2 and err == f"error: {new} exists; --force replaces it\n" and new.read_text() == "mine"
    assert call(capsys, "import-weights", path, "-o", new, "--force")[0] == 0
    assert len(load_file(new)) == len(NET)
    code, _, err = call(capsys, "import-weights", path, "-o", tmp_path / "new.pth")
    assert code == 2 and "must end in .safetensors" in err
