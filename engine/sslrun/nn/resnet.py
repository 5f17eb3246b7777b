"""ResNet 18 to 152 (He et al. 2016, arXiv 1512.03385), wide (Zagoruyko & Komodakis 2016, arXiv 1605.07146) and ResNeXt
(Xie et al. 2017, arXiv 1611.05431); parameter names as in torchvision, without the classifier."""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.contract import Backbone
from sslrun.nn.argument_checks import require_positive
from sslrun.nn.norm import BN, GroupBatchNorm, Norm, group_norms

STAGE_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection (depth 18 and 34)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, norm: Norm, inner: int, groups: int) -> None:
        super().__init__()
        assert (inner, groups) == (width, 1), "only Bottleneck has groups and a width of its own"
        self.conv1 = _conv(inputs, width, 3, stride)
        self.bn1 = norm.layer(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = norm.layer(width)
        self.downsample = _downsample(inputs, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride, in groups), 1x1 with a residual connection (depth 50 and more)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, norm: Norm, inner: int, groups: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = _conv(inputs, inner, 1)
        self.bn1 = norm.layer(inner)
        self.conv2 = _conv(inner, inner, 3, stride, groups)
        self.bn2 = norm.layer(inner)
        self.conv3 = _conv(inner, outputs, 1)
        self.bn3 = norm.layer(outputs)
        self.downsample = _downsample(inputs, outputs, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet(Backbone):
    """Residual network of four stages, with torchvision's parameter names (He et al. 2016, arXiv 1512.03385).

    `groups` and `width_per_group` make it a wide ResNet (arXiv 1605.07146) or a ResNeXt (arXiv 1611.05431).

    Args:
        depth: number of layers: 18, 34, 50, 101 or 152.
        in_channels: channels of the input images.
        out_indices: feature maps to return: 0 is that of the stem, 1 to 4 are those of the stages.
            Methods use the last one in the list. Stages above the highest are not built.
        norm_cfg: normalization layer.
        stem: "imagenet" is a 7x7 convolution of stride 2 and a max-pool; "small" is a 3x3 convolution of stride 1, for
            images of 32 to 64 pixels.
        base_width: channels of the stem and of the first stage; 64 in the paper.
        zero_init_residual: whether every residual branch starts at zero (Goyal et al. 2017, arXiv 1706.02677).
        groups: number of groups of the 3x3 convolutions; 32 with width_per_group = 4 is ResNeXt 32x4d. Only for depth
            50 and more.
        width_per_group: channels per group of the first stage's 3x3 convolutions if base_width is 64; 128 with one
            group is wide ResNet. Only for depth 50 and more.
        frozen_stages: number of stages, counted from the first, that are frozen together with the stem: they are not
            trained, and their BatchNorm uses running statistics. 0 freezes the stem alone, -1 nothing.
        norm_eval: whether every BatchNorm uses its running statistics in training too and does not update them; its
            scale and shift are trained.
    """

    def __init__(
        self,
        depth: Literal[18, 34, 50, 101, 152],
        in_channels: int = 3,
        out_indices: Sequence[int] = (4,),
        norm_cfg: Norm = BN(),
        stem: Literal["imagenet", "small"] = "imagenet",
        base_width: int = 64,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        frozen_stages: int = -1,
        norm_eval: bool = False,
    ) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, base_width=base_width, groups=groups, width_per_group=width_per_group)
        if depth < 50 and (groups, width_per_group) != (1, 64):
            raise ValueError(f"groups and width_per_group need depth 50 or more, not {depth}")
        if not -1 <= frozen_stages <= 4:
            raise ValueError(f"frozen_stages is {frozen_stages}, expected -1 (none) to 4")
        self.out_indices = list(out_indices)
        if not self.out_indices or not set(self.out_indices) <= set(range(5)):
            raise ValueError(f"out_indices is {self.out_indices}, but the feature maps are 0 (stem) to 4 (last stage)")
        block = BasicBlock if depth < 50 else Bottleneck
        self.stem = stem
        self.conv1 = _conv(in_channels, base_width, *((7, 2) if stem == "imagenet" else (3, 1)))
        self.bn1 = norm_cfg.layer(base_width)
        channels = base_width
        widths = [base_width]
        for stage, num_blocks in enumerate(STAGE_BLOCKS[depth][: max(self.out_indices)], start=1):
            width = base_width * 2 ** (stage - 1)
            inner = width * width_per_group // 64 * groups
            blocks = []
            for index in range(num_blocks):
                stride = 2 if index == 0 and stage > 1 else 1
                blocks.append(block(channels, width, stride, norm_cfg, inner, groups))
                channels = width * block.expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            widths.append(channels)
        self.num_features = widths[self.out_indices[-1]]
        self._initialize(zero_init_residual)
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        for module in self._frozen():
            module.requires_grad_(False)
        self.train()  # frozen parts are in evaluation mode from the first step on

    def train(self, mode: bool = True) -> "ResNet":
        super().train(mode)
        for module in [*self._frozen(), *(group_norms(self) if self.norm_eval else ())]:
            module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        maps = [x]
        if self.stem == "imagenet":
            x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for stage in range(1, max(self.out_indices) + 1):
            x = self.get_submodule(f"layer{stage}")(x)
            maps.append(x)
        return [maps[index] for index in self.out_indices]

    def layers(self) -> list[list[str]]:
        stages = [[name] for name, _ in self.named_children() if name.startswith("layer")]
        return [["conv1", "bn1"], *stages]

    def branches(self) -> list[nn.Module]:
        blocks = [module for module in self.modules() if isinstance(module, BasicBlock | Bottleneck)]
        return [block.bn2 if isinstance(block, BasicBlock) else block.bn3 for block in blocks]

    def _frozen(self) -> list[nn.Module]:
        stages = {f"layer{stage}": stage for stage in range(1, 5)}  # all other children belong to the stem
        return [child for name, child in self.named_children() if stages.get(name, 0) <= self.frozen_stages]

    def _initialize(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
                last = module.bn2 if isinstance(module, BasicBlock) else module.bn3
                if isinstance(last, GroupBatchNorm) and last.weight is not None:
                    nn.init.zeros_(last.weight)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def _downsample(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Module | None:
    """The projection on a shortcut if its shape changes, else None."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), norm.layer(outputs))
