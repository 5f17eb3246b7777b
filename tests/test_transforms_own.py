"""Transforms that a user brings: any one form is enough, in both modes, and no other step pays for it."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fidelity_cases import changed, decoded, exact_views, graph_views, sizes
from sslrun.data import native, pil_twins
from sslrun.data.exact import ExactStage
from sslrun.data.graph import Arguments, view_arguments
from sslrun.data.loader import Loader
from sslrun.data.order import Sequential
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.split import fallbacks, num_dali_steps, paths
from sslrun.data.transforms import (
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    Normalize,
    Numbers,
    RandomAppliedTrans,
    RandomCrop,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    SharedTrans,
    Solarization,
    Transform,
)
from sslrun.data.transforms.base import chain_numbers
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Patch(Transform, listed=False):
    """The numbers of a Cutout: a black patch anywhere. Its own `size` is nobody else's business."""

    num_draws = 3

    def __init__(self, patch: int = 16, p: float = 0.5) -> None:
        super().__init__(p=p)
        self.patch = patch

    def numbers(self, uniforms: np.ndarray, sizes: np.ndarray) -> Numbers:
        start = np.floor(uniforms[:, 1:] * (sizes - self.patch + 1)).astype(np.int32)
        return Numbers(uniforms[:, 0] < self.p, sizes, {"start": start, "size": np.full_like(start, self.patch)})

    def pil(self, image: Image.Image, numbers: Numbers) -> Image.Image:
        (top, left), (height, width) = numbers["start"].tolist(), numbers["size"].tolist()
        image.paste((0, 0, 0), (left, top, left + width, top + height))
        return image


class BlockCutout(Patch, listed=False):
    """The torch form alone."""

    def torch_block(self, x: torch.Tensor, numbers: Numbers) -> torch.Tensor:
        for image, (top, left), (height, width) in zip(x, numbers["start"], numbers["size"], strict=True):
            image[:, top : top + height, left : left + width] = 0
        return x


class DaliCutout(Patch, listed=False):
    """The DALI form alone."""

    def dali(self, image: object, nodes: dict) -> object:
        from nvidia.dali import fn

        if nodes["apply"]:
            image = fn.erase(image, anchor=nodes["start"], shape=nodes["size"], axis_names="HW", fill_value=0)
        return image

    def dali_arguments(self, numbers: Numbers) -> dict[str, np.ndarray]:
        floats = {name: values.astype(np.float32) for name, values in numbers.values.items()}
        return {"apply": numbers.apply, **floats}


class Frame(Transform, listed=False):
    """The numbers of a white frame around the image, which grows."""

    def __init__(self, width: int = 4, p: float = 0.5) -> None:
        super().__init__(p=p)
        self.width = width

    def numbers(self, uniforms: np.ndarray, sizes: np.ndarray) -> Numbers:
        apply = uniforms[:, 0] < self.p
        return Numbers(apply, sizes + 2 * self.width * apply[:, None].astype(np.int32))

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        if size is None or 0 < self.p < 1:
            return None
        return size[0] + 2 * self.width, size[1] + 2 * self.width

    def pil(self, image: Image.Image, numbers: Numbers) -> Image.Image:
        framed = Image.new("RGB", (image.width + 2 * self.width, image.height + 2 * self.width), (255, 255, 255))
        framed.paste(image, (self.width, self.width))
        return framed


class ImageFrame(Frame, listed=False):
    """The torch form alone."""

    def torch_image(self, image: torch.Tensor, numbers: Numbers) -> torch.Tensor:
        return torch.nn.functional.pad(image, (self.width,) * 4, value=255)


class DaliFrame(Frame, listed=False):
    """The DALI form alone."""

    def dali_arguments(self, numbers: Numbers) -> dict[str, np.ndarray]:
        start = np.where(numbers.apply[:, None], -self.width, 0).astype(np.int32)
        return {"start": np.repeat(start, 2, axis=1), "shape": numbers.size.astype(np.int32)}

    def dali(self, image: object, nodes: dict) -> object:
        from nvidia.dali import fn

        return fn.slice(image, nodes["start"], nodes["shape"], axes=[0, 1], out_of_bounds_policy="pad", fill_values=255)


def arguments_of(groups: list[ViewGroup]) -> Arguments:
    return view_arguments(groups, 0, 0, np.arange(8), sizes())


def views_of(groups: list[ViewGroup], augment: str, device: torch.device = CPU) -> list[np.ndarray]:
    """The views by the paths that a loader would take."""
    steps = [num_dali_steps(group, augment, device) for group in groups]
    return graph_views(groups, arguments_of(groups), steps)


