"""I-JEPA against its paper, written longhand in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import two_views
from steps import assert_close, longhand_step, pieces, step
from torch import Tensor

from sslrun.contract import Batch, PatchMask, Progress
from sslrun.data.masks import MaskDraws, MultiBlockMask
from sslrun.errors import UsageError
from sslrun.methods.ijepa import IJEPA
from sslrun.nn.predictors import IJEPAPredictor
from sslrun.nn.vit import VisionTransformer

PROGRESS = Progress(step=3, total_steps=10, steps_per_epoch=5, seed=1)
SIDE, GRID = 4, (5, 5)


def small() -> IJEPA:
    torch.manual_seed(0)
    backbone = VisionTransformer(
        embed_dim=16, depth=2, num_heads=2, img_size=20, patch_size=SIDE, initialization="ijepa",
        frozen_patch_embed=False, patch_tokens=True, global_pool="avg",
    )  # fmt: skip
    method = IJEPA(backbone, IJEPAPredictor(16, 20, SIDE, embed_dim=8, depth=2, num_heads=2)).double()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():  # large outputs reach both parts of the loss, and the teacher differs from the student
        for name, parameter in method.named_parameters():
            if "pos_embed" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, dtype=torch.float64, generator=random))
    return method


def random_batch(samples: int, seed: int = 0) -> Batch:
    images = torch.randn(samples, 3, 20, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask, draws = MultiBlockMask(3, patch_size=SIDE), MaskDraws(seed, 0, np.arange(samples), range(1))
    hidden = torch.from_numpy(mask.draw(draws, GRID)).flatten(1)
    blocks = torch.from_numpy(mask.blocks(draws, GRID))
    return Batch([images], torch.arange(samples), None, [PatchMask(hidden, int(hidden.sum()), blocks)])


def longhand(method: IJEPA, batch: Batch) -> Tensor:
    """One image, block and patch after the other."""
    backbone, teacher, predictor, losses = method.backbone, method.teacher_backbone, method.decoder, []
    assert batch.masks[0] is not None and batch.masks[0].blocks is not None

    def tokens_of(network: VisionTransformer, image: Tensor, places: list[int]) -> Tensor:
        weight, bias, positions = network.patch_embed.proj.weight, network.patch_embed.proj.bias, network.pos_embed
        tokens = [network.cls_token[0, 0] + positions[0, 0]]
        for place in places:
            row, column = divmod(place, GRID[1])
            square = image[:, SIDE * row : SIDE * (row + 1), SIDE * column : SIDE * (column + 1)]
            tokens.append((weight * square).sum(dim=(1, 2, 3)) + bias + positions[0, 1 + place])
        return network.norm(network.blocks(torch.stack(tokens).unsqueeze(0)))[0, 1:]

    for image, hidden, blocks in zip(batch.views[0], batch.masks[0].hidden, batch.masks[0].blocks, strict=True):
        visible = [place for place in range(25) if not hidden[place]]
        seen = tokens_of(backbone, image, visible)
        with torch.no_grad():
            whole = tokens_of(teacher, image, list(range(25)))
        for block in blocks.tolist():
            positions = predictor.predictor_pos_embed[0]
            tokens = [
                predictor.predictor_embed(out) + positions[place] for out, place in zip(seen, visible, strict=True)
            ]
            tokens += [predictor.mask_token[0, 0] + positions[place] for place in block]
            decoded = predictor.predictor_blocks(torch.stack(tokens).unsqueeze(0))[0, len(visible) :]
            for out, place in zip(decoded, block, strict=True):
                mean = whole[place].mean()
                target = (whole[place] - mean) / ((whole[place] - mean).square().mean() + 1e-5).sqrt()
                for difference in predictor.predictor_proj(predictor.predictor_norm(out)) - target:
                    size = difference.abs()
                    losses.append(size**2 / 2 if size < 1 else size - 0.5)
    sizes = torch.stack(losses)
    assert (sizes < 0.5).any() and (sizes > 0.5).any(), "both parts of the smooth L1 distance"
    return sizes.mean()


def test_a_step_is_the_papers() -> None:
    method, twin, batch = small(), small(), random_batch(3)
    result = step(method, [batch])
    assert_close(result, longhand_step(longhand(twin, batch), twin))
    assert {"backbone.cls_token", "backbone.patch_embed.proj.weight", "decoder.mask_token"} <= result.gradients.keys()
    assert not any("pos_embed" in name or name.startswith("teacher") for name in result.gradients)


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_are_the_whole_batch(size: int) -> None:
    batch = random_batch(8)
    assert_close(step(small(), pieces(batch, size)), step(small(), [batch]))


def test_hidden_pixels_reach_the_targets_alone() -> None:
    method, batch = small(), random_batch(2)
    assert batch.masks[0] is not None
    hidden = batch.masks[0].hidden.unflatten(1, GRID).unsqueeze(1).double()
    noise = torch.randn(batch.views[0].shape, dtype=torch.float64) * F.interpolate(hidden, scale_factor=SIDE)
    other = Batch([batch.views[0] + noise], batch.index, None, batch.masks)
    visible, _ = batch.masks[0].places()
    assert torch.equal(*(method.backbone(each.views[0], visible=visible)[-1] for each in (batch, other)))
    assert not torch.equal(*(method.targets([each], PROGRESS)[0] for each in (batch, other)))


def test_the_feature_is_the_mean_of_the_patches() -> None:
    patches, feature = small().backbone(random_batch(2).views[0])
    torch.testing.assert_close(feature, patches.mean(dim=(2, 3)))


def test_the_teacher_follows_linearly() -> None:
    method = small()
    momenta = [method.teachers(Progress(at, 10, 5, 0))[0][2] for at in (0, 5, 10)]
    assert momenta == pytest.approx([0.996, 0.998, 1.0])


def test_what_does_not_fit_is_named() -> None:
    method, batch = small(), random_batch(2)
    mask = batch.masks[0]
    assert mask is not None
    with pytest.raises(UsageError, match="needs a mask with blocks"):
        method.targets([Batch(batch.views, batch.index, None, [PatchMask(mask.hidden, mask.num_hidden)])], PROGRESS)
    with pytest.raises(ValueError, match="in_channels, img_size and patch_size of the predictor are"):
        IJEPA(method.backbone, IJEPAPredictor(16, 20, 5, embed_dim=8, depth=1, num_heads=2))
    with pytest.raises(ValueError, match="needs patch_tokens = true"):
        plain = VisionTransformer(embed_dim=16, depth=1, num_heads=2, img_size=20, patch_size=SIDE)
        IJEPA(plain, IJEPAPredictor(16, 20, SIDE, embed_dim=8, depth=1, num_heads=2))


def test_initial_weights_are_the_authors() -> None:
    """A standard deviation of 0.02; the branches' last layers of block l are divided by sqrt(2 l)."""
    torch.manual_seed(0)
    backbone = VisionTransformer(arch="tiny", depth=3, num_heads=3, initialization="ijepa", frozen_patch_embed=False)
    predictor = IJEPAPredictor(192, embed_dim=192, depth=3, num_heads=3)
    for blocks in (backbone.blocks, predictor.predictor_blocks):
        for number, block in enumerate(blocks, 1):
            for layer in (block.attn.qkv, block.mlp.fc1):
                assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
            for layer in (block.attn.proj, block.mlp.fc2):
                assert layer.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * number), rel=0.02)
    assert backbone.patch_embed.proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert backbone.pos_embed[0, 1].abs().max() == 1, "sines and cosines are kept"


