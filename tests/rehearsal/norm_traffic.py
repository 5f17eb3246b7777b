"""A compiled bottleneck of ResNet-50 with torch's BatchNorm, with one group and with eight: `python -m
rehearsal.norm_traffic` prints launches and 10^9 bytes of forward and backward for each, as one line of JSON."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rehearsal import played_torch_cuda
from rehearsal.inductor import Compiler, configure
from rehearsal.played_torch_cuda import DEVICE
from sslrun.nn.norm import GroupBatchNorm, set_groups

BATCH, CHANNELS, WIDTH, SIZE = 256, 256, 64, 56


class Bottleneck(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(CHANNELS, WIDTH, 1, bias=False), norm(WIDTH)
        self.conv2, self.norm2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), norm(WIDTH)
        self.conv3, self.norm3 = nn.Conv2d(WIDTH, CHANNELS, 1, bias=False), norm(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        y = torch.relu(self.norm2(self.conv2(y)))
        return torch.relu(self.norm3(self.conv3(y)) + x)


def traffic(norm: Callable[[int], nn.Module], num_groups: int) -> dict[str, Any]:
    block, mode = Bottleneck(norm), FakeTensorMode(allow_non_fake_inputs=False)
    set_groups(block, BATCH // num_groups, num_groups)
    compiler = Compiler({block: "block"}, mode)
    played_torch_cuda.fake_on_cuda(block, mode)
    torch._dynamo.reset()
    with mode:
        x = torch.empty(BATCH, SIZE, SIZE, CHANNELS, dtype=torch.bfloat16, device=DEVICE).permute(0, 3, 1, 2)
        block.compile(dynamic=False)
        with torch.autocast("cuda", torch.bfloat16):
            y = block(x.requires_grad_())
        y.sum().backward()
    return {graph.phase: {"launches": graph.launches, "gb": graph.gb} for graph in compiler.graphs}


if __name__ == "__main__":
    configure()
    found = {"torch": traffic(nn.BatchNorm2d, 1), "1 group": traffic(GroupBatchNorm, 1)}
    print(json.dumps(found | {"8 groups": traffic(GroupBatchNorm, 8)}))
