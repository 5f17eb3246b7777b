"""The dali mode: its distance from PIL on photographs, how many operators a graph has, what of the draws reaches a GPU,
and that nothing but the draws decides a single bit."""

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import fidelity_cases
import small_run
from fidelity_cases import (
    CASES,
    Case,
    Graph,
    blur_as_torchvision,
    changed,
    exact_views,
    geometric_steps,
    graph_views,
    measure,
    operators,
    recipe,
    sizes,
)
from sslrun.config import Config, load
from sslrun.data import pil_twins
from sslrun.data.graph import Arguments, dali_views, graph_arguments, graph_plan, num_inputs, view_arguments
from sslrun.data.transforms import (
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    Numbers,
    RandomGrayscale,
    RandomHorizontalFlip,
    Solarization,
    Transform,
)
from sslrun.data.transforms.color_jitter import NAMES, hue
from sslrun.data.views import ViewGroup

GROUPS = [ViewGroup(2, recipe(48)), ViewGroup(1, recipe(33, (0.05, 0.14)))]


def arguments_of(groups: list[ViewGroup], positions: np.ndarray | None = None) -> Arguments:
    positions = np.arange(8) if positions is None else positions
    return view_arguments(groups, 0, 0, positions, sizes()[positions])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_error_against_pil(case: Case) -> None:
    error, _ = measure(case, "dali", num_views=2)
    assert error.mean <= case.dali.mean and error.p99 <= case.dali.p99 and error.most <= case.dali.most, error


def views_of(config: Config) -> list[ViewGroup]:
    """The views of a recipe without normalization, which is not DALI's."""
    groups = config.build(list[ViewGroup], "data.views")
    return [ViewGroup(group.num_views, [t for t in group.transforms if t.steps()]) for group in groups]


@cache
def shipped() -> dict[str, list[ViewGroup]]:
    """The views of the shipped recipes, each kind once."""
    configs = map(load, sorted((small_run.ROOT / "configs/selfsup").rglob("*.toml")))
    kinds = {json.dumps(config.values["data"]["views"]): config for config in configs}
    return {config.name: views_of(config) for config in kinds.values()}


def assert_within_the_bound(groups: list[ViewGroup]) -> None:
    """Mean 1, p99 4, in each group of views."""
    arguments = arguments_of(groups)
    twins = pil_twins.views(fidelity_cases.decoded(), groups, arguments, {GaussianBlur: blur_as_torchvision})
    for own, other in zip(graph_views(groups, arguments), twins, strict=True):
        error = np.abs(own.astype(np.int16) - other)
        assert error.mean() <= 1 and np.percentile(error, 99) <= 4, (error.mean(), np.percentile(error, 99))


@pytest.mark.parametrize("jitter", [(0.4, 0.4, 0.2, 0.1), (0.4, 0.4, 1.0, 0.5), (0.8, 0.8, 0.8, 0.2)], ids=str)
def test_the_strongest_jitters_of_shipped_recipes_stay_within_the_bound(jitter: tuple[float, ...]) -> None:
    assert_within_the_bound([ViewGroup(2, [CenterCrop(224), ColorJitter(*jitter)])])


