"""`sslrun preview`: tiles are what training is handed, the printed draws are what made them, PIL's twins are PIL's."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

import documents
import small_run
from fidelity_cases import torchvision_blur
from sslrun import training
from sslrun.cli import main
from sslrun.config import load
from sslrun.data import pil_twins
from sslrun.data.graph import view_arguments
from sslrun.data.masks import MaskDraws, RandomMask
from sslrun.data.transforms import (
    CenterCrop,
    RandomCrop,
    RandomGridPatch,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    Resize,
    SharedTrans,
)
from sslrun.data.views import ViewGroup
from sslrun.preview import as_text, describe, draw, load_samples, pil_versions
from sslrun.preview.description import part_of_original
from sslrun.preview.grid import AMPLIFIED, difference, lay_out
from sslrun.preview.samples import HIDDEN

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
COLORS = """
  { type = "ColorJitter", p = 0.8, brightness = 0.4, contrast = 0.4, saturation = 0.4, hue = 0.1 },
  { type = "GaussianBlur", p = 0.5, sigma_max = 1.5 },
  { type = "RandomHorizontalFlip" },"""
VIEWS = f"""
[[data.views]]
transforms = [
  {{ type = "RandomResizedCrop", size = 24, scale = [0.2, 1.0] }}, {COLORS}
  {{ type = "Normalize", mean = {MEAN}, std = {STD} }},
]

[[data.views]]
transforms = [{{ type = "RandomResizedCrop", size = [16, 20], scale = [0.2, 0.6] }}, {COLORS}]

