"""Backbones of timm and torchvision by name: outputs, checkpoints and exports agree with the libraries themselves."""

import importlib.util
import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import small_run
from sslrun.cli import main
from sslrun.config import load
from sslrun.contract import Backbone
from sslrun.errors import RunFailed, UsageError
from sslrun.export.encoder import Encoder
from sslrun.export.export import export
from sslrun.export.preprocessing import Preprocessing
from sslrun.nn import library
from sslrun.nn.norm import converted_norms, group_norms, plain_norms
from sslrun.nn.timm_network import timm
from sslrun.nn.torchvision_network import torchvision
from sslrun.saved import open_saved
from sslrun.session import build

with_timm, with_torchvision = pytest.mark.needs("timm"), pytest.mark.needs("torchvision")
MODEL = """[model]
type = "MoCo"
queue_len = 40
feat_dim = 8
backbone = {{ {backbone} }}
neck = {{ type = "MoCoV2Neck", in_channels = {width}, hid_channels = 16, out_channels = 8 }}
head = {{ type = "ContrastiveHead", temperature = 0.2 }}

"""
RESNET = "resnet10t", [8, 8, 16, 16]  # of timm, and its channels


def noise(number: int, channels: int = 3, size: int = 64) -> torch.Tensor:
    return torch.randn(number, channels, size, size, generator=torch.Generator().manual_seed(1))


def pooled(backbone: Backbone, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        last = backbone.eval()(x)[-1]
    assert last.shape[1] == backbone.num_features
    return last.mean(dim=(2, 3)) if last.dim() == 4 else last


@with_timm
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet18", {}),
        ("resnet10t", {"in_channels": 5}),
        ("vit_tiny_patch16_224", {"img_size": 64}),
        ("mobilenetv3_small_050", {}),
    ],
)
def test_features_are_those_of_timm(name, arguments):
    """For each, timm's own network with the backbone's weights."""
    backbone = timm(name, **arguments)
    own = {{"in_channels": "in_chans"}.get(key, key): value for key, value in arguments.items()}
    theirs = library.imported("timm").create_model(name, num_classes=0, **own).eval()
    theirs.load_state_dict(backbone.net.state_dict())
    x = noise(2, arguments.get("in_channels", 3))
    with torch.no_grad():
        expected = theirs.forward_features(x) if name.startswith("mobile") else theirs(x)
    torch.testing.assert_close(pooled(backbone, x), expected.mean((2, 3)) if expected.dim() == 4 else expected)


@with_timm
def test_what_the_features_do_not_depend_on_is_not_trained():
    frozen = {n for n, p in timm("mobilenetv3_small_050").named_parameters() if not p.requires_grad}
    assert frozen == {"net.conv_head.weight", "net.conv_head.bias"}
    assert all(parameter.requires_grad for parameter in timm("resnet18").parameters())


@with_timm
def test_out_indices_and_layers_and_branches_of_timm():
    backbone = timm("resnet18", out_indices=[2, 4])
    with torch.no_grad():
        shapes = [tuple(each.shape) for each in backbone.eval()(noise(1))]
    assert shapes == [(1, 128, 8, 8), (1, 512, 2, 2)] and backbone.num_features == 512
    vit = timm("vit_tiny_patch16_224", img_size=32, model_args={"depth": 2})
    first, *blocks = vit.layers()
    assert "net.cls_token" in first and len(blocks) == 2 and "net.blocks.1.mlp.fc2.weight" in blocks[1]
    assert len(vit.branches()) == 4, "attention and MLP of two blocks"
    assert backbone.branches()[0] is backbone.net.layer1[0].bn2
    kept = vit(noise(1, size=32))[0]
    vit.branches()[0].register_forward_hook(lambda module, inputs, output: output * 0)
    assert not torch.equal(vit(noise(1, size=32))[0], kept), "a branch that is dropped changes the output"


@with_torchvision
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "vit_b_32"])
def test_features_are_those_of_torchvision(name):
    """What torchvision's own network hands to its pooling (or to its classifier) in a forward pass of its own."""
    arguments = {"image_size": 64} if name == "vit_b_32" else {}
    backbone = torchvision(name, model_args=arguments).eval()
    whole = library.imported("torchvision").models.get_model(name, weights=None, **arguments).eval()
    whole.load_state_dict(backbone.net.state_dict(), strict=False)
    seen: list[torch.Tensor] = []

    def see(module, inputs):
        seen.append(inputs[0])

    head = {"resnet18": "fc", "shufflenet_v2_x0_5": "fc", "vit_b_32": "heads"}.get(name, "classifier")
    getattr(whole, head).register_forward_pre_hook(see)
    with torch.no_grad():
        whole(noise(2))
    expected = seen[0].mean((2, 3)) if seen[0].dim() == 4 else seen[0]
    torch.testing.assert_close(pooled(backbone, noise(2)), expected)