@pytest.mark.parametrize("cutout", [BlockCutout, DaliCutout])
@pytest.mark.parametrize("frame", [ImageFrame, DaliFrame])
@pytest.mark.parametrize("augment", ["exact", "dali"])
def test_one_form_is_enough_in_both_modes(cutout: type[Patch], frame: type[Frame], augment: str) -> None:
    """A change of shape before a crop, and a patch after it; what has only DALI's form comes first where forms mix."""
    first = [frame(), CenterCrop(64)]
    if (frame, cutout) == (ImageFrame, DaliCutout):
        with pytest.raises(UsageError, match="put DaliCutout before ImageFrame"):
            views_of([ViewGroup(1, [*first, cutout()])], augment)
        first = [CenterCrop(64)]
    groups = [ViewGroup(2, [*first, cutout(), RandomHorizontalFlip(), Solarization(), Normalize((0, 0, 0), (1, 1, 1))])]
    (views,) = views_of(groups, augment)
    (expected,) = pil_twins.views(decoded(), groups, arguments_of(groups))
    assert np.array_equal(views, expected)
    without = changed(arguments_of(groups), 0, len(first), apply=np.zeros(16, dtype=bool))
    assert not np.array_equal(pil_twins.views(decoded(), groups, without)[0], expected)


@pytest.mark.parametrize("width", [4, 30])
def test_a_change_of_shape_may_come_last_and_in_a_group(width: int) -> None:
    shared = SharedTrans([CenterCrop(40), RandomAppliedTrans([ImageFrame(width, p=1.0)], p=1.0)])
    groups = [ViewGroup(3, [shared, ImageFrame(2, p=1.0)])]
    assert groups[0].size == (44 + 2 * width, 44 + 2 * width)
    expected = pil_twins.views(decoded(), groups, arguments_of(groups))[0]
    for augment in ("exact", "dali"):
        assert np.array_equal(views_of(groups, augment)[0], expected)


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("num_views", [1, 2])
def test_runs_of_c_and_torch_give_the_bits_of_torch(place: int, num_views: int) -> None:
    """A step without a C form in front, in the middle and at the end, with flips on both sides of it."""
    steps: list[Transform] = [
        *(ColorJitter(0.4, 0.4, 0.4, 0.1), RandomHorizontalFlip(), GaussianBlur(), RandomGrayscale(0.3)),
        RandomHorizontalFlip(),
    ]
    steps.insert(place, BlockCutout(p=0.7))
    groups = [ViewGroup(num_views, [RandomResizedCrop(50), *steps, Normalize()])]
    images = [[torch.from_numpy(pixels.copy()) for pixels in decoded()]]
    (in_c,), (in_torch,) = (ExactStage(groups, CPU, compiled=c)(images, arguments_of(groups)) for c in (True, False))
    assert torch.equal(in_c, in_torch)


@pytest.mark.parametrize("compiled", [True, False])
def test_flips_stay_on_their_side_of_a_step_that_sees_positions(compiled: bool) -> None:
    steps: list[Transform] = [
        *(CenterCrop(64), Solarization(p=0.5), RandomHorizontalFlip(), BlockCutout(p=1.0)),
        *(RandomGrayscale(0.5), RandomHorizontalFlip()),
    ]
    groups = [ViewGroup(2, steps)]
    arguments = arguments_of(groups)
    (expected,) = pil_twins.views(decoded(), groups, arguments)
    assert np.array_equal(exact_views(groups, arguments, compiled=compiled)[0], expected)


