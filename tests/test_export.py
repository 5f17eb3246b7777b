"""An exported encoder has the published names, and gives our outputs in a forward pass that is written out here."""

import errno
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from small_run import NAME, call
from sslrun.config import load
from sslrun.errors import RunFailed, UsageError
from sslrun.export import library_shapes
from sslrun.export.architecture import architecture_of, shapes_of
from sslrun.export.encoder import Encoder, encoder_of
from sslrun.export.export import export
from sslrun.export.foreign_network import built, deduce
from sslrun.export.preprocessing import Preprocessing, preprocessing_of
from sslrun.export.verify import difference, same_bits
from sslrun.nn.norm import BN
from sslrun.nn.resnet import ResNet
from sslrun.nn.sobel import Sobel
from sslrun.nn.vit import VisionTransformer
from sslrun.recipe import Recipe
from sslrun.runtime.safetensors_file import read_tensors
from sslrun.saved import open_saved

LIBRARIES = json.loads((Path(__file__).parent / "library_shapes.json").read_text())
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ABOUT = {"recipe": "r", "method": "MoCo", "backbone": {}, "weights": "step_7", "step": 7, "epoch": 0.5, "sslrun": "1"}


def network(cls: type[nn.Module], **arguments) -> tuple[nn.Module, dict]:
    """A backbone and the `[model.backbone]` table that builds it."""
    return cls(**arguments), {"type": cls.__name__, **arguments}


def resnet(depth: int, **arguments) -> tuple[nn.Module, dict]:
    return network(ResNet, depth=depth, **arguments)


def transformer(**arguments) -> tuple[nn.Module, dict]:
    return network(VisionTransformer, **arguments)


def sobel(**arguments) -> tuple[nn.Module, dict]:
    return network(Sobel, backbone=ResNet(18, in_channels=2, **arguments))


def encoder(built: tuple[nn.Module, dict], size: int = 32) -> Encoder:
    """An encoder whose weights and statistics all differ from their initial values."""
    backbone, table = built
    generator = torch.Generator().manual_seed(5)
    for name, tensor in backbone.state_dict().items():
        if tensor.dim() > 1:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * math.sqrt(2 / tensor[0].numel()))
        elif tensor.dim() == 1:
            low = -0.5 if name.endswith(("bias", "mean")) else 0.5
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    preprocessing = Preprocessing((size, size), round(size * 8 / 7), "bilinear", *IMAGENET)
    return Encoder(backbone.eval(), architecture_of(table), preprocessing, ABOUT)


def refused(capsys, *words, code=2) -> str:
    returned, out, err = call(capsys, *words)
    assert (returned, out) == (code, ""), err
    (line,) = err.splitlines()
    return line.removeprefix("error: ")