@pytest.mark.parametrize(
    ("name", "epochs", "width", "blocks"), [("vit-huge-p14", 300, 1280, 12), ("vit-base-p16", 600, 768, 6)]
)
def test_recipes_are_as_published(name: str, epochs: int, width: int, blocks: int) -> None:
    recipe = two_views.recipe(f"selfsup/ijepa/ijepa_{name}_16xb128-amp-coslr-{epochs}e_in1k.toml")
    assert (recipe.global_batch, recipe.data.samples_per_gpu, recipe.epochs) == (2048, 128, epochs)
    model = recipe.model
    assert (model.backbone.num_features, len(model.decoder.predictor_blocks)) == (width, blocks)
    assert model.decoder.predictor_embed.out_features == 384
    mask = recipe.data.views[0].mask
    assert (mask.num_blocks, mask.patch_size) == (4, model.backbone.patch_size)
    rates = [recipe.lr.value(1e-3, at, 10, 10 * epochs) for at in (0, 400, 10 * epochs)]
    assert rates == pytest.approx([2e-4, 1e-3, 1e-6])
    options = two_views.options_by_name(recipe)
    assert options["backbone.blocks.0.attn.qkv.weight"]["lr"] == 1e-3
    assert (
        options["backbone.norm.weight"]["weight_decay"] == 0 == options["decoder.predictor_proj.bias"]["weight_decay"]
    )
