"""MoCo v3 against its paper written longhand. (Cuts of the batch: test_cuts.py.)"""

import math
from pathlib import Path

import pytest
import torch
from steps import PROGRESS, assert_close, longhand_step, pieces, step

from sslrun.config import load
from sslrun.contract import Batch, Progress
from sslrun.methods.mocov3 import MoCoV3
from sslrun.nn.heads import MoCoV3Head
from sslrun.nn.necks import NonLinearNeck
from sslrun.nn.norm import BN, Norm
from sslrun.nn.resnet import ResNet
from sslrun.nn.vit import VisionTransformer
from sslrun.optim import Optimizer
from sslrun.runtime.executor import LocalExecutor

CONFIGS = Path(__file__).parents[2] / "configs"
TEMPERATURE = 0.3


def small(norm: Norm | None = None, **options: float) -> MoCoV3:
    torch.manual_seed(0)
    norm = norm or BN()
    backbone = ResNet(18, stem="small", base_width=4, norm_cfg=norm)
    neck = NonLinearNeck(32, 12, 6, with_last_bn_affine=False, norm_cfg=norm)
    predictor = NonLinearNeck(6, 12, 6, with_last_bn_affine=False, norm_cfg=norm)
    return MoCoV3(backbone, neck, MoCoV3Head(predictor, TEMPERATURE), **options).double()


def random_batch(num_samples: int) -> Batch:
    """Two views that resemble each other, as two groups of one."""
    generator = torch.Generator().manual_seed(5)
    shape = (num_samples, 3, 8, 8)
    first = torch.randn(shape, dtype=torch.float64, generator=generator)
    second = first + 0.5 * torch.randn(shape, dtype=torch.float64, generator=generator)
    return Batch([first, second], torch.arange(num_samples), None)


@pytest.mark.parametrize("micro_batch", [4, 8])
def test_each_query_knows_its_own_among_the_keys_of_the_whole_batch(micro_batch: int) -> None:
    cut = pieces(random_batch(16), micro_batch)
    assert [target.own.tolist() for target in small().targets(cut, PROGRESS)] == [p.index.tolist() for p in cut]


def longhand(method: MoCoV3, batch: Batch) -> torch.Tensor:
    """Algorithm 1 of arXiv 2104.02057 with loops: ctr(q1, k2) + ctr(q2, k1)."""
    first, second = batch.crops()

    def queries(images: torch.Tensor) -> torch.Tensor:
        return method.head.predictor(method.neck(method.backbone(images)[-1].mean(dim=(2, 3))))

    def keys(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return method.key_neck(method.key_backbone(images)[-1].mean(dim=(2, 3)))

    def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return sum(a * b) / (sum(a * a) * sum(b * b)).sqrt()

    total = torch.zeros((), dtype=torch.float64)
    for q, k in ((queries(first), keys(second)), (queries(second), keys(first))):
        for i in range(len(q)):
            logits = [cosine(q[i], other) / TEMPERATURE for other in k]
            total = total - 2 * TEMPERATURE * torch.log(logits[i].exp() / sum(x.exp() for x in logits)) / len(q)
    return total


def test_loss_and_gradient_are_the_papers() -> None:
    batch, twin = random_batch(5), small()
    expected = longhand_step(longhand(twin, batch), twin)
    assert_close(step(small(), [batch]), expected, rtol=1e-5, atol=1e-6)  # keys are float32


def test_the_momentum_encoder_follows_as_in_the_paper() -> None:
    """Before the keys of iteration t: k = m_t k + (1 - m_t) q, with m_t = 1 - (1 - m_0) (1 + cos(pi t / T)) / 2."""
    method, total_steps = small(base_momentum=0.8), 4
    names = [name for name, _ in method.key_backbone.named_parameters()]
    teacher = {name: p.detach().clone() for name, p in method.key_backbone.named_parameters()}
    executor = LocalExecutor(
        method, torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1), device=torch.device("cpu")
    )
    for t in range(total_steps):
        momentum = 1 - 0.2 * (1 + math.cos(math.pi * t / total_steps)) / 2
        for name in names:
            student = method.backbone.get_parameter(name).detach()
            teacher[name] = momentum * teacher[name] + (1 - momentum) * student
            torch.testing.assert_close(method.key_backbone.get_parameter(name), teacher[name])
        progress = Progress(t, total_steps, 2, seed=1)
        (targets,) = executor.targets([random_batch(6)], progress)
        executor.backward(executor.forward(random_batch(6), progress, targets).value)
        executor.step([0.1])
        executor.update_teachers(method.teachers(Progress(t + 1, total_steps, 2, seed=1)))
    assert [pair[2] for pair in method.teachers(Progress(total_steps, total_steps, 2, seed=1))] == [1.0, 1.0]


