"""`load_from`: what a new run takes from weights that are not quite its own, and which it refuses."""

import argparse
import logging
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import small_run
from foreign_checkpoints import linear, mmselfsup_vit, resnet, under, vit
from small_run import call
from sslrun.config import load
from sslrun.contract import Progress
from sslrun.errors import UsageError
from sslrun.initial_weights import filters_of, load_initial_weights
from sslrun.nn.vit import resized_positions
from sslrun.runtime.executor import LocalExecutor
from sslrun.session import build

START = Progress(0, 1, 1, 0)
VIT = """
[model]
type = "MoCo"
queue_len = 40
feat_dim = 8
backbone = { type = "VisionTransformer", arch = "tiny", depth = 2, num_heads = 3, img_size = 32, patch_size = 8 }
neck = { type = "MoCoV2Neck", in_channels = 192, hid_channels = 16, out_channels = 8, with_avg_pool = false }
head = { type = "ContrastiveHead", temperature = 0.2 }
"""

FIVE_CHANNELS = """
[model]
type = "MoCo"
queue_len = 40
feat_dim = 8
backbone = { type = "ResNet", depth = 18, base_width = 4, stem = "small", in_channels = 5 }
neck = { type = "MoCoV2Neck", in_channels = 32, hid_channels = 16, out_channels = 8 }
head = { type = "ContrastiveHead", temperature = 0.2 }
"""


@pytest.fixture
def executor(tmp_path):
    def make(model: str | None = None) -> LocalExecutor:
        recipe = build(load(small_run.write_recipe(tmp_path, tmp_path, model=model)))
        optimizer = recipe.optimizer.create(recipe.model.named_parameters())
        return LocalExecutor(recipe.model, optimizer, device=torch.device("cpu"))

    return make


def refusal(executor, path, is_strict=False) -> str:
    """The one line of the error; the model must be as it was."""
    before = executor.full_state()
    with pytest.raises(UsageError) as refused:
        load_initial_weights(executor, path, is_strict, START)
    assert all(torch.equal(before[name], tensor) for name, tensor in executor.full_state().items())
    (line,) = str(refused.value).splitlines()
    return line


def test_a_whole_backbone_is_taken_and_the_rest_is_counted(executor, tmp_path, caplog):
    """Neck, head and queue are missing in weights of a backbone: this is not worth a warning."""
    net = resnet(stem="small")
    save_file(under("backbone.", net), tmp_path / "w.safetensors")
    ours = executor()
    with caplog.at_level(logging.INFO, logger="sslrun"):
        load_initial_weights(ours, tmp_path / "w.safetensors", False, START)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert f"weights from {tmp_path / 'w.safetensors'}; 10 missing (neck." in record.message
    state = ours.full_state()
    assert all(torch.equal(state[f"backbone.{name}"], tensor) for name, tensor in net.items())
    assert all(torch.equal(state[f"key_backbone.{name}"], tensor) for name, tensor in net.items())


def test_weights_that_fill_little_of_the_backbone_are_refused_and_most_of_it_is_a_warning(executor, tmp_path, caplog):
    ours = executor()
    sizes = {name: shape.numel() for name, shape in ours.shapes().items() if name.startswith("backbone.")}
    net, path = under("backbone.", resnet(stem="small")), tmp_path / "w.pth"
    last = {name for name in net if name.startswith("backbone.layer4.")}
    of_last = sum(sizes[name] for name in last) / sum(sizes.values())
    assert 0.5 < of_last < 0.9
    torch.save({name: net[name] for name in net if name not in last}, path)
    line = refusal(ours, path)
    assert f"w.pth fills {100 * (1 - of_last):.0f} % of the backbone, of which load_from must fill 50 %" in line
    torch.save({name: net[name] for name in last}, path)
    load_initial_weights(ours, path, False, START)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{path}; {100 * of_last:.0f} % of the backbone is filled; " in record.message
    assert " missing (backbone.conv1.weight, " in record.message
    assert torch.equal(ours.full_state()["backbone.layer4.0.conv1.weight"], net["backbone.layer4.0.conv1.weight"])


def test_a_tensor_of_another_shape_is_a_warning(executor, tmp_path, caplog):
    net, path = under("backbone.", resnet(stem="small")), tmp_path / "w.pth"
    torch.save({**net, "neck.mlp.2.weight": torch.zeros(9, 16)}, path)
    load_initial_weights(executor(), path, False, START)
    (record,) = caplog.records
    assert (
        record.levelno == logging.WARNING
        and "2 of another shape (neck.mlp.2.weight, key_neck.mlp.2.weight)" in record.message
    )


