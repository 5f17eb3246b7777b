"""`sslrun report`: what is said of runs and how several of them are compared, without a browser."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import small_run
from sslrun.config import dump, load
from sslrun.evaluation.collapse import verdict
from sslrun.report import attention, encoder_outputs, feature_map, neighbors, plots
from sslrun.report.columns import columns
from sslrun.report.encoder_name import encoder_facts, encoder_name
from sslrun.report.header import run_verdict
from sslrun.report.html import Html, element, joined
from sslrun.report.page import render
from sslrun.report.reported_run import read_run
from sslrun.report.results import result_table
from test_report import Tree

BASE = {"step": 10, "epoch": 1.0, "wall_s": 5.0}


def written(run: Path, *rows: dict) -> Path:
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(BASE | row)}\n" for row in rows))
    return run


def text_of(runs: list[Path]) -> str:
    return Tree(render([read_run(run, number) for number, run in enumerate(runs)], has_images=False)).text


@pytest.mark.parametrize(
    ("feature_std", "rankme", "most", "word", "reason"),
    [
        (None, None, 192, "cannot be judged", "Neither RankMe nor the spread of the embeddings was measured"),
        (0.98, 61.2, 128, "not collapsed", "use 61 of 128 possible directions"),
        (0.98, 12.9, 128, "not collapsed", "13 of 128"),
        (0.98, 12.7, 128, "partly collapsed", "use few directions, 12.7 of 128"),
        (0.98, 1.9, 128, "collapsed", "almost the same features"),
        (0.09, 61.2, 128, "collapsed", "almost equal (spread 0.09)"),
        (0.3, None, None, "not collapsed", "unevenly (0.3). RankMe was not measured"),
        (None, 61.2, None, "not collapsed", "how many are possible is not known"),
    ],
)
def test_the_verdict_on_collapse(feature_std, rankme, most, word, reason):
    found = verdict(feature_std, rankme, most)
    assert found.word == word and reason in found.reason


def test_the_verdict_is_on_the_newest_measurement_after_the_first_step(run):
    judged = [
        ([{"epoch": 0, "spectrum/rankme": 20.0}], "cannot be judged"),
        ([{"epoch": 0, "spectrum/rankme": 1.0}, {"spectrum/rankme": 20.0}], "not collapsed"),
        ([{"spectrum/rankme": 20.0}, {"epoch": 2.0, "spectrum/rankme": 1.0}], "collapsed"),
        ([{"spectrum/rankme": 20.0}, {"epoch": 2.0, "spectrum/rankme": None}], "cannot be judged"),
        ([{"train/feature_std": 0.9}, {"epoch": 2.0, "train/feature_std": 0.01}], "collapsed"),
        ([], "cannot be judged"),
    ]
    for rows, word in judged:
        assert run_verdict(read_run(written(run, *rows), None)).word == word, rows
    (run / "eval").mkdir()
    result = {"kind": "spectrum", "results": {"spectrum/rankme": 1.5}}
    (run / "eval/spectrum_x.json").write_text(json.dumps(result))
    assert "RankMe is 1.5 of 32 possible" in run_verdict(read_run(written(run), None)).reason


def test_possible_directions_are_not_more_than_the_images(run):
    """16 images a step, 1 step an epoch: of the 32 features at most 16 directions can be used."""
    shown = read_run(written(run, {"step": 2, "epoch": 2.0, "spectrum/rankme": 9.0}), None)
    assert "use 9 of 16 possible" in run_verdict(shown).reason


def test_the_name_of_an_encoder_says_what_sets_it_apart(run):
    for table, name in (
        ({"type": "ResNet", "depth": 50}, "ResNet-50"),
        ({"type": "ResNet", "depth": 18, "base_width": 16, "stem": "small"}, "ResNet-18, base width 16, small stem"),
        ({"type": "VisionTransformer"}, "ViT-S/16"),
        ({"type": "VisionTransformer", "arch": "base", "patch_size": 8, "img_size": 96}, "ViT-B/8, 96 px"),
        ({"type": "VisionTransformer", "embed_dim": 96, "depth": 4}, "ViT/16, width 96, 4 blocks"),
        ({"type": "Sobel", "backbone": {"type": "ResNet", "depth": 50}}, "Sobel + ResNet-50"),
        ({"type": "timm", "name": "resnet18"}, "timm resnet18"),
    ):
        assert encoder_name(table) == name
    facts = encoder_facts(load(run / "config.toml"))
    backbone = encoder_outputs.run_encoder(run).encoder.backbone
    assert facts.num_parameters == sum(each.numel() for each in backbone.parameters()) > 40_000
    assert facts.num_features == backbone.num_features
    assert "MoCo with ResNet-18, base width 4, small stem, 44.29 k parameters" in text_of([run])


def test_the_results_of_runs_are_one_table(run, trained, tmp_path):
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    written(run, {"knn/top1_pct": 40.0}, {"epoch": 2.0, "knn/top1_pct": 30.0, "speed/images_per_s": 7})
    written(other, {"knn/top1_pct": 35.0, "wall_s": 7260})
    (run / "eval").mkdir()
    for number, (epoch, top1) in enumerate(((1, 61.0), (2, 58.0))):
        result = {"kind": "linear", "epoch": epoch, "results": {"linear/top1_pct": top1}}
        (run / f"eval/linear_{number}.json").write_text(json.dumps(result))
    table = Tree(joined(result_table([read_run(each, number) for number, each in enumerate((run, other))]))).text
    heads = "run k-NN, % linear, % parameters time images/s epochs loss method encoder state"
    assert table.split(" A ")[0].strip() == heads
    first, second = table.split(" A ")[1].split(" B ")
    assert "30.0 best 40.0, epoch 1 61.0 epoch 1 44.29 k 5 s 7" in first
    assert "35.0 (best) – 44.29 k 2 h 1 min –" in second
    assert "Not measured: k-NN after training, % ( sslrun eval knn RUN ), fine-tuned, % (" in second


def test_equal_parts_of_runs_are_shown_once(run, trained, tmp_path):
    runs = [read_run(each, number) for number, each in enumerate((run, run, trained))]
    texts = ["same", "same", "other"]
    shown = columns(
        [(each, [element("p", "above"), element("p", text)]) for each, text in zip(runs, texts, strict=True)]
    )
    tree = Tree(joined(shown))
    assert re.findall(r"above|same|other", tree.text.replace("the same", "")) == ["above", "same", "other"]
    assert len(tree.all("article")) == 2
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    text = text_of([run, other])
    assert text.count("config.toml, ") == 1 and "A B the same in all runs" in text


def test_recipe_differences_count_defaults_and_show_moved_and_added_elements(run, tmp_path):
    """B states a default; C inserts a transform where A has another, and moves one."""
    config, others = (run / "config.toml").read_text(), [tmp_path / "b", tmp_path / "c"]
    for other in others:
        shutil.copytree(run, other)
    (others[0] / "config.toml").write_text(config.replace("knn_k = 5", "knn_k = 5\nknn_temperature = 0.07"))
    assert "The recipes are the same" in text_of([run, others[0]])
    values = load(run / "config.toml").values
    crop, jitter, blur, *rest = values["data"]["views"][0]["transforms"]
    values["data"]["views"][0]["transforms"] = [crop, {"type": "RandomGrayscale"}, blur, jitter, *rest]
    (others[1] / "config.toml").write_text(dump(values))
    text = text_of([run, *others]).partition("Recipe differences ")[2]
    assert "data.views.0.transforms.1, added not set not set" in text and "RandomGrayscale" in text
    assert re.search(r"data\.views\.0\.transforms\.[12], place [12] [12] [23] ", text)


def test_neighbors_before_training_are_those_of_the_initial_network(run):
    """The k-NN of step 0 in metrics.jsonl is that of the network that the neighbors before training come from."""
    found = encoder_outputs.run_encoder(run)
    initial, note = encoder_outputs._initial_backbone(found.saved)
    assert note == "with its random initial weights"
    monitor = found.saved.recipe.monitor
    bank, queries = (
        found.encoder.extractor(source).extract(initial, ids)
        for source, ids in ((found.encoder.train, found.bank), (found.source, found.queries))
    )
    vote = {"k": monitor.knn_k, "temperature": monitor.knn_temperature}
    predicted = encoder_outputs.knn_predict(bank, torch.from_numpy(found.bank_labels), queries, **vote).numpy()
    first = next(row for row in small_run.metrics(run) if "knn/top1_pct" in row)
    assert first["step"] == 0 and np.mean(predicted == found.labels) * 100 == pytest.approx(first["knn/top1_pct"])
    np.testing.assert_array_equal(encoder_outputs.nearest(bank, queries, 5)[0].numpy(), found.before)
    assert not np.array_equal(found.before, found.neighbors)


def test_neighbors_of_runs_are_aligned_by_query(run, trained_vit):
    runs = [read_run(each, number) for number, each in enumerate((run, run, trained_vit))]
    parts = [neighbors.collect_neighbors(encoder_outputs.run_encoder(each.path)) for each in runs]
    assert len(parts[0].queries) == 4
    page = joined(neighbors.render_neighbors(list(zip(runs, parts, strict=True))))
    tree = Tree(page)
    assert len(tree.all("ol")) == 2, "the transformer has other queries: no images are held out"
    rows = [row.partition("</li>")[0] for row in page.split("<li>")[1:5]]
    assert all(row.count("letter run-0") == row.count("letter run-1") == 1 and "run-2" not in row for row in rows)
    assert all(row.count('class="strip"') == 3 for row in rows), "before training, A and B"
    moved = dataclasses.replace(parts[0], images=255 - parts[0].images)
    again = Tree(joined(neighbors.render_neighbors([(runs[0], parts[0]), (runs[1], moved)])))
    assert len(again.all("ol")) == 2, "equal names of other images are other queries"


def test_images_without_labels_get_clusters_and_thumbnails(run, tmp_path, images):
    config = (run / "config.toml").read_text()
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, image in enumerate(sorted(images.rglob("*.jpg"))):
        shutil.copy(image, flat / f"{number}.jpg")
    (run / "config.toml").write_text(config.replace(str(images), str(flat)))
    outputs = encoder_outputs.run_encoder(run)
    found = Tree(joined(feature_map.feature_maps(outputs)))
    assert "color and shape show 3 clusters" in found.text
    sizes = [int(size) for size in re.findall(r"cluster \d, (\d+) images?", found.text)]
    assert sum(sizes) == len(outputs.queries) == 16 and sizes == sorted(sizes, reverse=True)
    assert 3 <= len(found.all("image")) <= feature_map.MOST_THUMBNAILS
    assert all((image["href"] or "").startswith("data:image/webp;base64,") for image in found.all("image"))


def test_clusters_are_found_and_thumbnails_do_not_cover_each_other():
    random = np.random.default_rng(0)
    true = np.repeat([0, 1, 2], [40, 30, 20])
    features = torch.from_numpy(np.eye(3)[true] + 0.05 * random.normal(size=(90, 3))).float()
    numbers, distances = encoder_outputs.clusters(features, 3)
    np.testing.assert_array_equal(numbers, true)
    assert distances.max() < 0.3
    places = random.uniform(0, 400, (2000, 2))
    chosen = feature_map.apart(places, 32.0, 60)
    gaps = np.abs(places[chosen][:, None] - places[chosen]).max(axis=2) + 1e9 * np.eye(len(chosen))
    assert len(chosen) == 60 and gaps.min() >= 32
    assert len(feature_map.apart(np.zeros((5, 2)), 32.0, 60)) == 1


def test_attention_is_a_heat_map():
    """One bright patch: there the color is that of the strongest attention, elsewhere almost that of none."""
    share = np.zeros((4, 4), dtype=np.float32)
    share[1, 2] = 0.5
    tile = attention.heat_map(np.full((32, 32, 3), 128, np.uint8), share).astype(int)
    strong, weak = tile[36, 60], tile[90, 5]
    np.testing.assert_allclose(strong, 0.15 * 128 + 0.85 * attention.HEAT[-1], atol=35)
    np.testing.assert_allclose(weak, 0.65 * 128 + 0.35 * attention.HEAT[0], atol=2)
    np.testing.assert_allclose(attention.heat(np.array([0.0, 0.5, 1.0])), attention.HEAT[[0, 4, 8]])


def test_long_names_are_replaced_by_numbers_in_the_map_and_names_stay_inside():
    points = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    names = ["a" * plots.longest_name()] * 4
    svg = Tree(plots.scatter(points, np.arange(4), names, alt="", has_names=True))
    for text in svg.all("text"):
        half = plots._width(names[0], bold=True) / 2
        assert half <= float(text["x"] or 0) <= plots.MAP_WIDTH - half


def test_the_page_of_a_long_run_is_bounded(run):
    rows = [{"step": i, "epoch": i / 100, "wall_s": i, "train/loss": 1 / (i + 1), "a/b": i} for i in range(30_000)]
    written(run, *rows, *({f"mine/{number}": 1.0} for number in range(100)))
    page = render([read_run(run, number) for number in range(3)], has_images=False)
    assert len(page) < 1e6 and "metrics.jsonl has 61 more custom metrics." in page


def test_the_wall_clock_is_in_the_largest_unit_that_fits(run):
    written(run, {"wall_s": 0.0, "train/loss": 1.0}, {"wall_s": 7300.0, "epoch": 2.0, "train/loss": 0.5})
    page = Tree(render([read_run(run, None)], has_images=False))
    (plot,) = [
        svg for svg in page.all("svg") if (svg["aria-label"] or "").startswith("Loss over wall-clock time, hours")
    ]
    assert plot["data-x"] == "0 7300"


def test_a_part_that_fails_does_not_take_the_others_along(run):
    parts = [(read_run(run, number), part) for number, part in enumerate(("one", Html("<p>Left out: x.</p>")))]
    shown = joined(columns(parts))
    assert shown.count("<article>") == 2 and "Left out: x." in shown
