"""Images of other channels than red, green and blue: gray ones, and the bands of TIFF files."""

import json

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from safetensors import safe_open

import small_run
from sslrun.data import bands, pil_twins
from sslrun.data.bad_samples import BadSamples
from sslrun.data.loader import Loader
from sslrun.data.order import Sequential
from sslrun.data.pictures import as_rgb
from sslrun.data.sources import Source
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.sources.subset import Subset
from sslrun.data.transforms import (
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    Normalize,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    Solarization,
)
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError

BANDS = 6
LAYOUTS = ("samples", "planes", "pages")  # of bands in a TIFF file


def save_bands(path, pixels: np.ndarray, layout: str) -> None:
    """(H, W, C) as a TIFF file."""
    planes = pixels.transpose(2, 0, 1)
    if layout == "samples":
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
    elif layout == "planes":
        tifffile.imwrite(path, planes, photometric="minisblack", planarconfig="separate", compression="zlib")
    else:
        tifffile.imwrite(path, planes, photometric="minisblack")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same gray images, 4 classes of 20: as gray PNG files, as RGB ones, and as the first of 6 bands of 12 bits."""
    root, random = tmp_path_factory.mktemp("channels"), np.random.default_rng(0)
    for label in range(4):
        for kind in ("gray", "rgb", "bands"):
            (root / kind / f"class_{label}").mkdir(parents=True)
        for number in range(20):
            wave = np.sin(np.arange(40) * (label + 1) * 0.3 + random.uniform(0, 6))
            pixels = (random.integers(0, 60, (36, 40)) + 90 * (wave + 1)).clip(0, 255).astype(np.uint8)
            name = f"class_{label}/{number:02d}"
            Image.fromarray(pixels).save(root / "gray" / f"{name}.png")
            Image.fromarray(as_rgb(pixels[..., None])).save(root / "rgb" / f"{name}.png")
            many = np.stack([np.roll(pixels, band, 1) for band in range(BANDS)], axis=2).astype(np.uint16) * 16
            save_bands(root / "bands" / f"{name}.tif", many, LAYOUTS[number % 3])
    return root


def opened(folder, channels: int, **arguments) -> Source:
    source = ImageFolder(str(folder), channels=channels, **arguments)
    source.open()
    return source


def views_of(source: Source, transforms, count: int = 8) -> torch.Tensor:
    """(2 x count, C, H, W): two views of the first images."""
    group = ViewGroup(num_views=2, transforms=transforms)
    loader = Loader(source, [group], sampler=Sequential(len(source)), seed=1, batch_size=count)
    (batch,) = loader.run([(0, np.arange(count))])
    return batch.views[0]


def transforms(channels: int):
    return [
        RandomRotation(20, p=0.5),
        RandomResizedCrop(24),
        ColorJitter(brightness=0.4, contrast=0.4, p=0.8),
        GaussianBlur(p=0.5, sigma_max=1.0),
        Solarization(p=0.3),
        RandomHorizontalFlip(),
        Normalize([0.4] * channels, [0.2] * channels),
    ]


def test_gray_views_are_the_channels_of_the_same_images_in_rgb(folders):
    gray = views_of(opened(folders / "gray", 1), transforms(1))
    rgb = views_of(opened(folders / "rgb", 3), transforms(3))
    assert gray.shape == (16, 1, 24, 24)
    for channel in range(3):
        assert torch.equal(gray[:, 0], rgb[:, channel])
    assert gray.std() > 0.1


def test_gray_views_are_those_of_pil(folders):
    steps = [RandomResizedCrop(24), ColorJitter(brightness=0.4, contrast=0.4), RandomHorizontalFlip()]
    source = opened(folders / "gray", 1)
    group = ViewGroup(num_views=2, transforms=steps)
    loader = Loader(source, [group], sampler=Sequential(len(source)), seed=1, batch_size=8)
    ((spec, decoded),) = loader.decoded([(0, np.arange(8))])
    (theirs,) = pil_twins.views([image.numpy() for image in decoded], loader.views, spec.arguments)
    (batch,) = loader.run([(0, np.arange(8))])
    ours = (batch.views[0] * 255).round().permute(0, 2, 3, 1).numpy()
    difference = np.abs(ours - theirs)
    assert difference.max() <= 2 and difference.mean() < 0.01


def test_color_images_become_gray(images):
    source = opened(images, 1)
    pixels = views_of(source, [CenterCrop(32)], count=4)[:4] * 255
    for row in range(4):
        with Image.open(source.names[row]) as image:
            expected = np.asarray(image.convert("L"), dtype=np.float32)[2:34, 4:36]
        assert np.abs(pixels[row, 0].numpy() - expected).mean() < 1


def test_bands_are_read_in_order_from_every_layout(folders):
    gray = views_of(opened(folders / "gray", 1), [CenterCrop(32)], count=6)
    many = views_of(opened(folders / "bands", BANDS), [CenterCrop(32)], count=6)
    assert many.shape == (12, BANDS, 32, 32)
    for band in range(BANDS):  # shifted by as many columns; 16 of 4095 is 0.996 of 1 of 255
        difference = many[:, band, :, band:] - gray[:, 0, :, : 32 - band]
        assert difference.abs().max() < 1.6 / 255, band
    assert (many[:, 1] - many[:, 0]).abs().max() > 0.05, "the bands differ"


@pytest.mark.parametrize(
    ("values", "range", "expected"),
    [
        ([0, 255], "auto", [0, 255]),  # bytes
        ([0, 4000], "auto", [0, 249]),  # of 4095
        ([0, 4000], "full", [0, 16]),  # of 65535
        ([1000, 2000], [1000.0, 3000.0], [0, 128]),
        ([0.0, 0.5], "auto", [0, 128]),
        ([0.0, 0.5], "full", [0, 128]),
        ([0.0, 300.0], [0.0, 600.0], [0, 128]),
    ],
)
def test_the_range_of_bands(tmp_path, values, range, expected):
    kind = np.float32 if isinstance(values[1], float) else np.uint8 if values[1] == 255 else np.uint16
    pixels = np.broadcast_to(np.array(values, dtype=kind).repeat([1, 4]), (3, 4, 5))
    save_bands(tmp_path / "x.tif", pixels, "samples")
    read = bands.pixels((tmp_path / "x.tif").read_bytes(), 5, range)
    assert read.dtype == np.uint8 and read[0, 0].tolist() == [expected[0]] + [expected[1]] * 4


def test_pixels_with_alpha_have_four_bands(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "x.png")
    source = opened(tmp_path, 4)
    assert source.sizes.tolist() == [[8, 9]]
    assert (bands.pixels((tmp_path / "x.png").read_bytes(), 4, "auto") == pixels).all()


def test_sizes_that_another_reader_did_not_find_are_read_again(folders, tmp_path):
    save_bands(tmp_path / "x.tif", np.zeros((8, 9, 5), np.uint8), "samples")
    assert opened(tmp_path, 3).sizes.tolist() == [[0, 0]]
    assert opened(tmp_path, 5).sizes.tolist() == [[8, 9]]


class Stripes(Source, listed=False):
    """A user's own source of 4 bands."""

    channels = 4

    def list_samples(self, key):
        return ["a", "b"]

    def encoded(self, ids):
        return [np.full((8, 9 + i, 4), [1, 2, 3, 40 * i], dtype=np.uint8) for i in ids.tolist()]


