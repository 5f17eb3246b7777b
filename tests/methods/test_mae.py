"""MAE against its paper, written longhand in float64."""

import math

import pytest
import torch
from steps import assert_close, longhand_step, pieces, step
from torch import Tensor

from sslrun.contract import Batch, PatchMask, Progress
from sslrun.data.masks import MaskDraws, RandomMask
from sslrun.errors import UsageError
from sslrun.methods.mae import MAE
from sslrun.nn.decoders import MAEDecoder
from sslrun.nn.patches import images_of, normalized, patches_of
from sslrun.nn.vit import VisionTransformer

PROGRESS = Progress(step=0, total_steps=10, steps_per_epoch=5, seed=0)
SIDE, GRID = 4, (3, 3)


def small(norm_pix: bool = True, **options: object) -> MAE:
    torch.manual_seed(0)
    backbone = VisionTransformer(
        embed_dim=16, depth=2, num_heads=2, img_size=12, patch_size=SIDE, initialization="mae",
        frozen_patch_embed=False, **options,
    )  # fmt: skip
    decoder = MAEDecoder(16, 12, SIDE, embed_dim=8, depth=2, num_heads=2)
    return MAE(backbone, decoder, norm_pix).double()


def random_batch(samples: int, seed: int = 0, ratio: float = 0.6) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 3, 12, 12, generator=generator, dtype=torch.float64)
    drawn = RandomMask(ratio, patch_size=SIDE).draw(MaskDraws(seed, 0, torch.arange(samples).numpy(), range(1)), GRID)
    mask = PatchMask(torch.from_numpy(drawn).flatten(1), int(drawn.sum()))
    return Batch([images], torch.arange(samples), None, [mask])


