"""MaskFeat against its paper: histograms of gradients and loss, written longhand in float64."""

import math

import numpy as np
import pytest
import torch
from steps import assert_close, longhand_step, pieces, step
from test_mae import GRID, random_batch
from test_simmim import network, outputs_of_patches

from sslrun.contract import Batch
from sslrun.errors import UsageError
from sslrun.methods.maskfeat import MaskFeat
from sslrun.nn.hog import gaussian, oriented_gradients
from sslrun.nn.vit import VisionTransformer

CELL, BINS, WINDOW = 2, 5, 6


def small() -> MaskFeat:
    return MaskFeat(network(), cell=CELL, bins=BINS, window=WINDOW).double()


def histograms(channel: np.ndarray, cell: int, bins: int, window: int) -> np.ndarray:
    """(H / cell, W / cell, bins) of one channel, pixel by pixel, as scikit-image's `hog` is written: a gradient votes
    for its direction within half a turn. Sobel's filter, the window and hard bins are MaskFeat's."""
    height, width = channel.shape
    made = np.zeros((height // cell, width // cell, bins))

    def pixel(y: int, x: int) -> float:
        y, x = (abs(p) if p < n else 2 * (n - 1) - p for p, n in ((y, height), (x, width)))  # mirrored
        return float(channel[y, x])

    middle, deviation = (window - 1) / 2, window // 2
    bell = [math.exp(-0.5 * ((p - middle) / deviation) ** 2) for p in range(window)]
    for y in range(height):
        for x in range(width):
            across = sum(w * (pixel(y + d, x - 1) - pixel(y + d, x + 1)) for d, w in ((-1, 1), (0, 2), (1, 1)))
            down = sum(w * (pixel(y - 1, x + d) - pixel(y + 1, x + d)) for d, w in ((-1, 1), (0, 2), (1, 1)))
            angle = math.degrees(math.atan2(across, down)) % 180
            length = math.hypot(across, down) * bell[y % window] * bell[x % window] / sum(bell) ** 2
            made[y // cell, x // cell, int(angle // (180 / bins)) % bins] += length
    return made / np.maximum(np.sqrt((made**2).sum(axis=2, keepdims=True)), 1e-12)


@pytest.mark.parametrize(("cell", "bins", "window"), [(CELL, BINS, WINDOW), (4, 9, 12)])
def test_histograms_are_those_of_a_longhand(cell: int, bins: int, window: int) -> None:
    images = torch.randn(2, 3, 12, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = oriented_gradients(images, cell, bins, window)
    assert made.shape == (2, 3, bins, 12 // cell, 24 // cell)
    expected = [[histograms(channel, cell, bins, window) for channel in image] for image in images.numpy()]
    np.testing.assert_allclose(made.permute(0, 1, 3, 4, 2).numpy(), np.array(expected), rtol=1e-9, atol=1e-12)


def test_directions_of_edges() -> None:
    """An edge that falls to the right is in the first half of the directions' middle bin, and so is its reverse."""
    ramp = torch.arange(16, dtype=torch.float64).expand(1, 1, 16, 16)
    for image in (ramp, -ramp, 3 * ramp + 7):
        made = oriented_gradients(image, cell=8, bins=8, window=8)
        assert made.argmax(dim=2).eq(4).all()  # 90 degrees of 180
    made = oriented_gradients(ramp.transpose(2, 3), cell=8, bins=8, window=8)
    assert made.argmax(dim=2).eq(0).all()
    assert oriented_gradients(torch.ones(1, 1, 16, 16)).eq(0).all()


def test_the_window_is_a_bell_whose_sum_is_1() -> None:
    window = gaussian(16)
    assert window.sum().item() == pytest.approx(1)
    assert (window[0, 8] / window[7, 8]).item() == pytest.approx(math.exp(-0.5 * (7.5**2 - 0.5**2) / 64))


def longhand(method: MaskFeat, batch: Batch) -> torch.Tensor:
    losses = []
    assert batch.masks[0] is not None
    for image, hidden in zip(batch.views[0], batch.masks[0].hidden.tolist(), strict=True):
        outputs = outputs_of_patches(method.backbone, image, hidden)
        cells = [histograms(channel, CELL, BINS, WINDOW) for channel in image.numpy()]
        for place, is_hidden in enumerate(hidden):
            if is_hidden:
                row, column = divmod(place, GRID[1])
                target = [
                    cells[channel][2 * row + y, 2 * column + x, direction]
                    for channel in range(3) for direction in range(BINS) for y in range(2) for x in range(2)
                ]  # fmt: skip
                predicted = method.head.weight @ outputs[place] + method.head.bias
                losses.append((predicted - torch.tensor(target, dtype=torch.float64)).square().mean())
    return torch.stack(losses).mean()


def test_a_step_is_the_papers() -> None:
    method, twin, batch = small(), small(), random_batch(2)
    result = step(method, [batch])
    assert_close(result, longhand_step(longhand(twin, batch), twin))
    assert {"backbone.mask_token", "head.weight"} <= result.gradients.keys()


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_are_the_whole_batch(size: int) -> None:
    batch = random_batch(8)
    assert_close(step(small(), pieces(batch, size)), step(small(), [batch]))


def test_published_sizes() -> None:
    """Two by two cells of 9 directions for each color: 108 numbers for a patch of 16 pixels."""
    network_ = VisionTransformer(embed_dim=16, depth=1, num_heads=2, mask_token=True, patch_tokens=True)
    method = MaskFeat(network_)
    assert method.head.out_features == 108
    assert method.histograms(torch.randn(2, 3, 224, 224)).shape == (2, 196, 108)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="cell is 3, which does not divide the backbone's patch_size 4"):
        MaskFeat(network(), cell=3)
    with pytest.raises(UsageError, match="12 x 12 px do not consist of windows of 16 px"):
        MaskFeat(network(), cell=2).double().histograms(random_batch(1).views[0])
