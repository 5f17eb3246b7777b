"""Decoding on a GPU: what DALI is asked for, in any graph; and on a GPU, the pixels, beside those of the CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from photographs import jpeg, photographs
from sslrun.data import pipeline
from sslrun.data.data_config import DataConfig
from sslrun.data.loader import Loader
from sslrun.data.order import Sequential
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.transforms import RandomResizedCrop
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageFolder:
    """Photographs as JPEGs whose colors have half the resolution (4:2:0)."""
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    for number, pixels in enumerate(photographs()):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(pixels))
    folder = ImageFolder(str(tmp_path))
    folder.open()
    return folder


def loader_of(source: ImageFolder, device: str, **options: object) -> Loader:
    order = Sequential(len(source))
    batch_size = 3 * len(source)
    groups = [ViewGroup(1, [RandomResizedCrop(32)])]
    return Loader(source, groups, sampler=order, seed=0, batch_size=batch_size, device=device, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("augment", ["dali", "exact"])
def test_what_a_gpu_is_asked_for(source, monkeypatch, augment):
    """The graph is built for device 0 as far as a machine without one goes."""
    from nvidia.dali.pipeline import Pipeline

    monkeypatch.setattr(Pipeline, "build", Pipeline._build_graph)

    def arguments(device: str, **options: object) -> dict[str, str]:
        loader = loader_of(source, device, augment=augment, **options)
        graph = loader._pipeline(loader.dali_steps)._build(lambda: None)
        (decoder,) = [operator.spec for operator in graph._ops if "_display_name: image" in str(operator.spec)]
        return dict(line.strip().split(": ", 1) for line in str(decoder).splitlines() if ": " in line)

    asked = {"adjust_orientation": "False"}
    assert arguments("cpu").items() >= (asked | {"device": "cpu"}).items()
    mixed = asked | {"device": "mixed", "jpeg_fancy_upsampling": "True"}
    assert arguments("cuda").items() >= (mixed | {"hw_decoder_load": "0.000000"}).items()
    assert arguments("cuda", hw_decoder_load=1.0).items() >= (mixed | {"hw_decoder_load": "1.000000"}).items()
    assert not {"jpeg_fancy_upsampling", "hw_decoder_load"} & arguments("cpu", hw_decoder_load=1.0).keys()


@pytest.mark.parametrize("load", [-0.1, 1.1])
def test_a_share_that_is_none_is_one_line(source, load):
    with pytest.raises(UsageError, match=r"data\.hw_decoder_load must lie between 0 and 1"):
        DataConfig(source, [ViewGroup(1, [RandomResizedCrop(32)])], hw_decoder_load=load)


def decoded(source: ImageFolder, device: str, rows: np.ndarray, **options: object) -> list[np.ndarray]:
    loader = loader_of(source, device, **options)
    ((_, images),) = loader.decoded([(0, rows)])
    return [image.numpy() for image in images]


def differences(images: list[np.ndarray], others: list[np.ndarray]) -> np.ndarray:
    """Absolute differences of all pixels, in gray levels."""
    pairs = zip(images, others, strict=True)
    return np.concatenate([np.abs(a.astype(int) - b.astype(int)).ravel() for a, b in pairs])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("hw_decoder_load", [0.0, 1.0])
def test_a_gpu_decodes_to_nearly_the_pixels_of_the_cpu(source, monkeypatch, hw_decoder_load):
    rows = np.arange(len(source))
    expected = decoded(source, "cpu", rows)
    difference = differences(decoded(source, "cuda", rows, hw_decoder_load=hw_decoder_load), expected)
    assert difference.mean() < 0.5 and np.quantile(difference, 0.99) <= 2
    arguments = pipeline.decoder_arguments

    def repeated(*words: object) -> dict[str, object]:
        return arguments(*words) | {"jpeg_fancy_upsampling": False}  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "decoder_arguments", repeated)
    worse = differences(decoded(source, "cuda", rows, hw_decoder_load=hw_decoder_load), expected)
    assert worse.mean() > 2 * difference.mean()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("hw_decoder_load", [0.0, 1.0])
def test_the_place_in_the_batch_changes_no_bit(source, hw_decoder_load):
    rows = np.tile(np.arange(len(source)), 3)
    together = decoded(source, "cuda", rows, hw_decoder_load=hw_decoder_load)
    for row in rows[: len(source)]:
        (alone,) = decoded(source, "cuda", np.array([row]), hw_decoder_load=hw_decoder_load)
        assert all(np.array_equal(together[place], alone) for place in range(row, len(rows), len(source)))
