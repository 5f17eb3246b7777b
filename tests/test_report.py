"""`sslrun report`: a page in one file, with correct values, written whatever is missing from the run folder."""

import base64
import hashlib
import itertools
import json
import re
import shutil
import socket
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import small_run
from sslrun.cli import main
from sslrun.glossary import meaning
from sslrun.nn.vit import VisionTransformer
from sslrun.report import encoder_outputs, patches, plots
from sslrun.report import page as page_module
from sslrun.report.html import Html, element, escape

HOSTILE = "<script>alert('1')</script>&amp;\"$x_1$"
EMPTY = {"meta", "link", "img", "br", "wbr", "hr"}


class Tree(HTMLParser):
    """The elements and texts of a page. Parsing fails if elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


@pytest.fixture(scope="module")
def shown(trained, tmp_path_factory) -> tuple[Path, Tree]:
    """A run that no test changes, and its page."""
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("shown") / small_run.NAME))
    return run, report(run)


@pytest.fixture(scope="module")
def vit_page(trained_vit) -> Tree:
    return report(trained_vit)


def report(*words: object) -> Tree:
    """The page that the command line writes."""
    output = Path(words[0]) / "report.html"  # type: ignore[arg-type]
    assert main(["report", *map(str, words), "-o", str(output)]) == 0
    return Tree(output.read_text(encoding="utf-8"))


def without_images(*runs: Path) -> Tree:
    return report(*runs, "--no-images")


def test_the_page_is_complete_in_one_file(shown):
    run, page = shown
    data = (run / "report.html").read_bytes()
    assert len(data) < 3e6
    links = [a[key] or "" for _, a in page.elements for key in ("src", "href", "xlink:href", "srcset") if key in a]
    assert {link.partition(",")[0][:5] for link in links if not link.startswith("#")} <= {"data:"}
    assert not re.search(rb"url\((?!#)|@import", data)
    script = (Path(page_module.__file__).with_name("script.js")).read_bytes()
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    assert data.count(b"<script") == 1 and data.count(b"<script>" + script + b"</script>") == 1 and len(script) < 6000
    policies = [meta["content"] or "" for meta in page.all("meta") if "http-equiv" in meta]
    assert [policy.partition("script-src ")[2] for policy in policies] == [f"'sha256-{digest}'"]
    identifiers = [a["id"] for _, a in page.elements if "id" in a]
    assert len(identifiers) == len(set(identifiers)) > 8
    inside = {link[1:] for link in links if link.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", data.decode()))
    assert inside <= set(identifiers), "every reference has its target"


def test_metrics_are_explained_where_their_names_stand(shown):
    _, page = shown
    for tag, metrics in {
        "h3": ["train/loss", "knn/top1_pct", "speed/images_per_s"],  # plots
        "dt": ["train/loss", "knn/top1_pct", "wall_s"],  # main results
    }.items():
        titles = {attributes.get("title") for attributes in page.all(tag)}
        assert {meaning(metric) for metric in metrics} <= titles - {None}


def test_the_page_is_accessible_to_screen_readers(shown, vit_page):
    for page in (shown[1], vit_page):
        assert page.all("html")[0]["lang"] == "en"
        assert len(page.all("h1")) == 1
        levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
        assert all(image.get("alt") for image in page.all("img"))
        plotted = [svg for svg in page.all("svg") if svg.get("aria-hidden") is None]
        assert plotted and all(svg["role"] == "img" and svg["aria-label"] for svg in plotted)
        assert all("scope" in cell for cell in page.all("th"))


def test_the_same_run_gives_the_same_page(capsys, shown):
    run, _ = shown
    before = (run / "report.html").read_bytes()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n", "the default path"
    assert (run / "report.html").read_bytes() == before


def test_the_k_nn_is_the_monitors(shown):
    """The last k-NN of the training had the same weights and the same images."""
    run, page = shown
    last = [row["knn/top1_pct"] for row in small_run.metrics(run) if "knn/top1_pct" in row][-1]
    assert "16 images are classified by the 5 most similar images out of 64." in page.text
    assert f"{last:.1f} % are classified correctly." in page.text
    found = encoder_outputs.run_encoder(run)
    assert np.mean(found.labels == found.predicted) * 100 == pytest.approx(last)
    assert found.is_held_out and len(found.bank) == 64


def test_neighbors_are_the_nearest(trained, trained_vit):
    """Reference: features of one image at a time, all cosine similarities, sorted."""
    for folder in (trained, trained_vit):
        found = encoder_outputs.run_encoder(folder)
        extract = found.encoder.extractor(found.encoder.train).extract
        bank = np.stack([extract(found.encoder.backbone, np.array([i]))[0].numpy() for i in found.bank])
        bank /= np.linalg.norm(bank, axis=1, keepdims=True)
        cosines = found.features.numpy() @ bank.T
        nearest = np.sort(cosines, axis=1)[:, ::-1][:, : encoder_outputs.NEIGHBORS]
        np.testing.assert_allclose(found.similarity, nearest, atol=1e-5)
        chosen = np.take_along_axis(cosines, found.neighbors, axis=1)
        np.testing.assert_allclose(chosen, nearest, atol=1e-5)


def test_without_held_out_images_no_image_is_its_own_neighbor(trained_vit, vit_page):
    found = encoder_outputs.run_encoder(trained_vit)
    assert not found.is_held_out
    assert len(found.queries) == 40 and not set(found.queries) & set(found.bank)
    assert "the first training image of each class (no images are held out)" in vit_page.text


def test_only_some_of_many_classes_are_shown(run, monkeypatch):
    monkeypatch.setattr(encoder_outputs, "MOST_CLASSES", 3)
    monkeypatch.setattr(encoder_outputs, "SOME_CLASSES", 2)
    found = encoder_outputs.run_encoder(run)
    assert found.class_names == ["class_0", "class_3"]
    assert set(found.encoder.train.labels[found.bank]) == set(found.source.labels[found.queries]) == {0, 3}
    assert "Only 2 of the 4 classes" in report(run).text


def test_attention_equals_torchs(trained_vit, vit_page):
    """Reference: torch.nn.MultiheadAttention with the weights of the last block."""
    torch.manual_seed(0)
    model = VisionTransformer("tiny", img_size=24, patch_size=8, embed_dim=24, depth=2, num_heads=3).eval()
    images = torch.randn(2, 3, 24, 24)
    maps = encoder_outputs.class_attention(model, images)
    tokens = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(images)], dim=1) + model.pos_embed
    tokens = model.blocks[1].norm1(model.blocks[0](tokens))
    twin = torch.nn.MultiheadAttention(24, 3, batch_first=True)
    attend = model.blocks[1].attn
    twin.in_proj_weight, twin.in_proj_bias = attend.qkv.weight, attend.qkv.bias
    _, weights = twin(tokens, tokens, tokens, average_attn_weights=False)
    torch.testing.assert_close(maps, weights[:, :, 0, 1:].view(2, 3, 3, 3))
    assert vit_page.text.count("head 3, ") == encoder_outputs.examples(encoder_outputs.run_encoder(trained_vit), 4).size


def test_alike_patches_have_one_color(trained_vit, vit_page):
    """Two kinds of patches differ most in the first component; noise is small beside them."""
    random = np.random.default_rng(0)
    kinds = random.integers(2, size=(3, 4, 4))
    directions = random.standard_normal((2, 16))
    features = directions[kinds] + 0.01 * random.standard_normal((3, 4, 4, 16))
    colors, share = patches.components_as_colors(features.astype(np.float32))
    assert colors.shape == (3, 4, 4, 3) and colors.dtype == np.uint8 and share > 0.99
    red = colors[..., 0].astype(int)
    assert abs(red[kinds == 0].mean() - red[kinds == 1].mean()) > 240
    assert max(np.ptp(red[kinds == kind]) for kind in (0, 1)) < 15
    found = encoder_outputs.run_encoder(trained_vit)
    places = encoder_outputs.examples(found, 4)
    images, rows = encoder_outputs.patch_features(found, places)
    backbone = found.encoder.backbone
    assert rows.shape == (len(places), *2 * (images.shape[1] // backbone.patch_size,), backbone.num_features)
    colored = [image for image in vit_page.all("img") if image["alt"] == "patches as colors"]
    assert len(colored) == encoder_outputs.examples(found, patches.SHOWN).size > 0


def test_text_is_never_markup(tmp_path, trained, images):
    """Class names, run names, values of the recipe and errors may contain any character."""
    named = HOSTILE.replace("/", "∕")  # no file name has a slash
    run = Path(shutil.copytree(trained, tmp_path / named))
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "class_0").rename(tmp_path / "images" / named)
    config = (run / "config.toml").read_text().replace(str(images), str(tmp_path / "images"))
    (run / "config.toml").write_text(f"{config}\n[vars]\nnote = {json.dumps(HOSTILE)}\n")
    (run / "state.json").write_text(json.dumps({"state": HOSTILE, "error": HOSTILE, "host": HOSTILE}))
    (run / "env.json").write_text(json.dumps({HOSTILE: [HOSTILE], "commit": {"a": HOSTILE}}))
    (run / "eval").mkdir()
    result = {"kind": HOSTILE, "command": HOSTILE, "results": {HOSTILE: 1.0, "grid": [{HOSTILE: HOSTILE}]}}
    (run / "eval" / "knn_x.json").write_text(json.dumps(result))
    page = report(run)
    assert len(page.all("script")) == 1, "ours"
    assert page.text.count(HOSTILE) >= 8 and page.text.count(named) >= 4
    again = without_images(run, shutil.copytree(run, tmp_path / "other"))
    assert len(again.all("script")) == 1 and again.text.count(named) >= 2


def test_the_ranks_of_all_starts(run, tmp_path):
    assert "from step" not in without_images(run).text, "a run of one process says nothing"
    copy = Path(shutil.copytree(run, tmp_path / run.name))
    starts = [{"step": 0, "ranks": 16, "nodes": 2, "device": "cuda"}, {"step": 1204, "ranks": 8, "nodes": 1}]
    (copy / "machine.json").write_text(json.dumps({"starts": starts}))
    assert "16 on 2 nodes, then 8 from step 1,204 on" in without_images(copy).text


def test_missing_and_damaged_files_are_named(run, tmp_path, images):
    """Each file that a section needs is removed or damaged in turn."""
    full = without_images(run).text
    gone = tmp_path / "gone"
    shutil.copytree(run, gone)
    config = (run / "config.toml").read_text()

    (gone / "config.toml").write_text(config.replace(str(images), str(tmp_path / "nowhere")))
    assert "nowhere does not exist" in report(gone).text
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, image in enumerate(images.rglob("*.jpg")):
        shutil.copy(image, flat / f"{number}.jpg")
    (gone / "config.toml").write_text(config.replace(str(images), str(flat)))
    page = report(gone).text
    assert "Left out: the images have no labels." in page and "There are no labels to color them by" in page
    (gone / "config.toml").write_text("model = [")
    page = report(gone).text
    assert "config.toml cannot be read" in page and "Left out: " in page
    (gone / "config.toml").unlink()
    assert "config.toml: No such file" in without_images(gone).text
    (gone / "config.toml").write_text(config)

    shutil.rmtree(gone / "checkpoints")
    assert "Left out: " in report(gone).text
    shutil.copytree(run / "checkpoints", gone / "checkpoints")
    for file in (gone / "checkpoints").rglob("model.safetensors"):
        file.write_bytes(b"")
    assert "Left out: " in report(gone).text

    for name in ("metrics.jsonl", "state.json", "env.json"):
        (gone / name).write_text('[1]\n{"step"')
    (gone / "eval").mkdir()
    (gone / "eval" / "knn.json").write_text("{")
    page = without_images(gone).text
    for message in ("state.json cannot be read", "eval/knn.json cannot be read", "Not in metrics.jsonl: Loss,"):
        assert message in page and message not in full
    for name in ("metrics.jsonl", "state.json", "env.json"):
        (gone / name).unlink()
    (gone / "state.json").write_text(json.dumps({"state": "running", "pid": 2**22 + 1, "host": socket.gethostname()}))
    page = without_images(gone).text
    assert "env.json is missing." in page and "✗ died" in page


def test_rows_without_numbers_leave_gaps(run):
    rows = [{"step": i, "epoch": i / 2, "wall_s": i, "train/loss": None if i % 2 else 1.0 / (i + 1)} for i in range(9)]
    rows += [{"step": 9, "epoch": "x", "train/loss": True, "train/lr": "high", "knn/top1_pct": [1]}, {}]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    page = without_images(run)
    (panel,) = [
        svg["aria-label"] for svg in page.all("svg") if (svg["aria-label"] or "").startswith("Loss over epochs")
    ]
    assert panel == "Loss over epochs. 1 at epoch 0, 0.111 at epoch 4."
    assert "k-NN accuracy" in page.text.partition("Not in metrics.jsonl: ")[2]


def test_metrics_of_custom_monitors_are_drawn(run):
    rows = [
        {"step": i, "epoch": i, "mine/share_pct": 10.0 * i, f"mine/{HOSTILE}": 1.5, "data/own": 1} for i in range(3)
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    labels = [svg["aria-label"] for svg in without_images(run).all("svg") if svg["data-axis"] == "epoch"]
    assert labels == [
        f"mine/{HOSTILE} over epochs. 1.5 at epoch 0, 1.5 at epoch 2.",
        "mine/share_pct over epochs. 0.0 % at epoch 0, 20.0 % at epoch 2.",
    ]


def test_several_runs_are_compared(run, trained, tmp_path):
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    text = (other / "config.toml").read_text()
    (other / "config.toml").write_text(text.replace("temperature = 0.2", "temperature = 0.5"))
    (other / "state.json").write_text('{"state": "failed", "exit_code": 1, "error": "disk full"}')
    page = without_images(run, other)
    assert "Two runs compared" in page.text and "1 key of the resolved recipes differs" in page.text
    assert "model.head.temperature 0.2 0.5" in page.text
    assert "B: disk full" in page.text and "failed, exit code 1" in page.text
    loss = next(svg["aria-label"] or "" for svg in page.all("svg") if (svg["aria-label"] or "").startswith("Loss"))
    assert re.fullmatch(r"Loss over epochs\. A: (.* at epoch .*); B: \1\.", loss)


def test_the_results_of_evaluations_are_shown(run):
    assert main(["eval", "knn", str(run)]) == 0
    assert main(["eval", "spectrum", str(run)]) == 0
    page = without_images(run)
    kept = [json.loads(file.read_text()) for file in sorted((run / "eval").iterdir())]
    for result in kept:
        assert result["command"] in page.text and result["weights"] in page.text
    assert f"knn/top1_pct {kept[0]['results']['knn/top1_pct']:.4g} " in page.text
    assert "knn: grid, 4 rows" in page.text and "Singular values" in page.text


def test_a_path_that_is_not_a_run_is_refused(capsys, run, tmp_path):
    for words, code, message in (
        (["report", tmp_path / "none"], 2, "none does not exist: name the folder of a run"),
        (["report", tmp_path], 2, "has neither config.toml nor metrics.jsonl"),
        (["report", run, "--no-images", "-o", tmp_path / "no" / "page.html"], 1, "could not be written"),
        (["report", run, "--no-images", "-o", tmp_path], 1, "could not be written"),
    ):
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert message in line and captured.out == ""


def test_the_old_name_of_a_flag_still_works(run):
    page = report(run, "--no-pictures").text
    assert page == without_images(run).text and "Nearest neighbors" not in page


def test_a_checkpoint_can_be_named(run):
    assert encoder_outputs.run_encoder(run / "checkpoints/step_00000004").saved.step == 4
    page = report(run / "checkpoints/step_00000004", "-o", run / "report.html", "--no-images")
    assert small_run.NAME in page.text.replace(" ", "")


def drawn(svg: str, number: int = 0) -> np.ndarray:
    """The points of the curve with a run's color."""
    (path,) = re.findall(rf'class="line line-{number}" d="([^"]*)"', svg)
    return np.array([float(word) for word in re.findall(r"-?[\d.]+", path)]).reshape(-1, 2)