@with_torchvision
def test_every_kind_of_torchvision_has_layers_that_exist():
    for name in ("resnet18", "mobilenet_v2", "regnet_y_400mf", "mnasnet0_5"):
        backbone = torchvision(name, in_channels=2)
        listed = [each for depth in backbone.layers() for each in depth]
        for each in listed:
            assert list(backbone.get_submodule(each).parameters()), each
        rest = [n for n, _ in backbone.named_parameters() if not any(n.startswith(f"{each}.") for each in listed)]
        assert rest == []
    assert len(torchvision("resnet18").branches()) == 8


@with_torchvision
def test_weights_depend_on_the_seed_alone():
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        made.append(torchvision("squeezenet1_1", in_channels=4).state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert made[0]["net.features.0.weight"].shape[1] == 4


@with_timm
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: timm("resnet81"), "timm has no network called 'resnet81'; did you mean resnet18"),
        (lambda: timm("resnet18.a1_in1k"), "names weights too, and none are downloaded: write 'resnet18'"),
        (lambda: timm("hf-hub:somebody/something"), "no network called 'hf-hub:somebody/something'"),
        (lambda: timm("resnet18", img_size=96), "cannot make resnet18 .*unexpected keyword argument 'img_size'"),
        (lambda: timm("resnet18", model_args={"pretrained": True}), "model_args may not have pretrained"),
        (lambda: timm("resnet18", model_args={"in_chans": 1}), "set in_channels of the backbone"),
        (lambda: timm("resnet18", in_channels=0), "in_channels is 0, expected 1 or more"),
        (lambda: timm("resnet18", out_indices=[9]), "does not take an image of 224 x 224"),
        (lambda: torchvision("resnet19"), "torchvision has no network called 'resnet19'; did you mean resnet"),
        (lambda: torchvision("maxvit_t"), "maxvit_t has no feature map that is known here"),
        (lambda: torchvision("resnet18", model_args={"weights": "DEFAULT"}), "model_args may not have weights"),
        (lambda: torchvision("resnet18", model_args={"depth": 3}), "cannot make resnet18 .*'depth'"),
    ],
)
def test_a_wrong_network_is_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@with_timm
def test_images_of_another_size_than_a_transformers_are_one_line():
    vit = timm("vit_tiny_patch16_224", img_size=32, model_args={"depth": 1})
    with pytest.raises(ValueError, match=r"images of \(64, 64\) px, but img_size is 32"):
        vit(noise(1))
    free = timm("vit_tiny_patch16_224", img_size=32, model_args={"depth": 1, "dynamic_img_size": True})
    assert free(noise(1))[0].shape == (1, 192)


def test_a_library_that_is_missing_is_one_line(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else find_spec("json"))
    with pytest.raises(UsageError) as caught:
        timm("resnet18")
    assert str(caught.value) == "timm networks need timm, which is not installed: pip install 'sslrun[timm]'"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"torchvision networks need torchvision, .* pip install 'sslrun\[torchvision\]'"
    ):
        torchvision("resnet18")