def test_a_step_that_claims_to_ignore_flips_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with the declaration, the flip is done before the patch, which is another image."""
    groups = [ViewGroup(1, [CenterCrop(64), BlockCutout(p=1.0), RandomHorizontalFlip(1.0)])]
    right = exact_views(groups, arguments_of(groups))[0]
    monkeypatch.setattr(BlockCutout, "ignores_flips", True)
    assert not np.array_equal(exact_views(groups, arguments_of(groups), compiled=False)[0], right)


def test_c_does_all_other_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[torch.dtype, int]] = []
    run = native.run

    def counted(program: native.Program, pixels: torch.Tensor, rows: slice, out: torch.Tensor, *rest: Any) -> None:
        ran.append((out.dtype, program.codes.shape[1]))
        run(program, pixels, rows, out, *rest)

    monkeypatch.setattr(native, "run", counted)
    steps: list[Transform] = [ColorJitter(0.4, 0.4, 0.4, 0.1), BlockCutout(), GaussianBlur(), Solarization()]
    groups = [ViewGroup(1, [CenterCrop(224), *steps])]
    exact_views(groups, arguments_of(groups))
    assert set(ran) == {(torch.uint8, 4), (torch.float32, 2)}


def test_a_cutouts_own_size_does_not_change_the_next_crop() -> None:
    cutout, crop = Patch(16), RandomResizedCrop(32)
    uniforms = np.random.default_rng(0).random((50, cutout.num_draws + crop.num_draws))
    entering = np.tile((300, 400), (50, 1))
    patches, crops = chain_numbers([cutout, crop], uniforms, entering)
    (alone,) = chain_numbers([crop], uniforms[:, 3:], entering)
    assert np.array_equal(crops["box"], alone["box"])
    # Negative control: the rule that took any number called `size` for the size of the image.
    (misled,) = chain_numbers([crop], uniforms[:, 3:], patches["size"])
    assert misled["box"].max() <= 16 < crops["box"].max()


class Careless(Patch, listed=False):
    """Fractions, and values beyond the ends: the stage cuts them, as PIL would."""

    def torch_block(self, x: torch.Tensor, numbers: Numbers) -> torch.Tensor:
        return x * 1.7 - 40.0


@pytest.mark.parametrize("last", [True, False])
def test_fractions_and_values_beyond_bytes_are_cut_on_all_paths(last: bool) -> None:
    groups = [ViewGroup(1, [CenterCrop(32), Careless(p=1.0), *([] if last else [RandomGrayscale(0.0)])])]
    plain = exact_views([ViewGroup(1, [CenterCrop(32)])], [arguments_of(groups)[0][:1]])[0]
    expected = np.clip(plain.astype(np.float32) * np.float32(1.7) - np.float32(40), 0, 255).astype(np.uint8)
    for compiled in (True, False):
        assert np.array_equal(exact_views(groups, arguments_of(groups), compiled=compiled)[0], expected)
    before_a_crop = [ViewGroup(1, [Careless(p=1.0), CenterCrop(32)])]
    assert np.array_equal(exact_views(before_a_crop, arguments_of(before_a_crop))[0], expected)


def test_on_a_gpu_crops_and_turns_after_colors_are_made_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, on the CPU: DALI does the leading geometric steps, the stage the rest, in one thread."""
    colors = [ColorJitter(0.4, 0.4, 0.4, 0.1), RandomGrayscale(0.3)]
    groups = [
        ViewGroup(2, [CenterCrop(64), RandomHorizontalFlip(), *colors, RandomRotation(30), RandomCrop(48)]),
        ViewGroup(2, [Solarization(), SharedTrans([CenterCrop(40)])]),
        ViewGroup(1, [RandomHorizontalFlip(), CenterCrop(32), *colors]),
    ]
    expected = exact_views(groups, arguments_of(groups))
    assert [num_dali_steps(group, "exact", CUDA) for group in groups] == [2, 0, 2]
    monkeypatch.setattr(ExactStage, "_is_gpu", property(lambda stage: True))
    for one, other in zip(views_of(groups, "exact", CUDA), expected, strict=True):
        assert np.array_equal(one, other)


def test_how_the_work_is_split() -> None:
    crop, colors = RandomResizedCrop(64), [ColorJitter(0.4), RandomGrayscale()]
    flip = RandomHorizontalFlip()

    def line(*steps: Transform, augment: str = "exact", device: torch.device = CPU) -> str:
        return paths(ViewGroup(2, list(steps)), augment, device)

    names = "ColorJitter, RandomGrayscale, RandomHorizontalFlip"
    assert line(crop, *colors, flip) == f"C: RandomResizedCrop, {names}, normalize"
    assert line(crop, *colors, flip, augment="dali") == f"DALI: RandomResizedCrop, {names}; C: normalize"
    assert line(crop, flip, *colors, device=CUDA) == (
        "DALI: RandomResizedCrop, RandomHorizontalFlip; Triton: ColorJitter, RandomGrayscale, normalize"
    )
    assert line(crop, *colors, BlockCutout(), flip, Normalize()) == (
        "C: RandomResizedCrop, ColorJitter, RandomGrayscale; torch: BlockCutout; C: RandomHorizontalFlip, normalize"
    )
    assert line(crop, *colors, BlockCutout(), flip, augment="dali", device=CUDA) == (
        "DALI: RandomResizedCrop, ColorJitter, RandomGrayscale; torch: BlockCutout; "
        "Triton: RandomHorizontalFlip, normalize"
    )
    assert line(crop, DaliCutout(), *colors) == (
        "DALI: RandomResizedCrop, DaliCutout; C: ColorJitter, RandomGrayscale, normalize"
    )
    assert line(*colors, crop) == "torch: ColorJitter, RandomGrayscale; C: RandomResizedCrop, normalize"


