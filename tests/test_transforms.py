"""Draws become numbers: boxes, factors, orders and yes or no, against longhand computations."""

import itertools
import math

import numpy as np
import pytest

from sslrun.data.graph import graph_arguments, graph_plan, num_inputs, view_arguments
from sslrun.data.transforms import (
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    Normalize,
    Numbers,
    RandomAppliedTrans,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    Resize,
    SharedTrans,
    Solarization,
    Transform,
)
from sslrun.data.transforms.base import chain_numbers
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError
from sslrun.randomness import uniforms

MANY = np.arange(4000)


def drawn(transform: Transform, size: tuple[int, int] = (300, 400), count: int = 4000) -> Numbers:
    sizes = np.tile(size, (count, 1))
    return transform.numbers(uniforms(1, 0, np.arange(count), 0, transform.num_draws), sizes)


def longhand_box(u: np.ndarray, height: int, width: int, scale: tuple, ratio: tuple) -> list[int]:
    """torchvision's RandomResizedCrop.get_params, its random calls replaced by four draws a try."""
    for area_draw, ratio_draw, top_draw, left_draw in u.reshape(10, 4):
        area = height * width * (scale[0] + area_draw * (scale[1] - scale[0]))
        log_ratio = math.log(ratio[0]) + ratio_draw * (math.log(ratio[1]) - math.log(ratio[0]))
        w = round(math.sqrt(area * math.exp(log_ratio)))
        h = round(math.sqrt(area / math.exp(log_ratio)))
        if 0 < w <= width and 0 < h <= height:
            return [int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w]
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize("size", [(375, 500), (40, 900), (900, 40), (7, 5), (1, 1)])
def test_random_resized_crop_is_torchvisions(size: tuple[int, int]) -> None:
    scale, ratio = (0.2, 1.0), (3 / 4, 4 / 3)
    transform = RandomResizedCrop(224, scale, ratio)
    u = uniforms(3, 1, MANY[:300], 0, transform.num_draws)
    boxes = transform.numbers(u, np.tile(size, (300, 1)))["box"]
    assert boxes.tolist() == [longhand_box(row[1:], *size, scale, ratio) for row in u]


def test_boxes_lie_inside_the_image() -> None:
    box = drawn(RandomResizedCrop(96, (0.05, 0.14)))["box"]
    assert (box[:, :2] >= 0).all() and (box[:, 2:] >= 1).all()
    assert (box[:, :2] + box[:, 2:] <= (300, 400)).all()
    share = box[:, 2] * box[:, 3] / (300 * 400)
    assert 0.045 < share.min() < 0.055 and 0.135 < share.max() < 0.145


def test_an_image_that_is_not_cropped_keeps_its_box_and_size() -> None:
    numbers = drawn(RandomResizedCrop(96, p=0.5))
    left_alone = ~numbers.apply
    assert 0.45 < left_alone.mean() < 0.55
    assert (numbers["box"][left_alone] == (0, 0, 300, 400)).all()
    assert (numbers.size[left_alone] == (300, 400)).all()


@pytest.mark.parametrize(
    ("size", "entering", "leaving"),
    [
        (256, (375, 500), (256, 341)),
        (256, (500, 375), (341, 256)),
        (256, (300, 300), (256, 256)),
        ([80, 90], (5, 7), (80, 90)),
    ],
)
def test_resize(size: int | list[int], entering: tuple[int, int], leaving: tuple[int, int]) -> None:
    assert drawn(Resize(size), entering, 1).size.tolist() == [list(leaving)]


@pytest.mark.parametrize(
    ("entering", "start"),
    [((256, 341), (16, 58)), ((227, 225), (2, 0)), ((100, 341), (-62, 58)), ((221, 223), (-1, 0))],
)
def test_center_crop_starts_where_torchvision_starts(entering: tuple[int, int], start: tuple[int, int]) -> None:
    assert drawn(CenterCrop(224), entering, 1)["start"].tolist() == [list(start)]