def test_a_users_own_source_of_bands():
    source = Stripes()
    source.open()
    assert source.sizes.tolist() == [[8, 9], [8, 10]]
    pixels = views_of(source, [CenterCrop(8)], count=2) * 255
    assert pixels.round()[:2, :, 0, 0].tolist() == [[1, 2, 3, 0], [1, 2, 3, 40]]


def test_a_subset_has_the_channels_of_its_source(folders):
    assert Subset(opened(folders / "gray", 1), np.arange(3)).channels == 1


RECIPE = """
[vars]
channels = {channels}
level = {level}

[model.backbone]
_delete_ = true
type = "ResNet"
depth = 18
base_width = 16
stem = "small"
in_channels = "${{vars.channels}}"

[model.neck]
in_channels = 128

[data]
source = {{ type = "ImageFolder", data_prefix = "{folder}", channels = "${{vars.channels}}" }}
"""
TRANSFORMS = """[
  {{ type = "RandomResizedCrop", size = 24, scale = [0.2, 1.0] }},
  {{ type = "ColorJitter", p = 0.8, brightness = 0.4, contrast = 0.4 }},
  {{ type = "RandomHorizontalFlip" }},
  {{ type = "Normalize", mean = {mean}, std = {std} }},
]"""


@pytest.fixture
def recipe(folders, tmp_path, monkeypatch):
    """A function that writes the recipe of a run on one of the folders."""
    monkeypatch.chdir(tmp_path)

    def write(kind: str, channels: int):
        base = small_run.write_recipe(tmp_path, folders / kind, steps=4, name="base")
        text = base.read_text()
        first, last = text.index("transforms = ["), text.index("[optimizer]")
        own = TRANSFORMS.format(mean=[0.4] * channels, std=[0.2] * channels)
        base.write_text(f"{text[:first]}transforms = {own}\n\n{text[last:]}")
        path = tmp_path / f"{kind}.toml"
        body = RECIPE.format(channels=channels, level=0.4, folder=folders / kind)
        path.write_text(f'extends = "base.toml"\n{body}')
        return path

    return write


