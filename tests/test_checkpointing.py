"""Activation checkpointing: the same numbers, bit for bit, with fewer activations kept."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn

import small_run
from sslrun.cli import main
from sslrun.contract import Backbone
from sslrun.errors import UsageError
from sslrun.methods.supervised import Supervised
from sslrun.nn.checkpointing import checkpoint_activations
from sslrun.nn.norm import group_norms, set_groups
from sslrun.nn.resnet import ResNet
from sslrun.nn.vit import VisionTransformer

KEY = "engine.checkpoint_activations"
STAGES = ["layer1", "layer2", "layer3", "layer4"]


class Dropping(Backbone):
    """A user's backbone that draws random numbers."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GELU(), nn.Dropout(0.5), nn.Conv2d(6, 6, 3), nn.Dropout(0.5))
        self.scaled = Scaled()

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.scaled(self.body(images), factor=2.0)]


class Scaled(nn.Module):
    """A part that is called with a keyword."""

    def forward(self, x: Tensor, factor: float) -> Tensor:
        return (x * factor).sin()


def resnet() -> Backbone:
    network = ResNet(18, base_width=8, stem="small")
    set_groups(network, 4, 2)
    return network


def vit() -> Backbone:
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=3, num_heads=3)


def drawing_vit() -> Backbone:
    """Stochastic depth and rescaled positions: what is computed again draws nothing anew."""
    options = {"positions": "rotary", "rotary_rescale": 2.0, "drop_path": 0.5}
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=3, num_heads=3, **options)


def kept_bytes(network: nn.Module, images: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass; each storage counts once. Parameters are left out."""
    kept: dict[int, Tensor] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(images)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("make", "patterns", "parts"),
    [
        (resnet, STAGES, STAGES),
        (resnet, ["layer1.*", "layer3"], ["layer1.0", "layer1.1", "layer3"]),
        (resnet, ["layer2.0", "layer2", "layer2.*"], ["layer2"]),  # the outer part alone
        (resnet, ["l*2.*"], ["layer2.0", "layer2.1"]),
        (vit, ["blocks.*"], ["blocks.0", "blocks.1", "blocks.2"]),
        (vit, ["blocks.1.mlp", "blocks.*.attn"], ["blocks.0.attn", "blocks.1.attn", "blocks.1.mlp", "blocks.2.attn"]),
        (drawing_vit, ["blocks.*"], ["blocks.0", "blocks.1", "blocks.2"]),
        (Dropping, ["body", "scaled"], ["body", "scaled"]),
    ],
)
def test_gradients_and_statistics_have_the_same_bits(make, patterns, parts):
    torch.manual_seed(0)
    plain = make()
    thrifty = copy.deepcopy(plain)
    assert checkpoint_activations(thrifty, patterns, KEY) == parts
    copied = copy.deepcopy(thrifty)
    assert [name for name, _ in copied.named_parameters()] == [name for name, _ in plain.named_parameters()]
    images = torch.randn(2, 8, 3, 16, 16)
    for network in (plain, thrifty, copied):
        torch.manual_seed(1)
        for batch in images:  # statistics of two passes add up
            network(batch)[-1].square().mean().backward()
    for network in (thrifty, copied):
        for (name, expected), got in zip(plain.named_parameters(), network.parameters(), strict=True):
            assert (got.grad is None and expected.grad is None) or torch.equal(got.grad, expected.grad), name
        for expected, got in zip(group_norms(plain), group_norms(network), strict=True):
            assert expected.pending[-1].max() == 2, "two passes"
            assert torch.equal(got.pending, expected.pending)
    assert kept_bytes(thrifty, images[0]) < kept_bytes(plain, images[0])
    thrifty.eval(), plain.eval()
    assert torch.equal(thrifty(images[0])[-1], plain(images[0])[-1])
    assert kept_bytes(thrifty, images[0]) == kept_bytes(plain, images[0]), "evaluation computes as before"


def test_stages_keep_little_more_than_their_inputs():
    """A ResNet-18's stages at 32 px: the inputs of the four stages, beside what the stem keeps."""
    images = torch.randn(8, 3, 32, 32)
    network = resnet()
    sizes = [8 * 8 * 32**2, 8 * 8 * 32**2, 8 * 16 * 16**2, 8 * 32 * 8**2]  # values at the input of each stage
    before = kept_bytes(network, images)
    stem = kept_bytes(nn.Sequential(network.conv1, network.bn1, nn.ReLU(inplace=True)), images)
    checkpoint_activations(network, STAGES, KEY)
    after = kept_bytes(network, images)
    assert after <= stem + 4 * sum(sizes) and after < before / 4


def test_a_run_trains_the_same_and_plans_less_memory(tmp_path, images, capsys):
    path = small_run.write_recipe(tmp_path, images, steps=3)
    options = ["--set=monitor.knn_interval=0", "--set=engine.micro_batch=8"]
    thrifty = ["--set", f"{KEY}=['layer1', 'layer2.*', 'layer3', 'layer4']"]
    wide = ["--dry-run", "--set=model.backbone.base_width=32", "--set=model.neck.in_channels=256"]
    plans = [small_run.call(capsys, path, *options, *more, *wide)[1] for more in ([], thrifty)]
    kept = [float(re.search(r"\((\S+) MiB per sample\)", plan)[1]) for plan in plans]
    assert kept[1] < 0.7 * kept[0]
    assert "recomputed   layer1, layer2.*, layer3, layer4\n" in plans[1] and "recomputed" not in plans[0]
    for name, more in (("plain", []), ("thrifty", thrifty)):
        assert main([str(path), *options, *more, "--work-dir", str(tmp_path / name)]) == 0
    runs = [tmp_path / name / "small" for name in ("plain", "thrifty")]
    assert small_run.differences(*(run / "checkpoints/step_00000003" for run in runs)) == []
    assert small_run.timeless(small_run.metrics(runs[0])) == small_run.timeless(small_run.metrics(runs[1]))


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("layer5", "ResNet has no part 'layer5'; did you mean layer[1-4]"),
        ("stages", "ResNet has no part 'stages'; it has conv1, bn1, layer1, layer2, layer3, layer4"),
        ("layer*.9", "ResNet has no part 'layer*.9'"),
        ("", "ResNet has no part ''"),
    ],
)
def test_a_pattern_that_fits_nothing_is_an_error(pattern, told):
    with pytest.raises(UsageError, match=f"^{KEY}: {told.replace('*', '[*]')}"):
        checkpoint_activations(resnet(), ["layer1", pattern], KEY)