def test_a_curve_goes_through_its_points():
    y = [3.0, 1.0, 2.0, 5.0]
    lines = [plots.Line([0, 1, 2, 4], y, "A 5", 0), plots.Line([0, 4], [1, 1], "B 1", 1)]
    svg = plots.lines(lines, alt='a < "b"', x_label="epoch")
    points = drawn(svg)
    for column, values in ((0, [0, 1, 2, 4]), (1, y)):  # the plot is an affine map of the values
        slope, start = np.polyfit(values, points[:, column], 1)
        np.testing.assert_allclose(points[:, column], slope * np.array(values) + start, atol=0.02)
        assert slope > 0 if column == 0 else slope < 0
    tree = Tree(svg)
    assert tree.all("svg")[0]["aria-label"] == 'a < "b"' and {"A 5", "B 1", "epoch"} <= {t.strip() for t in tree.texts}


def test_labels_may_hold_any_character_and_look_like_markup_or_a_color():
    labels = [HOSTILE, "#050100 id=", "bell\x07 \ud800 \uffff"]
    svg = plots.scatter(np.eye(3)[:, :2], np.arange(3), labels, alt=labels[2], has_names=True)
    tree = Tree(svg)
    shown = [text for text in tree.texts if text.strip()]
    assert shown == [*labels[:2], "bell\ufffd ? \ufffd"] and tree.all("svg")[0]["aria-label"] == shown[2]