def test_the_user_is_told_once_where_a_mode_is_left(
    images: object, tmp_path: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path))
    source = ImageFolder(str(images))
    source.open()
    groups = [ViewGroup(1, [RandomResizedCrop(24), BlockCutout(8), RandomHorizontalFlip()])]
    options = {"sampler": Sequential(len(source)), "seed": 0, "batch_size": 8}
    with caplog.at_level(logging.INFO, "sslrun"):
        loaders = [Loader(source, groups, augment="dali", **options) for _ in range(2)]  # type: ignore[arg-type]
    text = "BlockCutout has no DALI operators: torch does BlockCutout, RandomHorizontalFlip"
    assert [record.message for record in caplog.records] == [f"data.views.0, dali mode: {text}"]
    (batch,) = loaders[0].run([(0, np.arange(8))])
    (exact,) = Loader(source, groups, augment="exact", **options).run([(0, np.arange(8))])  # type: ignore[arg-type]
    assert 0 < (batch.views[0] - exact.views[0]).abs().mean() < 0.25 / 255 * 4  # DALI's resize
    assert fallbacks(groups[0], "exact", CPU) == []
    only_dali = ViewGroup(1, [RandomResizedCrop(24), DaliCutout(8), Solarization()])
    told = "DaliCutout has DALI operators only: DALI does RandomResizedCrop, DaliCutout"
    assert fallbacks(only_dali, "exact", CPU) == [told] and fallbacks(only_dali, "dali", CPU) == []


class Sizeless(BlockCutout, listed=False):
    """States something that is no size."""

    def numbers(self, uniforms: np.ndarray, sizes: np.ndarray) -> Numbers:
        return Numbers(uniforms[:, 0] < self.p, np.array(self.patch))


class Liar(ImageFrame, listed=False):
    """States the size that entered."""

    def numbers(self, uniforms: np.ndarray, sizes: np.ndarray) -> Numbers:
        return Numbers(uniforms[:, 0] < self.p, sizes)


class Bent(Patch, listed=False):
    """A block form that changes the shape."""

    def torch_block(self, x: torch.Tensor, numbers: Numbers) -> torch.Tensor:
        return x[..., 1:]


@pytest.mark.parametrize(
    ("steps", "augment", "message"),
    [
        ([Patch()], "exact", "Patch has no form: give it a method torch_block, torch_image or dali"),
        ([Patch()], "dali", "Patch has no form"),
        ([BlockCutout(), DaliCutout()], "exact", "BlockCutout has no DALI operators and DaliCutout has nothing else"),
        ([BlockCutout(), Solarization(), DaliCutout()], "dali", "put DaliCutout before BlockCutout, give BlockCutout"),
        ([Sizeless()], "exact", r"Sizeless.numbers gives apply of shape \(8,\) and size of shape \(\)"),
        ([Liar(p=1.0), CenterCrop(32)], "exact", r"Liar.torch_image makes an image of \(1, 3, 40, 40\), but .* 32, 32"),
        ([Bent(p=1.0)], "exact", "Bent.torch_block makes .* what changes the shape is a torch_image"),
    ],
)
def test_what_a_user_gets_wrong(steps: list[Transform], augment: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        views_of([ViewGroup(1, [CenterCrop(32), *steps])], augment)


def test_a_file_in_the_folder_is_all_that_a_shipped_transform_needs(tmp_path: Path) -> None:
    engine = Path(__file__).parents[1] / "engine"
    shutil.copytree(engine, tmp_path / "engine", ignore=shutil.ignore_patterns("__pycache__"))
    text = (
        'from sslrun.data.transforms.base import Transform\n\n\nclass Mirrored(Transform):\n    """Of the tests."""\n'
    )
    (tmp_path / "engine/sslrun/data/transforms/mirrored.py").write_text(text)
    ask = "from sslrun.data.transforms import Transform; print(Transform.registry['Mirrored'].__module__)"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'engine'}:{engine.parent / 'kernels'}"}
    printed = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout == "sslrun.data.transforms.mirrored\n"
