"""What a trained encoder makes of images, to look at: neighbors, map, confusion, attention."""

import base64
import io

import numpy as np
from PIL import Image

from sslrun.config import load
from sslrun.preview import as_text, describe, load_samples
from sslrun.preview.description import describe_sample, sample_in_words
from sslrun.report import plots
from sslrun.report.evidence import ANY_DEVICE, Evidence, attention, examples, maps, pixels
from sslrun.report.figures import counted, percent
from sslrun.report.html import Child, Html, element
from sslrun.report.record import Record

THUMBNAIL = 96  # pixels
EXAMPLES, ATTENDED, SAMPLES = 10, 4, 6


def augmentations(record: Record) -> list[Child]:
    """The first samples of the recipe, and what the network sees of them."""
    config = load(record.path / "config.toml", [ANY_DEVICE])
    seen = load_samples(config, SAMPLES)
    rows, views = [], len(seen.columns)
    for row, original in enumerate(seen.originals):
        described = describe_sample(seen, row)
        tiles = [_tile(_small(original), sample_in_words(described), described["class"] or "original", "asked")]
        for number, (g, view) in enumerate(seen.columns):
            done = [each["type"] for each in described["views"][number]["transforms"] if each["applied"]]
            image = _small(seen.views[g][seen.line(view, row)])
            title = ", ".join(done) or "unchanged"
            tiles.append(_tile(image, f"view {number + 1}: {title}", f"view {number + 1}", title=title))
        rows.append(element("li", tiles))
    text = (
        f"The first {counted(len(rows), 'sample')} in the recipe's order and {counted(views, 'view')} of each, made by "
        f"the data path of the training ({seen.augment} mode); at the left the images as they were decoded."
    )
    draws = element("pre", element("code", as_text(describe(seen))), tabindex=0)
    told = element("details", element("summary", "What was drawn for each view"), draws)
    return [
        element("p", text),
        element("ol", rows, class_="views", style=f"--tiles: {views + 1 if views < 7 else views // 2 + 1}"),
        told,
    ]


def neighbors(evidence: Evidence, name: str) -> list[Child]:
    """Some queries, each with the training images that the encoder finds most like them."""
    places = examples(evidence, EXAMPLES)
    nearest = evidence.neighbors[places]
    count = nearest.shape[1]
    asked = pixels(evidence, evidence.source, evidence.queries[places], THUMBNAIL)
    found = pixels(evidence, evidence.subject.train, evidence.bank[nearest].flatten(), THUMBNAIL)
    rows = []
    for row, place in enumerate(places):
        own = None if evidence.labels is None else evidence.class_names[evidence.labels[place]]
        tiles = [_tile(asked[row], own or "image", own or "asked", "asked")]
        for column, neighbor in enumerate(nearest[row]):
            label = None if evidence.bank_labels is None else evidence.class_names[evidence.bank_labels[neighbor]]
            cosine = f"{evidence.similarity[place, column]:.2f}"
            alt = f"neighbor {column + 1}, cosine {cosine}"
            said, kind = (cosine, "") if label is None else _verdict(label, label == own)
            tiles.append(_tile(found[row * count + column], alt, said, kind, title=f"cosine {cosine}"))
        rows.append(element("li", tiles))
    chosen = "Evenly spaced images" if evidence.labels is None else "The first image of each class"
    of = "that the encoder was not trained on" if evidence.is_held_out else "of the training set (nothing is held out)"
    text = (
        f"{chosen} {of}, at the left, and the {counted(count, 'training image')} with the most similar features, out "
        f"of {len(evidence.bank):,}. None was picked for what came out. {_part(evidence)}"
    )
    return [element("p", text), element("ol", rows, class_="neighbors", style=f"--tiles: {count + 1}")]


def _verdict(label: str, is_same: bool) -> tuple[Html, str]:
    """A neighbor's class, with a mark that says whether it is the asked one's."""
    mark = element(
        "span", "✓" if is_same else "✗", class_="mark", role="img", aria_label="same" if is_same else "other"
    )
    return element("span", label, " ", mark), "same" if is_same else "other"


def _part(evidence: Evidence) -> str:
    """What is to be said where not all classes are shown."""
    shown = len(evidence.class_names)
    if shown == evidence.num_classes:
        return ""
    return (
        f"Only {shown} of the {evidence.num_classes:,} classes, evenly spaced, are shown and compared, which is easier "
        "than all; sslrun eval knn measures those."
    )


def embedding(evidence: Evidence, name: str) -> list[Child]:
    """The features in two dimensions, twice."""
    if len(evidence.queries) < 10:
        return [element("p", "Left out: a map needs at least ten images.", class_="note")]
    linear, share, nearby = maps(evidence.features)
    labels, names = evidence.labels, evidence.class_names
    shown = [] if labels is None else [names[label] for label in np.unique(labels)]
    groups = None if labels is None else np.unique(labels, return_inverse=True)[1]
    colored = "color and shape tell the class" if shown else "there are no labels to color them by"
    figures = []
    for kind, title, points, told in (
        (
            "tsne",
            "t-SNE",
            nearby,
            "images that are close here have similar features; distances between islands mean little",
        ),
        ("pca", "PCA", linear, f"the two directions of most variance, which hold {percent(100 * share)} of it"),
    ):
        alt = f"{title} of the features of {len(points)} images" + (f" of {len(shown)} classes." if shown else ".")
        plot = plots.scatter(points, groups, shown, name=f"{kind}-{name}", alt=alt, has_names=kind == "tsne")
        caption = element("figcaption", element("strong", title), element("p", told))
        figures.append(element("figure", caption, plot, class_="panel map"))
    held_out = "held-out" if evidence.is_held_out else "training"
    text = f"Features of {counted(len(evidence.queries), f'{held_out} image')}, one dot each; {colored}."
    return [element("p", text), element("div", figures, class_="maps"), _key(shown)]