def test_jitter_draws_all_orders_and_the_ranges_of_torchvision() -> None:
    numbers = drawn(ColorJitter(0.4, 1.5, [0.9, 1.3], 0.1), count=24000)
    orders, counts = np.unique(numbers["order"], axis=0, return_counts=True)
    assert {tuple(order) for order in orders.tolist()} == set(itertools.permutations(range(4)))
    assert counts.min() > 850 and counts.max() < 1150
    low, high = numbers["factors"].min(axis=0), numbers["factors"].max(axis=0)
    assert low == pytest.approx([0.6, 0.0, 0.9, -25.0], abs=2e-3)
    assert high == pytest.approx([1.4, 2.5, 1.3, 25.0], abs=2e-3)


def test_jitter_leaves_out_what_is_zero() -> None:
    numbers = drawn(ColorJitter(brightness=0.4, hue=0.1, p=0.8))
    assert set(np.unique(numbers["order"])) == {-1, 0, 3}
    done = np.sort(numbers["order"][numbers.apply], axis=1)
    assert (done == (-1, -1, 0, 3)).all()
    assert (numbers["order"][~numbers.apply] == -1).all()


@pytest.mark.parametrize(("degrees", "low", "high"), [(2, -2, 2), ([10.0, 30.0], 10, 30), (0.0, 0, 0)])
def test_turns_are_uniform(degrees: float | list[float], low: float, high: float) -> None:
    numbers = drawn(RandomRotation(degrees, p=0.5))
    a, b, _, d, e, _ = numbers["affine"].T
    assert (a == e).all() and (b == -d).all()
    turns = np.degrees(np.arctan2(d, a))
    quartiles = np.quantile(turns[numbers.apply], [0, 0.25, 0.5, 0.75, 1])
    assert quartiles == pytest.approx(np.linspace(low, high, 5), abs=0.05 * (high - low) + 1e-9)
    assert (numbers["affine"][~numbers.apply] == (1, 0, 0, 0, 1, 0)).all()


def test_a_turn_leaves_the_middle_in_its_place() -> None:
    a, b, c, d, e, f = drawn(RandomRotation(180), size=(60, 90))["affine"].T
    assert a * 45 + b * 30 + c == pytest.approx(45) and d * 45 + e * 30 + f == pytest.approx(30)


def test_sigma_is_uniform() -> None:
    sigma = drawn(GaussianBlur(0.1, 2.0))["sigma"]
    assert np.quantile(sigma, [0, 0.25, 0.5, 0.75, 1]) == pytest.approx([0.1, 0.575, 1.05, 1.525, 2.0], abs=0.05)


@pytest.mark.parametrize("p", [0.0, 0.2, 1.0])
def test_p_is_the_share_of_images_changed(p: float) -> None:
    share = drawn(RandomGrayscale(p)).apply.mean()
    assert share == p if p in (0.0, 1.0) else abs(share - p) < 0.03


def test_groups_nest_and_their_members_keep_their_own_p() -> None:
    inner = RandomAppliedTrans([Solarization(p=1.0), RandomGrayscale(p=0.5)], p=0.5)
    group = RandomAppliedTrans([RandomHorizontalFlip(1.0), inner], p=0.5)
    steps = group.step_numbers(uniforms(1, 0, MANY, 0, group.num_draws), np.tile((300, 400), (4000, 1)))
    outer, both, gray = (numbers.apply for numbers in steps)
    assert [round(float(x.mean()), 1) for x in (outer, both, gray)] == pytest.approx([0.5, 0.2, 0.1], abs=0.11)
    assert not (both & ~outer).any() and not (gray & ~both).any()
    assert (outer & ~both).any() and (both & ~gray).any()


def test_sizes_reach_the_next_transform() -> None:
    """A crop after a resize that applies to some draws its box in the size that each image has by then."""
    resize, crop = Resize([50, 60], p=0.5), RandomResizedCrop(20, (1.0, 1.0), (1.0, 1.0))
    u = uniforms(0, 0, MANY[:200], 0, resize.num_draws + crop.num_draws)
    resized, cropped = chain_numbers([resize, crop], u, np.tile((200, 100), (200, 1)))
    assert (cropped["box"][resized.apply, 2:] == (50, 50)).all()
    assert (cropped["box"][~resized.apply, 2:] == (100, 100)).all()


