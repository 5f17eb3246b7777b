"""Masks: numbers of patches, shapes of blocks, longhand samplers, and draws that depend on nothing but their key."""

import math

import numpy as np
import pytest
import torch

from sslrun.contract import Batch, PatchMask
from sslrun.data.loader import patch_masks
from sslrun.data.masks import BlockMask, InverseBlockMask, Mask, MaskDraws, MultiBlockMask, RandomMask, masks_of
from sslrun.data.transforms import CenterCrop
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError

GRID = (14, 14)
MASKS: list[Mask] = [
    RandomMask(0.75),
    RandomMask(0.6, cell_size=32),
    BlockMask(0.4, min_patches=16),
    BlockMask([0.1, 0.5], probability=0.5, samples=8),
    InverseBlockMask(0.65),
    MultiBlockMask(),
]


def draws_of(count: int, seed: int = 0, epoch: int = 0, first: int = 0, views: int = 1) -> MaskDraws:
    return MaskDraws(seed, epoch, np.arange(first, first + count), range(views))


@pytest.mark.parametrize(
    ("mask", "number"),
    [
        (RandomMask(0.75), 147),
        (RandomMask(0.6, cell_size=32), 4 * 30),
        (BlockMask(0.4), 78),
        (InverseBlockMask(), 128),
        (MultiBlockMask(), 147),
    ],
)
def test_every_view_has_the_stated_number_of_hidden_patches(mask: Mask, number: int) -> None:
    hidden = mask.draw(draws_of(200), GRID)
    assert hidden.dtype == bool and hidden.shape == (200, *GRID)
    assert set(hidden.sum(axis=(1, 2))) == {number}
    assert len(np.unique(hidden.reshape(200, -1), axis=0)) == 200, "masks of different samples are equal"


def test_ratio_of_a_decimal_number_is_not_rounded_up_by_binary_noise() -> None:
    assert RandomMask(0.7).draw(draws_of(1), (1, 10)).sum() == 7  # 10 * 0.7 is 7.000000000000001 for some factors
    assert RandomMask(0.55).draw(draws_of(1), (10, 10)).sum() == 55  # 100 * 0.55 is 55.00000000000001


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: type(mask).__name__)
def test_a_mask_depends_on_seed_epoch_position_and_view_alone(mask: Mask) -> None:
    whole = mask.draw(draws_of(24, seed=3, epoch=2, views=2), GRID).reshape(2, 24, *GRID)
    for first, count in ((0, 24), (0, 5), (5, 11), (16, 8)):
        part = mask.draw(draws_of(count, seed=3, epoch=2, first=first, views=2), GRID).reshape(2, count, *GRID)
        assert np.array_equal(part, whole[:, first : first + count])
    for other in (draws_of(24, seed=4, epoch=2, views=2), draws_of(24, seed=3, epoch=1, views=2)):
        assert not np.array_equal(mask.draw(other, GRID).reshape(whole.shape), whole)
    assert not np.array_equal(whole[0], whole[1])


def test_random_mask_hides_every_patch_equally_often() -> None:
    share = RandomMask(0.75).draw(draws_of(4000), (4, 4)).mean(axis=0)
    assert np.abs(share - 0.75).max() < 5 * math.sqrt(0.75 * 0.25 / 4000)


def test_cells_are_hidden_as_a_whole() -> None:
    hidden = RandomMask(0.6, cell_size=32).draw(draws_of(50), GRID)
    cells = hidden.reshape(50, 7, 2, 7, 2)
    assert np.array_equal(cells.all(axis=(2, 4)), cells.any(axis=(2, 4)))