def digest(shapes) -> dict:
    """A digest of names and shapes in any order."""
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return {"tensors": len(lines), "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]}


# --- networks written down by the names in their files ---------------------------------------------------------------


def conv_bn(x, t, conv, norm, stride=1):
    weight = t[f"{conv}.weight"]
    groups = x.shape[1] // weight.shape[1]
    x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
    mean, var, scale, shift = (t[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
    return (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt() * scale[:, None, None] + shift[:, None, None]


def resnet_by_torchvision(x, t):
    x = F.max_pool2d(conv_bn(x, t, "conv1", "bn1", 2).relu(), 3, 2, 1)
    for stage in range(1, 5):
        for block in range(sum(name.startswith(f"layer{stage}.") and name.endswith("conv1.weight") for name in t)):
            p, stride, shortcut = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1, x
            if f"{p}.downsample.0.weight" in t:
                shortcut = conv_bn(x, t, f"{p}.downsample.0", f"{p}.downsample.1", stride)
            strides = (1, stride, 1) if f"{p}.conv3.weight" in t else (stride, 1)
            for number, step in enumerate(strides, start=1):
                x = conv_bn(x, t, f"{p}.conv{number}", f"{p}.bn{number}", step)
                x = x.relu() if number < len(strides) else (x + shortcut).relu()
    return x.mean((2, 3))


def resnet_by_transformers(x, t, config):
    def layer(x, prefix, stride=1):
        return conv_bn(x, t, f"{prefix}.convolution", f"{prefix}.normalization", stride)

    x = F.max_pool2d(layer(x, "embedder.embedder", 2).relu(), 3, 2, 1)
    for stage, blocks in enumerate(config["depths"]):
        for block in range(blocks):
            p, stride, shortcut = f"encoder.stages.{stage}.layers.{block}", 1 if stage == 0 or block else 2, x
            if f"{p}.shortcut.convolution.weight" in t:
                shortcut = layer(x, f"{p}.shortcut", stride)
            if config["layer_type"] == "basic":
                x = layer(layer(x, f"{p}.layer.0", stride).relu(), f"{p}.layer.1")
            else:
                x = layer(layer(layer(x, f"{p}.layer.0").relu(), f"{p}.layer.1", stride).relu(), f"{p}.layer.2")
            x = (x + shortcut).relu()
    return x.mean((2, 3))


def vit(x, t, heads, names):
    """`names` maps parts to names; "block" has a {} for its number, and precedes the names of parts in a block."""

    def affine(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    patches = t[f"{names['patch']}.weight"]
    x = F.conv2d(x, patches, t[f"{names['patch']}.bias"], stride=patches.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([t[names["class"]].expand(len(x), -1, -1), x], 1) + t[names["position"]]
    for block in range(len({n for n in t if n.endswith(f"{names['norm1']}.weight")})):
        p = names["block"].format(block)
        y = norm(x, p + names["norm1"])
        if "qkv" in names:
            q, k, v = affine(y, p + names["qkv"]).chunk(3, -1)
        else:
            q, k, v = (affine(y, p + names[part]) for part in ("query", "key", "value"))
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        y = ((q @ k.transpose(2, 3)) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + affine(y.transpose(1, 2).flatten(2), p + names["out"])
        x = x + affine(F.gelu(affine(norm(x, p + names["norm2"]), p + names["fc1"])), p + names["fc2"])
    return norm(x, names["norm"])[:, 0]


TIMM = {
    "patch": "patch_embed.proj", "class": "cls_token", "position": "pos_embed", "block": "blocks.{}.", "norm": "norm",
    "norm1": "norm1", "norm2": "norm2", "qkv": "attn.qkv", "out": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
}  # fmt: skip
TRANSFORMERS = {
    "patch": "embeddings.patch_embeddings.projection", "class": "embeddings.cls_token",
    "position": "embeddings.position_embeddings", "block": "encoder.layer.{}.", "norm": "layernorm",
    "norm1": "layernorm_before", "norm2": "layernorm_after", "query": "attention.attention.query",
    "key": "attention.attention.key", "value": "attention.attention.value", "out": "attention.output.dense",
    "fc1": "intermediate.dense", "fc2": "output.dense",
}  # fmt: skip


def require_same(made: Encoder, theirs):
    """`theirs` maps images (B, 3, H, W) to features (B, D)."""
    with torch.no_grad():
        images = torch.randn(3, 3, *made.preprocessing.size, generator=torch.Generator().manual_seed(9))
        ours = made.backbone(images)[-1]
        ours = ours.mean((2, 3)) if ours.dim() == 4 else ours
        assert (ours.std(0) / ours.std()).mean() > 0.02  # outputs depend on the images, so that any error shows
        torch.testing.assert_close(theirs(images), ours, rtol=0, atol=1e-5 * max(1, ours.abs().max().item()))


# --- published names -------------------------------------------------------------------------------------------------


def test_expected_shapes_equal_those_of_the_libraries():
    torchvision, timm, transformers = LIBRARIES.values()
    assert torchvision == {name: digest(library_shapes.resnet(name)) for name in library_shapes.RESNETS}
    lists = {
        **dict.fromkeys(library_shapes.RESNETS, library_shapes.resnet),
        **dict.fromkeys(library_shapes.VITS, library_shapes.vit),
    }
    assert timm == {name: digest(make(name)) for name, make in lists.items()}
    configs = {}
    for depth, blocks in library_shapes.BLOCKS.items():
        sizes = [64 * 2**stage * (4 if depth >= 50 else 1) for stage in range(4)]
        config = {"layer_type": "basic" if depth < 50 else "bottleneck", "depths": blocks, "num_channels": 3}
        configs[f"resnet{depth}"] = {**config, "hidden_sizes": sizes, "embedding_size": 64}
    configs["resnet18 16"] = {**configs["resnet18"], "hidden_sizes": [16, 32, 64, 128], "embedding_size": 16}
    found = {name: digest(library_shapes.transformers_resnet(config)) for name, config in configs.items()}
    for name, (width, depth, _) in library_shapes.VITS.items():
        config = {"hidden_size": width, "intermediate_size": 4 * width, "patch_size": 16, "image_size": 224}
        more = {"num_channels": 3, "num_hidden_layers": depth}
        found[name.removesuffix("_patch16_224")] = digest(library_shapes.transformers_vit({**config, **more}))
    assert transformers == found


@pytest.mark.parametrize("name", [*library_shapes.RESNETS, *library_shapes.VITS])
def test_our_networks_have_the_published_names(name):
    with torch.device("meta"):
        if name in library_shapes.RESNETS:
            depth, groups, width = library_shapes.RESNETS[name]
            (ours, table), theirs = resnet(depth, groups=groups, width_per_group=width), library_shapes.resnet(name)
        else:
            (ours, table), theirs = transformer(arch=name.split("_")[1]), library_shapes.vit(name)
    shapes = shapes_of(ours.state_dict())
    left = {key: shape for key, shape in theirs.items() if key not in shapes}
    assert set(left) <= library_shapes.CLASSIFIERS and len(left) == 2
    assert difference(shapes, {key: shape for key, shape in theirs.items() if key not in left}) is None
    assert shapes_of(built(deduce(shapes)).state_dict()) == shapes  # the network can be deduced from the shapes alone
    architecture = architecture_of(table)
    assert shapes_of(built(architecture).state_dict()) == shapes
    if name in library_shapes.RESNETS:
        assert architecture == deduce(shapes)


def test_differences_are_described():
    shapes = library_shapes.resnet("resnet18")
    assert difference(shapes, shapes) is None
    less = {name: shape for name, shape in shapes.items() if name != "layer2.0.downsample.1.running_var"}
    assert difference(less, shapes) == "1 missing, such as layer2.0.downsample.1.running_var"
    assert difference(shapes, less) == "1 too many, such as layer2.0.downsample.1.running_var"
    assert "conv1.weight is (64, 3, 3, 3)" in difference({**shapes, "conv1.weight": (64, 3, 3, 3)}, shapes)


# --- each format -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "suffix"), [("torchvision", ".pth"), ("timm", ".safetensors")])
def test_a_resnet_for_torchvision_and_timm(tmp_path, target, suffix):
    made, path = encoder(resnet(18)), tmp_path / f"new/x{suffix}"
    export(made, target, path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    if suffix == ".pth":
        tensors = torch.load(path, weights_only=True)
        metadata = json.loads(tensors._metadata[""]["sslrun"])
    else:
        tensors = load_file(path)
        metadata = json.loads(safe_open(path, "pt").metadata()["sslrun"])
    require_same(made, lambda x: resnet_by_torchvision(x, tensors))
    assert metadata["target"] == target and metadata["architecture"] == "resnet18"
    assert {key: metadata[key] for key in ABOUT} == ABOUT
    assert metadata["preprocessing"] == {
        "color_order": "RGB", "input_size": [3, 32, 32], "resize": 37, "interpolation": "bilinear", "antialias": True,
        "center_crop": [32, 32], "scale": "pixels / 255", "mean": list(IMAGENET[0]), "std": list(IMAGENET[1]),
    }  # fmt: skip


def test_a_transformer_for_timm_has_its_number_of_heads(tmp_path):
    made, path = encoder(transformer(arch="tiny"), size=224), tmp_path / "x.safetensors"
    assert export(made, "timm", path) == "timm's vit_tiny_patch16_224 has 3 heads: create it with num_heads=12"
    metadata = json.loads(safe_open(path, "pt").metadata()["sslrun"])
    assert (metadata["architecture"], metadata["model_args"]) == (
        "vit_tiny_patch16_224", {"num_classes": 0, "num_heads": 12},  # timm's has 3
    )  # fmt: skip
    assert metadata["pretrained_cfg"]["crop_pct"] == 0.875
    require_same(made, lambda x: vit(x, load_file(path), 12, TIMM))


@pytest.mark.parametrize(
    "backbone",
    [
        lambda: resnet(18, base_width=8),
        lambda: resnet(50, base_width=4),
        lambda: resnet(18, base_width=8, out_indices=[2]),
    ],
)
def test_a_resnet_for_transformers(tmp_path, backbone):
    made, path = encoder(backbone()), tmp_path / "folder"
    export(made, "huggingface", path)
    assert {file.name for file in path.iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "README.md",
    }  # fmt: skip
    config, tensors = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
    require_same(made, lambda x: resnet_by_transformers(x, tensors, config))
    processor = json.loads((path / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 37} and processor["crop_size"] == {"height": 32, "width": 32}
    card = (path / "README.md").read_text()
    assert 'ResNetModel.from_pretrained("folder")' in card and "MoCo, 7 steps (0.5 epochs)" in card


def test_a_transformer_for_transformers(tmp_path):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}
    made, path = encoder(transformer(**sizes)), tmp_path / "folder"
    export(made, "huggingface", path)
    config, tensors = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
    assert (config["num_attention_heads"], config["layer_norm_eps"], config["intermediate_size"]) == (3, 1e-6, 48)
    require_same(made, lambda x: vit(x, tensors, 3, TRANSFORMERS))


def run_onnx(path):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session, lambda x: [torch.from_numpy(array) for array in session.run(None, {"images": x.numpy()})]


SMALL_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("backbone", "outputs"),
    [
        (lambda: resnet(18, base_width=4, stem="small"), ["features", "feature_map"]),
        (lambda: transformer(**SMALL_VIT), ["features"]),
        pytest.param(
            lambda: transformer(
                **SMALL_VIT,
                positions="rotary",
                registers=2,
                layer_scale=0.1,
                mlp="swiglu",
                drop_path=0.3,
                mask_token=True,
                patch_tokens=True,
                global_pool="avg",
            ),
            ["features"],
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["cnn", "vit", "vit with all parts"],
)
def test_onnx_takes_any_number_of_images(tmp_path, backbone, outputs):
    pytest.importorskip("onnxscript")
    made, path = encoder(backbone(), size=16), tmp_path / "x.onnx"
    export(made, "onnx", path)
    session, run = run_onnx(path)
    require_same(made, lambda x: torch.cat([run(x[:1])[0], run(x[1:])[0]]))
    require_same(made, lambda x: run(x)[0])
    assert [output.name for output in session.get_outputs()] == outputs
    assert session.get_inputs()[0].shape == ["batch", 3, 16, 16]
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["sslrun"])
    assert metadata["preprocessing"]["input_size"] == [3, 16, 16]


def test_any_backbone_can_be_exported_to_safetensors(tmp_path):
    made, path = (
        encoder(sobel(base_width=4, norm_cfg=BN(affine=False))),
        tmp_path / "x.safetensors",
    )
    export(made, "safetensors", path)
    tensors = load_file(path)
    assert tensors.keys() == made.backbone.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in made.backbone.state_dict().items())


class Spectral(nn.Module):
    """A user's own backbone with buffers of unusual dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        for dtype in (torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.bool, torch.uint16):
            values = torch.randn(2, 3, generator=torch.Generator().manual_seed(1)).abs()
            self.register_buffer(str(dtype).removeprefix("torch."), values.to(dtype))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [self.conv(images) * self.complex64.abs().sum()]


def test_buffers_of_any_dtype_can_be_exported_to_safetensors(tmp_path):
    backbone = Spectral().eval()
    made = Encoder(backbone, None, Preprocessing((8, 8), 9, "bilinear", *IMAGENET), ABOUT)
    export(made, "safetensors", tmp_path / "x.safetensors")
    tensors = read_tensors(tmp_path / "x.safetensors")
    assert tensors.keys() == backbone.state_dict().keys()
    assert all(same_bits(tensors[name], tensor) for name, tensor in backbone.state_dict().items())
    changed = {**tensors, "complex64": tensors["complex64"] + 1e-3}
    assert not same_bits(changed["complex64"], backbone.complex64)


# --- networks that a library does not have ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "targets", "message"),
    [
        (lambda: resnet(18, stem="small"), ("torchvision", "timm", "transformers"), 'no ResNet with stem = "small"'),
        (lambda: resnet(18, base_width=32), ("torchvision", "timm"), "no ResNet-18, base_width = 32"),
        (lambda: resnet(18, out_indices=[3]), ("torchvision", "timm"), r"no ResNet-18, out_indices = \[3\]"),
        (lambda: resnet(50, width_per_group=96), ("torchvision", "transformers"), "no ResNet-50, width_per_group"),
        (lambda: resnet(50, groups=32, width_per_group=4), ("transformers",), "no ResNeXt-50, groups = 32"),
        (lambda: resnet(18, norm_cfg=BN(eps=1e-3)), ("torchvision", "timm", "transformers"), "eps of 1e-5 only"),
        (lambda: resnet(18, norm_cfg=BN(affine=False)), ("torchvision", "timm", "transformers"), "scale, shift"),
        (lambda: sobel(), ("torchvision", "timm", "transformers"), "has no Sobel"),
        (lambda: transformer(arch="tiny", img_size=32), ("timm",), "no ViT-Tiny/16 for images of 32 px"),
        (lambda: transformer(arch="tiny"), ("torchvision",), "--to timm takes this one"),
        (lambda: transformer(arch="tiny", registers=4), ("torchvision",), "--to timm takes this one"),
        (lambda: transformer(arch="tiny", positions="rotary", num_heads=3), ("timm",), "have no bias of keys"),
        (lambda: transformer(arch="tiny", registers=4, norm_eps=1e-5), ("timm",), "adds 1e-06 to the variance"),
        (lambda: resnet(18, in_channels=1), ("timm", "transformers"), r"conv1.weight|convolution.weight"),
    ],
)  # fmt: skip
def test_a_network_that_a_library_does_not_have_is_refused(tmp_path, backbone, targets, message):
    backbone, table = backbone()
    made = Encoder(backbone, architecture_of(table), Preprocessing((32, 32), 36, "bilinear", *IMAGENET), ABOUT)
    for program in targets:
        target, name = {"transformers": ("huggingface", "x")}.get(program, (program, "x.safetensors"))
        with pytest.raises(UsageError, match=message):
            export(made, target, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


# --- the command line ------------------------------------------------------------------------------------------------


def test_a_run_is_exported(capsys, trained, tmp_path):
    path = tmp_path / "encoder.safetensors"
    code, out, err = call(capsys, "export", trained, "--to", "safetensors", "-o", path)
    assert (code, out) == (0, f"{path}\n"), err
    metadata = json.loads(safe_open(path, "pt").metadata()["sslrun"])
    assert (metadata["recipe"], metadata["method"], metadata["step"], metadata["epoch"]) == (NAME, "MoCo", 6, 1.5)
    assert metadata["preprocessing"]["input_size"] == [3, 24, 24] and metadata["preprocessing"]["resize"] == 27
    assert metadata["preprocessing"]["std"] == [1, 1, 1]  # the recipe does not normalize
    saved = load_file(trained / "checkpoints/step_00000006/model.safetensors")
    assert all(torch.equal(saved[f"backbone.{name}"], tensor) for name, tensor in load_file(path).items())

    assert (
        refused(capsys, "export", trained, "--to", "safetensors", "-o", path) == f"{path} exists; --force replaces it"
    )
    earlier = trained / "checkpoints/step_00000004"
    overrides = ["--set", "eval.transforms=[{type='Resize',size=[20,30]},{type='Normalize'}]"]
    assert call(capsys, "export", earlier, "--to", "safetensors", "-o", path, "--force", *overrides)[0] == 0
    metadata = json.loads(safe_open(path, "pt").metadata()["sslrun"])
    assert metadata["step"] == 4 and metadata["preprocessing"]["resize"] == [20, 30]
    assert metadata["preprocessing"]["mean"] == list(IMAGENET[0])

    line = refused(capsys, "export", trained, "--to", "timm", "-o", tmp_path / "t.safetensors")
    assert line == 'timm has no ResNet with stem = "small": --to safetensors and --to onnx take any backbone'
    line = refused(capsys, "export", trained, "--to", "pickle", "-o", tmp_path / "x.pkl")
    assert "no export format called 'pickle'; there are huggingface, onnx, safetensors, timm, torchvision;" in line
    for target, name in (("safetensors", "x.pth"), ("timm", "x.bin"), ("onnx", "x.pth")):
        assert "must end in" in refused(capsys, "export", trained, "--to", target, "-o", tmp_path / name)
    assert "nowhere does not exist" in refused(capsys, "export", "nowhere", "--to", "onnx", "-o", tmp_path / "x.onnx")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_folder_is_replaced_only_if_it_is_an_export(tmp_path):
    made, path = encoder(resnet(18, base_width=4)), tmp_path / "folder"
    export(made, "huggingface", path)
    (path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="exists"):
        export(made, "huggingface", path)
    export(made, "huggingface", path, force=True)
    assert json.loads((path / "config.json").read_text())["model_type"] == "resnet"
    (path / "thesis.tex").write_text("three years")
    with pytest.raises(UsageError, match=r"other things in it \(thesis.tex\)"):
        export(made, "huggingface", path, force=True)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="is a file"):
        export(made, "huggingface", tmp_path / "file", force=True)
    with pytest.raises(UsageError, match="file cannot be made: File exists"):
        export(made, "huggingface", tmp_path / "file/folder")
    assert {part.name for part in tmp_path.iterdir()} == {"folder", "file"}
    assert (path / "thesis.tex").read_text() == "three years"


@pytest.mark.parametrize(("target", "name"), [("safetensors", "x.safetensors"), ("huggingface", "x")])
def test_a_full_disk_leaves_the_old_file(capsys, trained, tmp_path, monkeypatch, target, name):
    path = tmp_path / name
    if target == "huggingface":
        made = encoder(resnet(18, base_width=4))

        def again(force):
            export(made, target, path, force)
    else:

        def again(force):
            words = ["export", trained, "--to", target, "-o", path, *["--force"][: int(force)]]
            code, _, err = call(capsys, *words)
            if code:
                assert code == 1 and len(err.splitlines()) == 1
                raise RunFailed(err)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunFailed, match="could not be written: No space left on device"):
            again(force=False)
    assert list(tmp_path.iterdir()) == []
    path.mkdir() if target == "huggingface" else path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunFailed, match="No space left"):
            again(force=True)
    assert list(tmp_path.iterdir()) == [path]
    assert path.is_dir() or path.read_text() == "old"


def test_a_file_that_does_not_read_back_is_not_kept(tmp_path, monkeypatch):
    import sslrun.export.tensor_files as files

    made, write = encoder(resnet(18)), files.write_tensors

    def without(path, tensors, metadata):
        write(path, {name: tensor for name, tensor in tensors.items() if name != "bn1.bias"}, metadata)

    def changed(path, tensors, metadata):
        write(path, {**tensors, "bn1.bias": tensors["bn1.bias"] + 1}, metadata)

    def untold(path, tensors, metadata):
        write(path, tensors, {"format": "pt"})

    for broken, message in (
        (without, "its names are not the published ones: 1 missing, such as bn1.bias"),
        (changed, "bn1.bias is not what was written"),
        (untold, "its metadata did not read back"),
    ):
        monkeypatch.setattr(files, "write_tensors", broken)
        with pytest.raises(RunFailed, match=message):
            export(made, "torchvision", tmp_path / "x.safetensors")
        assert list(tmp_path.iterdir()) == []


class Untranslatable(nn.Module):
    def forward(self, images):
        return [images.mean((2, 3)) * (2 if float(images.sum()) > 0 else 1)]


def test_a_backbone_that_onnx_cannot_translate_is_an_error(tmp_path):
    pytest.importorskip("onnxscript")
    made = Encoder(Untranslatable(), None, Preprocessing((8, 8), 9, "bilinear", *IMAGENET), ABOUT)
    with pytest.raises(RunFailed, match="torch cannot translate the backbone"):
        export(made, "onnx", tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_onnx_without_its_packages_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"pip install 'sslrun\[onnx\]'"):
        export(encoder(resnet(18, base_width=4)), "onnx", tmp_path / "x.onnx")


# --- preprocessing ---------------------------------------------------------------------------------------------------


def test_preprocessing_equals_that_of_the_evaluation(trained):
    def of(*overrides):
        return preprocessing_of(load(trained / "config.toml", list(overrides)).build(Recipe))

    assert of() == Preprocessing((24, 24), 27, "bilinear", (0, 0, 0), (1, 1, 1))
    bicubic = "[{type='Resize',size=30,interpolation='bicubic'},{type='CenterCrop',size=[20,24]}]"
    assert of(f"monitor.transforms={bicubic}") == Preprocessing((20, 24), 30, "bicubic", (0, 0, 0), (1, 1, 1))
    for transforms in (
        "[{type='RandomResizedCrop',size=24}]",
        "[{type='Resize',size=30},{type='CenterCrop',size=24,p=0.0}]",
    ):
        with pytest.raises(UsageError):
            of(f"eval.transforms={transforms}")


def test_timm_resizes_to_the_same_size():
    for size in (24, 32, 64, 96, 160, 192, 224, 299, 384):
        for resize in (size, round(size * 8 / 7), size + 1, 2 * size + 3):
            share = Preprocessing((size, size), resize, "bilinear", *IMAGENET).for_timm()["crop_pct"]
            assert math.floor(size / share) == resize  # what timm computes


def test_images_must_suit_the_backbone(trained, tmp_path):
    saved = open_saved(trained)
    saved.recipe.model.backbone = VisionTransformer(img_size=32, patch_size=16, embed_dim=8, depth=1, num_heads=2)
    with pytest.raises(UsageError, match=r"does not take images as eval\.transforms prepares them: images of"):
        encoder_of(saved)


def test_weights_that_are_not_finite_are_refused(trained):
    saved = open_saved(trained)
    encoder_of(saved)
    saved.backbone.layer1[0].bn2.bias.data[1] = torch.nan
    with pytest.raises(UsageError, match=r"layer1\.0\.bn2\.bias of the backbone is not finite"):
        encoder_of(saved)
