"""How many heads an imported transformer has, and which networks, that look like ours, are refused."""

import json

import pytest
import tomli
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import small_run
from foreign_checkpoints import (
    MOCO_V3,
    NET,
    SMALL,
    TRANSFORMER,
    linear,
    resnet,
    rows_then_columns,
    sequential,
    transformers_resnet,
    transformers_vit,
    under,
    vit,
)
from small_run import call
from sslrun.export.architecture import shapes_of
from sslrun.export.foreign_network import built, deduce
from sslrun.nn.vit import VisionTransformer, resized_positions

# width, hidden width of the MLPs, heads: as published
PUBLISHED = {
    "Ti": (192, 768, 3),
    "S": (384, 1536, 6),
    "B": (768, 3072, 12),
    "L": (1024, 4096, 16),
    "SO400m": (1152, 4304, 16),
    "H": (1280, 5120, 16),
    "g": (1408, 6144, 16),
    "G": (1664, 8192, 16),
}


def imported(capsys, path, *words):
    """(the printed backbone table, the tensors without "backbone.", what was printed)."""
    new = path.with_name("new.safetensors")
    code, _, err = call(capsys, "import-weights", path, "-o", new, "--force", *words)
    assert code == 0, err
    (line,) = [line.strip() for line in err.splitlines() if "model.backbone" in line]
    tensors = {name.removeprefix("backbone."): tensor for name, tensor in load_file(new).items()}
    return tomli.loads(line)["model"]["backbone"], tensors, err


def refused(capsys, path, *words) -> str:
    new = path.with_name("new.safetensors")
    code, out, err = call(capsys, "import-weights", path, "-o", new, *words)
    assert (code, out) == (2, "") and not new.exists(), err
    (line,) = err.splitlines()
    return line.removeprefix("error: ")


