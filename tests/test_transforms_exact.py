"""The exact mode: its distance from PIL on photographs, and that nothing but the draws decides a single bit."""

import platform
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fidelity_cases import CASES, Case, changed, decoded, exact_views, measure, recipe, sizes
from sslrun.data import exact, native, operations, pil_twins
from sslrun.data.exact import ExactStage
from sslrun.data.graph import Arguments, view_arguments
from sslrun.data.transforms import (
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    Normalize,
    Numbers,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    Resize,
    Solarization,
    Transform,
)
from sslrun.data.transforms.gaussian_blur import blur_taps
from sslrun.data.transforms.resampling import Interpolation
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError

CPU = torch.device("cpu")
GROUPS = [ViewGroup(2, [*recipe(64), Normalize()]), ViewGroup(3, [*recipe(33, (0.05, 0.14)), Normalize()])]


def images() -> list[torch.Tensor]:
    return [torch.from_numpy(array.copy()) for array in decoded()]


def arguments_of(groups: list[ViewGroup], positions: np.ndarray | None = None) -> Arguments:
    positions = np.arange(8) if positions is None else positions
    return view_arguments(groups, 0, 0, positions, sizes()[positions])


def exact_floats(groups: list[ViewGroup], **options: object) -> list[torch.Tensor]:
    return stage(groups, images(), arguments_of(groups), **options)


