"""The cases compared with PIL in both modes, with the largest allowed errors: the table of docs/fidelity.md."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from photographs import jpeg, photographs
from sslrun.data import pil_twins
from sslrun.data.exact import ExactStage
from sslrun.data.graph import (
    Arguments,
    dali_views,
    graph_arguments,
    graph_plan,
    outputs_by_group,
    view_arguments,
)
from sslrun.data.split import num_dali_steps
from sslrun.data.transforms import (
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    RandomAppliedTrans,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    Resize,
    Solarization,
    Transform,
)
from sslrun.data.views import ViewGroup


@dataclass(frozen=True)
class Bound:
    """The most that a mode may differ from the twin, in gray levels over all images."""

    mean: float
    p99: int
    most: int

    def __str__(self) -> str:
        return f"{self.mean:g} / {self.p99} / {self.most}"


@dataclass(frozen=True)
class Case:
    """Transforms, the blur to compare with, and a bound for each mode.

    Single operations start from images that were cropped, not resized, so that only their own error is measured.
    """

    name: str
    transforms: Callable[[], list[Transform]]
    exact: Bound
    dali: Bound
    pils_blur: bool = False

    def twins(self, groups: list[ViewGroup], arguments: Arguments) -> list[np.ndarray]:
        """The views of the photographs as torchvision makes them: on PIL images, blurs as its tensor version."""
        instead = {} if self.pils_blur else {GaussianBlur: blur_as_torchvision}
        return pil_twins.views(decoded(), groups, arguments, instead)


def torchvision_blur(image: Image.Image, sigma: float) -> Image.Image:
    """torchvision's tensor version: one two-dimensional kernel, reflected border, rounded once; 31 taps."""
    reach = 15
    distance = torch.arange(-reach, reach + 1, dtype=torch.float64)
    line = torch.exp(-0.5 * (distance / sigma) ** 2)
    line = line / line.sum()
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, None].double()
    x = F.pad(x, (reach,) * 4, mode="reflect")
    x = F.conv2d(F.conv2d(x, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))
    return Image.fromarray(x[:, 0].round().to(torch.uint8).permute(1, 2, 0).numpy())


def blur_as_torchvision(image: Any, numbers: Any) -> Any:
    return torchvision_blur(image, float(numbers["sigma"]))