def test_arguments_depend_on_position_and_view_alone() -> None:
    group = ViewGroup(2, [RandomResizedCrop(32), ColorJitter(0.4), RandomHorizontalFlip()])
    sizes = np.tile((60, 80), (8, 1))
    whole = view_arguments([group], 5, 2, np.arange(8), sizes)
    part = view_arguments([group], 5, 2, np.array([6, 3]), sizes[:2])
    for one, other in zip(whole[0], part[0], strict=True):
        assert np.array_equal(one.apply[[6, 3, 14, 11]], other.apply)
        for name, values in one.values.items():
            assert np.array_equal(values[[6, 3, 14, 11]], other[name])
    boxes = whole[0][0]["box"]
    assert not np.array_equal(boxes[:8], boxes[8:]), "two views of an image draw differently"
    assert not np.array_equal(boxes, view_arguments([group], 5, 3, np.arange(8), sizes)[0][0]["box"])
    second = view_arguments([group, group], 5, 2, np.arange(8), sizes)[1][0]["box"]
    assert not np.array_equal(boxes, second), "views are numbered through over all groups"


def test_graph_arguments_are_small_arrays_one_for_each_number() -> None:
    groups = [
        ViewGroup(2, [RandomResizedCrop(32), ColorJitter(0.4, hue=0.1), Normalize()]),
        ViewGroup(1, [CenterCrop(8), ColorJitter(0.4)]),
    ]
    arguments = view_arguments(groups, 0, 0, np.arange(5), np.tile((60, 80), (5, 1)))
    plan = graph_plan(groups, [2, 2])
    jitter = {"factor0": "F", "steps1": "F*", "channels1": "F*", "factor2": "F"}
    assert [[step.layouts for step in group.steps] for group in plan] == [
        [{"start": "", "shape": "", "size": ""}, jitter],
        [{"start": "", "size": ""}, {"factor0": ""}],
    ]
    given = graph_arguments(plan, arguments)
    assert len(given) == num_inputs(plan) == 2 * 3 + 4 + 2 + 1
    assert all(len(values) == 5 and values.flags.c_contiguous for values in given)
    box, factors = arguments[0][0]["box"], arguments[0][1]["factors"]
    assert np.array_equal(given[0], box[:5, :2]) and np.array_equal(given[3], box[5:, :2])
    both = np.where(given[6] == 1.0, given[9], given[6])  # before the hue or after it
    assert np.array_equal(both, factors[:, 0].reshape(2, 5).T), "of frames: (B, V)"
    part = graph_plan(groups, [1, 0])
    assert [len(group.steps) for group in part] == [1, 0] and len(graph_arguments(part, arguments)) == 6


def test_the_dali_graph_does_the_operations_of_a_jitter_in_every_order() -> None:
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.1)
    orders = np.array(list(itertools.permutations(range(4))))
    factors = np.tile(np.float32([1.5, 0.5, 2.0, 7.0]), (24, 1))
    sizes = np.full((24, 2), 8)
    arguments = jitter.dali_arguments(Numbers(np.full(24, True), sizes, {"order": orders, "factors": factors}))
    done: list[list[int]] = [[] for _ in orders]
    for slot, operation in enumerate(jitter.slots):
        turns = operation == 3
        given = arguments[f"{'steps' if turns else 'factor'}{slot}"].reshape(24)
        for row in np.flatnonzero(given != (0.0 if turns else 1.0)):
            assert given[row] == (6.5 if turns else factors[0, operation])  # PIL's cut takes half a step
            done[row].append(operation)
    assert done == orders.tolist()
    assert [ColorJitter(contrast=1.0).slots, ColorJitter(0.4, hue=0.1).slots] == [[1], [0, 3, 0]]
    black = np.array([[1, -1, -1, -1]]), np.zeros((1, 4), dtype=np.float32)
    own = Numbers(np.full(1, True), sizes[:1], {"order": black[0], "factors": black[1]})
    assert all(np.isfinite(array).all() for array in ColorJitter(contrast=1.0).dali_arguments(own).values())