@pytest.mark.parametrize(("kind", "channels"), [("gray", 1), ("bands", BANDS)])
def test_trains_and_is_measured_shown_checked_and_exported(recipe, folders, kind, channels, tmp_path, capsys):
    small_run.train(recipe(kind, channels))
    run = tmp_path / "runs" / kind
    code, printed, error = small_run.call(capsys, "eval", "knn", run, "--set", "eval.knn.k=[5]")
    assert code == 0, error
    weights = tmp_path / "x.safetensors"
    assert small_run.call(capsys, "export", run, "--to", "safetensors", "-o", weights)[0] == 0
    with safe_open(weights, framework="pt") as file:
        prepared = json.loads(file.metadata()["sslrun"])["preprocessing"]
        assert file.get_tensor("conv1.weight").shape[1] == channels
    assert prepared["input_size"] == [channels, 24, 24] and prepared["color_order"] == "as in the file"
    grid = tmp_path / "grid.png"
    code, _, error = small_run.call(capsys, "preview", f"{kind}.toml", "-o", grid, "--samples", "2", "--against", "pil")
    assert code == 0, error
    assert ("PIL has no images of 6 channels" in error) == (kind == "bands")
    assert Image.open(grid).mode == "RGB"
    code, printed, error = small_run.call(capsys, "data", "check", f"{kind}.toml")
    assert code == 0 and "80 images" in printed + error
    code, printed, error = small_run.call(capsys, "report", run, "-o", tmp_path / "report.html")
    assert code == 0, error
    folder, vectors, picture = folders / kind, tmp_path / "vectors.npy", tmp_path / "similar.png"
    code, printed, error = small_run.call(capsys, "embed", run, folder, "-o", vectors)
    assert code == 0 and np.isfinite(np.load(vectors)).all() and len(np.load(vectors)) == 80, error
    image = sorted(path for path in folder.rglob("*") if path.is_file())[3]
    code, printed, error = small_run.call(capsys, "similar", run, image, folder, "-o", picture)
    assert code == 0 and Image.open(picture).mode == "RGB", error


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.source.channels=3", "Normalize has a mean and std of 1 channels, but the images have 3"),
        ("model.backbone.in_channels=3", "ResNet takes 3 channels (in_channels), but is given 1: (B, 1, 24, 24)"),
        ("data.augment=dali", 'data.augment = "dali" is for RGB, and the images have 1 channels'),
        ("data.views.0.transforms.1.hue=0.1", "ColorJitter changes hue of red, green and blue, and the images have 1"),
        ("data.source.channels=0", "data.source: channels is 0, expected 1 or more"),
    ],
)
def test_what_does_not_fit_together_is_one_line(recipe, setting, message, capsys):
    code, _, error = small_run.call(capsys, recipe("gray", 1), "--dry-run", "--set", setting)
    assert code == 2 and message in error and error.count("\n") == 1, error