def test_a_vision_transformer_keeps_its_patch_projection() -> None:
    torch.manual_seed(0)
    backbone = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2)
    neck = NonLinearNeck(16, 12, 6, num_layers=3, with_last_bn_affine=False)
    predictor = NonLinearNeck(6, 12, 6, with_last_bn_affine=False)
    method = MoCoV3(backbone, neck, MoCoV3Head(predictor, TEMPERATURE)).double()
    step(method, [random_batch(6)])
    without = {name for name, p in method.named_parameters() if p.grad is None and not name.startswith("key_")}
    assert without == {"backbone.pos_embed", "backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"}


def test_bad_arguments_are_named() -> None:
    backbone, neck = ResNet(18, base_width=4), NonLinearNeck(32, 12, 6)
    with pytest.raises(ValueError, match=r"the head's predictor gives 5 channels .*, but the neck 6"):
        MoCoV3(backbone, neck, MoCoV3Head(NonLinearNeck(6, 12, 5)))
    with pytest.raises(ValueError, match=r"base_momentum is 1\.5, expected 0 to 1"):
        small(base_momentum=1.5)
    with pytest.raises(ValueError, match="temperature is 0, expected a finite number above 0"):
        MoCoV3Head(NonLinearNeck(6, 12, 6), 0)


def test_the_resnet_recipes_are_the_published_ones() -> None:
    alias = load(CONFIGS / "mocov3.toml")
    assert alias.name == "mocov3_resnet50_8xb512-amp-coslr-100e_in1k"
    published = {100: (9.6, 1e-6, 0.99), 300: (4.8, 1e-6, 0.99), 800: (4.8, 1.5e-6, 0.996)}
    for epochs, (lr, weight_decay, momentum) in published.items():
        values = load(CONFIGS / f"selfsup/mocov3/{alias.name.replace('100e', f'{epochs}e')}.toml").values
        optimizer, model = values["optimizer"], values["model"]
        assert (values["epochs"], values["global_batch"], values["data"]["samples_per_gpu"]) == (epochs, 4096, 512)
        assert (optimizer["type"], optimizer["lr"], optimizer["weight_decay"]) == ("LARS", lr, weight_decay)
        assert (model["base_momentum"], model["head"]["temperature"], optimizer["momentum"]) == (momentum, 1.0, 0.9)
        assert (values["lr"]["warmup_epochs"], values["lr"]["by"], values["lr"]["min_lr"]) == (10, "iter", 0.0)
        assert values["lr"]["after_warmup"]
        assert (model["neck"]["with_last_bn"], model["head"]["predictor"]["with_last_bn"]) == (True, False)
        views = [[t["type"] for t in group["transforms"]] for group in values["data"]["views"]]
        assert ("Solarization" in views[0], "Solarization" in views[1]) == (False, True)
        assert [group["transforms"][3]["p"] for group in values["data"]["views"]] == [1.0, 0.1]  # blur


def test_lars_leaves_out_every_norm_and_bias() -> None:
    """By the recipe's rules, on the recipe's names: what has one dimension is what is left out."""
    torch.manual_seed(0)
    backbone, neck = ResNet(50, base_width=4), NonLinearNeck(128, 12, 6, with_last_bn_affine=False)
    method = MoCoV3(backbone, neck, MoCoV3Head(NonLinearNeck(6, 12, 6, with_last_bn_affine=False)))
    optimizer = load(CONFIGS / "mocov3.toml").build(Optimizer, "optimizer")
    excluded = set()
    for group in optimizer.create(method.named_parameters()).param_groups:
        assert group["weight_decay"] == (0.0 if group["lars_exclude"] else 1e-6)
        excluded |= set(group["param_names"]) if group["lars_exclude"] else set()
    assert excluded == {name for name, p in method.named_parameters() if p.requires_grad and p.dim() == 1}


def test_the_transformer_recipes_are_the_published_ones() -> None:
    sizes = {"small-p16_16xb256": (384, 256), "base-p16_16xb256": (768, 256), "large-p16_64xb64": (1024, 64)}
    for name, (width, samples) in sizes.items():
        values = load(CONFIGS / f"selfsup/mocov3/mocov3_vit-{name}-amp-coslr-300e_in1k.toml").values
        model, optimizer = values["model"], values["optimizer"]
        assert model["backbone"]["arch"] == name.split("-")[0] and model["backbone"]["frozen_patch_embed"]
        assert (model["neck"]["in_channels"], model["neck"]["num_layers"]) == (width, 3)
        assert (model["base_momentum"], model["head"]["temperature"]) == (0.99, 0.2)
        assert (values["epochs"], values["global_batch"], values["data"]["samples_per_gpu"]) == (300, 4096, samples)
        assert (optimizer["type"], optimizer["lr"], optimizer["weight_decay"]) == ("AdamW", 2.4e-3, 0.1)
        assert optimizer.get("grad_clip") == ({"max_norm": 5.0} if width == 1024 else None)
        assert (values["lr"]["warmup_epochs"], values["lr"]["by"], values["lr"]["after_warmup"]) == (40, "iter", True)
        assert model["neck"]["with_last_bn"] and model["head"]["predictor"]["with_last_bn"]
        assert [group["transforms"][0]["scale"] for group in values["data"]["views"]] == [[0.08, 1.0], [0.08, 1.0]]
