"""A 1x1 convolution with a stride and few channels does not end the process on the CPU, and computes the same."""

import copy

import pytest
import torch
from torch import nn

from small_run import finish, python
from sslrun.nn.resnet import ResNet
from sslrun.runtime.strided_convolutions import avoid_strides

# Without `avoid_strides`, torch 2.13.0 on a CPU with AVX-512 dies here by SIGSEGV or SIGABRT.
TRAIN = """
import sys
import torch
from torch import nn
from sslrun.nn.resnet import ResNet
from sslrun.runtime.strided_convolutions import avoid_strides

torch.set_num_threads(1)
for network in (ResNet(18, base_width=8, stem="small", out_indices=[2]), nn.Conv2d(12, 8, 1, 2, bias=False)):
    network.to(memory_format=torch.channels_last)
    avoid_strides(network)
    channels = next(network.parameters()).shape[1]
    for _ in range(4):
        images = torch.randn(4, channels, 64, 64).to(memory_format=torch.channels_last).requires_grad_()
        outputs = network(images)
        (outputs[-1] if isinstance(outputs, list) else outputs).square().mean().backward()
        kept = [torch.randn(size) for size in (3, 100, 5000)]
print("trained")
"""


def test_narrow_resnets_are_trained_on_the_cpu():
    assert finish(python(TRAIN)) == (0, "trained\n")


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("stride", [2, 3, (2, 1)])
def test_outputs_and_gradients_are_the_same(size, stride):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(5, 6, 1, stride), nn.Conv2d(6, 4, 1, stride, groups=2)).double()
    avoiding = copy.deepcopy(plain)
    avoid_strides(avoiding)
    assert all(layer.stride == (1, 1) for layer in avoiding)
    results = []
    for network in (plain, avoiding):
        images = torch.randn(2, 5, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        outputs = network(images.requires_grad_())
        outputs.square().sum().backward()
        results.append([outputs, images.grad, *(parameter.grad for parameter in network.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_other_layers_keep_their_strides():
    layers = [
        nn.Conv2d(16, 8, 1, 2),
        nn.Conv2d(8, 8, 3, 2),
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, 1, 2, padding=1),
        nn.Conv2d(32, 8, 1, 2, groups=2),
    ]
    network = nn.Sequential(*layers)
    avoid_strides(network)
    assert [layer.stride[0] for layer in network] == [2, 2, 1, 2, 2]
    assert not any(layer._forward_pre_hooks for layer in network)
    names = ResNet(18, base_width=8)
    before = list(names.state_dict())
    avoid_strides(names)
    assert list(names.state_dict()) == before
    strides = {name: module.stride for name, module in names.named_modules() if name.endswith("downsample.0")}
    assert strides == {
        "layer2.0.downsample.0": (1, 1),
        "layer3.0.downsample.0": (2, 2),
        "layer4.0.downsample.0": (2, 2),
    }