def longhand(u: np.ndarray, count: int, height: int, width: int, least: int, aspect: float) -> np.ndarray:
    """BEiT's loop for one view, from its draws: rectangles only."""
    hidden, failures, k = np.zeros((height, width), dtype=bool), 0, 0
    while hidden.sum() < count and failures < 10:
        left = count - hidden.sum()
        area = least + u[k] * (left - least)
        ratio = math.exp(math.log(aspect) + u[k + 1] * (math.log(1 / aspect) - math.log(aspect)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        taken = False
        if h < height and w < width:
            top, side = int(u[k + 2] * (height - h + 1)), int(u[k + 3] * (width - w + 1))
            more = h * w - int(hidden[top : top + h, side : side + w].sum())
            if 0 < more <= left:
                hidden[top : top + h, side : side + w] = True
                taken = True
        failures = 0 if taken else failures + 1
        k += 4
    return hidden


def test_blocks_are_those_of_the_longhand_sampler() -> None:
    draws, mask = draws_of(300), BlockMask(0.4, min_patches=16)
    hidden = mask.draw(draws, GRID)
    uniforms = draws.uniforms(0, 400)
    filled = 0
    for row in range(300):
        rectangles = longhand(uniforms[row], 78, *GRID, least=16, aspect=0.3)
        assert (hidden[row] | rectangles == hidden[row]).all()
        singles = hidden[row].sum() - rectangles.sum()
        filled += int(singles)
        assert rectangles.sum() + singles == 78
    assert 0 < filled < 300 * 20, "single patches fill up what rectangles leave, and no more"


def test_blocks_hang_together_more_than_random_patches() -> None:
    def neighbors(hidden: np.ndarray) -> float:
        return float((hidden[:, 1:] & hidden[:, :-1]).sum() / hidden.sum())

    assert neighbors(BlockMask(0.4).draw(draws_of(200), GRID)) > 1.5 * neighbors(
        RandomMask(0.4).draw(draws_of(200), GRID)
    )


def test_views_of_a_group_of_samples_share_out_the_ratios() -> None:
    mask = BlockMask([0.1, 0.5], probability=0.5, samples=8)
    counts = mask.draw(draws_of(32, views=2), GRID).sum(axis=(1, 2)).reshape(2, 4, 8)
    expected = [0] * 8 + [int(196 * (0.1 + 0.4 * (i + 1) / 8) + 1e-9) for i in range(8)]
    places = set()
    for group in range(4):
        own = counts[:, group].ravel()
        assert sorted(own) == expected
        places.add(tuple(own))
    assert len(places) == 4, "the ratios are not shuffled"


def test_rolled_masks_show_the_edge_as_often_as_the_middle() -> None:
    def edge_over_middle(mask: Mask) -> float:
        shown = 1 - mask.draw(draws_of(3000), GRID).mean(axis=0)
        return float(shown[0].mean() / shown[6:8].mean())

    assert abs(edge_over_middle(InverseBlockMask(0.65)) - 1) < 0.06
    assert edge_over_middle(InverseBlockMask(0.65, roll=False)) < 0.8


def test_masks_of_a_batch_follow_the_numbers_of_views() -> None:
    crop = [CenterCrop(64)]
    groups = [ViewGroup(2, crop), ViewGroup(3, crop, RandomMask(0.5))]
    first, second = masks_of(groups, 0, 1, np.arange(6))
    assert first is None and second is not None and second.shape == (18, 4, 4)
    alone = RandomMask(0.5).draw(MaskDraws(0, 1, np.arange(6), range(2, 5)), (4, 4))
    assert np.array_equal(second, alone)


def test_a_batch_takes_its_masks_to_a_device() -> None:
    mask = PatchMask(torch.ones(2, 4, dtype=torch.bool), 8)
    batch = Batch([torch.zeros(2, 3, 4, 4)], torch.arange(2), None, [mask, None]).to(torch.device("meta"))
    assert batch.masks[0] is not None and batch.masks[0].hidden.device.type == "meta" and batch.masks[1] is None


def test_places_are_those_of_visible_and_hidden_patches_in_order() -> None:
    hidden = torch.from_numpy(RandomMask(0.6, patch_size=4).draw(draws_of(9), (3, 5))).flatten(1)
    visible, rest = PatchMask(hidden, int(hidden.sum())).places()
    for row in range(9):
        assert visible[row].tolist() == (~hidden[row]).nonzero().flatten().tolist()
        assert rest[row].tolist() == hidden[row].nonzero().flatten().tolist()
    with pytest.raises(UsageError, match="same number of patches"):
        PatchMask(hidden, int(hidden.sum()) - 1).places()


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: RandomMask(1.0), "ratio must lie between 0 and 1"),
        (lambda: RandomMask(patch_size=0), "patch_size"),
        (lambda: RandomMask(patch_size=16, cell_size=24), "cell_size is 24"),
        (lambda: BlockMask([0.5, 0.1]), "ratio must be a number or two"),
        (lambda: BlockMask([0.1, 0.2, 0.3]), "ratio must be a number or two"),
        (lambda: BlockMask(probability=1.5), "probability"),
        (lambda: BlockMask(min_aspect=0), "min_aspect"),
        (lambda: BlockMask(samples=0), "samples"),
        (lambda: InverseBlockMask(0), "ratio"),
        (lambda: ViewGroup(1, [CenterCrop(100)], RandomMask(patch_size=16)), "do not consist of patches of 16"),
        (lambda: ViewGroup(1, [CenterCrop(48)], RandomMask(cell_size=32)), "do not consist of cells of 32"),
    ],
)
def test_bad_arguments_are_named(make, part: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=part):
        make()