def longhand(method: MAE, batch: Batch) -> Tensor:
    """One image after the other, patch by patch."""
    backbone, decoder, losses = method.backbone, method.decoder, []
    assert batch.masks[0] is not None and backbone.pos_embed is not None
    weight, bias = backbone.patch_embed.proj.weight, backbone.patch_embed.proj.bias
    for image, hidden in zip(batch.views[0], batch.masks[0].hidden.tolist(), strict=True):
        squares = [
            image[:, SIDE * r : SIDE * (r + 1), SIDE * c : SIDE * (c + 1)]
            for r in range(GRID[0])
            for c in range(GRID[1])
        ]
        tokens = [backbone.cls_token[0, 0] + backbone.pos_embed[0, 0]]
        for place, square in enumerate(squares):
            if not hidden[place]:
                token = (weight * square).sum(dim=(1, 2, 3)) + bias
                tokens.append(token + backbone.pos_embed[0, 1 + place])
        seen = backbone.norm(backbone.blocks(torch.stack(tokens).unsqueeze(0)))[0]
        embedded = iter(decoder.decoder_embed(seen))
        full = [next(embedded)]
        for is_hidden in hidden:
            full.append(decoder.mask_token[0, 0] if is_hidden else next(embedded))
        full = [token + decoder.decoder_pos_embed[0, i] for i, token in enumerate(full)]
        decoded = decoder.decoder_norm(decoder.decoder_blocks(torch.stack(full).unsqueeze(0)))[0]
        for place, square in enumerate(squares):
            if hidden[place]:
                pixels = [square[c, y, x] for y in range(SIDE) for x in range(SIDE) for c in range(3)]
                mean = sum(pixels) / len(pixels)
                variance = sum((p - mean) ** 2 for p in pixels) / (len(pixels) - 1)
                scale = math.sqrt(variance + 1e-6)
                target = torch.stack([(p - mean) / scale if method.norm_pix else p for p in pixels])
                losses.append((decoder.decoder_pred(decoded[1 + place]) - target).square().mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_step_is_the_papers(norm_pix: bool) -> None:
    method, twin, batch = small(norm_pix), small(norm_pix), random_batch(3)
    result = step(method, [batch])
    assert_close(result, longhand_step(longhand(twin, batch), twin))
    assert {"backbone.cls_token", "backbone.patch_embed.proj.weight", "decoder.mask_token"} <= result.gradients.keys()
    assert not {"backbone.pos_embed", "decoder.decoder_pos_embed"} & result.gradients.keys()


@pytest.mark.parametrize("size", [1, 2, 6])
def test_micro_batches_are_the_whole_batch(size: int) -> None:
    batch = random_batch(12)
    assert_close(step(small(), pieces(batch, size)), step(small(), [batch]))


def test_hidden_pixels_do_not_reach_the_network() -> None:
    """Other pixels under the mask change the target alone."""
    method, batch = small(), random_batch(4)
    assert batch.masks[0] is not None
    visible, hidden = batch.masks[0].places()
    other = patches_of(batch.views[0], SIDE).scatter(
        1, hidden.unsqueeze(-1).expand(-1, -1, 48), torch.randn(4, hidden.shape[1], 48, dtype=torch.float64)
    )
    changed = images_of(other, SIDE, GRID)
    assert not torch.equal(changed, batch.views[0])
    before, after = (method.backbone(images, visible=visible)[-1] for images in (batch.views[0], changed))
    assert torch.equal(before, after)


def test_zero_for_normalized_targets_costs_one_less_the_unbiased_share() -> None:
    patches = normalized(torch.randn(5, 7, 48, dtype=torch.float64))
    assert patches.square().mean().item() == pytest.approx(47 / 48, rel=1e-5)  # 1e-6 in the denominator


def test_patches_have_pixels_in_the_order_row_column_channel_and_are_put_back() -> None:
    images = torch.arange(2 * 3 * 8 * 12, dtype=torch.float64).view(2, 3, 8, 12)
    patches = patches_of(images, 4)
    assert patches.shape == (2, 6, 48)
    assert patches[1, 4, 0] == images[1, 0, 4, 4] and patches[1, 4, 1] == images[1, 1, 4, 4]
    assert patches[1, 4, 3] == images[1, 0, 4, 5] and patches[1, 4, 12] == images[1, 0, 5, 4]
    assert torch.equal(images_of(patches, 4, (2, 3)), images)


def test_all_patches_visible_are_the_ordinary_pass() -> None:
    backbone = small(registers=2).backbone
    images = random_batch(3).views[0]
    everything = torch.arange(9).expand(3, -1)
    tokens = backbone(images, visible=everything)[-1]
    assert tokens.shape == (3, 1 + 2 + 9, 16)
    torch.testing.assert_close(tokens[:, 0], backbone(images)[-1])
    order = torch.randperm(9)
    torch.testing.assert_close(backbone(images, visible=everything[:, order])[-1][:, 3:], tokens[:, 3:][:, order])


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="in_channels, img_size and patch_size of the decoder are"):
        MAE(small().backbone, MAEDecoder(16, 12, 6, embed_dim=8, depth=1, num_heads=2))
    with pytest.raises(UsageError, match="same number of patches"):
        drawn = random_batch(2).masks[0]
        assert drawn is not None
        method, batch = small(), random_batch(2)
        method(Batch(batch.views, batch.index, None, [PatchMask(drawn.hidden, drawn.num_hidden + 1)]), PROGRESS, None)
    with pytest.raises(ValueError, match="not rotary"):
        small(positions="rotary").backbone(torch.zeros(1, 3, 12, 12).double(), visible=torch.zeros(1, 1).long())


def test_initial_weights_are_the_authors() -> None:
    """Xavier uniform with query, key and value as one matrix; tokens with a standard deviation of 0.02."""
    torch.manual_seed(0)
    backbone = VisionTransformer(arch="tiny", depth=2, num_heads=3, initialization="mae", frozen_patch_embed=False)
    for weight, fan in (
        (backbone.blocks[0].attn.qkv.weight, 192 + 3 * 192),
        (backbone.blocks[1].mlp.fc1.weight, 192 + 768),
        (backbone.patch_embed.proj.weight, 3 * 16 * 16 + 192),
    ):
        bound = math.sqrt(6 / fan)
        assert 0.98 * bound < weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert backbone.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert backbone.patch_embed.proj.weight.requires_grad
