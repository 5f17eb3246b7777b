"""Of a very large resized image only the part that a crop keeps is made, with the same bytes."""

import numpy as np
import pytest
import torch
from PIL import Image

from fidelity_cases import Graph, decoded, exact_views, sizes
from small_run import call, write_recipe
from sslrun.data import pil_twins
from sslrun.data.exact import ExactStage
from sslrun.data.graph import view_arguments
from sslrun.data.transforms import CenterCrop, RandomCrop, RandomHorizontalFlip, Resize, resize
from sslrun.data.transforms.enlarging import enlarged_window
from sslrun.data.transforms.resampling import _interpolate
from sslrun.data.views import ViewGroup

CPU = torch.device("cpu")
NEVER = 2**62

CHAINS = {
    "center": lambda kind: [Resize(40, kind), CenterCrop(24)],
    "random": lambda kind: [RandomHorizontalFlip(), Resize(90, kind, p=0.8), RandomCrop([20, 30])],
    "padded": lambda kind: [Resize(20, kind), CenterCrop(24)],
}


def noise(*shapes):
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


THIN = noise((1, 90), (90, 1), (2, 77), (61, 3), (17, 500), (30, 30), (400, 300), (13, 8))


def restricted(monkeypatch, groups, images, is_large):
    """Arguments in which the results that have more than four times the pixels of the crop are cut, or none."""
    monkeypatch.setattr(resize, "_LARGE", 0 if is_large else NEVER)
    shapes = np.array([image.shape[:2] for image in images])
    return view_arguments(groups, 3, 0, np.arange(len(images)), shapes)


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("chain", CHAINS)
def test_the_bytes_are_those_of_the_whole(monkeypatch, chain, kind):
    groups = [ViewGroup(2, CHAINS[chain](kind))]
    cut, whole = (restricted(monkeypatch, groups, THIN, is_large) for is_large in (True, False))
    place = next(k for k, step in enumerate(groups[0].steps) if isinstance(step, Resize))
    assert 4 <= (cut[0][place].size != whole[0][place].size).any(axis=1).sum() < 2 * len(THIN)
    images = [torch.from_numpy(image) for image in THIN]
    views = [ExactStage(groups, CPU)([images], arguments)[0] for arguments in (cut, whole)]
    assert torch.equal(*views)


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
def test_any_window_of_any_enlargement(kind):
    random = np.random.default_rng(1)
    for _ in range(60):
        old = random.integers(1, 40, 2)
        new = np.maximum(old, (old * random.uniform(1, 9, 2)).astype(int))
        shape = random.integers(1, new + 1)
        start = random.integers(0, new - shape + 1)
        image = torch.from_numpy(random.choice([0, 255, 90], (1, 3, *old)).astype(np.uint8))
        whole = _interpolate(image.contiguous(memory_format=torch.channels_last), *new.tolist(), kind)
        (top, left), (height, width) = start.tolist(), shape.tolist()
        window = enlarged_window(image, tuple(new.tolist()), (top, left), (height, width), kind)
        assert torch.equal(window, whole[..., top : top + height, left : left + width]), (old, new, start, shape)


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (3, 20_000)])
def test_a_thin_image_needs_no_memory(shape):
    """The whole result of 60,000 x 1 has 3.9 billion pixels."""
    length = max(shape)
    ramp = (np.arange(length) * 251 // length).astype(np.uint8).reshape([-1 if side == length else 1 for side in shape])
    image = np.ascontiguousarray(np.broadcast_to(ramp[..., None], (*shape, 3)))
    groups = [ViewGroup(1, [Resize(256), CenterCrop(224)])]
    arguments = view_arguments(groups, 0, 0, np.zeros(1, dtype=np.int64), np.array([shape]))
    (ours,) = exact_views_of([image], groups, arguments)
    (twin,) = pil_twins.views([image], groups, arguments)
    assert ours.shape == (1, 224, 224, 3) and np.abs(ours.astype(int) - twin).max() <= 1
    assert abs(int(ours.mean()) - 125) <= 1


def exact_views_of(images, groups, arguments):
    tensors = [torch.from_numpy(np.array(image)) for image in images]
    views = ExactStage(groups, CPU)([tensors], arguments)
    return [(v * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy() for v in views]


@pytest.mark.nightly
def test_dali_makes_the_same_part(monkeypatch):
    groups = [ViewGroup(1, [Resize(500), CenterCrop(64)])]
    results = []
    for is_large in (True, False):
        arguments = restricted(monkeypatch, groups, decoded(), is_large)
        results.append(Graph(groups).views(arguments)[0].astype(int))
        assert np.abs(results[-1] - exact_views(groups, arguments)[0]).max() <= 2
        assert (arguments[0][0].size <= 64).all(axis=1).sum() == (6 if is_large else 0)
    assert np.abs(results[0] - results[1]).max() <= 1 and len(sizes()) == len(results[0])


def test_preview_of_thin_images(capsys, tmp_path):
    (tmp_path / "images" / "x").mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (300, 1) if i % 2 else (1, 300), (i * 20, 10, 10)).save(tmp_path / f"images/x/{i}.png")
    recipe = write_recipe(tmp_path, tmp_path / "images")
    code, _, err = call(capsys, "preview", recipe, "--samples", 6, "-o", tmp_path / "grid.png", "--draws")
    assert code == 0 and Image.open(tmp_path / "grid.png").size[0] > 100, err
