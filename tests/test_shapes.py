"""Shapes: files that are equal everywhere and drawn once; neither pixels nor an untrained network tell the labels."""

import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ranks import ROOT, run_ranks
from sslrun.data.sources.shapes import Shapes
from sslrun.data.sources.shapes_drawing import CLASS_NAMES, Spec, draw
from sslrun.errors import UsageError
from sslrun.evaluation.knn import knn_top1
from sslrun.nn.resnet import ResNet


def test_images_are_functions_of_their_arguments(tmp_path):
    source = Shapes(str(tmp_path), num_images=40, size=48)
    source.open()
    contents = [Path(path).read_bytes() for path in source.names]
    assert len(contents) == len(set(contents)) == len(source) == 40
    assert contents == [draw(source.spec, i) for i in range(40)]
    assert {Image.open(io.BytesIO(c)).size for c in contents} == {(48, 48)} and (source.sizes == 48).all()
    assert source.class_names == CLASS_NAMES and len(CLASS_NAMES) >= 10
    assert np.bincount(source.labels).tolist() == [4] * 10
    assert [Path(path).parent.name for path in source.names] == [CLASS_NAMES[label] for label in source.labels]
    other = [Shapes(str(tmp_path), num_images=40, size=48, split="test"), Shapes(str(tmp_path), 40, 48, seed=1)]
    for changed in other:
        changed.open()
        assert not {Path(path).read_bytes() for path in changed.names} & set(contents)


def test_drawn_once_and_not_by_the_constructor(tmp_path):
    root = tmp_path / "new" / "shapes"
    source = Shapes(str(root), num_images=10, size=16)
    assert source.nominal_size == 10 and not root.exists()
    source.open()
    times = [os.stat(path).st_mtime_ns for path in source.names]
    time.sleep(0.02)
    again = Shapes(str(root), num_images=10, size=16)
    again.open()
    assert [os.stat(path).st_mtime_ns for path in again.names] == times
    assert [entry.name for entry in root.iterdir() if entry.is_dir()] == [Path(source.names[0]).parents[1].name]


def loaded(root: Path) -> int:
    source = Shapes(str(root), num_images=60, size=32)
    source.open()
    return len([Image.open(path).load() for path in source.names])


def test_processes_that_draw_at_once_get_whole_sets(tmp_path):
    assert run_ranks(loaded, 2, tmp_path) == [60, 60]
    assert len([entry for entry in tmp_path.iterdir() if entry.is_dir()]) == 1


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"data\.source\.root") as error:
        Shapes(str(tmp_path / "file" / "shapes"), num_images=10).open()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [{"rotation": [10, -10]}, {"lighting": [-1, 1]}, {"num_images": 0}, {"size": 4}])
def test_wrong_arguments(wrong):
    with pytest.raises(UsageError):
        Shapes(**wrong)


def test_rotation_and_lighting_are_what_they_say():
    def pixels(rotation, lighting):
        spec = Spec(10, 64, 0, 0, rotation, lighting)
        return np.stack([np.asarray(Image.open(io.BytesIO(draw(spec, i))), dtype=float) for i in range(10)])

    upright, bright = pixels((0, 0), (1.0, 1.0)), pixels((0, 0), (1.5, 1.5))
    assert bright.mean() / upright.mean() > 1.2
    assert pixels((0, 0), (0.0, 0.0)).max() < 12
    turned = pixels((360, 360), (1.0, 1.0))
    assert np.abs(turned - upright).mean() < 1.0  # a full turn
    assert np.abs(pixels((90, 90), (1.0, 1.0)) - upright).mean() > 8.0


def test_a_single_silhouette_leaves_the_border_to_the_cloth():
    def edges(layout, i):
        """Fraction of the pixels within 6 pixels of the border at which the color jumps."""
        image = Image.open(io.BytesIO(draw(Spec(20, 64, 0, 0, (-10, 10), (1.0, 1.0), layout), i)))
        pixels = np.asarray(image, dtype=float)
        steps = np.abs(np.diff(pixels, axis=0))[:, 1:] + np.abs(np.diff(pixels, axis=1))[1:]
        jumps = steps.max(axis=2) > 60
        return np.mean(jumps[np.pad(np.zeros((51, 51), dtype=bool), 6, constant_values=True)])

    for i in range(20):
        assert edges("single", i) < 0.06 < 0.09 < edges("strewn", i), i


@pytest.fixture(scope="module")
def shapes():
    """The first training and test images of the quickstart: (N, 3, 80, 80) in [0, 1], and labels."""
    splits = []
    for split, count in (("train", 2000), ("test", 400)):
        source = Shapes(str(ROOT / "data/shapes"), split=split)  # drawn once a checkout, for other tests too
        source.open()
        images = np.stack([np.asarray(Image.open(path)) for path in source.names[:count]])
        labels = torch.from_numpy(source.labels[:count])
        splits.append((torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, labels))
    return splits


@pytest.mark.nightly
def test_raw_pixels_do_not_tell(shapes):
    (train, train_labels), (test, test_labels) = shapes
    bank, queries = (F.interpolate(x, (32, 32), mode="bilinear", antialias=True).flatten(1) for x in (train, test))
    mean = bank.mean(dim=0)
    for k in (1, 20):
        assert knn_top1(bank, train_labels, queries, test_labels, k=k) <= 35
        assert knn_top1(bank - mean, train_labels, queries - mean, test_labels, k=k) <= 35


@torch.no_grad()
@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_an_untrained_network_does_not_tell(shapes, training):
    """Features with the initial running statistics, or with those of the batch."""
    torch.manual_seed(0)
    network = ResNet(18, base_width=32).train(training)
    features = []
    for images, _ in shapes:
        small = F.interpolate(images, (64, 64), mode="bilinear", antialias=True)
        small = (small - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
        features.append(torch.cat([network(part)[-1].mean((2, 3)) for part in small.split(200)]))
    for k in (1, 20):
        assert knn_top1(features[0], shapes[0][1], features[1], shapes[1][1], k=k) <= 50