@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (8, 8), (10, 20)])
def test_multi_block_mask(grid: tuple[int, int]) -> None:
    """Blocks are rectangles but for the end of their last row; no visible patch is in one; numbers are fixed."""
    rows, columns = grid
    mask, draws = MultiBlockMask(), draws_of(300)
    hidden, blocks = mask.draw(draws, grid), mask.blocks(draws, grid)
    count = round(0.175 * rows * columns)
    assert hidden.shape == (300, *grid) and blocks.shape == (300, 4, count)
    assert set((~hidden).sum(axis=(1, 2))) == {round(0.25 * rows * columns)}
    aspects = []
    for view, own in zip(hidden, blocks, strict=True):
        for places in own:
            assert view.flat[places].all() and len(set(places)) == count
            y, x = np.divmod(places, columns)
            height, width = np.ptp(y) + 1, np.ptp(x) + 1
            aspects.append(height / width)
            assert (height - 1) * width < count <= height * width
            full = [divmod(number, width) for number in range(count)]
            assert [(a - y[0], b - x[0]) for a, b in zip(y, x, strict=True)] == full
    assert 0.6 < min(aspects) < 0.9 and 1.2 < max(aspects) < 2
    assert len(np.unique(blocks[:, :, 0])) > count, "blocks lie everywhere"


def test_multi_block_mask_takes_visible_patches_from_a_square() -> None:
    """Without blocks in the way all of them are inside; of the whole image every patch is visible equally often."""
    small = MultiBlockMask(1, 0.01, context_ratio=0.3, context_scale=(0.36, 0.36))
    for visible in ~small.draw(draws_of(50), (10, 10)):
        y, x = visible.nonzero()
        assert np.ptp(y) < 6 and np.ptp(x) < 6
    whole = MultiBlockMask(1, 0.01, context_ratio=0.3, context_scale=(1.0, 1.0))
    share = (~whole.draw(draws_of(4000), (5, 5))).mean(axis=0)
    assert np.abs(share - 0.32).max() < 5 * math.sqrt(0.32 * 0.68 / 4000)  # 8 of 25


def test_multi_block_mask_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"is 1\.1; above 1"):
        MultiBlockMask(4, 0.2, context_ratio=0.3)
    with pytest.raises(UsageError, match="4 blocks of 1 patches and 1 visible ones do not fit into the 2 x 2 patches"):
        MultiBlockMask().draw(draws_of(2), (2, 2))
    with pytest.raises(UsageError, match="aspect must be two numbers above 0"):
        MultiBlockMask(aspect=(2.0, 1.0))


def test_blocks_reach_the_batch_and_depend_on_their_key_alone() -> None:
    group = ViewGroup(1, [CenterCrop(64)], MultiBlockMask(2, patch_size=8))
    (whole,) = patch_masks([group], 5, 1, np.arange(12))
    (part,) = patch_masks([group], 5, 1, np.arange(4, 9))
    (other,) = patch_masks([group], 6, 1, np.arange(12))
    assert torch.equal(part.blocks, whole.blocks[4:9]) and torch.equal(part.hidden, whole.hidden[4:9])
    assert not torch.equal(other.blocks, whole.blocks)
    moved = Batch([], torch.arange(12), None, [whole]).to(torch.device("meta")).masks[0]
    assert moved.blocks.is_meta and moved.hidden.is_meta and moved.num_hidden == whole.num_hidden
