"""ResNet: torchvision's names and shapes, and the counts of its paper."""

import pytest
import torch

from sslrun.nn.norm import BN, RunningStatistics, SyncBN, group_norms
from sslrun.nn.resnet import ResNet

# Parameters of torchvision's resnetN without its classifier (fc has features x 1000 + 1000).
PARAMETERS = {
    18: 11_689_512 - 513_000,
    34: 21_797_672 - 513_000,
    50: 25_557_032 - 2_049_000,
    101: 44_549_160 - 2_049_000,
    152: 60_192_808 - 2_049_000,
}


@pytest.mark.parametrize("depth", PARAMETERS)
def test_parameter_count_is_torchvisions(depth):
    with torch.device("meta"):
        model = ResNet(depth)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[depth]


@pytest.mark.parametrize(
    ("depth", "groups", "width_per_group", "parameters"),
    [(50, 32, 4, 25_028_904), (101, 32, 8, 88_791_336), (50, 1, 128, 68_883_240), (101, 1, 128, 126_886_696)],
    ids=["resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"],
)
def test_parameter_count_of_wide_and_grouped_ones(depth, groups, width_per_group, parameters):
    with torch.device("meta"):
        model = ResNet(depth, groups=groups, width_per_group=width_per_group)
    assert sum(p.numel() for p in model.parameters()) == parameters - 2_049_000


@pytest.mark.parametrize("frozen_stages", [-1, 0, 2])
def test_frozen_stages_do_not_move(frozen_stages):
    model = ResNet(18, base_width=4, frozen_stages=frozen_stages).train()
    model(torch.rand(4, 3, 32, 32))[-1].sum().backward()
    stems = {"conv1": 0, "bn1": 0}
    for name, child in model.named_children():
        is_frozen = stems.get(name, int(name[-1])) <= frozen_stages
        assert all((p.grad is None) == is_frozen for p in child.parameters()), name
        assert all(bool(layer.pending.any()) != is_frozen for layer in group_norms(child)), name


@pytest.mark.parametrize("frozen_stages", [-1, 2])
def test_what_is_frozen_is_so_from_the_first_step_on(frozen_stages):
    """Nothing but `build` comes before it."""
    model = ResNet(18, base_width=4, frozen_stages=frozen_stages)
    training = {name: child.training for name, child in model.named_children()}
    held = ["conv1", "bn1", "layer1", "layer2"] if frozen_stages == 2 else []
    assert training == {name: name not in held for name in training}
    assert model.eval().train().layer3.training


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("norm_cfg", [BN(), SyncBN()], ids=["BN", "SyncBN"])
@pytest.mark.parametrize("norm_eval", [True, False])
def test_norm_eval_normalizes_by_running_statistics_and_leaves_them(depth, norm_cfg, norm_eval):
    torch.manual_seed(0)
    model = ResNet(depth, base_width=4, norm_cfg=norm_cfg, norm_eval=norm_eval)
    norms, images = group_norms(model), torch.rand(8, 3, 32, 32)
    with torch.no_grad():
        for norm in norms:
            norm.running_mean.copy_(-torch.rand_like(norm.running_mean))  # what is above 0 survives the ReLUs
            norm.running_var.add_(torch.rand_like(norm.running_var))
    statistics = RunningStatistics(model)
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    with torch.no_grad():
        expected = model.eval()(images)[-1]
    seen = model.train()(images)[-1]
    seen.square().mean().backward()
    statistics.commit()
    after = [(norm.running_mean, norm.running_var) for norm in norms]
    assert torch.equal(seen, expected) == norm_eval
    assert all(torch.equal(*pair) == norm_eval for pair in zip(sum(before, ()), sum(after, ()), strict=True))
    assert {int(norm.num_batches_tracked) for norm in norms} == {int(not norm_eval)}
    assert all(p.grad.any() for norm in norms for p in (norm.weight, norm.bias)), "they are trained"


def test_depths_without_groups_say_so():
    with pytest.raises(ValueError, match="groups and width_per_group need depth 50 or more, not 18"):
        ResNet(18, groups=32, width_per_group=4)


def test_names_are_torchvisions():
    with torch.device("meta"):
        names = set(ResNet(50).state_dict())
    expected = {"conv1.weight", "bn1.running_var", "layer1.0.conv3.weight", "layer1.0.downsample.0.weight"}
    expected |= {"layer1.0.downsample.1.num_batches_tracked", "layer3.5.bn2.bias", "layer4.2.bn3.weight"}
    assert expected <= names
    assert len(names) == 318  # torchvision's resnet50 has 320 entries, two of them fc's


@pytest.mark.parametrize(
    ("stem", "out_indices", "shapes"),
    [
        ("imagenet", [4], [(2, 64, 2, 2)]),
        ("imagenet", [0, 2, 4], [(2, 8, 32, 32), (2, 16, 8, 8), (2, 64, 2, 2)]),
        ("small", [1, 3], [(2, 8, 64, 64), (2, 32, 16, 16)]),
    ],
)
def test_feature_maps(stem, out_indices, shapes):
    model = ResNet(18, stem=stem, base_width=8, out_indices=out_indices)
    maps = model(torch.randn(2, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == shapes
    assert model.num_features == shapes[-1][1]


def test_the_stride_of_a_bottleneck_is_in_its_3x3():
    with torch.device("meta"):
        block = ResNet(50).get_submodule("layer2")[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


def test_zero_init_residual_starts_as_the_identity():
    torch.manual_seed(0)
    model = ResNet(50, base_width=8, zero_init_residual=True)
    block = model.get_submodule("layer1")[1]
    x = torch.rand(2, 32, 4, 4)
    torch.testing.assert_close(block(x), x)
    assert not torch.allclose(ResNet(50, base_width=8).get_submodule("layer1")[1](x), x)


def test_a_feature_map_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"out_indices is \[5\]"):
        ResNet(18, out_indices=[5])