def test_views_are_frames_where_their_size_is_known_and_a_flip_comes_before_them() -> None:
    class Other(RandomGrayscale, listed=False):
        dali_frames = ignores_flips = False

    crop, jitter, gray, other, flip = (
        RandomResizedCrop(32),
        ColorJitter(0.4),
        RandomGrayscale(),
        Other(),
        RandomHorizontalFlip(),
    )

    def plan(num_views: int, transforms: list[Transform]) -> list[tuple[int, int, bool]]:
        group = ViewGroup(num_views, transforms)
        steps = graph_plan([group], [len(group.steps)])[0].steps
        return [(step.place, step.branches, step.is_frames) for step in steps]

    assert plan(2, [crop, jitter, gray, flip]) == [(0, 2, False), (3, 2, False), (1, 1, True), (2, 1, True)]
    assert plan(1, [crop, jitter, flip]) == [(0, 1, False), (1, 1, False), (2, 1, False)]
    assert plan(2, [jitter, crop, gray]) == [(0, 2, False), (1, 2, False), (2, 1, True)]
    assert plan(2, [crop, jitter, other, flip, gray])[1:] == [
        (1, 1, True),
        (2, 2, False),
        (3, 2, False),
        (4, 1, True),
    ]
    resized = RandomAppliedTrans([jitter, Resize(48), jitter, Resize(32)], p=0.5)
    assert not any(is_frames for _, _, is_frames in plan(2, [crop, resized]))
    assert plan(3, [SharedTrans([crop, jitter]), gray]) == [(0, 1, False), (1, 1, False), (2, 1, True)]


def test_the_size_of_a_view_is_known_beforehand() -> None:
    assert ViewGroup(1, [Resize(256), CenterCrop(224), Normalize()]).size == (224, 224)
    assert ViewGroup(1, [RandomResizedCrop([32, 48]), Resize(64)]).size == (64, 96)
    assert ViewGroup(1, [RandomAppliedTrans([RandomResizedCrop(64)], p=0.5), CenterCrop(64)]).size == (64, 64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomGrayscale(p=1.5), "between 0 and 1"),
        (lambda: RandomResizedCrop(0), "at least 1"),
        (lambda: RandomResizedCrop(224, scale=(1.0, 0.2)), "scale must be"),
        (lambda: Resize(224, interpolation="nearest"), "bilinear"),
        (lambda: RandomRotation(-1), "degrees must be 0 or more"),
        (lambda: RandomRotation([3, 2]), "degrees must be"),
        (lambda: ColorJitter(hue=0.7), "hue must lie"),
        (lambda: ColorJitter(brightness=-1.0), "brightness must lie"),
        (lambda: GaussianBlur(2.0, 0.1), "sigma_min"),
        (lambda: Solarization(300), "threshold"),
        (lambda: Normalize(std=(1.0, 0.0, 1.0)), "above 0"),
        (lambda: ViewGroup(1, [RandomHorizontalFlip()]), "different sizes"),
        (lambda: ViewGroup(1, [Resize(256)]), "different sizes"),
        (lambda: ViewGroup(1, [RandomResizedCrop(224, p=0.5)]), "different sizes"),
        (lambda: ViewGroup(1, [RandomAppliedTrans([RandomResizedCrop(224)], p=0.5)]), "different sizes"),
        (lambda: ViewGroup(1, [CenterCrop(8), Normalize(), RandomGrayscale()]), "last"),
        (lambda: ViewGroup(1, [CenterCrop(8), RandomAppliedTrans([Normalize()])]), "once"),
        (lambda: ViewGroup(1, [CenterCrop(8), GaussianBlur(0.1, 2.0)]), "too small"),
        (lambda: ViewGroup(0, [CenterCrop(8)]), "num_views"),
    ],
)
def test_what_a_user_gets_wrong(make: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()  # type: ignore[operator]