def confusion(evidence: Evidence, name: str) -> list[Child]:
    """Which classes the neighbors vote for."""
    if evidence.labels is None or evidence.predicted is None:
        return [element("p", "Left out: the images have no labels.", class_="note")]
    names = evidence.class_names
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, (evidence.labels, evidence.predicted), 1)
    totals = counts.sum(axis=1)
    share = counts / np.maximum(totals, 1)[:, None]
    head = element("tr", element("td"), [element("th", element("span", each), scope="col") for each in names])
    body = []
    for row, own in enumerate(names):
        if not totals[row]:
            continue
        cells = []
        for column, part in enumerate(share[row]):
            said, style = (f"{100 * part:.0f}", f"--part: {part:.2f}") if part else ("·", None)
            cells.append(element("td", said, class_="own" if row == column else None, style=style))
        body.append(element("tr", element("th", own, scope="row"), cells))
    accuracy = 100 * np.trace(counts) / counts.sum()
    monitor = evidence.saved.recipe.monitor
    text = (
        f"{percent(accuracy)} of {counted(len(evidence.labels), 'image')} are classified rightly by the "
        f"{counted(min(monitor.knn_k, len(evidence.bank)), 'most similar image')} out of {len(evidence.bank):,}. "
        f"A row is a class, its cells are the per cent of it taken for each class. {_worst(share, names)} "
        f"{_part(evidence)}"
    )
    caption = element("caption", "Per cent of each class (rows) taken for each class (columns)", class_="unseen")
    table = element("table", caption, element("thead", head), element("tbody", body), class_="confusion")
    box = element("div", table, class_="scroll", tabindex=0, role="region", aria_label="Confusion of the k-NN")
    return [element("p", text), box]


def attention_maps(evidence: Evidence, name: str) -> list[Child]:
    """Where the class token looks, head by head."""
    places = examples(evidence, ATTENDED)
    seen = attention(evidence, places)
    if seen is None:
        kind = type(evidence.subject.backbone).__name__
        return [
            element(
                "p", f"Left out: the encoder is a {kind}, and only vision transformers have such maps.", class_="note"
            )
        ]
    images, shares = seen
    heads = shares.shape[1]
    rows = []
    for image, share in zip(images, shares, strict=True):
        tiles = [_tile(_fitted(image), "image", "image")]
        for head in range(heads):
            strongest = 100 * share[head].max()
            alt = f"head {head + 1}: at most {strongest:.0f} % of the attention on one patch"
            tiles.append(_tile(_lit(image, share[head]), alt, f"head {head + 1}"))
        rows.append(element("li", tiles))
    grid = shares.shape[-1]
    text = (
        f"Attention of the class token in the last block, for each of its {counted(heads, 'head')}, over the "
        f"{grid} x {grid} patches: a head looks at what is lit and in color. Each tile has a scale of its own."
    )
    return [element("p", text), element("ol", rows, class_="attention")]


def _tile(image: np.ndarray, alt: str, said: Child, class_: str = "", title: str | None = None) -> Html:
    """An image with a word below."""
    height, width = image.shape[:2]
    shown = element("img", src=_data_uri(image), alt=alt, width=width, height=height, title=title)
    return element("figure", shown, element("figcaption", said), class_=f"tile {class_}".strip())


def _data_uri(image: np.ndarray) -> str:
    """(H, W, 3) uint8 as a small file within the page."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="WEBP", quality=82, method=4)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def _small(image: np.ndarray) -> np.ndarray:
    """In its own size, or smaller: as large as a thumbnail."""
    thumbnail = Image.fromarray(image)
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return np.asarray(thumbnail)


def _fitted(image: np.ndarray) -> np.ndarray:
    """In the size of a thumbnail."""
    return np.asarray(Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC))


def _lit(image: np.ndarray, share: np.ndarray) -> np.ndarray:
    """An image, (H, W, 3) uint8, in light and color where the attention (G, G) falls, gray and dim elsewhere."""
    most = np.percentile(share, 98)
    light = Image.fromarray((255 * (share / max(most, 1e-12)).clip(0, 1) ** 0.8).astype(np.uint8))
    smooth = np.asarray(light.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    small = _fitted(image).astype(np.float32)
    gray = small.mean(axis=2, keepdims=True)
    return (0.22 * gray + smooth[..., None] * (small - 0.22 * gray)).clip(0, 255).astype(np.uint8)


def _key(names: list[str]) -> Html | None:
    """The classes with their colors and shapes."""
    if not names:
        return None
    return element(
        "ul",
        [element("li", plots.marker(place), element("span", each)) for place, each in enumerate(names)],
        class_="key",
    )


def _worst(share: np.ndarray, names: list[str]) -> str:
    """The confusion that happens most."""
    others = share.copy()
    np.fill_diagonal(others, 0)
    row, column = np.unravel_index(int(others.argmax()), others.shape)
    if others[row, column] == 0:
        return "None is taken for another."
    return f"Most often taken for another: {names[row]} for {names[column]}, {percent(100 * others[row, column])}."
