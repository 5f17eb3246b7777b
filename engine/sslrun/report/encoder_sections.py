"""The sections of a report that show images and what the encoder computes from them."""

import base64
import io

import numpy as np
from PIL import Image

from sslrun.allowed_imports import require_allowed
from sslrun.config import load
from sslrun.data.display import as_rgb
from sslrun.preview import as_text, describe, load_samples
from sslrun.preview.description import describe_sample, sample_in_words
from sslrun.report import plots
from sslrun.report.encoder_outputs import ANY_DEVICE, EncoderOutputs, attention, examples, maps, pixels
from sslrun.report.html import Child, Html, element, scrollable
from sslrun.report.number_format import counted, percent
from sslrun.report.reported_run import ReportedRun
from sslrun.runtime.run_files import CONFIG

THUMBNAIL = 96  # pixels
EXAMPLES, ATTENDED, SAMPLES = 10, 4, 6


def augmentations(run: ReportedRun) -> list[Child]:
    """The first samples of the recipe's order, each with its views."""
    config = load(run.path / CONFIG, [ANY_DEVICE])
    require_allowed(config, is_for_training=False)
    preview = load_samples(config, SAMPLES)
    rows, views = [], len(preview.columns)
    for row, original in enumerate(preview.originals):
        described = describe_sample(preview, row)
        tiles = [_tile(_small(original), sample_in_words(described), described["class"] or "original", "query")]
        for number, (g, view) in enumerate(preview.columns):
            applied = [each["type"] for each in described["views"][number]["transforms"] if each["applied"]]
            image = _small(preview.views[g][preview.line(view, row)])
            title = ", ".join(applied) or "unchanged"
            tiles.append(_tile(image, f"view {number + 1}: {title}", f"view {number + 1}", title=title))
        rows.append(element("li", tiles))
    text = (
        f"The first {counted(len(rows), 'sample')} in the recipe's order with {counted(views, 'view')} of each, made "
        f"by the training's data pipeline ({preview.augment} mode). On the left: the decoded images."
    )
    draws = element("pre", element("code", as_text(describe(preview))), tabindex=0)
    parameters = element("details", element("summary", "Parameters of each view"), draws)
    return [
        element("p", text),
        element("ol", rows, class_="views", style=f"--tiles: {views + 1 if views < 7 else views // 2 + 1}"),
        parameters,
    ]


def neighbors(outputs: EncoderOutputs, name: str) -> list[Child]:
    """Some queries, each with the training images whose features are most similar."""
    places = examples(outputs, EXAMPLES)
    nearest = outputs.neighbors[places]
    count = nearest.shape[1]
    queries = pixels(outputs, outputs.source, outputs.queries[places], THUMBNAIL)
    nearby = pixels(outputs, outputs.encoder.train, outputs.bank[nearest].flatten(), THUMBNAIL)
    rows = []
    for row, place in enumerate(places):
        own = None if outputs.labels is None else outputs.class_names[outputs.labels[place]]
        tiles = [_tile(queries[row], own or "query image", own or "query", "query")]
        for column, neighbor in enumerate(nearest[row]):
            label = None if outputs.bank_labels is None else outputs.class_names[outputs.bank_labels[neighbor]]
            cosine = f"{outputs.similarity[place, column]:.2f}"
            title = f"cosine similarity {cosine}"
            caption, kind = (cosine, "") if label is None else _marked(label, label == own)
            tiles.append(_tile(nearby[row * count + column], f"neighbor {column + 1}, {title}", caption, kind, title))
        rows.append(element("li", tiles))
    kind = "held-out" if outputs.is_held_out else "training"
    selection = f"evenly spaced {kind} images" if outputs.labels is None else f"the first {kind} image of each class"
    note = "" if outputs.is_held_out else " (no images are held out)"
    text = (
        f"On the left: {selection}{note}. Beside each: the {counted(count, 'training image')} with the most similar "
        f"features, out of {len(outputs.bank):,}. The choice does not depend on the result. {_shown_classes(outputs)}"
    )
    return [element("p", text), element("ol", rows, class_="neighbors", style=f"--tiles: {count + 1}")]


def _marked(label: str, is_same: bool) -> tuple[Html, str]:
    """A neighbor's class with a mark, and the CSS class of its tile: same as the query's class or different."""
    kind = "same" if is_same else "different"
    mark = element("span", "✓" if is_same else "✗", class_="mark", role="img", aria_label=f"{kind} class")
    return element("span", label, " ", mark), kind


def _shown_classes(outputs: EncoderOutputs) -> str:
    """A sentence about the classes that are left out; empty if all are shown."""
    shown = len(outputs.class_names)
    if shown == outputs.num_classes:
        return ""
    return (
        f"Only {shown} of the {outputs.num_classes:,} classes, evenly spaced, are shown and compared, which is easier "
        "than telling all of them apart. sslrun eval knn measures all classes."
    )


def feature_maps(outputs: EncoderOutputs, name: str) -> list[Child]:
    """The features in two dimensions, by t-SNE and by PCA."""
    if len(outputs.queries) < 10:
        return [element("p", "Left out: a map needs at least ten images.", class_="note")]
    linear, share, nearby = maps(outputs.features)
    labels, names = outputs.labels, outputs.class_names
    shown = [] if labels is None else [names[label] for label in np.unique(labels)]
    groups = None if labels is None else np.unique(labels, return_inverse=True)[1]
    colored = "Color and shape show the class" if shown else "There are no labels to color them by"
    figures = []
    for kind, title, points, subtitle in (
        (
            "tsne",
            "t-SNE",
            nearby,
            "close images have similar features; distances between clusters mean little",
        ),
        ("pca", "PCA", linear, f"the two directions of largest variance, with {percent(100 * share)} of it"),
    ):
        alt = f"{title} of the features of {len(points)} images" + (f" of {len(shown)} classes." if shown else ".")
        plot = plots.scatter(points, groups, shown, name=f"{kind}-{name}", alt=alt, has_names=kind == "tsne")
        caption = element("figcaption", element("strong", title), element("p", subtitle))
        figures.append(element("figure", caption, plot, class_="panel map"))
    held_out = "held-out" if outputs.is_held_out else "training"
    text = f"Features of {counted(len(outputs.queries), f'{held_out} image')}, one marker each. {colored}."
    return [element("p", text), element("div", figures, class_="maps"), _legend(shown)]