def test_ticks_show_small_differences():
    svg = plots.lines([plots.Line([0, 1], [2.0884, 2.0893], "", 0)], alt="", x_label="epoch")
    values = [float(text) for text in Tree(svg).texts if re.fullmatch(r"2\.08\d*", text)]
    assert len(values) == len(set(values)) >= 3


def test_long_runs_are_drawn_with_few_points():
    x = np.arange(100_000) / 100
    y = np.sin(x / 50)
    thin_x, thin_y = plots.thinned([x, y])
    svg = plots.lines([plots.Line(thin_x, thin_y, "A", 0)], alt="", x_label="epoch")
    assert len(drawn(svg)) == len(thin_x) <= plots.MOST_POINTS and len(svg) < 20_000
    np.testing.assert_allclose(thin_y, np.sin(thin_x / 50), atol=2e-3)


@pytest.mark.parametrize("centers", [np.zeros((8, 2)), np.array([[0, 0], [5, 3], [100, 0], [101, 1], [0, 40]])])
def test_labels_are_moved_apart(centers: np.ndarray):
    widths = np.full(len(centers), 30.0)

    def covers(places: np.ndarray) -> Sequence[tuple[int, int]]:
        gap = np.abs(places[:, None] - places[None])
        return [(i, j) for i, j in np.argwhere((gap[..., 0] < 30) & (gap[..., 1] < 10)) if i < j]

    moved = plots._apart(centers.astype(float), widths)
    assert covers(centers) and not covers(moved)
    np.testing.assert_array_equal(moved[:, 0], centers[:, 0])
    assert np.abs(moved - centers).max() < 10 * len(centers)


def test_strings_in_html_are_escaped():
    assert element("p", "<b>", Html("<i>x</i>"), None, ["&", 1], class_='"') == (
        '<p class="&quot;">&lt;b&gt;<i>x</i>&amp;1</p>'
    )
    assert element("img", alt="", hidden=True, title=None) == '<img alt="" hidden>'
    assert escape("a\x00b\udcff") == "a\ufffdb?"