def longhand(tensors, images, heads):
    """The class token's output of a timm transformer whose heads are torch's own."""
    width = tensors["cls_token"].shape[2]
    patch = tensors["patch_embed.proj.weight"].shape[2]
    tokens = nn.functional.conv2d(
        images, tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"], stride=patch
    )
    x = torch.cat([tensors["cls_token"].expand(len(images), -1, -1), tokens.flatten(2).transpose(1, 2)], dim=1)
    x = x + tensors["pos_embed"]

    def norm(x, name):
        return nn.functional.layer_norm(x, (width,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps=1e-6)

    for block in (f"blocks.{number}" for number in range(2) if f"blocks.{number}.norm1.weight" in tensors):
        attention = nn.MultiheadAttention(width, heads, batch_first=True)
        attention.load_state_dict({
            f"{place}{kind}": tensors[f"{block}.attn.{name}.{kind}"]
            for place, name in (("in_proj_", "qkv"), ("out_proj.", "proj"))
            for kind in ("weight", "bias")
        })  # fmt: skip
        y = norm(x, f"{block}.norm1")
        x = x + attention(y, y, y, need_weights=False)[0]
        y = norm(x, f"{block}.norm2")
        y = nn.functional.gelu(y @ tensors[f"{block}.mlp.fc1.weight"].T + tensors[f"{block}.mlp.fc1.bias"])
        x = x + y @ tensors[f"{block}.mlp.fc2.weight"].T + tensors[f"{block}.mlp.fc2.bias"]
    return norm(x, "norm")[:, 0]


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_have_their_heads(size):
    width, hidden, heads = PUBLISHED[size]
    with torch.device("meta"):
        theirs = VisionTransformer(embed_dim=width, depth=1, num_heads=1, mlp_ratio=(hidden + 0.5) / width)
    architecture = deduce(shapes_of(theirs.state_dict()))
    assert architecture.num_heads == heads
    assert shapes_of(built(architecture).state_dict()) == shapes_of(theirs.state_dict())
    assert shapes_of(theirs.state_dict())["blocks.0.mlp.fc1.weight"] == (hidden, width)


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (1280, 16)])
def test_the_imported_network_gives_their_features(capsys, tmp_path, width, heads):
    torch.manual_seed(0)
    keys = {"embed_dim": width, "depth": 1, "img_size": 16, "patch_size": 8, "mlp_ratio": 0.1}
    theirs = VisionTransformer(num_heads=1, **keys).state_dict()
    theirs = {name: tensor + 0.02 * torch.randn(tensor.shape) for name, tensor in theirs.items()}
    torch.save(theirs, tmp_path / "x.pth")
    table, tensors, err = imported(capsys, tmp_path / "x.pth")
    assert f"note: {heads} attention heads: as published transformers of width {width}" in err
    assert table.pop("type") == "VisionTransformer"
    ours, images = VisionTransformer(**table), torch.randn(2, 3, 16, 16)
    ours.load_state_dict(tensors)
    with torch.no_grad():
        expected = longhand(theirs, images, heads)
        torch.testing.assert_close(ours(images)[-1], expected, atol=1e-4, rtol=1e-4)
        assert (longhand(theirs, images, width // 32) - expected).abs().max() > 1e-3, "the number of heads matters"


def test_a_width_without_a_published_network_asks_for_heads(capsys, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(vit(embed_dim=96), path)
    assert refused(capsys, path).endswith(
        "how many attention heads this transformer of width 96 has, its weights do not tell: set --heads N"
    )
    table, _, err = imported(capsys, path, "--heads", "4")
    assert table["num_heads"] == 4 and "note: 4 attention heads: as --heads says" in err
    (tmp_path / "new.safetensors").unlink()
    assert "expected a multiple of 4 and of num_heads, 5" in refused(capsys, path, "--heads", "5")
    assert refused(capsys, path, "--heads", "0") == "--heads is 0, expected 1 or more"
    torch.save(NET, path)
    assert "--heads is for transformers, and this is a ResNet-18" in refused(capsys, path, "--heads", "3")


def test_small_transformers_with_waves_as_positions_are_told_apart_or_asked_about(capsys, tmp_path):
    """MoCo v3's small one has 12 heads; MAE's order of waves is that of our own networks too, whose heads vary."""
    path = tmp_path / "x.pth"
    for content in (MOCO_V3, {"net": {"encoder": MOCO_V3}}, {name: t.bfloat16() for name, t in MOCO_V3.items()}):
        torch.save(content, path)
        assert imported(capsys, path)[0]["num_heads" if "num_heads" in imported(capsys, path)[0] else "depth"] in (
            12,
            2,
        )
        assert imported(capsys, path)[0].get("num_heads", 12) == 12
    assert imported(capsys, path, "--heads", "6")[0]["num_heads"] == 6
    (tmp_path / "new.safetensors").unlink()
    swapped = torch.cat(rows_then_columns(4, 384).chunk(2, dim=2)[::-1], dim=2)
    torch.save({**MOCO_V3, "pos_embed": swapped}, path)
    assert "published ones of this width have 6 or 12: set --heads N" in refused(capsys, path)
    torch.save({**TRANSFORMER, "pos_embed": rows_then_columns(4, 192)}, path)
    assert "published ones of this width have 3 or 12: set --heads N" in refused(capsys, path)


def folder_of(tmp_path, tensors, config, name="model.safetensors"):
    folder = tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder / "config.json").write_text(json.dumps(config))
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name)
    return folder


VIT_CONFIG = {"model_type": "vit", "hidden_act": "gelu", "num_attention_heads": 6, "layer_norm_eps": 1e-12}
RESNET_CONFIG = {"model_type": "resnet", "hidden_act": "relu", "downsample_in_bottleneck": False}


def test_hugging_face_folders_are_read_and_their_heads_win(capsys, tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin"):
        folder = folder_of(tmp_path, transformers_vit(TRANSFORMER), VIT_CONFIG, name)
        for path in (folder, folder / name):
            table, tensors, err = imported(capsys, path)
            assert table["num_heads"] == 6 and "note: 6 attention heads: as config.json says" in err
            assert "recognized: a Hugging Face folder, vit (no prefix)" in err
            assert "note: its norms add 1e-12 to the variance, ours 1e-06" in err
            assert tensors.keys() == TRANSFORMER.keys()
            assert all(torch.equal(tensors[name], TRANSFORMER[name]) for name in TRANSFORMER)
            new = path.with_name("new.safetensors")
            new.unlink()
            assert refused(capsys, path, "--heads", "3").endswith("--heads is 3, but config.json says 6")
    theirs = transformers_resnet(NET)
    table, tensors, _ = imported(capsys, folder_of(tmp_path, theirs, RESNET_CONFIG))
    assert table["depth"] == 18 and all(torch.equal(tensors[name], NET[name]) for name in NET)
    # timm's folders
    config = {"architecture": "vit_tiny_patch8", "global_pool": "token", "model_args": {"num_heads": 12}}
    assert imported(capsys, folder_of(tmp_path, TRANSFORMER, config))[0]["num_heads"] == 12


def test_a_folder_in_several_files_is_one_network(capsys, tmp_path):
    theirs = transformers_vit(TRANSFORMER)
    folder = folder_of(tmp_path, theirs, VIT_CONFIG)
    (folder / "model.safetensors").unlink()
    names = sorted(theirs)
    weight_map = {name: f"model-{1 + place % 2}.safetensors" for place, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: theirs[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _, tensors, _ = imported(capsys, folder)
    assert all(torch.equal(tensors[name], TRANSFORMER[name]) for name in TRANSFORMER)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (transformers_vit(TRANSFORMER), {**VIT_CONFIG, "hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        (transformers_resnet(NET), {**RESNET_CONFIG, "downsample_in_bottleneck": True}, "downsample_in_bottleneck is"),
        (TRANSFORMER, {"architecture": "vit", "global_pool": "avg"}, "global_pool is 'avg' in config.json"),
        (
            {**transformers_vit(TRANSFORMER), "embeddings.register_tokens": torch.zeros(1, 4, 192)},
            VIT_CONFIG,
            "embeddings.register_tokens is part of a network that is not ours",
        ),
        (
            {**transformers_vit(TRANSFORMER), "encoder.layer.0.layer_scale1.lambda1": torch.ones(192)},
            VIT_CONFIG,
            "encoder.layer.0.layer_scale1.lambda1 is part of a network that is not ours",
        ),
        (
            {n: t for n, t in transformers_vit(TRANSFORMER).items() if not n.endswith("key.bias")},
            VIT_CONFIG,
            "encoder.layer.0.attention.attention.query.bias is part of a network that is not ours",
        ),
    ],
)
def test_folders_of_networks_that_compute_something_else_are_refused(capsys, tmp_path, tensors, config, message):
    assert message in refused(capsys, folder_of(tmp_path, tensors, config))


def test_a_folder_that_is_none_is_refused(capsys, tmp_path):
    folder = folder_of(tmp_path, {"a": torch.zeros(1)}, VIT_CONFIG)
    (folder / "model.safetensors").unlink()
    assert refused(capsys, folder).endswith("has neither model.safetensors nor pytorch_model.bin")
    (folder / "config.json").write_text("[1")
    assert "config.json cannot be read: " in refused(capsys, folder)


NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize(
    "to", ["huggingface", *(pytest.param(to, marks=NIGHTLY) for to in ("timm", "safetensors", "timm.pth"))]
)
def test_our_own_exports_are_read_with_their_heads(capsys, tmp_path, to):
    """A file of weights of a small transformer with 12 heads, which timm's and DINO's have not."""
    heads = 4 if to == "huggingface" else 12
    recipe = tmp_path / "tiny.toml"
    text = small_run.RECIPE.format(steps=1, work_dir=tmp_path, images=tmp_path).replace("size = 24", "size = 224")
    ours = f'"VisionTransformer", arch = "tiny", num_heads = {heads}'
    text = text.replace('"ResNet", depth = 18, base_width = 4, stem = "small"', ours)
    text = text.replace("in_channels = 32", "with_avg_pool = false, in_channels = 192")
    recipe.write_text(text)
    torch.manual_seed(0)
    theirs = VisionTransformer("tiny", img_size=224).state_dict()
    save_file(under("backbone.", theirs), tmp_path / "w.safetensors")
    kind, suffix = (to, "") if to == "huggingface" else ("timm", ".pth") if "." in to else (to, ".safetensors")
    out = tmp_path / f"exported{suffix}"
    code, _, err = call(capsys, "export", tmp_path / "w.safetensors", "--recipe", recipe, "--to", kind, "-o", out)
    assert code == 0, err
    table, tensors, err = imported(capsys, out)
    assert VisionTransformer(**{k: v for k, v in table.items() if k != "type"}).blocks[0].attn.heads == heads
    assert f"note: {heads} attention heads: as " in err and " says" in err
    assert all(torch.equal(tensors[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"target_encoder": under("module.", {n: t for n, t in TRANSFORMER.items() if n != "cls_token"})},
            "this vision transformer has no class token (cls_token), as that of I-JEPA",
        ),
        (
            {**{n: t for n, t in TRANSFORMER.items() if n[:5] != "norm."}, "fc_norm.weight": torch.ones(192)},
            "averages its patches and has its last norm behind that (fc_norm, global_pool",
        ),
        ({n: t for n, t in TRANSFORMER.items() if n != "pos_embed"}, "has no pos_embed: its positions are of another"),
        (
            {n.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): t for n, t in TRANSFORMER.items()},
            "the blocks of this vision transformer have no mlp.fc1, as ours have, but mlp.w12, mlp.w3",
        ),
        (
            {n: t for n, t in NET.items() if "running" not in n and "tracked" not in n},
            "bn1 of this ResNet has no running statistics: it is not a BatchNorm, as ours (a GroupNorm?)",
        ),
        (
            {n: t for n, t in NET.items() if n != "layer3.0.bn2.running_var"},
            "layer3.0.bn2 of this ResNet has no running",
        ),
        (under("backbone.", sequential(SMALL, first=2)), "has no ReLU behind its first norm"),
        (under("backbone.", sequential(resnet(), first=2)), "has no ReLU behind its first norm"),
        (under("backbone.", sequential(resnet(), first=3)), "has no max-pool behind its 7x7 convolution"),
    ],
)
def test_networks_that_compute_something_else_are_refused(capsys, tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    line = refused(capsys, tmp_path / "x.pth")
    assert message in line, line


def test_positions_are_interpolated_on_request(capsys, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({**TRANSFORMER, **linear("head")}, path)
    table, tensors, err = imported(capsys, path, "--img-size", "48")
    assert "note: its positions are interpolated from 4 x 4 patches to 6 x 6" in err
    assert table["img_size"] == 48 and torch.equal(tensors["pos_embed"], resized_positions(TRANSFORMER["pos_embed"], 6))
    VisionTransformer(**{k: v for k, v in table.items() if k != "type"}).load_state_dict(tensors)
    (tmp_path / "new.safetensors").unlink()
    assert "--img-size is 30, expected a multiple of 8 pixels" in refused(capsys, path, "--img-size", "30")
    torch.save(NET, path)
    assert "--img-size is for transformers" in refused(capsys, path, "--img-size", "32")