def without_cuts(x: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """A jitter of one image whose results become bytes before the hue, after it and at the end, and nowhere else."""
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    for operation in numbers["order"].tolist():
        factor = float(numbers["factors"][operation])
        gray = (x * luma).sum(1, keepdim=True)
        if NAMES[operation] == "hue":
            x = x.clamp(0.0, 255.0).floor()
            hue(x, torch.full((1, 1, 1, 1), factor))
        else:
            center = {"brightness": torch.zeros(1), "contrast": gray.mean(), "saturation": gray}[NAMES[operation]]
            x = center + factor * (x - center)
    return x.clamp(0.0, 255.0).floor()


@pytest.mark.parametrize("strength", [0.4, 0.8])
def test_one_matrix_for_several_operations_would_break_the_bound(strength: float) -> None:
    jitter = ColorJitter(strength, strength, strength, strength / 4)
    groups = [ViewGroup(2, [CenterCrop(224), jitter]), ViewGroup(2, [CenterCrop(224)])]
    arguments = arguments_of(groups)
    numbers = arguments[0][1]
    twins, cut = (torch.from_numpy(views).permute(0, 3, 1, 2).float() for views in exact_views(groups, arguments))
    other = torch.cat([without_cuts(cut[row : row + 1], numbers.rows(row)) for row in range(16)])
    assert np.percentile((other - twins).abs().numpy(), 99) > 4


@pytest.mark.nightly  # half a minute: PIL makes every view of every recipe
def test_every_shipped_recipe_stays_within_the_bound() -> None:
    for groups in shipped().values():
        assert_within_the_bound(groups)
        jitters = [step for group in groups for step in group.steps if isinstance(step, ColorJitter)]
        for jitter in jitters:
            assert_within_the_bound([ViewGroup(2, [CenterCrop(224), jitter])])


@pytest.mark.parametrize("device_id", [None, 0], ids=["cpu", "cuda"])
def test_a_graph_has_few_operators(device_id: int | None) -> None:
    """The executor takes tens of microseconds for each, whatever it does."""
    mocov2, swav = (views_of(load(small_run.ROOT / f"configs/{name}.toml")) for name in ("mocov2", "swav"))
    assert len(operators(mocov2, device_id)) <= 90
    assert len(operators(swav, device_id)) <= 200
    sizes = {name: len(operators(groups, device_id)) for name, groups in shipped().items()}
    assert max(sizes.values()) <= 300, sizes  # iBOT has twelve crops
    assert max(size for name, size in sizes.items() if not name.startswith("ibot")) <= 280  # DINO has ten


def copied_to_the_device(graph: list[Any]) -> list[str]:
    """The inputs that the executor copies from the host for an operator on the GPU. Arguments are not among them."""
    return [
        f"{operator.spec.InputName(place)} for {operator.name}"
        for operator in graph
        if operator._op.device == "gpu"
        for place in range(operator.spec.NumRegularInput())
        if operator.inputs[place].source._op.device == "cpu"
    ]


def test_no_number_is_copied_to_the_gpu() -> None:
    """Operators read their arguments on the host; encoded images enter by the decoder."""
    for groups in shipped().values():
        assert copied_to_the_device(operators(groups, 0)) == []


class Offset(Transform, listed=False):
    """Its number is an operand of arithmetic, not an argument."""

    def numbers(self, uniforms: np.ndarray, sizes: np.ndarray) -> Numbers:
        return Numbers(uniforms[:, 0] < self.p, sizes, {"offset": np.zeros(len(sizes), dtype=np.uint8)})

    def dali_arguments(self, numbers: Numbers) -> dict[str, np.ndarray]:
        return numbers.values

    def dali(self, image: Any, nodes: dict[str, Any]) -> Any:
        return image + nodes["offset"]


def test_a_number_in_arithmetic_would_be_copied() -> None:
    assert len(copied_to_the_device(operators([ViewGroup(2, [CenterCrop(64), Offset()])], 0))) == 2


def test_numbers_that_change_nothing_change_nothing() -> None:
    """Every transform of a recipe at p = 0, image by image and as frames: the graph leaves out no operator for it."""
    colors = [ColorJitter(0.8, 0.8, 0.8, 0.5, p=0.0), RandomGrayscale(p=0.0), GaussianBlur(p=0.0), Solarization(p=0.0)]
    for num_views in (1, 2):
        groups = [ViewGroup(num_views, [CenterCrop(224), *colors]), ViewGroup(num_views, [CenterCrop(224)])]
        views, expected = graph_views(groups, arguments_of(groups))
        assert np.array_equal(views, expected)


def test_frames_are_what_single_views_are() -> None:
    groups = [ViewGroup(2, recipe(48))]
    arguments = arguments_of(groups)
    single = [ViewGroup(1, recipe(48))]
    for view in range(2):
        own = [[numbers.rows(slice(8 * view, 8 * view + 8)) for numbers in arguments[0]]]
        assert np.array_equal(graph_views(groups, arguments)[0][8 * view : 8 * view + 8], graph_views(single, own)[0])


class Negative(Transform, listed=False):
    """A user's own: it takes one image, and decides about each."""

    def torch_block(self, x: torch.Tensor, numbers: Numbers) -> torch.Tensor:
        return 255.0 - x

    def dali_arguments(self, numbers: Numbers) -> dict[str, np.ndarray]:
        return {"apply": numbers.apply}

    def dali(self, image: Any, nodes: dict[str, Any]) -> Any:
        from nvidia.dali import fn

        if nodes["apply"]:
            image = fn.brightness_contrast(image, brightness=-1.0, brightness_shift=1.0)
        return image


def test_frames_become_single_views_for_a_step_that_takes_no_frames() -> None:
    gray, blur = RandomGrayscale(p=0.5), GaussianBlur(p=0.5)
    groups = [ViewGroup(3, [CenterCrop(64), gray, Negative(p=0.5), RandomHorizontalFlip(), gray, blur])]
    arguments = arguments_of(groups)
    assert 0 < arguments[0][2].apply.sum() < 24
    difference = np.abs(graph_views(groups, arguments)[0].astype(int) - exact_views(groups, arguments)[0])
    assert difference.mean() < 0.01 and difference.max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_views_of_a_cpu() -> None:
    """From the same pixels; resize and blur round differently."""
    from nvidia.dali import fn, pipeline_def

    photographs = fidelity_cases.decoded()
    for groups in shipped().values():
        plan = graph_plan(groups, [len(group.steps) for group in groups])
        given = graph_arguments(plan, arguments_of(groups))
        assert len(given) == num_inputs(plan)

        def views(device: str, plan: Any = plan, given: Any = given) -> Any:
            images = fn.external_source(source=lambda: photographs, batch=True, layout="HWC", device=device)
            return tuple(dali_views(images, plan, lambda: given))

        results = []
        for device, device_id in (("cpu", None), ("gpu", 0)):
            options = {"num_threads": 1, "device_id": device_id, "exec_dynamic": True}
            pipeline = pipeline_def(enable_conditionals=True)(views)(device, batch_size=8, **options)
            pipeline.build()
            results.append([np.stack([np.asarray(image) for image in out.as_cpu()]) for out in pipeline.run()])
        for one, other in zip(*results, strict=True):
            error = np.abs(one.astype(np.int16) - other)
            assert error.mean() <= 0.5 and np.percentile(error, 99) <= 2


@pytest.fixture(scope="module")
def graph() -> Graph:
    return Graph(GROUPS)


@pytest.mark.parametrize("rows", [slice(0, 3), slice(5, 6), slice(None, None, -1)], ids=str)
def test_neighbors_and_place_in_the_batch_decide_no_bit(graph: Graph, rows: slice) -> None:
    positions = np.arange(8)[rows]
    part = graph.views(arguments_of(GROUPS, positions), rows)
    for group, one, other in zip(GROUPS, graph.views(arguments_of(GROUPS)), part, strict=True):
        assert np.array_equal(one[np.concatenate([positions + 8 * v for v in range(group.num_views)])], other)


def test_threads_decide_no_bit_and_numbers_do(graph: Graph) -> None:
    arguments = arguments_of(GROUPS)
    expected = graph.views(arguments)
    for one, other in zip(expected, Graph(GROUPS, num_threads=3).views(arguments), strict=True):
        assert np.array_equal(one, other)
    row = int(np.flatnonzero(arguments[0][1].apply)[0])
    factors = arguments[0][1]["factors"].copy()
    factors[row] += (0.05, 0.05, 0.05, 3)
    other = graph.views(changed(arguments, 0, 1, factors=factors))[0]
    assert np.flatnonzero((other != expected[0]).any(axis=(1, 2, 3))).tolist() == [row]


def test_a_graph_that_stops_at_geometry_leaves_the_rest_to_the_stage() -> None:
    """As on a GPU in exact mode: only the resize differs from the exact mode of the CPU."""
    arguments = arguments_of(GROUPS)
    for one, other in zip(
        graph_views(GROUPS, arguments, geometric_steps(GROUPS)), exact_views(GROUPS, arguments), strict=True
    ):
        assert 0 < np.abs(one.astype(int) - other).mean() < 0.3
    cut = [ViewGroup(1, [CenterCrop(64), RandomHorizontalFlip(), ColorJitter(0.4, 0.4, 0.4, 0.1)])]
    arguments = arguments_of(cut)
    assert np.array_equal(graph_views(cut, arguments, geometric_steps(cut))[0], exact_views(cut, arguments)[0])
