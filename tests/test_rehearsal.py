"""Models whose parts do not fit together: one line that names the key."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import small_run
from sslrun.config import load
from sslrun.contract import Backbone, Batch, Loss, Method, Progress
from sslrun.errors import UsageError
from sslrun.recipe import Recipe
from sslrun.rehearsal import rehearse
from sslrun.session import build

QUICKSTART = small_run.ROOT / "configs/quickstart.toml"
VIT = '{ _delete_ = true, type = "VisionTransformer", arch = "tiny", img_size = 40, patch_size = 8 }'
DENSE_NECK = '{ _delete_ = true, type = "DenseCLNeck", in_channels = 192, hid_channels = 8, out_channels = 64 }'


def recipe_of(*settings: str) -> Recipe:
    return build(load(str(QUICKSTART), [*settings, "data.samples_per_gpu=4", "global_batch=4"]))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["model.backbone.in_channels=1"],
            "model.backbone: ResNet takes 1 channels (in_channels), but is given 3: (B, 3, 40, 40)",
        ),
        (
            ["model.backbone.out_indices=[4, 3]"],
            "model.neck: MoCoV2Neck takes 192 channels (in_channels), but is given 96: (B, 96, 3, 3); of the 2 feature "
            "maps of the backbone (out_indices) the last is used",
        ),
        (
            ["model.neck.with_avg_pool=false"],
            "model.neck: MoCoV2Neck cannot take (4, 192, 2, 2): Expected size for first two dimensions",
        ),
        ([f"model.neck={DENSE_NECK}"], "model: MoCo cannot take these views: 'tuple' object has no attribute"),
        (
            ['model.head={ _delete_ = true, type = "ClsHead", in_channels = 12, num_classes = 4 }'],
            "model.head: ClsHead takes 12 channels (in_channels), but is given 64: (B, 64)",
        ),
        (
            ['model.head={ _delete_ = true, type = "LatentCrossCorrelationHead" }'],
            "model.head: LatentCrossCorrelationHead cannot take (4, 64) and (4, 64) and (",
        ),
        (
            [f"model.backbone={VIT}", "model.backbone.patch_size=16", "model.backbone.img_size=32"],
            "model.backbone: VisionTransformer cannot take (4, 3, 40, 40): images of (40, 40) px do not consist of",
        ),
        (
            [f"model.backbone={VIT}", "model.type=DenseCL", f"model.neck={DENSE_NECK}"],
            "model.neck: DenseCLNeck cannot take (4, 192): Expected 3D (unbatched) or 4D (batched) input to conv2d",
        ),
    ],
)
def test_a_misfit_is_one_line_with_its_key(settings, expected):
    with pytest.raises(UsageError) as caught:
        rehearse(recipe_of(*settings), "fp32")
    assert str(caught.value).startswith(expected), str(caught.value)
    assert "\n" not in str(caught.value)


class MisfitBackbone(Backbone):
    """Breaks a promise of `Backbone`.

    Args:
        mistake: which.
    """

    num_features = 8

    def __init__(self, mistake: str) -> None:
        super().__init__()
        self.mistake, self.conv = mistake, nn.Conv2d(3, 8, 3, 8)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.conv(images)
        if self.mistake == "tensor":
            return features
        if self.mistake == "tokens":
            return [features.flatten(2)]
        if self.mistake == "channels":
            return [features[:, :4]]
        if self.mistake == "value":
            return [features * features.max().item()]
        return [features.no_such_attribute]


class MeanMethod(Method):
    """The smallest method there is.

    Args:
        backbone: the network to train.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, batch: Batch, progress: Progress, targets: None) -> Loss:
        return Loss(self.backbone(batch.views[0])[-1].mean())


def misfit(mistake: str) -> Recipe:
    backbone = f'{{ type = "MisfitBackbone", mistake = "{mistake}" }}'
    model = f'{{ _delete_ = true, type = "MeanMethod", backbone = {backbone} }}'
    return recipe_of(f'custom_imports=["{__name__}"]', f"model={model}")


@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        ("tensor", "returns one tensor, expected a list of feature maps"),
        ("tokens", r"returns \(8, 8, 25\), expected \(B, C, H, W\) or \(B, C\)"),
        ("channels", "returns 4 channels, but its num_features is 8"),
        (
            "value",
            "needs a value of a tensor on the host, and a step would wait for the device: .*rehearsal.py:",
        ),
    ],
)
def test_a_users_backbone_keeps_the_contract(mistake, expected):
    with pytest.raises(UsageError, match=rf"^model\.backbone: MisfitBackbone {expected}"):
        rehearse(misfit(mistake), "fp32")


def test_a_mistake_in_a_users_code_keeps_its_traceback():
    with pytest.raises(AttributeError, match="no_such_attribute"):
        rehearse(misfit("code"), "fp32")


class Reading(torch.autograd.Function):
    """The identity; its backward pass reads a number, which tensors without numbers do not have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * (1.0 if gradients[0].sum().item() > 0 else 2.0)


class ReadingBackbone(MisfitBackbone):
    """Keeps the contract, with a backward pass that reads a number."""

    def __init__(self) -> None:
        super().__init__("none")

    def forward(self, images: Tensor) -> list[Tensor]:
        return [Reading.apply(self.conv(images))]


def test_a_backward_pass_that_reads_numbers_does_not_prevent_a_start():
    model = '{ _delete_ = true, type = "MeanMethod", backbone = { type = "ReadingBackbone" } }'
    memory = rehearse(recipe_of(f'custom_imports=["{__name__}"]', f"model={model}"), "fp32")
    assert memory.activations > 0 and memory.optimizer > 0
