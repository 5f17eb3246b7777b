"""The picture of a batch shows what the network sees, with the normalization undone."""

import numpy as np
import pytest
import torch

from sslrun.contract import Batch
from sslrun.data.pictures import GAP, PAPER, sheet
from sslrun.data.transforms.center_crop import CenterCrop
from sslrun.data.transforms.normalize import Normalize
from sslrun.data.views import ViewGroup


def batch_of(pixels: list[np.ndarray], groups: list[ViewGroup], count: int) -> Batch:
    """Normalized views of uint8 pixels (N, h, w, 3)."""
    views = []
    for levels, group in zip(pixels, groups, strict=True):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (group.normalize.mean, group.normalize.std))
        views.append((torch.from_numpy(levels).permute(0, 3, 1, 2) / 255 - mean) / std)
    return Batch(views, torch.arange(count), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_for_each_sample_and_its_views_side_by_side(dtype):
    large, small = ViewGroup(2, [CenterCrop(16), Normalize()]), ViewGroup(1, [CenterCrop(6)])
    draw = np.random.default_rng(0)
    pixels = [draw.integers(0, 256, (20, 16, 16, 3), np.uint8), draw.integers(0, 256, (10, 6, 6, 3), np.uint8)]
    batch = batch_of(pixels, [large, small], 10)
    batch.views[:] = [view.to(dtype) for view in batch.views]
    shown = sheet(batch, [large, small]).astype(int)
    assert shown.shape == (8 * (16 + GAP) - GAP, 2 * (16 + GAP) + 6, 3)
    error = 0 if dtype == torch.float32 else 3
    for row in range(8):
        top = row * (16 + GAP)
        for left, view in ((0, pixels[0][row]), (16 + GAP, pixels[0][10 + row]), (2 * (16 + GAP), pixels[1][row])):
            part = shown[top : top + len(view), left : left + len(view)]
            assert np.abs(part - view).max() <= error
    assert (shown[16 : 16 + GAP] == PAPER).all() and (shown[6:16, -6:] == PAPER).all()


def test_other_channels_than_three():
    group = ViewGroup(1, [CenterCrop(4)])
    group.normalize.mean, group.normalize.std = (0.0,), (1.0,)
    one = sheet(Batch([torch.full((2, 1, 4, 4), 0.5)], torch.arange(2), None), [group])
    assert (one[:4] == 128).all()
    five = torch.stack([torch.full((4, 4), k / 5) for k in range(5)])[None]
    group.normalize.mean, group.normalize.std = (0.0,) * 5, (1.0,) * 5
    assert sheet(Batch([five], torch.arange(1), None), [group])[0, 0].tolist() == [0, 51, 102]
