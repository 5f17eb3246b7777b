"""RandAugment and random erasing: their bits are PIL's, and their numbers those of the papers."""

import numpy as np
import pytest
import torch

from fidelity_cases import decoded, exact_views, sizes
from sslrun.data import pil_twins
from sslrun.data.graph import view_arguments
from sslrun.data.transforms import CenterCrop, RandAugment, RandomErasing
from sslrun.data.transforms.rand_augment import COLOR, OPERATIONS, ROTATE, SHEAR_X, TRANSLATE_X
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError


def drawn(transform, count=4000, size=(60, 90)):
    uniforms = np.random.default_rng(0).random((count, transform.num_draws))
    return transform.numbers(uniforms, np.tile(np.array(size), (count, 1)))


@pytest.mark.parametrize("operation", range(len(OPERATIONS)), ids=OPERATIONS)
def test_each_operation_is_pils_to_the_bit(operation):
    """On photographs, with the magnitudes and signs that were drawn."""
    group = ViewGroup(2, [CenterCrop([90, 120]), RandAugment(num_ops=1, magnitude_std=3.0, prob=1.0)])
    places = np.arange(8)
    ((crop, own),) = view_arguments([group], 0, 0, places, sizes()[places])
    source = drawn(group.steps[1], 2000)
    chosen = np.flatnonzero(source["operation"][:, 0] == operation)[:16]
    own.values["operation"], own.values["argument"] = source["operation"][chosen], source["argument"][chosen]
    arguments = [[crop, own]]
    made, expected = exact_views([group], arguments)[0], pil_twins.views(decoded(), [group], arguments)[0]
    assert expected is not None and np.array_equal(made, expected)
    plain = exact_views([ViewGroup(2, [CenterCrop([90, 120])])], [[crop]])[0]
    assert not np.array_equal(made, plain), "it does something"


def test_two_operations_and_erasing_are_pils_to_the_bit():
    group = ViewGroup(4, [CenterCrop(96), RandAugment(), RandomErasing(p=0.5)])
    arguments = view_arguments([group], 3, 1, np.arange(8), sizes())
    assert 0.2 < arguments[0][2].apply.mean() < 0.8 and (arguments[0][1]["operation"] >= 0).all(axis=1).any()
    made, expected = exact_views([group], arguments)[0], pil_twins.views(decoded(), [group], arguments)[0]
    assert expected is not None and np.array_equal(made, expected)


def test_operations_are_equally_frequent_and_applied_half_the_time():
    numbers = drawn(RandAugment(), 20_000)
    operation = numbers["operation"]
    assert (operation >= 0).mean() == pytest.approx(0.5, abs=0.01)
    shares = np.bincount(operation[operation >= 0], minlength=15) / (operation >= 0).sum()
    assert shares == pytest.approx(np.full(15, 1 / 15), abs=0.006)
    none = drawn(RandAugment(p=0.0))
    assert not none.apply.any() and (none["operation"] == -1).all()


@pytest.mark.parametrize(
    ("operation", "least", "most"),
    [(ROTATE, -27, 27), (SHEAR_X, -0.27, 0.27), (TRANSLATE_X, -0.405, 0.405), (COLOR, 0.19, 1.81)],
)
def test_arguments_of_magnitude_9(operation, least, most):
    """Published values at magnitude 9 of 10, with either sign."""
    numbers = drawn(RandAugment(magnitude_std=0.0, prob=1.0))
    found = numbers["argument"][numbers["operation"] == operation]
    assert sorted(set(np.round(found, 9))) == pytest.approx([least, most])


def test_magnitudes_are_normal_and_cut():
    numbers = drawn(RandAugment(prob=1.0), 30_000)
    degrees = np.abs(numbers["argument"][numbers["operation"] == ROTATE])
    assert degrees.max() == 30.0
    inside = degrees[degrees < 30] / 3
    assert np.median(degrees) == pytest.approx(27, abs=0.1) and inside.std() == pytest.approx(0.48, abs=0.03)
    assert (degrees == 30).mean() == pytest.approx(0.0228, abs=0.006)  # two standard deviations above


def test_rectangles_have_the_drawn_area_and_aspect():
    numbers = drawn(RandomErasing(p=1.0), size=(224, 200))
    box = numbers["box"]
    assert numbers.apply.all() and (box[:, :2] >= 0).all() and (box[:, :2] + box[:, 2:] <= (224, 200)).all()
    share, aspect = box[:, 2] * box[:, 3] / (224 * 200), box[:, 2] / box[:, 3]
    assert 0.019 < share.min() < 0.03 and 0.30 < share.max() < 0.34
    assert share.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
    assert 0.28 < aspect.min() < 0.35 and 2.9 < aspect.max() < 3.5 and np.median(aspect) == pytest.approx(1, abs=0.05)
    assert drawn(RandomErasing()).apply.mean() == pytest.approx(0.25, abs=0.02)


def test_a_rectangle_is_filled_with_normal_noise_and_nothing_else_changes():
    transform = RandomErasing(mean=[0.5, 0.4, 0.3], std=[0.1, 0.0, 0.2], p=1.0)
    numbers = drawn(transform, 2, size=(120, 120))
    x = torch.full((2, 3, 120, 120), 200.0)
    result = transform.torch_block(x.clone(), numbers)
    for row, (top, left, height, width) in enumerate(numbers["box"].tolist()):
        inside = result[row, :, top : top + height, left : left + width]
        assert (result[row] != 200).sum() <= inside.numel()
        assert inside.mean(dim=(1, 2)).tolist() == pytest.approx([127.5, 102, 76.5], abs=6)
        assert inside.std(dim=(1, 2)).tolist() == pytest.approx([25.5, 0, 50], abs=4)
    assert drawn(transform, 2)["key"][0] != drawn(transform, 2)["key"][1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandAugment(num_ops=0), "num_ops must be at least 1"),
        (lambda: RandAugment(magnitude=11), "magnitude must lie between 0 and 10"),
        (lambda: RandAugment(fill=[0, 0, 300]), "fill must be three numbers"),
        (lambda: RandAugment().check_channels(1), "red, green and blue"),
        (lambda: RandomErasing(scale=[0.5, 0.1]), "scale must be"),
        (lambda: RandomErasing(std=[2, 0, 0]), "std must be numbers from 0 to 1"),
        (lambda: RandomErasing().check_channels(1), "fills 3 channels"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(UsageError, match=message):
        make()