def stage(
    groups: list[ViewGroup], decoded: list[torch.Tensor], arguments: Arguments, **options: object
) -> list[torch.Tensor]:
    return ExactStage(groups, CPU, **options)([decoded] * len(groups), arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_error_against_pil(case: Case) -> None:
    error, _ = measure(case, "exact", num_views=2)
    assert error.mean <= case.exact.mean and error.p99 <= case.exact.p99 and error.most <= case.exact.most, error


def test_the_published_bounds_are_those_of_the_tests() -> None:
    lines = (Path(__file__).parents[1] / "docs" / "fidelity.md").read_text(encoding="utf-8").splitlines()
    cells = {
        row[1].strip(): [cell.strip() for cell in row] for row in (line.split("|") for line in lines) if len(row) > 2
    }
    for case in CASES:
        assert (cells[case.name][3], cells[case.name][7]) == (str(case.exact), str(case.dali))


def test_without_jitter_in_drawn_order_the_bound_is_missed() -> None:
    """Negative control of the table: the same factors in the fixed order are another image."""
    groups = [ViewGroup(2, [CenterCrop(224), ColorJitter(0.4, 0.4, 0.4, 0.1)])]
    arguments = arguments_of(groups)
    fixed = changed(arguments, 0, 1, order=np.sort(arguments[0][1]["order"], axis=1))
    difference = np.abs(exact_views(groups, arguments)[0].astype(int) - exact_views(groups, fixed)[0])
    assert difference.mean() > 0.5


def test_output_is_float_normalized_channels_last_and_view_major() -> None:
    groups = [ViewGroup(2, [Resize(40), CenterCrop([32, 24]), Normalize((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))])]
    view = exact_floats(groups)[0]
    assert view.shape == (16, 3, 32, 24) and view.dtype == torch.float32
    assert view.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(view[:8], view[8:])
    plain = exact_floats([ViewGroup(1, [Resize(40), CenterCrop([32, 24])])])[0]
    expected = (plain - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    assert torch.allclose(view[:8], expected, atol=2e-6)


@pytest.mark.parametrize("options", [{"num_threads": 3}, {"compiled": False}, {"compiled": False, "num_threads": 3}])
def test_threads_and_compiler_decide_no_bit(options: dict) -> None:
    for one, other in zip(exact_floats(GROUPS), exact_floats(GROUPS, **options), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("block", [1, 2**30])
def test_block_size_decides_no_bit(monkeypatch: pytest.MonkeyPatch, compiled: bool, block: int) -> None:
    """A block of all images is what a GPU makes, one image what a large CPU recipe makes."""
    expected = exact_floats(GROUPS)
    monkeypatch.setattr(exact, "_BLOCK_PIXELS", block)
    for one, other in zip(expected, exact_floats(GROUPS, compiled=compiled), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("positions", [np.arange(8)[::-1].copy(), np.array([5]), np.array([1, 6, 3])])
def test_neighbors_and_place_in_the_batch_decide_no_bit(positions: np.ndarray, compiled: bool) -> None:
    own = [images()[i] for i in positions]
    part = stage(GROUPS, own, arguments_of(GROUPS, positions), compiled=compiled)
    for group, one, other in zip(GROUPS, exact_floats(GROUPS), part, strict=True):
        rows = np.concatenate([positions + 8 * view for view in range(group.num_views)])
        assert torch.equal(one[rows], other)


@pytest.mark.parametrize(
    ("step", "name"), [(1, "factors"), (3, "sigma"), (0, "box"), (5, "apply"), (4, "apply"), (2, "apply")]
)
def test_another_number_is_another_image(step: int, name: str) -> None:
    """Negative control of the zero tolerance: one number of one image changes that view, and no other."""
    arguments = arguments_of(GROUPS)
    row = int(np.flatnonzero(arguments[0][1].apply & arguments[0][3].apply)[0])
    numbers = arguments[0][step]
    values = (numbers.apply if name == "apply" else numbers[name]).copy()
    if name == "apply":
        values[row] = ~values[row]
    else:
        values[row] += (0, 0, -1, -1) if name == "box" else 0.05
    other = stage(GROUPS, images(), changed(arguments, 0, step, **{name: values}))[0]
    same = (exact_floats(GROUPS)[0] == other).flatten(1).all(dim=1)
    assert (~same).nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("place", range(5))
def test_a_flip_in_any_place_is_the_same_image(place: int) -> None:
    colors = [ColorJitter(0.4, 0.4, 0.4, 0.1), GaussianBlur(p=1.0), RandomGrayscale(0.3), Normalize()]
    steps: list[Transform] = [CenterCrop(64), *colors]
    unflipped = exact_floats([ViewGroup(1, steps)])[0]
    steps.insert(place + 1, RandomHorizontalFlip(1.0))
    # Draws are counted through the list: a flip in front of a color would shift them.
    (numbers,) = arguments_of([ViewGroup(1, [CenterCrop(64), *colors])])
    numbers.insert(place + 1, Numbers(np.ones(8, dtype=bool), numbers[0].size))
    for compiled in (True, False):
        flipped = stage([ViewGroup(1, steps)], images(), [numbers], compiled=compiled)[0]
        assert torch.equal(flipped, unflipped.flip(-1))
        assert not torch.equal(flipped, unflipped)


def test_two_flips_are_none() -> None:
    steps = [CenterCrop(64), RandomHorizontalFlip(1.0), Solarization(p=1.0), RandomHorizontalFlip(1.0)]
    without = [ViewGroup(1, [CenterCrop(64), Solarization(p=1.0)])]
    assert torch.equal(exact_floats([ViewGroup(1, steps)])[0], exact_floats(without)[0])


@pytest.mark.parametrize("compiled", [True, False])
def test_turns_of_whole_images_between_other_steps_are_pils(compiled: bool) -> None:
    """Images that are not square, before a crop, after a flip and after colors."""
    steps: list[Transform] = [RandomRotation(180), CenterCrop([96, 64]), RandomHorizontalFlip(), Solarization(p=0.5)]
    groups = [ViewGroup(2, [*steps, RandomRotation([80, 100], p=0.5), RandomGrayscale(0.5)])]
    arguments = arguments_of(groups)
    views = exact_views(groups, arguments, compiled=compiled)[0]
    assert np.array_equal(views, pil_twins.views(decoded(), groups, arguments)[0])
    assert (views == 0).all(axis=3).any(), "no corner came in"


def test_order_of_the_list_is_order_of_application() -> None:
    before, after = [Solarization(100, p=1.0), Resize([40, 40])], [Resize([40, 40]), Solarization(100, p=1.0)]
    groups = [ViewGroup(1, before), ViewGroup(1, after)]
    first, second = exact_views(groups, arguments_of(groups))
    for row, array in enumerate(decoded()):
        solarised = Image.fromarray(np.where(array >= 100, 255 - array, array)).resize(
            (40, 40), Image.Resampling.BILINEAR
        )
        assert np.abs(first[row].astype(int) - np.asarray(solarised)).max() <= 1
    assert np.abs(first.astype(int) - second).mean() > 1


@pytest.mark.parametrize("done", [2, 4])
def test_the_rest_after_the_graph_is_the_rest_of_the_whole(done: int) -> None:
    """Steps that were done before, on crops of one size, and the others; with all done, it only normalizes."""
    steps: list[Transform] = [CenterCrop(64), RandomHorizontalFlip(), ColorJitter(0.4, 0.4, 0.4, 0.1), GaussianBlur()]
    groups = [ViewGroup(2, [*steps, Normalize()])]
    arguments = arguments_of(groups)
    crops = torch.from_numpy(exact_views([ViewGroup(2, steps[:done])], [arguments[0][:done]])[0])
    for compiled in (True, False):
        rest = ExactStage(groups, CPU, compiled=compiled, dali_steps=[done])
        assert torch.equal(rest([crops.split(8)], arguments)[0], exact_floats(groups)[0])


def test_every_color_keeps_its_hue_arithmetic() -> None:
    """C and torch agree on all colors of a lattice that holds grays, ties and extremes."""
    levels = torch.tensor([0, 1, 2, 50, 51, 85, 127, 128, 170, 204, 253, 254, 255], dtype=torch.uint8)
    lattice = torch.cartesian_prod(levels, levels, levels).view(13, 169, 3)
    group = [ViewGroup(1, [CenterCrop([13, 169]), ColorJitter(hue=0.5)])]
    size = np.array([[13, 169]])
    whole = Numbers(np.zeros(1, dtype=bool), size)
    for steps in (-127, -1, 0, 1, 85, 127):
        values = {"order": np.array([[3, -1, -1, -1]], dtype=np.int32)}
        values["factors"] = np.array([[1, 1, 1, steps]], dtype=np.float32)
        numbers = [[whole, Numbers(np.ones(1, dtype=bool), size, values)]]
        one, other = (stage(group, [lattice], numbers, compiled=compiled)[0] for compiled in (True, False))
        assert torch.equal(one, other)


def test_blur_weights_are_whole_and_sum_to_a_power_of_two() -> None:
    for taps, total in zip(blur_taps(np.linspace(0.05, 3, 60, dtype=np.float32)), (2**16, 2**12), strict=True):
        assert (taps == np.rint(taps)).all()
        assert (taps[:, 0] + 2 * taps[:, 1:].sum(axis=1) == total).all()


def test_small_views_fill_the_same_block_as_large_ones() -> None:
    """Views whose size is no multiple of anything: the vector loops' tails."""
    groups = [ViewGroup(1, [RandomResizedCrop([37, 91]), *recipe(64)[1:]]), ViewGroup(1, [RandomResizedCrop([9, 10])])]
    for one, other in zip(exact_floats(groups), exact_floats(groups, compiled=False), strict=True):
        assert torch.equal(one, other)


def test_without_a_compiler_torch_does_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = exact_floats(GROUPS)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native, "c_functions", native.c_functions.__wrapped__)
    without = ExactStage(GROUPS, CPU)
    assert without.compiled is None
    assert torch.equal(without([images()] * 2, arguments_of(GROUPS))[0], expected[0])


def test_the_library_is_kept_and_compiled_where_there_is_no_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.c_functions.__wrapped__() is not None
    (kept,) = (tmp_path / "sslrun").iterdir()
    before = kept.stat().st_mtime_ns
    assert native.c_functions.__wrapped__() is not None
    assert kept.stat().st_mtime_ns == before
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert native.c_functions.__wrapped__() is not None


def test_memory_is_used_again_only_when_nobody_holds_it() -> None:
    exact_stage, arguments = ExactStage(GROUPS, CPU), arguments_of(GROUPS)
    held = exact_stage([images()] * 2, arguments)[0][3:5, 1]  # a part of the tensor holds all of it
    copy, address = held.clone(), held.untyped_storage().data_ptr()
    other = exact_stage([[255 - image for image in images()]] * 2, arguments)[0]
    assert other.untyped_storage().data_ptr() != address
    assert torch.equal(held, copy)
    del held
    again = exact_stage([images()] * 2, arguments)[0]
    assert again.untyped_storage().data_ptr() == address
    assert torch.equal(again[3:5, 1], copy)


RESIZED = [  # from, to: shrunk, enlarged, one axis alone, one pixel, beyond a vector's window, the height first
    ((290, 390), (224, 224)),
    ((120, 130), (96, 96)),
    ((40, 30), (97, 131)),
    ((64, 50), (64, 33)),
    ((50, 64), (33, 64)),
    ((1, 1), (5, 7)),
    ((7, 5), (1, 1)),
    ((600, 1300), (61, 90)),
    ((400, 60), (100, 50)),
    ((33, 35), (33, 35)),
]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("flags", [(), ("-mno-avx512f",), ("-march=x86-64",)], ids=["native", "AVX2", "no vectors"])
def test_c_resizes_to_the_bits_of_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: tuple[str, ...], interpolation: Interpolation
) -> None:
    if flags and platform.machine() != "x86_64":
        pytest.skip("flags of another processor")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_FLAGS", native._FLAGS + flags)
    functions = native.c_functions.__wrapped__()
    assert functions is not None
    monkeypatch.setattr(native, "c_functions", lambda: functions)
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (600, 1300, 3), dtype=np.uint8))
    image = torch.cat([noise, (noise >> 7) * 255])  # extremes too: where bicubic leaves the bytes
    for (height, width), to in RESIZED:
        for top, left in ((0, 0), (1200 - height, 1300 - width), (600 - height // 2, 11 % (1301 - width))):
            box = np.array([[top, left, height, width]], dtype=np.int32)
            crop = RandomResizedCrop(list(to), interpolation=interpolation)
            numbers = Numbers(np.ones(1, dtype=bool), np.array([to]), {"box": box})
            expected = crop.torch_image(image.permute(2, 0, 1)[None], numbers.rows(0))
            made = torch.empty(1, *to, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
            native.run(operations.program([], 1), native.Boxes([image], box, interpolation), slice(0, 1), made)
            assert torch.equal(made, expected), ((height, width), to, (top, left))


def test_c_makes_views_from_whole_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The crop that resizes is no step of torch, neither first nor after another crop."""
    groups = [GROUPS[0], ViewGroup(1, [CenterCrop(200), *recipe(64)])]
    expected = exact_floats(groups, compiled=False)

    def fails(*arguments: object) -> None:
        raise AssertionError("torch resizes")

    monkeypatch.setattr(torch.nn.functional, "interpolate", fails)
    for one, other in zip(exact_floats(groups), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("box", [(0, 0, 9, 8), (-1, 0, 4, 4), (0, 5, 4, 4), (2, 2, 0, 4)])
def test_a_box_outside_of_its_image_is_no_read_of_foreign_memory(box: tuple[int, ...]) -> None:
    boxes = native.Boxes([torch.zeros(8, 8, 3, dtype=torch.uint8)], np.array([box], dtype=np.int32), "bilinear")
    made = torch.empty(1, 4, 4, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    with pytest.raises(UsageError, match="is not inside its image of 8x8"):
        native.run(operations.program([], 1), boxes, slice(0, 1), made)


def test_an_image_of_one_column_is_taken_whatever_its_strides() -> None:
    group = [ViewGroup(1, [RandomResizedCrop(4)])]
    column = torch.arange(15, dtype=torch.uint8).view(5, 3).as_strided((5, 1, 3), (3, 7, 1))
    numbers = view_arguments(group, 0, 0, np.arange(1), np.array([[5, 1]]))
    assert torch.equal(*(stage(group, [column], numbers, compiled=compiled)[0] for compiled in (True, False)))