def test_stochastic_depth_is_refused():
    """Its masks are those of the forward pass, and are gone when the backward pass computes again."""
    method = Supervised(ResNet(18, base_width=8, stem="small"), num_classes=3, drop_path=0.2)
    with pytest.raises(UsageError, match=r"layer1 cannot be computed again, .*drop_path.* of layer1.0.bn2$"):
        checkpoint_activations(method.backbone, ["layer1"], KEY)
    checkpoint_activations(method.backbone, ["layer1.0.conv1"], KEY)


def test_a_part_with_a_forward_of_its_own_is_refused():
    network = resnet()
    network.layer1.forward = network.layer1.forward
    with pytest.raises(UsageError, match="layer1 cannot be computed again, since its forward has been replaced"):
        checkpoint_activations(network, ["layer1"], KEY)


@pytest.mark.nightly
def test_compiled_parts_train_alike():
    torch.manual_seed(0)
    plain = ResNet(18, base_width=4, out_indices=[2], stem="small")
    set_groups(plain, 4, 2)
    thrifty = copy.deepcopy(plain)
    checkpoint_activations(thrifty, ["layer1", "layer2.*"], KEY)
    thrifty.compile(dynamic=False)
    images = torch.randn(8, 3, 16, 16)
    for network in (plain, thrifty):
        network(images)[-1].square().mean().backward()
    for expected, got in zip(plain.parameters(), thrifty.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-6)
    for expected, got in zip(group_norms(plain), group_norms(thrifty), strict=True):
        torch.testing.assert_close(got.pending, expected.pending, rtol=1e-4, atol=1e-6)