def test_held_out_images_have_the_same_channels(recipe, tmp_path, capsys):
    path = recipe("gray", 1)
    base = tmp_path / "base.toml"
    base.write_text(base.read_text().replace("holdout = 0.2", 'holdout = { type = "Shapes", split = "test" }'))
    code, _, error = small_run.call(capsys, path, "--dry-run")
    assert code == 2 and "the images of data.holdout have 3 channels, and those of data.source 1" in error


def test_a_wrong_number_of_bands_is_one_line_with_the_right_one(recipe, folders, tmp_path, capsys):
    code, _, error = small_run.call(capsys, recipe("bands", 5))
    assert code == 2 and error.splitlines()[-1].endswith("has 6 bands: set channels of the source, which is 5, to it")
    source = opened(folders / "bands", 3)
    assert any("has 6 bands, which channels = 6 would read" in remark for remark in source.remarks)


def test_colors_need_three_channels():
    group = ViewGroup(num_views=1, transforms=[CenterCrop(8), RandomGrayscale()])
    assert group.for_channels(3) is group
    with pytest.raises(UsageError, match="RandomGrayscale takes red, green and blue, and the images have 2 channels"):
        group.for_channels(2)
    jitter = ViewGroup(num_views=1, transforms=[CenterCrop(8), ColorJitter(saturation=0.1, hue=0.1)])
    with pytest.raises(UsageError, match="ColorJitter changes saturation and hue of"):
        jitter.for_channels(1)
    with pytest.raises(UsageError, match="a number for each channel"):
        Normalize([0.5, 0.5], [0.5])


def test_contrast_of_bands_is_about_the_mean_of_all():
    x = torch.tensor([[[[0.0, 100.0]], [[200.0, 100.0]]]])  # (1, 2, 1, 2), of mean 100
    numbers = ColorJitter(contrast=[0.5, 0.5]).numbers(np.zeros((1, 9)), np.array([[1, 2]]))
    changed = ColorJitter(contrast=[0.5, 0.5]).torch_block(x, numbers)
    assert changed.tolist() == [[[[50.0, 100.0]], [[150.0, 100.0]]]]


def test_a_damaged_file_of_bands_is_named_and_replaced(folders, tmp_path):
    for name in ("00", "01", "02"):
        content = (folders / "bands" / "class_0" / f"{name}.tif").read_bytes()
        (tmp_path / f"{name}.tif").write_bytes(content[:-3000] if name == "01" else content)
    source = opened(tmp_path, BANDS)
    group = ViewGroup(num_views=1, transforms=[CenterCrop(8)])
    bad = BadSamples(max_bad_pct=50)
    loader = Loader(source, [group], sampler=Sequential(3), seed=1, batch_size=3, bad=bad)
    (batch,) = loader.run([(0, np.arange(3))])
    assert 1 not in batch.index.tolist() and batch.views[0].shape == (3, BANDS, 8, 8)
    assert "damaged" in str(bad.state_dict())


def test_tiff_files_without_their_reader_are_one_line(folders, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"tifffile, which .* is not installed: pip install 'sslrun\[tiff\]'"):
        opened(folders / "bands", BANDS)


def test_images_are_shown_in_rgb():
    pixels = np.arange(2 * 2 * 5).reshape(2, 2, 5)
    assert (as_rgb(pixels) == pixels[..., :3]).all()
    assert (as_rgb(pixels[..., :2])[..., 2] == pixels[..., 0]).all() and as_rgb(pixels[..., :1]).shape == (2, 2, 3)