def test_a_library_whose_import_fails_is_one_line_with_the_cause(monkeypatch, tmp_path):
    """As torchvision of another torch does; a module that stands in for it raises."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator x does not exist\\nmore')\n")
    monkeypatch.syspath_prepend(tmp_path)
    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "torchvision"}
    try:
        with pytest.raises(UsageError, match=r"its import fails: operator x does not exist \(torch is ") as caught:
            torchvision("resnet18")
        assert "\n" not in str(caught.value)
    finally:
        sys.modules.update(saved)


@pytest.fixture(scope="module")
def timm_run(tmp_path_factory, images):
    """The folder of a run of MoCo v2 with a network of timm; the recipe is beside `runs`. Tests only read it."""
    folder = tmp_path_factory.mktemp("timm")
    backbone = f'type = "timm", name = "{RESNET[0]}", model_args = {{ channels = {RESNET[1]} }}'
    file = small_run.write_recipe(
        folder, images, steps=6, name="small", model=MODEL.format(backbone=backbone, width=RESNET[1][-1])
    )
    assert main([str(file)]) == 0
    return folder / "runs" / "small"


def their_network(**arguments) -> nn.Module:
    return library.imported("timm").create_model(RESNET[0], num_classes=0, channels=RESNET[1], **arguments).eval()


@with_timm
def test_batch_norm_layers_are_grouped(timm_run):
    model = build(load(timm_run.parents[1] / "small.toml")).model
    assert len(converted_norms(model)) > 10 and plain_norms(model) == []
    assert not any(layer.sync for layer in group_norms(model))
    assert all(layer.sync for layer in group_norms(timm("resnet18", sync_bn=True)))


@with_timm
def test_a_resumed_run_is_the_same_to_the_bit(timm_run, tmp_path):
    small_run.as_of(timm_run, 4, tmp_path / "runs")
    small_run.train(timm_run.parents[1] / "small.toml", "--work-dir", str(tmp_path / "runs"), "--resume")
    both = small_run.saved(timm_run, 6), small_run.saved(tmp_path / "runs" / "small", 6)
    assert small_run.differences(*both) == []


@with_timm
def test_measured_and_exported_to_timm_and_taken_from_it(timm_run, tmp_path, capsys):
    assert small_run.call(capsys, "eval", "knn", timm_run)[0] == 0
    path = tmp_path / "r.safetensors"
    code, _, printed = small_run.call(capsys, "export", timm_run, "--to", "timm", "-o", path)
    assert code == 0, printed
    theirs = their_network()
    theirs.load_state_dict(load_file(path))
    with torch.no_grad():
        torch.testing.assert_close(theirs(noise(2)), pooled(open_saved(timm_run).backbone, noise(2)))
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["sslrun"])
    assert (about["architecture"], about["model_args"]) == (RESNET[0], {"num_classes": 0, "channels": RESNET[1]})

    torch.save(their_network().state_dict(), tmp_path / "their.pth")
    options = [
        "--set",
        f"load_from={tmp_path / 'their.pth'}",
        "--set",
        "load_strict=false",
        "--set",
        "optimizer.lr=0.0",
    ]
    small_run.train(timm_run.parents[1] / "small.toml", "--work-dir", str(tmp_path), *options)
    loaded = open_saved(tmp_path / "small").backbone
    for name, weight in torch.load(tmp_path / "their.pth", weights_only=True).items():
        if name in dict(loaded.net.named_parameters()):
            assert torch.equal(loaded.net.get_parameter(name), weight), name


@with_timm
def test_a_format_without_the_network_is_one_line(timm_run, tmp_path, capsys):
    code, _, printed = small_run.call(capsys, "export", timm_run, "--to", "torchvision", "-o", tmp_path / "x.pth")
    expected = f"error: torchvision has no timm {RESNET[0]}: --to safetensors and --to onnx take any backbone\n"
    assert (code, printed) == (2, expected)


@with_timm
def test_an_export_that_the_library_would_compute_otherwise_is_not_kept(tmp_path, monkeypatch):
    backbone = timm(RESNET[0], model_args={"channels": RESNET[1]}).eval()
    monkeypatch.setattr(backbone, "network", lambda: their_network(act_layer=nn.SiLU))
    with pytest.raises(RunFailed, match="its outputs for 2 images differ"):
        export(encoder(backbone), "timm", tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


@with_torchvision
def test_exported_to_torchvision(tmp_path):
    backbone = torchvision("squeezenet1_1", in_channels=2).eval()
    path = tmp_path / "x.pth"
    note = export(encoder(backbone, channels=2), "torchvision", path)
    assert note == "torchvision's squeezenet1_1 takes 3 channels: give it a first convolution of 2"
    theirs = library.imported("torchvision").models.squeezenet1_1(weights=None)
    theirs.classifier, theirs.features[0] = nn.Identity(), nn.Conv2d(2, 64, 3, 2)
    theirs.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        expected = theirs.eval()(noise(2, 2)).unflatten(1, (512, -1)).mean(2)
    torch.testing.assert_close(pooled(backbone, noise(2, 2)), expected)


def encoder(backbone: Backbone, channels: int = 3) -> Encoder:
    """An encoder of random weights, to export."""
    preprocessing = Preprocessing((64, 64), 72, "bilinear", (0.5,) * channels, (0.2,) * channels)
    about = {"recipe": "r", "method": "MoCo", "backbone": {}, "weights": "w", "step": 1, "epoch": 1.0, "sslrun": "1"}
    return Encoder(backbone, None, preprocessing, about)


@with_timm
@pytest.mark.nightly
@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_train_it(timm_run, tmp_path, stage):
    options = ["--work-dir", str(tmp_path), "--set", f"engine.zero_stage={stage}"]
    small_run.train(timm_run.parents[1] / "small.toml", *options, ranks=2)
    rows = [small_run.metrics(folder) for folder in (timm_run, tmp_path / "small")]
    one, two = ([row["train/loss"] for row in run if "train/loss" in row][-1] for run in rows)
    assert two == pytest.approx(one, rel=1e-3)
