"""The exact stage as a GPU runs it: DALI's crops in, `write_views` for the rest, out the bits of the torch forms.

Without a GPU the stage takes that path on CPU tensors, with interpreted kernels or their reference.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from view_cases import byol, moco

import sslkernels.views
from fidelity_cases import decoded, exact_views, geometric_steps, graph_views, sizes
from sslkernels.device import INTERPRETED
from sslrun.data import split
from sslrun.data.exact import ExactStage
from sslrun.data.graph import Arguments, view_arguments
from sslrun.data.loader import Loader
from sslrun.data.order import Sequential
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.transforms import (
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    Normalize,
    Numbers,
    RandomCrop,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    SharedTrans,
    Solarization,
    Transform,
)
from sslrun.data.views import ViewGroup

CUDA = torch.device("cuda")


class Erased(Transform, listed=False):
    """A transform of a user's own: it depends on the position, and only torch knows it."""

    def torch_block(self, x: Tensor, numbers: Numbers) -> Tensor:
        x[:, :, :8, :5] = 0.0
        return x


@pytest.fixture(params=[33, *(pytest.param(side, marks=pytest.mark.nightly) for side in (34, [40, 57]))])
def side(request: pytest.FixtureRequest) -> int | list[int]:
    """Height and width of the views in pixels."""
    return request.param


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> list[torch.dtype]:
    """The stage takes a GPU's path; what each call of `write_views` writes."""
    called: list[torch.dtype] = []
    write = sslkernels.views.write_views

    def counted(out: Tensor, *rest: object) -> None:
        called.append(out.dtype)
        write(out, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(sslkernels.views, "write_views", counted)
    if device.type == "cpu":
        monkeypatch.setattr(ExactStage, "_is_gpu", property(lambda stage: True))
        monkeypatch.setattr(split, "compiled_code", lambda device: "Triton")
    return called


def arguments_of(groups: list[ViewGroup], count: int = 2) -> Arguments:
    return view_arguments(groups, 1, 0, np.arange(count), sizes()[:count])


def crops_after(groups: list[ViewGroup], arguments: Arguments, done: Sequence[int]) -> list[list[Tensor]]:
    """What DALI would make of the photographs: for each group one tensor (B, h, w, 3) for each view."""
    result = []
    for group, own, steps in zip(groups, arguments, done, strict=True):
        stage = ExactStage([ViewGroup(group.num_views, group.steps[:steps])], torch.device("cpu"), compiled=False)
        images = [torch.from_numpy(pixels.copy()) for pixels in decoded()[: len(own[0].apply) // group.num_views]]
        views = stage([images], [own[:steps]])[0].mul(255).round().to(torch.uint8)
        result.append(list(views.permute(0, 2, 3, 1).contiguous().chunk(group.num_views)))
    return result


def in_torch(
    groups: list[ViewGroup], crops: list[list[Tensor]], arguments: Arguments, done: Sequence[int]
) -> list[Tensor]:
    """By the path of a CPU without a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExactStage, "_is_gpu", property(lambda stage: False))
        return ExactStage(groups, torch.device("cpu"), dali_steps=done, compiled=False)(crops, arguments)


def check(
    groups: list[ViewGroup], device: torch.device, dtype: torch.dtype = torch.float32, done: Sequence[int] = ()
) -> None:
    arguments, done = arguments_of(groups), done or geometric_steps(groups)
    crops = crops_after(groups, arguments, done)
    expected = in_torch(groups, crops, arguments, done)
    stage = ExactStage(groups, device, dali_steps=done, dtype=dtype)
    views = stage([[view.to(device) for view in own] for own in crops], arguments)
    for one, other in zip(views, expected, strict=True):
        assert one.dtype == dtype and one.device.type == device.type
        assert one.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(one.cpu(), other.to(dtype))


def multi_crop() -> list[ViewGroup]:
    """Two groups of views, one with the flip in front and one with the flip at the end."""
    return [
        ViewGroup(2, [RandomResizedCrop(40), *moco(), Normalize()]),
        ViewGroup(3, [RandomResizedCrop([33, 36], (0.05, 0.14)), *byol(), Normalize()]),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_groups_colors_are_one_call_for_all_its_views(device, runs, dtype):
    check(multi_crop(), device, dtype)
    assert runs == [dtype, dtype]


@pytest.mark.parametrize("place", range(4))
def test_a_users_own_step_is_done_by_torch_and_the_others_by_the_kernels(device, runs, place, side):
    steps: list[Transform] = [ColorJitter(0.4, 0.4, 0.4, 0.1), RandomHorizontalFlip(), Solarization(p=0.5)]
    steps.insert(place, Erased(p=0.7))
    check([ViewGroup(2, [CenterCrop(side), *steps, Normalize()])], device, torch.bfloat16)
    last = [] if place == 3 else [torch.bfloat16]
    assert runs == ([] if place == 0 else [torch.uint8]) + last


def test_two_contrasts_and_two_blurs_are_two_calls(device, runs, side):
    check([ViewGroup(2, [CenterCrop(side), *moco(), *byol(), Normalize()])], device)
    assert runs == [torch.uint8, torch.float32]


def test_a_change_of_shape_after_colors_is_made_image_by_image(device, runs, side):
    steps = [CenterCrop(100), RandomGrayscale(0.3), RandomRotation(30), RandomCrop(side), *moco()]
    check([ViewGroup(2, [*steps, Normalize()])], device)
    assert runs == [torch.float32]


def test_views_that_share_what_dali_did_come_from_one_crop(device, runs, side):
    groups = [ViewGroup(3, [SharedTrans([CenterCrop(side), RandomHorizontalFlip()]), *moco(), Normalize()])]
    arguments, done = arguments_of(groups), [2]
    crops = [crops_after(groups, arguments, done)[0][:1]]
    expected = in_torch(groups, crops, arguments, done)[0]
    views = ExactStage(groups, device, dali_steps=done)([[own.to(device) for own in crops[0]]], arguments)[0]
    assert torch.equal(views.cpu(), expected) and runs == [torch.float32]
    assert not torch.equal(views[:2], views[2:4]), "the colors are each view's own"


def test_where_dali_does_all_steps_the_kernel_normalizes(device, runs, side):
    group = ViewGroup(2, [CenterCrop(side), Solarization(p=0.5), RandomHorizontalFlip(), Normalize()])
    check([group], device, torch.bfloat16, done=[3])
    assert runs == [torch.bfloat16]


def test_images_of_their_own_tensors(device, runs, side):
    """Decoded images that need no crop and come one by one."""
    groups = [ViewGroup(2, [CenterCrop(side), GaussianBlur(), Normalize()])]
    arguments = arguments_of(groups)
    crops = crops_after(groups, arguments, [1])
    singles = [[image.clone() for view in crops[0] for image in view]]
    views = ExactStage(groups, device, dali_steps=[1])([[i.to(device) for i in singles[0]]], arguments)[0]
    assert torch.equal(views.cpu(), in_torch(groups, crops, arguments, [1])[0])


@pytest.mark.skipif(INTERPRETED, reason="photographs of their size, and the reference shows the path")
def test_behind_a_graph_of_dalis_operators(runs, device):
    if device.type != "cpu":
        pytest.skip("the graph of the CPU")
    groups = multi_crop()
    arguments = view_arguments(groups, 0, 0, np.arange(8), sizes())
    views = graph_views(groups, arguments, geometric_steps(groups))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExactStage, "_is_gpu", property(lambda stage: False))
        patch.setattr(split, "compiled_code", lambda device: None)
        expected = graph_views(groups, arguments, geometric_steps(groups))
        whole = exact_views(groups, arguments)
    for one, other, own in zip(views, expected, whole, strict=True):
        assert np.array_equal(one, other)
        assert np.abs(one.astype(int) - own).mean() < 2.0  # DALI's resize
    assert len(runs) == 2


def test_what_a_user_is_told(side):
    mine = ViewGroup(2, [RandomResizedCrop(side), ColorJitter(0.4), Erased(), RandomHorizontalFlip(), Normalize()])
    assert split.paths(mine, "exact", CUDA) == (
        "DALI: RandomResizedCrop; Triton: ColorJitter; torch: Erased; Triton: RandomHorizontalFlip, normalize"
    )
    told = "no kernel does Erased: torch does, in a launch for each operator"
    assert split.fallbacks(mine, "exact", CUDA) == [told]
    turned = ViewGroup(1, [CenterCrop(side), RandomGrayscale(), RandomRotation(10), Solarization()])
    assert split.paths(turned, "exact", CUDA) == (
        "DALI: CenterCrop; torch: RandomGrayscale, RandomRotation; Triton: Solarization, normalize"
    )
    assert "no kernel does RandomGrayscale, RandomRotation" in split.fallbacks(turned, "exact", CUDA)[0]
    for group in multi_crop():
        assert split.fallbacks(group, "exact", CUDA) == []


@pytest.mark.gpu
@pytest.mark.parametrize("augment", ["auto", "dali"])
def test_a_loader_gives_channels_last_bfloat16(images, augment):
    """The views of the loader on a GPU are those of the CPU but for DALI's crops and the rounding."""
    source = ImageFolder(str(images))
    source.open()
    options = {"sampler": Sequential(len(source)), "seed": 0, "batch_size": 8}
    cursor = [(0, np.arange(8))]
    loader = Loader(source, multi_crop(), device="cuda", augment=augment, dtype=torch.bfloat16, **options)
    (batch,) = loader.run(cursor)
    (expected,) = Loader(source, multi_crop(), augment="exact", **options).run(cursor)
    assert loader.augment == ("exact" if augment == "auto" else "dali")
    for view, other in zip(batch.views, expected.views, strict=True):
        assert view.dtype == torch.bfloat16 and view.is_contiguous(memory_format=torch.channels_last)
        assert (view.float().cpu() - other).abs().mean() * 255 * 0.226 < 4.0  # levels


@pytest.mark.gpu
def test_the_stage_waits_for_nothing():
    groups = multi_crop()
    arguments, done = arguments_of(groups), geometric_steps(groups)
    crops = [[view.cuda() for view in own] for own in crops_after(groups, arguments, done)]
    stage = ExactStage(groups, CUDA, dali_steps=done, dtype=torch.bfloat16)
    stage(crops, arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stage(crops, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