def recipe(size: int = 224, scale: tuple[float, float] = (0.2, 1.0)) -> list[Transform]:
    """MoCo v2's view with solarisation added."""
    return [
        RandomResizedCrop(size, scale=scale),
        RandomAppliedTrans([ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        RandomGrayscale(0.2),
        GaussianBlur(0.1, 2.0, p=0.5),
        Solarization(p=0.2),
        RandomHorizontalFlip(),
    ]


def _cut(transform: Transform) -> Callable[[], list[Transform]]:
    return lambda: [CenterCrop(224), transform]


CASES = [
    Case("crop, bilinear, 224", lambda: [RandomResizedCrop(224, (0.2, 1.0))], Bound(0.02, 1, 1), Bound(0.25, 1, 16)),
    Case(
        "crop, bicubic, 224",
        lambda: [RandomResizedCrop(224, (0.2, 1.0), interpolation="bicubic")],
        Bound(0.02, 1, 8),
        Bound(0.25, 1, 16),
    ),
    Case("crop, bilinear, 96", lambda: [RandomResizedCrop(96, (0.05, 0.14))], Bound(0.02, 1, 1), Bound(0.25, 1, 16)),
    Case("resize 256, center 224", lambda: [Resize(256), CenterCrop(224)], Bound(0.02, 0, 1), Bound(0.25, 1, 4)),
    Case("flip", _cut(RandomHorizontalFlip()), Bound(0, 0, 0), Bound(0, 0, 0)),
    Case("turn by 45 degrees at most", _cut(RandomRotation(45)), Bound(0, 0, 0), Bound(0.05, 0, 255)),
    Case("brightness", _cut(ColorJitter(brightness=0.4)), Bound(0, 0, 0), Bound(0.02, 1, 1)),
    Case("contrast", _cut(ColorJitter(contrast=0.4)), Bound(0, 0, 0), Bound(0.1, 1, 1)),
    Case("saturation", _cut(ColorJitter(saturation=0.4)), Bound(0, 0, 0), Bound(0.15, 1, 1)),
    Case("hue", _cut(ColorJitter(hue=0.5)), Bound(0.02, 1, 8), Bound(0.4, 3, 8)),
    Case("jitter, drawn order", _cut(ColorJitter(0.4, 0.4, 0.4, 0.1)), Bound(0.02, 1, 8), Bound(0.5, 3, 24)),
    Case("jitter, twice as strong", _cut(ColorJitter(0.8, 0.8, 0.8, 0.2)), Bound(0.02, 1, 16), Bound(0.6, 4, 32)),
    Case("gray", _cut(RandomGrayscale(0.5)), Bound(0, 0, 0), Bound(0.02, 1, 1)),
    Case("solarise", _cut(Solarization(p=0.5)), Bound(0, 0, 0), Bound(0, 0, 0)),
    Case("blur (torchvision's tensor version)", _cut(GaussianBlur(p=1.0)), Bound(0.02, 1, 1), Bound(0.05, 1, 1)),
    Case(
        "blur (PIL's three boxes)",
        _cut(GaussianBlur(p=1.0)),
        Bound(0.6, 6, 48),
        Bound(0.6, 6, 48),
        pils_blur=True,
    ),
    Case("whole recipe, 224", recipe, Bound(0.04, 1, 16), Bound(0.4, 3, 48)),
    Case("whole recipe, 96", lambda: recipe(96, (0.05, 0.14)), Bound(0.04, 1, 16), Bound(0.4, 3, 48)),
    Case("whole recipe, 224 (PIL's blur)", recipe, Bound(0.4, 4, 64), Bound(0.5, 4, 64), pils_blur=True),
]


@cache
def encoded() -> list[np.ndarray]:
    """The photographs as JPEG files."""
    return [np.frombuffer(jpeg(pixels), dtype=np.uint8) for pixels in photographs()]


@cache
def decoded() -> list[np.ndarray]:
    """The files as PIL decodes them."""
    return [pil_twins.decode(io.BytesIO(file.tobytes())) for file in encoded()]


def sizes() -> np.ndarray:
    """(8, 2) height and width of the photographs."""
    return np.array([pixels.shape[:2] for pixels in decoded()])


def exact_views(groups: list[ViewGroup], arguments: Arguments, **options: Any) -> list[np.ndarray]:
    """The views of the exact mode as bytes, (num_views * B, h, w, 3)."""
    images = [torch.from_numpy(pixels.copy()) for pixels in decoded()]
    return _bytes(ExactStage(groups, torch.device("cpu"), **options)([images] * len(groups), arguments))


def geometric_steps(groups: list[ViewGroup]) -> list[int]:
    """What DALI does in exact mode on a GPU."""
    return [num_dali_steps(group, "exact", torch.device("cuda")) for group in groups]


class Graph:
    """A DALI graph that makes the first steps of each group's views (None: all), and the exact stage the others."""

    def __init__(self, groups: list[ViewGroup], dali_steps: Sequence[int] | None = None, num_threads: int = 1) -> None:
        from nvidia.dali import fn, pipeline_def

        self.groups = groups
        self.dali_steps = [len(group.steps) for group in groups] if dali_steps is None else dali_steps
        self.plan = graph_plan(groups, self.dali_steps)
        self.files: list[np.ndarray] = []  # of the next run
        self.inputs: list[np.ndarray] = []

        def views() -> Any:
            images = fn.decoders.image(
                fn.external_source(source=lambda: self.files, batch=True), adjust_orientation=False
            )
            return tuple(dali_views(images, self.plan, lambda: self.inputs))

        options = {"num_threads": num_threads, "device_id": None, "exec_dynamic": True, "prefetch_queue_depth": 1}
        self.pipeline = pipeline_def(enable_conditionals=True)(views)(batch_size=len(encoded()), **options)
        self.pipeline.build()

    def views(self, arguments: Arguments, rows: slice = slice(None)) -> list[np.ndarray]:
        """The views of the photographs in `rows` as bytes, (num_views * B, h, w, 3)."""
        self.files = encoded()[rows]
        self.inputs = graph_arguments(self.plan, arguments)
        outputs = [[torch.from_dlpack(image) for image in output] for output in self.pipeline.run()]
        images = outputs_by_group(self.plan, outputs)
        return _bytes(ExactStage(self.groups, torch.device("cpu"), dali_steps=self.dali_steps)(images, arguments))


def operators(groups: list[ViewGroup], device_id: int | None) -> list[Any]:
    """The operators of a graph that decodes and makes all steps, on a GPU or (None) the CPU. It is not run: no GPU is
    needed."""
    from nvidia.dali import fn, pipeline_def

    plan = graph_plan(groups, [len(group.steps) for group in groups])

    def whole() -> Any:
        encoded_images = fn.external_source(source=_no_data, batch=True)
        images = fn.decoders.image(encoded_images, device="cpu" if device_id is None else "mixed")
        return tuple(dali_views(images, plan, _no_data))

    options = {"num_threads": 1, "device_id": device_id, "exec_dynamic": True}
    pipeline = pipeline_def(enable_conditionals=True)(whole)(batch_size=8, **options)
    pipeline._build_graph()
    return pipeline._ops


def _no_data() -> list[np.ndarray]:
    return []


def graph_views(
    groups: list[ViewGroup], arguments: Arguments, dali_steps: Sequence[int] | None = None
) -> list[np.ndarray]:
    return Graph(groups, dali_steps).views(arguments)


def changed(arguments: Arguments, group: int, step: int, **changes: Any) -> Arguments:
    """`view_arguments` with other numbers for one step: `apply`, or values by name."""
    numbers = arguments[group][step]
    apply = changes.pop("apply", numbers.apply)
    assert changes.keys() <= numbers.values.keys()
    result = [list(steps) for steps in arguments]
    result[group][step] = replace(numbers, apply=apply, values=numbers.values | changes)
    return result


def _bytes(views: list[torch.Tensor]) -> list[np.ndarray]:
    return [view.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy() for view in views]


def measure(case: Case, mode: str, num_views: int = 8) -> tuple[Bound, float]:
    """The error of a case against its twin, and the mean error of the worst view."""
    groups = [ViewGroup(num_views, case.transforms())]
    arguments = view_arguments(groups, 0, 0, np.arange(len(decoded())), sizes())
    views = exact_views(groups, arguments)[0] if mode == "exact" else graph_views(groups, arguments)[0]
    difference = np.abs(views.astype(np.int16) - case.twins(groups, arguments)[0].astype(np.int16))
    worst = difference.reshape(len(difference), -1).mean(axis=1).max()
    return Bound(float(difference.mean()), int(np.percentile(difference, 99)), int(difference.max())), float(worst)