def confusion(outputs: EncoderOutputs, name: str) -> list[Child]:
    """A table of the classes that the k-NN predicts for each class."""
    if outputs.labels is None or outputs.predicted is None:
        return [element("p", "Left out: the images have no labels.", class_="note")]
    names = outputs.class_names
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, (outputs.labels, outputs.predicted), 1)
    totals = counts.sum(axis=1)
    share = counts / np.maximum(totals, 1)[:, None]
    head = element("tr", element("td"), [element("th", element("span", each), scope="col") for each in names])
    body = []
    for row, own in enumerate(names):
        if not totals[row]:
            continue
        cells = []
        for column, part in enumerate(share[row]):
            text, style = (f"{100 * part:.0f}", f"--share: {part:.2f}") if part else ("·", None)
            cells.append(element("td", text, class_="diagonal" if row == column else None, style=style))
        body.append(element("tr", element("th", own, scope="row"), cells))
    accuracy = 100 * np.trace(counts) / counts.sum()
    monitor = outputs.saved.recipe.monitor
    text = (
        f"{percent(accuracy)} of {counted(len(outputs.labels), 'image')} are classified correctly by the "
        f"{counted(min(monitor.knn_k, len(outputs.bank)), 'most similar image')} out of {len(outputs.bank):,}. "
        f"A row is a class; its cells are the percentages predicted as each class. {_most_confused(share, names)} "
        f"{_shown_classes(outputs)}"
    )
    caption = element(
        "caption", "Percentage of each class (rows) predicted as each class (columns)", class_="screen-reader-only"
    )
    table = element("table", caption, element("thead", head), element("tbody", body), class_="confusion")
    return [element("p", text), scrollable(table, "Confusion of the k-NN")]


def attention_maps(outputs: EncoderOutputs, name: str) -> list[Child]:
    """Attention of the class token, head by head."""
    places = examples(outputs, ATTENDED)
    weights = attention(outputs, places)
    if weights is None:
        kind = type(outputs.encoder.backbone).__name__
        return [element("p", f"Left out: the encoder is a {kind}, not a vision transformer.", class_="note")]
    images, shares = weights
    heads = shares.shape[1]
    rows = []
    for image, share in zip(images, shares, strict=True):
        tiles = [_tile(_fitted(image), "input image", "image")]
        for head in range(heads):
            strongest = 100 * share[head].max()
            alt = f"head {head + 1}: at most {strongest:.0f} % of the attention is on one patch"
            tiles.append(_tile(_lit(image, share[head]), alt, f"head {head + 1}"))
        rows.append(element("li", tiles))
    grid = shares.shape[-1]
    text = (
        f"Attention of the last block's class token to the {grid} x {grid} patches, for each of the "
        f"{counted(heads, 'head')}: bright and in color where it is strong. Each tile has its own scale."
    )
    return [element("p", text), element("ol", rows, class_="attention")]


def _tile(image: np.ndarray, alt: str, caption: Child, class_: str = "", title: str | None = None) -> Html:
    """An image with a caption."""
    height, width = image.shape[:2]
    shown = element("img", src=_data_uri(image), alt=alt, width=width, height=height, title=title)
    return element("figure", shown, element("figcaption", caption), class_=f"tile {class_}".strip())


def _data_uri(image: np.ndarray) -> str:
    """A (H, W, 3) uint8 image as a data URI."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="WEBP", quality=82, method=4)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def _small(image: np.ndarray) -> np.ndarray:
    """The image in RGB, reduced to a thumbnail's size if it is larger."""
    thumbnail = Image.fromarray(as_rgb(image))
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return np.asarray(thumbnail)


def _fitted(image: np.ndarray) -> np.ndarray:
    """The image, resized to a thumbnail's size."""
    return np.asarray(Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC))


def _lit(image: np.ndarray, share: np.ndarray) -> np.ndarray:
    """A (H, W, 3) uint8 image, in color where the attention (G, G) is strong, gray and dark where it is weak."""
    most = np.percentile(share, 98)
    light = Image.fromarray((255 * (share / max(most, 1e-12)).clip(0, 1) ** 0.8).astype(np.uint8))
    smooth = np.asarray(light.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    small = _fitted(image).astype(np.float32)
    gray = small.mean(axis=2, keepdims=True)
    return (0.22 * gray + smooth[..., None] * (small - 0.22 * gray)).clip(0, 255).astype(np.uint8)


def _legend(names: list[str]) -> Html | None:
    """The classes with their markers."""
    if not names:
        return None
    return element(
        "ul",
        [element("li", plots.marker(place), element("span", each)) for place, each in enumerate(names)],
        class_="legend",
    )


def _most_confused(share: np.ndarray, names: list[str]) -> str:
    """A sentence about the most frequent confusion."""
    others = share.copy()
    np.fill_diagonal(others, 0)
    row, column = np.unravel_index(int(others.argmax()), others.shape)
    if others[row, column] == 0:
        return "No class is confused with another."
    return f"Most frequent confusion: {names[row]} predicted as {names[column]}, {percent(100 * others[row, column])}."
