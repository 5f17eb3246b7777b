"""Views that share draws and views that know their number: Relative-Loc's nine patches, longhand, in both modes."""

import numpy as np
import pytest
from PIL import Image

from fidelity_cases import decoded, exact_views, geometric_steps, graph_views, sizes
from sslrun.data import pil_twins
from sslrun.data.graph import graph_plan, num_inputs, view_arguments
from sslrun.data.transforms import (
    CenterCrop,
    ColorJitter,
    RandomAppliedTrans,
    RandomCrop,
    RandomGrayscale,
    RandomGridPatch,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
    SharedTrans,
    Solarization,
)
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError
from sslrun.randomness import uniforms


def patches() -> ViewGroup:
    shared = SharedTrans([Resize(292), RandomCrop(255)])
    return ViewGroup(9, [shared, RandomGridPatch(64), SharedTrans([RandomGrayscale(p=0.66)])])


def longhand(seed: int, position: int) -> list[np.ndarray]:
    """The nine patches of a photograph with PIL, (64, 64, 3) uint8 each, from the draws themselves."""
    # Draws of view v: gate, Resize's, RandomCrop's three; patch: p, (view), y, x; gate, gray's.
    draws = [uniforms(seed, 0, np.array([position]), view, 11)[0] for view in range(9)]
    image = Image.fromarray(decoded()[position])
    short = min(image.size)
    width, height = (292 if side == short else int(292 * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    top, left = int(draws[0][3] * (height - 255 + 1)), int(draws[0][4] * (width - 255 + 1))
    image = image.crop((left, top, left + 255, top + 255))
    if draws[0][10] < 0.66:
        image = image.convert("L").convert("RGB")
    cut = []
    for view in range(9):
        row, column = divmod(view, 3)
        y = 85 * row + int(draws[view][7] * 22)
        x = 85 * column + int(draws[view][8] * 22)
        cut.append(np.asarray(image.crop((x, y, x + 64, y + 64))))
    return cut


@pytest.mark.parametrize(
    ("make", "mean", "most"), [(exact_views, 0.02, 1), (graph_views, 0.25, 4)], ids=["exact", "dali"]
)
def test_patches_are_the_longhand_ones(make, mean, most):
    group = patches()
    views = make([group], view_arguments([group], 3, 0, np.arange(8), sizes()))[0].reshape(9, 8, 64, 64, 3)
    expected = np.stack([longhand(3, position) for position in range(8)], axis=1)
    difference = np.abs(views.astype(int) - expected)
    assert difference.mean() <= mean and difference.max() <= most
    is_gray = (views == views[..., :1]).all(axis=(0, 2, 3, 4))  # whole images, or not at all
    assert 0 < is_gray.sum() < 8 and not (views == views[..., :1]).all(axis=(2, 3, 4))[:, ~is_gray].any()


def test_the_graph_that_stops_at_geometry_gives_the_same_patches():
    group = patches()
    arguments = view_arguments([group], 3, 0, np.arange(8), sizes())
    difference = np.abs(
        graph_views([group], arguments, geometric_steps([group]))[0].astype(int) - exact_views([group], arguments)[0]
    )
    assert difference.mean() <= 0.25 and difference.max() <= 4


def test_what_views_share_is_done_once(monkeypatch):
    calls = []
    resize = Resize.torch_image
    monkeypatch.setattr(Resize, "torch_image", lambda *arguments: calls.append(1) or resize(*arguments))
    group = patches()
    exact_views([group], view_arguments([group], 0, 0, np.arange(8), sizes()))
    assert len(calls) == 8
    plan = graph_plan([group], geometric_steps([group]))
    assert [list(step.layouts) for step in plan[0].steps] == [
        ["from", "until", "size"],
        ["start", "size"],
        ["start", "size"],
    ]
    assert num_inputs(plan) == 3 + 2 + 9 * 2


@pytest.mark.parametrize("done", range(5))
def test_views_that_share_their_first_steps_are_equal_wherever_dali_stops(done):
    """DALI stops before, within and after the steps that the three views share; crops of one size and of several."""
    head = [CenterCrop(64), RandomHorizontalFlip()]
    for tail in ([Solarization(p=0.5)], [RandomCrop(40), Solarization(p=0.5)]):
        groups = [ViewGroup(3, [SharedTrans([*head, RandomGrayscale(0.5)]), *tail]), ViewGroup(1, [CenterCrop(40)])]
        arguments = view_arguments(groups, 0, 0, np.arange(8), sizes())
        for one, other in zip(graph_views(groups, arguments, [done, 0]), exact_views(groups, arguments), strict=True):
            assert np.abs(one.astype(int) - other).max() <= (1 if done > 2 else 0)  # DALI's gray


def test_shared_draws_are_equal_and_others_are_not():
    shared = SharedTrans([RandomCrop(20), ColorJitter(0.4, p=0.5)])
    group = ViewGroup(3, [shared, RandomHorizontalFlip(), SharedTrans([Solarization(p=0.5)], p=0.5), Resize([8, 9])])
    sizes = np.tile((30, 40), (50, 1))
    numbers = view_arguments([ViewGroup(2, [CenterCrop(8)]), group], 1, 2, np.arange(50), sizes)[1]
    for step, own in enumerate(numbers):
        for name, values in {"apply": own.apply, "size": own.size, **own.values}.items():
            apart = values.reshape(3, 50, -1)
            assert (apart == apart[:1]).all() == ((step, name) != (2, "apply")), (step, name)
    starts = numbers[0]["start"][:50]
    assert len(np.unique(starts, axis=0)) > 30, "images share nothing with each other"
    assert 5 < numbers[3].apply[:50].sum() < 25
    draws = uniforms(1, 2, np.arange(50), 2, group.num_draws)  # of the group's first view, the third of all
    assert np.array_equal(starts, np.floor(draws[:, 2:4] * (11, 21)))


def test_patches_fill_their_cells_and_stay_in_them():
    count = 4000
    numbers = view_arguments([patches()], 0, 0, np.arange(count), np.tile((292, 400), (count, 1)))
    starts = numbers[0][2]["start"].reshape(9, count, 2)
    for view in range(9):
        low = np.array(divmod(view, 3)) * 85
        offsets = starts[view] - low
        for axis in range(2):
            assert set(offsets[:, axis]) == set(range(22))  # 0 to 85 - 64
        assert abs(np.corrcoef(offsets.T)[0, 1]) < 0.06
    crops = numbers[0][1]["start"].reshape(9, count, 2)
    assert (crops == crops[0]).all() and set(crops[0, :, 0]) == set(range(38)) and crops[0, :, 1].max() == 145


@pytest.mark.parametrize(
    ("entering", "allowed"),
    [((100, 100), (range(37), range(37))), ((64, 70), (range(1), range(7))), ((40, 90), (range(-12, -11), range(27)))],
)
def test_random_crop(entering, allowed):
    numbers = RandomCrop(64).numbers(uniforms(0, 0, np.arange(2000), 0, 3), np.tile(entering, (2000, 1)))
    assert [set(numbers["start"][:, axis]) for axis in range(2)] == [set(values) for values in allowed]
    assert (numbers.size == 64).all() and numbers.apply.all()
    kept = RandomCrop(64, p=0.0).numbers(uniforms(0, 0, np.arange(5), 0, 3), np.tile(entering, (5, 1)))
    assert not kept.apply.any() and not kept["start"].any() and (kept.size == entering).all()


def test_both_modes_agree_with_pil_where_more_is_shared():
    """Sharing at the head, in the middle, with a probability; a group without sharing beside it."""
    colors = RandomAppliedTrans([ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    head = [SharedTrans([CenterCrop(200), RandomHorizontalFlip()], p=0.5), RandomResizedCrop(48), RandomGrayscale(0.3)]
    groups = [ViewGroup(4, [*head, SharedTrans([colors], p=0.7)]), ViewGroup(1, [CenterCrop(40)])]
    arguments = view_arguments(groups, 0, 0, np.arange(8), sizes())
    expected = pil_twins.views(decoded(), groups, arguments)
    for make, mean in ((exact_views, 0.04), (graph_views, 0.4)):
        for views, twin in zip(make(groups, arguments), expected, strict=True):
            assert np.abs(views.astype(int) - twin).mean() <= mean


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ViewGroup(8, [CenterCrop(255), RandomGridPatch(64)]), "num_views is 8, but RandomGridPatch has 9"),
        (lambda: ViewGroup(9, [CenterCrop(180), RandomGridPatch(64)]), "do not fit into 3 x 3 cells"),
        (lambda: RandomGridPatch(64, grid=0), "grid must be at least 1"),
        (lambda: ViewGroup(9, [CenterCrop(255), SharedTrans([RandomGridPatch(64)])]), "RandomGridPatch must stand in"),
        (
            lambda: ViewGroup(2, [RandomAppliedTrans([SharedTrans([CenterCrop(8)])], p=1.0)]),
            "SharedTrans must stand in",
        ),
    ],
)
def test_what_a_user_gets_wrong(make, message):
    with pytest.raises(UsageError, match=message):
        make()