[optimizer]"""


@pytest.fixture
def recipe(tmp_path, images, monkeypatch):
    """MoCo with two groups of one view each, of different sizes, the second without normalization."""
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    path = small_run.write_recipe(tmp_path, images, steps=5)
    text = path.read_text()
    path.write_text(text[: text.index("[[data.views]]")] + VIEWS + text[text.index("[optimizer]") + 11 :])
    return path


def previewed(capsys, *words) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["preview", *map(str, words)])
    return code, *capsys.readouterr()


def tiles(image: Path, originals, views, with_pil=False, line=0) -> list[list[np.ndarray]]:
    """For each sample the views that stand in an image, each pixel taken once; every repetition of it is the same."""
    layout = lay_out(originals, views, with_pil)
    sheet = np.asarray(Image.open(image))
    assert sheet.shape == (layout.size[1], layout.size[0], 3)
    found = []
    for tops in layout.tops:
        found.append([])
        for (height, width), zoom, left in zip(views, layout.zooms, layout.lefts[1:], strict=True):
            top = tops[1 + line]
            tile = sheet[top : top + height * zoom, left : left + width * zoom]
            assert (tile == tile[::zoom, ::zoom].repeat(zoom, 0).repeat(zoom, 1)).all()
            found[-1].append(tile[::zoom, ::zoom])
    return found


@pytest.mark.parametrize("mode", ["exact", "dali"])
def test_the_tiles_are_what_training_is_handed(capsys, recipe, monkeypatch, mode):
    handed, step = [], training.train_step

    def noted(executor, method, statistics, batches, progress, rates, decays):
        handed.append(batches[0])
        return step(executor, method, statistics, batches, progress, rates, decays)

    monkeypatch.setattr(training, "train_step", noted)
    assert main([str(recipe), "--set", f"data.augment={mode}", "--set", "monitor.knn_interval=0"]) == 0
    assert [len(batch.index) for batch in handed] == [16] * 5  # 64 of 80 images: the fifth is of the second epoch
    shown = {}
    for epoch, batch in ((0, handed[0]), (1, handed[4])):
        options = ["--set", f"data.augment={mode}", "--samples", 3, "--epoch", epoch, "--json", "-o", "grid.png"]
        code, out, err = previewed(capsys, recipe, *options)
        assert code == 0, err
        printed = json.loads(out)
        assert [sample["sample"] for sample in printed["samples"]] == batch.index[:3].tolist()
        assert [sample["label"] for sample in printed["samples"]] == batch.label[:3].tolist()
        shown[epoch] = tiles(Path("grid.png"), [(36, 40)] * 3, [(24, 24), (16, 20)])
        for g, (mean, std) in enumerate([(MEAN, STD), ([0.0] * 3, [1.0] * 3)]):
            for row in range(3):
                levels = (batch.views[g][row].double().permute(1, 2, 0) * torch.tensor(std) + torch.tensor(mean)) * 255
                assert (levels - levels.round()).abs().max() < 0.01
                assert np.array_equal(shown[epoch][row][g], levels.round().numpy())
    assert not np.array_equal(shown[0][0][0], shown[1][0][0])


def by_hand(image: Image.Image, view: dict) -> Image.Image:
    """A view from what was printed about it and nothing else."""
    for step in view["transforms"]:
        if not step["applied"]:
            continue
        if step["type"] == "RandomResizedCrop":
            top, left, height, width = (step[f"{name}_px"] for name in ("top", "left", "height", "width"))
            box = (left, top, left + width, top + height)
            image = image.crop(box).resize(step["to_px"][::-1], Image.Resampling.BILINEAR)
        elif step["type"] == "ColorJitter":
            for name in step["order"]:
                if name == "hue":
                    hue, *rest = image.convert("HSV").split()
                    turned = ((np.array(hue).astype(int) + round(step["hue_degrees"] / 360 * 255)) % 256).astype(
                        np.uint8
                    )
                    image = Image.merge("HSV", (Image.fromarray(turned), *rest)).convert("RGB")
                else:
                    kind = {"brightness": "Brightness", "contrast": "Contrast", "saturation": "Color"}[name]
                    image = getattr(ImageEnhance, kind)(image).enhance(step[name])
        elif step["type"] == "GaussianBlur":
            image = torchvision_blur(image, step["sigma_px"])
        elif step["type"] == "RandomHorizontalFlip":
            image = ImageOps.mirror(image)
        else:
            raise AssertionError(step)
    return image


def test_the_draws_that_are_printed_make_the_views(recipe):
    samples = load_samples(load(str(recipe)), samples=12)
    printed = describe(samples)
    assert [sample["position"] for sample in printed["samples"]] == list(range(12))
    applied = set()
    for row, sample in enumerate(printed["samples"]):
        original = Image.open(sample["path"]).convert("RGB")
        assert np.array_equal(original, samples.originals[row]) and sample["size_px"] == [36, 40]
        assert Path(sample["path"]).parent.name == sample["class"] == f"class_{sample['label']}"
        for g, view in enumerate(sample["views"]):
            made = np.asarray(by_hand(original, view)).astype(int)
            assert np.abs(made - samples.views[g][row]).mean() < 0.2
            others = np.asarray(by_hand(original, sample["views"][g - 1])).astype(int)
            assert others.shape != made.shape or np.abs(others - samples.views[g][row]).mean() > 1
            applied |= {(step["type"], step["applied"]) for step in view["transforms"]}
    assert applied > {(name, yes) for name in ("ColorJitter", "GaussianBlur") for yes in (True, False)}


def test_draws_are_readable(capsys, recipe):
    code, text, _ = previewed(capsys, recipe, "--samples", 2, "--draws")
    assert code == 0 and text.splitlines()[-1] == "small_preview.png" and Path("small_preview.png").exists()
    printed = json.loads(previewed(capsys, recipe, "--samples", 2, "--json")[1])
    assert text == as_text(printed) + "\nsmall_preview.png\n" and printed["image"] == "small_preview.png"
    described = {
        "path": "/there/cat\udcff.jpg", "label": 3, "class": "cat", "size_px": [30, 40], "position": 7, "views": [{
            "view": 1, "size_px": [8, 9], "group": "data.views.0", "part_of_original_px": [1.0, 2.5, 20.0, 30.0],
            "transforms": [
                {"type": "RandomResizedCrop", "applied": True, "top_px": 1, "to_px": [8, 9]},
                {"type": "ColorJitter", "applied": True, "order": ["hue", "contrast"], "hue_degrees": -12.345678},
                {"type": "RandomGrayscale", "applied": True},
                {"type": "GaussianBlur", "applied": False},
            ], "mask": {"type": "RandomMask", "patches": 9, "hidden": [0, 1, 4]},
        }], "in_place_of": "/there/dog.jpg"}  # fmt: skip
    assert as_text({"samples": [described]}).splitlines() == [
        "position 7: cat\\udcff.jpg (in place of dog.jpg, which is bad), label 3 (cat), 30 x 40 px",
        "  view 1, 8 x 9 px, of 20 x 30 px at row 1, column 2.5 of the original",
        "    RandomResizedCrop     top 1 px, to 8 x 9 px",
        "    ColorJitter           order hue > contrast, hue -12.35 degrees",
        "    RandomGrayscale       applied",
        "    GaussianBlur          not applied",
        "    RandomMask            hides 3 of 9 patches",
    ]


def test_hidden_patches_are_gray_and_those_of_the_run(capsys, recipe):
    masked = ["--set", 'data.views.1.mask={type="RandomMask", patch_size=4, ratio=0.5}', "--samples", 3]
    code, out, err = previewed(capsys, recipe, *masked, "--json", "-o", "grid.png")
    assert code == 0, err
    described = [sample["views"] for sample in json.loads(out)["samples"]]
    config = load(recipe, ['data.views.1.mask={type="RandomMask", patch_size=4, ratio=0.5}'])
    expected = RandomMask(0.5, patch_size=4).draw(MaskDraws(3, 0, np.arange(3), range(1, 2)), (4, 5))
    views = load_samples(config, 3).views
    for row, (plain, other) in enumerate(tiles(Path("grid.png"), [(36, 40)] * 3, [(24, 24), (16, 20)])):
        assert described[row][0]["mask"] is None and np.array_equal(plain, views[0][row])
        hidden = np.zeros((4, 5), dtype=bool)
        hidden.flat[described[row][1]["mask"]["hidden"]] = True
        assert np.array_equal(hidden, expected[row]) and hidden.sum() == 10
        pixels = hidden.repeat(4, 0).repeat(4, 1)
        assert (other[pixels] == HIDDEN).all() and np.array_equal(other[~pixels], views[1][row][~pixels])


def test_a_turn_is_told_in_degrees_and_has_no_upright_box():
    group = ViewGroup(1, [RandomRotation([30, 40], p=0.5), CenterCrop(20)])
    ((turns, crops),) = view_arguments([group], 0, 0, np.arange(16), np.full((16, 2), 30))
    for row in range(16):
        steps = [(step, own.rows(row)) for step, own in zip(group.steps, (turns, crops), strict=True)]
        if turns.apply[row]:
            degrees = steps[0][0].describe(steps[0][1])["counter_clockwise_degrees"]
            assert 30 <= degrees < 40
            assert turns["affine"][row, 0] == pytest.approx(math.cos(math.radians(degrees)))
        assert part_of_original(steps, (30, 30)) == (None if turns.apply[row] else (5, 5, 20, 20))
    assert 0 < turns.apply.sum() < 16


CHAINS = [
    [RandomResizedCrop(32, scale=(0.2, 0.6)), RandomHorizontalFlip()],
    [RandomHorizontalFlip(), RandomResizedCrop([24, 40], scale=(0.3, 0.8)), RandomHorizontalFlip(), CenterCrop(20)],
    [SharedTrans([Resize(150), RandomHorizontalFlip(), RandomCrop(120)]), RandomGridPatch(32)],
]


@pytest.mark.parametrize("chain", CHAINS)
def test_the_part_of_the_original_is_where_its_pixels_come_from(chain):
    """Of an image whose red is the column and whose green is the row, views tell where they are from."""
    rows, columns = 200, 250
    original = np.zeros((rows, columns, 3), dtype=np.uint8)
    original[..., 0], original[..., 1] = np.arange(columns), np.arange(rows)[:, None]
    group = ViewGroup(9 if any(isinstance(t, RandomGridPatch) for t in chain) else 2, chain)
    positions = np.arange(6)
    arguments = view_arguments([group], 0, 0, positions, np.tile([rows, columns], (6, 1)))
    (views,) = pil_twins.views([original] * 6, [group], arguments)
    boxes = set()
    for row, view in enumerate(views):
        steps = [(step, own.rows(row)) for step, own in zip(group.steps, arguments[0], strict=True)]
        top, left, height, width = part_of_original(steps, (rows, columns))
        half_row, half_column = height / len(view) / 2 + 1, width / len(view[0]) / 2 + 1
        assert [view[..., 1].min(), view[..., 1].max() + 1] == pytest.approx([top, top + height], abs=half_row)
        assert [view[..., 0].min(), view[..., 0].max() + 1] == pytest.approx([left, left + width], abs=half_column)
        boxes.add((top, left))
    assert len(boxes) > 0.9 * len(views)


@pytest.mark.parametrize("mode", ["exact", "dali"])
def test_against_pil(capsys, recipe, mode):
    options = ["--set", f"data.augment={mode}"]
    code, out, err = previewed(capsys, recipe, *options, "--samples", 4, "--against", "pil", "-o", "pair.png")
    assert (code, out) == (0, "pair.png\n"), err
    samples = load_samples(load(str(recipe), options[1:]), samples=4)
    decoded = [np.asarray(Image.open(samples.source.names[i])) for i in samples.plan.ids]
    expected = pil_twins.views(decoded, samples.groups, samples.plan.arguments)
    lines = [tiles(Path("pair.png"), [(36, 40)] * 4, [(24, 24), (16, 20)], with_pil=True, line=k) for k in range(3)]
    errors = []
    for row in range(4):
        for g in range(2):
            ours, theirs, distance = (line[row][g].astype(int) for line in lines)
            assert np.array_equal(ours, samples.views[g][row]) and np.array_equal(theirs, expected[g][row])
            assert np.array_equal(distance, np.minimum(AMPLIFIED * abs(ours - theirs), 255))
            assert np.array_equal(difference(ours, theirs), abs(ours - theirs))
            errors.append(distance.mean() / AMPLIFIED)
    assert max(errors) > 0 and np.median(errors) < (0.5 if mode == "exact" else 1)


def test_a_transform_without_a_twin_has_no_pair(capsys, recipe, tmp_path):
    (tmp_path / "my_transform.py").write_text(
        "from sslrun.data.transforms import Transform\n"
        "class Darker(Transform):\n"
        '    """Half as bright.\n\n    Args:\n        p: probability.\n    """\n'
        "    def __init__(self, p: float = 1.0) -> None:\n"
        "        super().__init__(p=p)\n"
        "    def torch_block(self, x, numbers):\n"
        "        return x * 0.5\n"
    )
    text = recipe.read_text().replace('{ type = "Normalize"', '{ type = "Darker" }, { type = "Normalize"')
    recipe.write_text('custom_imports = ["my_transform"]\n' + text)
    code, _, err = previewed(capsys, recipe, "--samples", 2, "--against", "pil", "-o", "pair.png")
    assert code == 0
    assert err == "warning: no PIL twin of Darker: the views of data.views.0 are shown alone\n"
    samples = load_samples(load(str(recipe)), samples=2)
    assert pil_versions(samples)[1][0] is None and samples.views[0].max() < 128
    ours, theirs = (
        tiles(Path("pair.png"), [(36, 40)] * 2, [(24, 24), (16, 20)], with_pil=True, line=k) for k in range(2)
    )
    assert np.array_equal(ours[0][0], samples.views[0][0])
    assert (theirs[0][0] == theirs[0][0][0, 0]).all(), "paper"
    assert np.array_equal(theirs[0][1], pil_versions(samples)[1][1][0])
    darker = next(type(step) for step in samples.groups[0].steps if type(step).__name__ == "Darker")
    darker.pil = lambda self, image, numbers: image.point(lambda level: level // 2)
    assert difference(samples.views[0], pil_versions(samples)[1][0]).mean() < 0.5


def test_bad_images_are_replaced_as_in_training(capsys, recipe, tmp_path, images):
    samples = load_samples(load(str(recipe)), samples=4)
    bad = tmp_path / "some"
    for path in images.rglob("*.jpg"):
        copy = bad / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    broken = samples.source.names[samples.plan.ids[2]].replace(str(images), str(bad))
    Path(broken).write_bytes(b"no image")
    options = ["--set", f"data.source.data_prefix={bad}", "--samples", 4, "--json"]
    code, out, err = previewed(capsys, recipe, *options, "--set", "data.max_bad_pct=5")
    assert code == 0 and f"warning: bad image, replaced by another: {broken}" in err
    samples = json.loads(out)["samples"]
    assert [sample["in_place_of"] for sample in samples] == [None, None, broken, None]
    assert samples[2]["path"] != broken
    code, _, err = previewed(capsys, recipe, *options, "--set", "data.max_bad_pct=0")
    assert code == 1 and "data.max_bad_pct" in err and "Traceback" not in err


def test_order_by_clusters_is_said_not_to_be_known(capsys, tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = small_run.ROOT / "configs/learn/deepcluster.toml"
    source = f'data.source={{ _delete_ = true, type = "ImageFolder", data_prefix = "{images}" }}'
    holdout = source.replace("data.source", "data.holdout")
    options = ["--set", source, "--set", holdout, "--samples", 1, "-o", "one.png"]
    code, _, err = previewed(capsys, recipe, *options)
    assert code == 0 and err.startswith("warning: DeepCluster draws from clusters that only a run has"), err


@pytest.mark.nightly
def test_the_document_can_be_followed(tmp_path):
    documents.follow(small_run.ROOT / "docs/looking.md", tmp_path)


MISTAKES = {
    "a folder": (["-o", "."], "is a folder, not a file"),
    "no such folder": (["-o", "nowhere/grid.png"], "there is no folder nowhere"),
    "not a PNG": (["-o", "grid.jpg"], "-o names one that ends with .png"),
    "cannot be written": (["-o", "/proc/grid.png"], "/proc/grid.png cannot be written"),
    "no samples": (["--samples", "0"], "--samples must lie between 1 and 100, not 0"),
    "an epoch before the first": (["--epoch", "-1"], "--epoch must lie between 0 and 4294967295, not -1"),
    "missing data": (["--set", "data.source.data_prefix=gone"], "gone does not exist (relative to "),
    "a misspelled key": (["--set", "data.augmnt=dali"], "augmnt"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(capsys, recipe, mistake):
    words, expected = MISTAKES[mistake]
    code, out, err = previewed(capsys, recipe, *words)
    assert code == 2 and not out
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and expected in err, err
    assert not list(Path().glob("*.png*"))


@pytest.mark.parametrize(
    ("views", "zooms"),
    [
        ([(224, 224)] * 2, [1, 1]),
        ([(224, 224)] * 2 + [(96, 96)] * 6, [1, 1] + [2] * 6),
        ([(64, 64)] * 9, [2] * 9),
        ([(32, 32)] * 2, [7, 7]),
        ([(20, 40)], [5]),
        ([(384, 384)], [1]),
        ([(32, 32)] * 100, [3] * 100),
    ],
)
@pytest.mark.parametrize("with_pil", [False, True])
def test_tiles_do_not_overlap(views, zooms, with_pil):
    originals = [(375, 500), (500, 375), (10, 3), (1, 4000)]
    layout = lay_out(originals, views, with_pil)
    assert layout.zooms == zooms
    assert layout.size[0] <= 2048 or len(views) == 100
    widths = [
        max(width for width, _ in layout.originals),
        *(w * zoom for (_, w), zoom in zip(views, zooms, strict=True)),
    ]
    assert all(
        left + width < following
        for left, width, following in zip(layout.lefts, widths, [*layout.lefts[1:], layout.size[0]], strict=True)
    )
    flat = [(top, row) for row, tops in enumerate(layout.tops) for top in tops[1:]]
    for (top, row), (following, _) in zip(flat, [*flat[1:], (layout.size[1], 0)], strict=True):
        assert (
            top + max(layout.originals[row][1], *(h * zoom for (h, _), zoom in zip(views, zooms, strict=True)))
            < following
        )
    assert layout.originals == [(224, 168), (168, 224), (66, 220), (224, 1)]


@pytest.mark.parametrize("name", ["x" * 4000 + ".jpg", "новый\nkatze\udc80.jpg", ""])
def test_names_of_any_length_and_kind_are_drawn(recipe, name):
    samples = load_samples(load(str(recipe)), samples=1)
    named = replace(samples, source=SimpleNamespace(names=[name] * 80, labels=None, class_names=None, channels=3))
    sheet = draw(named)
    assert sheet.size == draw(samples).size and sheet.tobytes() != draw(samples).tobytes()
    assert as_text(describe(named)).splitlines()[0].endswith(" px")
