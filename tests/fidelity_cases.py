"""What is held against PIL, in both modes, and how far each may be off: the table of tests and docs/fidelity.md."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from photographs import jpeg, photographs
from sslrun.data import pil_twins
from sslrun.data.exact import ExactStage
from sslrun.data.graph import Arguments, Part, dali_views, graph_arguments, graph_inputs, view_arguments
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
    """Transforms, the twin to compare with, and a bound for each mode.

    Single operations start from images that were cut, not resized, so that only their own error is seen.
    """

    name: str
    transforms: Callable[[], list[Transform]]
    exact: Bound
    dali: Bound
    blur: pil_twins.Blur = field(default=pil_twins.tensor_blur)


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
    Case("contrast", _cut(ColorJitter(contrast=0.4)), Bound(0, 0, 0), Bound(0.02, 1, 1)),
    Case("saturation", _cut(ColorJitter(saturation=0.4)), Bound(0, 0, 0), Bound(0.02, 1, 1)),
    Case("hue", _cut(ColorJitter(hue=0.5)), Bound(0.02, 1, 8), Bound(0.05, 1, 8)),
    Case("jitter, drawn order", _cut(ColorJitter(0.4, 0.4, 0.4, 0.1)), Bound(0.02, 1, 8), Bound(0.05, 1, 16)),
    Case("gray", _cut(RandomGrayscale(0.5)), Bound(0, 0, 0), Bound(0.02, 1, 1)),
    Case("solarise", _cut(Solarization(p=0.5)), Bound(0, 0, 0), Bound(0, 0, 0)),
    Case("blur (torchvision's tensor version)", _cut(GaussianBlur(p=1.0)), Bound(0.02, 1, 1), Bound(0.05, 1, 1)),
    Case(
        "blur (PIL's three boxes)",
        _cut(GaussianBlur(p=1.0)),
        Bound(0.6, 6, 48),
        Bound(0.6, 6, 48),
        blur=pil_twins.pil_blur,
    ),
    Case("whole recipe, 224", recipe, Bound(0.04, 1, 16), Bound(0.4, 3, 48)),
    Case("whole recipe, 96", lambda: recipe(96, (0.05, 0.14)), Bound(0.04, 1, 16), Bound(0.4, 3, 48)),
    Case("whole recipe, 224 (PIL's blur)", recipe, Bound(0.4, 4, 64), Bound(0.5, 4, 64), blur=pil_twins.pil_blur),
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
    stage = ExactStage(groups, torch.device("cpu"), **options)
    return _bytes(stage([torch.from_numpy(pixels.copy()) for pixels in decoded()], arguments))


def graph_views(
    groups: list[ViewGroup], arguments: Arguments, part: Part = "all", rows: slice = slice(None), num_threads: int = 1
) -> list[np.ndarray]:
    """The views that begin in the graph (and, with part="geometry", end in the stage) as bytes."""
    from nvidia.dali import fn, pipeline_def

    names = [argument.name for argument in graph_inputs(groups, part)]
    values = graph_arguments(groups, arguments, part)
    files = encoded()[rows]

    def views() -> Any:
        file, *nodes = fn.external_source(
            source=lambda: [files, *(values[name] for name in names)], num_outputs=1 + len(names), batch=True
        )
        images = fn.decoders.image(file, adjust_orientation=False)
        return tuple(dali_views(images, groups, dict(zip(names, nodes)), part))  # noqa: B905 (AutoGraph's zip)

    graph = pipeline_def(enable_conditionals=True)(views)
    options = {"num_threads": num_threads, "device_id": None, "exec_dynamic": True, "prefetch_queue_depth": 1}
    pipeline = graph(batch_size=len(files), **options)
    pipeline.build()
    crops = [torch.from_dlpack(output.as_tensor()) for output in pipeline.run()]
    return _bytes(ExactStage(groups, torch.device("cpu")).finish(crops, arguments, part))


def _bytes(views: list[torch.Tensor]) -> list[np.ndarray]:
    return [view.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy() for view in views]


def measure(case: Case, mode: str, num_views: int = 8) -> tuple[Bound, float]:
    """The error of a case against its twin, and the mean error of the worst view."""
    groups = [ViewGroup(num_views, case.transforms())]
    arguments = view_arguments(groups, 0, 0, np.arange(len(decoded())), sizes())
    made = exact_views(groups, arguments)[0] if mode == "exact" else graph_views(groups, arguments)[0]
    twin = pil_twins.views(decoded(), groups, arguments, case.blur)[0]
    difference = np.abs(made.astype(np.int16) - twin.astype(np.int16))
    worst = difference.reshape(len(difference), -1).mean(axis=1).max()
    return Bound(float(difference.mean()), int(np.percentile(difference, 99)), int(difference.max())), float(worst)
