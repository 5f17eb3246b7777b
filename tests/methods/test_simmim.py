"""SimMIM against its paper, written longhand in float64."""

import pytest
import torch
from steps import assert_close, longhand_step, pieces, step
from test_mae import GRID, SIDE, random_batch
from torch import Tensor

from sslrun.contract import Batch
from sslrun.methods.simmim import SimMIM
from sslrun.nn.vit import VisionTransformer


def network(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    options = {"mask_token": True, "patch_tokens": True, "positions": "learned", "layer_scale": 0.1, **options}
    return VisionTransformer(embed_dim=16, depth=2, num_heads=2, img_size=12, patch_size=SIDE, **options)


def small() -> SimMIM:
    return SimMIM(network()).double()


def outputs_of_patches(backbone: VisionTransformer, image: Tensor, hidden: list[bool]) -> Tensor:
    """(9, D) of one image, whose hidden patches are the mask token with their positions."""
    assert backbone.pos_embed is not None and backbone.mask_token is not None
    weight, bias = backbone.patch_embed.proj.weight, backbone.patch_embed.proj.bias
    tokens = [backbone.cls_token[0, 0] + backbone.pos_embed[0, 0]]
    for place, is_hidden in enumerate(hidden):
        row, column = divmod(place, GRID[1])
        square = image[:, SIDE * row : SIDE * (row + 1), SIDE * column : SIDE * (column + 1)]
        token = backbone.mask_token[0] if is_hidden else (weight * square).sum(dim=(1, 2, 3)) + bias
        tokens.append(token + backbone.pos_embed[0, 1 + place])
    return backbone.norm(backbone.blocks(torch.stack(tokens).unsqueeze(0)))[0, 1:]


def longhand(method: SimMIM, batch: Batch) -> Tensor:
    """Pixel by pixel; the head's numbers are in the order row, column, channel."""
    errors = []
    assert batch.masks[0] is not None
    for image, hidden in zip(batch.views[0], batch.masks[0].hidden.tolist(), strict=True):
        outputs = outputs_of_patches(method.backbone, image, hidden)
        for place, is_hidden in enumerate(hidden):
            if is_hidden:
                row, column = divmod(place, GRID[1])
                predicted = iter(method.head.weight @ outputs[place] + method.head.bias)
                for y in range(SIDE * row, SIDE * (row + 1)):
                    for x in range(SIDE * column, SIDE * (column + 1)):
                        errors += [(next(predicted) - image[c, y, x]).abs() for c in range(3)]
    return torch.stack(errors).mean()


def test_a_step_is_the_papers() -> None:
    method, twin, batch = small(), small(), random_batch(2)
    result = step(method, [batch])
    assert_close(result, longhand_step(longhand(twin, batch), twin))
    assert {"backbone.mask_token", "backbone.pos_embed", "head.weight"} <= result.gradients.keys()


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_are_the_whole_batch(size: int) -> None:
    batch = random_batch(8)
    assert_close(step(small(), pieces(batch, size)), step(small(), [batch]))


def test_the_reconstruction_has_the_predicted_pixels_where_patches_are_hidden() -> None:
    method, batch = small(), random_batch(2)
    images, mask = batch.views[0], batch.masks[0]
    assert mask is not None
    with torch.no_grad():
        shown = method.reconstructed(images, mask)
    row, column = divmod(int(mask.hidden[1].nonzero()[0]), GRID[1])
    outputs = outputs_of_patches(method.backbone, images[1], mask.hidden[1].tolist())[GRID[1] * row + column]
    predicted = (method.head.weight @ outputs + method.head.bias).view(SIDE, SIDE, 3)
    corner = slice(SIDE * row, SIDE * (row + 1)), slice(SIDE * column, SIDE * (column + 1))
    torch.testing.assert_close(shown[1][:, *corner], predicted.detach().permute(2, 0, 1))
    pixels = mask.hidden.view(2, 1, *GRID).repeat_interleave(SIDE, 2).repeat_interleave(SIDE, 3).expand_as(images)
    assert torch.equal(shown[~pixels], images[~pixels]) and not torch.isclose(shown[pixels], images[pixels]).any()


@pytest.mark.parametrize("missing", ["mask_token", "patch_tokens"])
def test_what_the_backbone_lacks_is_named(missing: str) -> None:
    with pytest.raises(ValueError, match="needs mask_token = true and patch_tokens = true"):
        SimMIM(network(**{missing: False}))


def test_the_feature_is_the_mean_of_the_patches_where_global_pool_says_so() -> None:
    image = random_batch(1).views[0]
    network_ = network(global_pool="avg").double()
    patches, feature = network_(image)
    torch.testing.assert_close(feature[0], outputs_of_patches(network_, image[0], [False] * 9).mean(dim=0))
    torch.testing.assert_close(feature, patches.mean(dim=(2, 3)))
    assert not torch.allclose(network().double()(image)[1], feature), "the class token's output"