@pytest.mark.parametrize("is_strict", [True, False])
def test_weights_of_another_project_name_import_weights(executor, tmp_path, is_strict):
    """Wrapped in a checkpoint, or tensors by other names; whatever the file is called."""
    net, transformer = resnet(stem="small"), vit()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(net, folder / "model.safetensors")
    contents = {
        "vissl.torch": {"classy_state_dict": {"base_model": {"model": {"trunk": under("_feature_blocks.", net)}}}},
        "dino.pth": {"teacher": under("backbone.", net), "args": argparse.Namespace(a=1), "epoch": 3},
        "moco.pth.tar": {"state_dict": under("module.encoder_q.", net), "epoch": 200},
        "lightly.ckpt": {"state_dict": under("backbone.", net), "pytorch-lightning_version": "2.1.0"},
        "torchvision.pth": {**net, **linear("fc")},
        "timm.bin": transformer,
        "mmselfsup.pth": {"meta": {}, "state_dict": under("backbone.", mmselfsup_vit(transformer))},
        "compiled.pth": under("_orig_mod.", net),
    }
    ours = executor()
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
        line = refusal(ours, tmp_path / name, is_strict)
        assert f"`sslrun import-weights {tmp_path / name} -o NEW.safetensors`" in line, line
    torch.save(contents["dino.pth"], tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for path in (tmp_path / "old.pth", folder, folder / "model.safetensors"):
        assert f"`sslrun import-weights {path} -o" in refusal(ours, path, is_strict)


def test_a_file_that_is_no_checkpoint_says_so(executor, tmp_path):
    ours = executor()
    for name in ("cat.jpg", "w.pth", "w.ckpt"):
        for content in (b"", b"\xff\xd8\xff\xe0\x00\x10JFIF", b"hello\n"):
            (tmp_path / name).write_bytes(content)
            line = refusal(ours, tmp_path / name)
            assert line == f"{tmp_path / name} cannot be loaded: it is not a file of weights"
    assert "nowhere does not exist" in refusal(ours, tmp_path / "nowhere")


def test_strict_weights_that_almost_fit_name_the_other_key(executor, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(under("backbone.", resnet(stem="small")), path)
    line = refusal(executor(), path, is_strict=True)
    assert "does not fit the model: " in line and line.endswith("load_strict = false takes the weights that fit")


def test_the_command_stops_before_the_first_step(capsys, images, tmp_path):
    torch.save({"_orig_mod.conv1.weight": torch.zeros(16, 3, 3, 3)}, tmp_path / "w.pth")
    words = ["--set", f"load_from={tmp_path / 'w.pth'}", "--set", "load_strict=false"]
    code, _, err = call(capsys, small_run.write_recipe(tmp_path, images, steps=1), *words)
    assert code == 2 and "w.pth fills 0 % of the backbone" in err and "Traceback" not in err
    assert not (tmp_path / "runs/small/metrics.jsonl").exists()


def cubic(distance: float) -> float:
    """Keys' kernel of 1981 with a = -0.75."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def interpolated(patches: np.ndarray, new: int) -> np.ndarray:
    """(g, g, D) at the centers of new x new cells; beyond the edge lies the edge."""
    old = len(patches)
    weights = np.zeros((new, old))
    for i in range(new):
        center = (i + 0.5) * old / new - 0.5
        for place in range(math.floor(center) - 1, math.floor(center) + 3):
            weights[i, min(max(place, 0), old - 1)] += cubic(center - place)
    return np.einsum("ia,jb,abd->ijd", weights, weights, patches)


@pytest.mark.parametrize(("old", "new"), [(4, 2), (2, 4), (3, 7), (14, 9)])
def test_positions_are_interpolated_bicubically_and_the_class_token_keeps_its_own(old, new):
    torch.manual_seed(0)
    positions = torch.randn(1, 1 + old**2, 12)
    resized = resized_positions(positions, new)
    assert torch.equal(resized[0, 0], positions[0, 0])
    expected = interpolated(positions[0, 1:].double().numpy().reshape(old, old, 12), new).reshape(-1, 12)
    torch.testing.assert_close(resized[0, 1:], torch.from_numpy(expected).float())


def test_positions_of_another_image_size_are_interpolated_and_said(executor, tmp_path, caplog):
    theirs, path = vit(img_size=64, mlp_ratio=4.0), tmp_path / "w.pth"
    torch.save(under("backbone.", theirs), path)
    ours = executor(VIT)
    with caplog.at_level(logging.INFO, logger="sslrun"):
        load_initial_weights(ours, path, False, START)
    first, second = caplog.messages
    assert first == "backbone.pos_embed is interpolated from 8 x 8 patches to 4 x 4 (img_size = 32)"
    assert second.startswith(f"weights from {path}; 10 missing (neck.")
    state, expected = ours.full_state(), resized_positions(theirs["pos_embed"], 4)
    for place in ("backbone", "key_backbone"):
        assert torch.equal(state[f"{place}.pos_embed"], expected)
        assert torch.equal(state[f"{place}.cls_token"], theirs["cls_token"])
    # One side of the images, two numbers of patches: a table that is no square stays out, and so does another width.
    for shape in ((1, 1 + 15, 192), (1, 1 + 64, 96)):
        torch.save(under("backbone.", {**theirs, "pos_embed": torch.zeros(shape)}), path)
        caplog.clear()
        load_initial_weights(ours, path, False, START)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING and "of another shape (backbone.pos_embed" in record.message
    torch.save({name: tensor.clone() for name, tensor in state.items()} | under("backbone.", theirs), path)
    assert "1 of another shape (backbone.pos_embed); load_strict = false" in refusal(ours, path, is_strict=True)


@pytest.mark.parametrize(("channels", "wanted"), [
    (1, [[2.0 * 3]]), (2, [[2.0 * 3 / 2] * 2]), (4, [[1 * 0.75, 2 * 0.75, 3 * 0.75, 2 * 0.75]]),
])  # fmt: skip
def test_filters_for_another_number_of_channels(channels, wanted):
    filters = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(filters_of(filters, channels).flatten(1), torch.tensor(wanted))
    filters, gray = torch.randn(5, 3, 4, 4), torch.randn(2, 1, 4, 4)
    both = (filters, filters_of(filters, channels))
    old, new = (torch.nn.functional.conv2d(gray.expand(-1, each.shape[1], -1, -1), each) for each in both)
    torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ResNet", "VisionTransformer"])
def test_the_first_convolution_is_made_for_the_models_channels_and_said(executor, tmp_path, caplog, kind):
    is_vit = kind == "VisionTransformer"
    theirs, path = vit(mlp_ratio=4.0) if is_vit else resnet(stem="small"), tmp_path / "w.pth"
    first = "patch_embed.proj.weight" if is_vit else "conv1.weight"
    torch.save(under("backbone.", theirs), path)
    ours = executor(VIT.replace("patch_size = 8", "patch_size = 8, in_channels = 5") if is_vit else FIVE_CHANNELS)
    with caplog.at_level(logging.INFO, logger="sslrun"):
        load_initial_weights(ours, path, False, START)
    line, rest = caplog.messages
    assert line == f"backbone.{first} is made for 5 channels instead of 3" and "of another shape" not in rest
    state = ours.full_state()
    for place in ("backbone", "key_backbone"):
        assert torch.equal(state[f"{place}.{first}"], filters_of(theirs[first], 5))
    torch.save({name: tensor.clone() for name, tensor in state.items()} | under("backbone.", theirs), path)
    assert f"1 of another shape (backbone.{first}); load_strict = false" in refusal(ours, path, is_strict=True)


DINOV3 = """
[model]
type = "DINOv3"
koleo_group = 2
{gram}
neck = {{ type = "DINONeck", in_channels = 24, hid_channels = 8, out_channels = 6 }}
head = {{ type = "DINOHead", feat_dim = 6, num_prototypes = 12 }}
patch_neck = "${{model.neck}}"
patch_head = "${{model.head}}"

[model.backbone]
type = "VisionTransformer"
embed_dim = 24
depth = 2
num_heads = 3
img_size = 32
patch_size = 8
positions = "rotary"
mask_token = true
patch_tokens = true
"""


def test_the_anchor_of_a_later_stage_is_the_teacher_of_the_weights(executor, tmp_path):
    first = executor(DINOV3.format(gram="")).full_state()
    moved = {name: tensor + 1 if name.startswith("teacher_backbone.") else tensor for name, tensor in first.items()}
    save_file(moved, tmp_path / "stage.safetensors")
    second = executor(DINOV3.format(gram="gram_weight = 2.0"))
    load_initial_weights(second, tmp_path / "stage.safetensors", False, START)
    state = second.full_state()
    anchor = [name for name in state if name.startswith("gram_backbone.")]
    assert len(anchor) == len([name for name in first if name.startswith("backbone.")])
    for name in anchor:
        assert torch.equal(state[name], moved[name.replace("gram_", "teacher_", 1)]), name
    backbone = {name: tensor for name, tensor in first.items() if name.startswith("backbone.")}
    save_file(backbone, tmp_path / "backbone.safetensors")
    load_initial_weights(second, tmp_path / "backbone.safetensors", False, START)
    state = second.full_state()
    for name, tensor in backbone.items():
        assert torch.equal(state[f"gram_{name}"], tensor) and torch.equal(state[f"teacher_{name}"], tensor), name
