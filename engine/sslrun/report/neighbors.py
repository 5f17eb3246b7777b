"""Some images, each with the training images whose features are most similar, before and after training."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sslrun.number_format import counted
from sslrun.report.columns import heading
from sslrun.report.encoder_outputs import EncoderOutputs, examples, pixels
from sslrun.report.html import Child, Html, element, joined
from sslrun.report.reported_run import ReportedRun
from sslrun.report.tiles import THUMBNAIL, tile

EXAMPLES = 10
SAME = 4.0  # mean difference, in levels of 255, of two thumbnails of the same images


@dataclass(frozen=True)
class Neighbors:
    """The neighbors of some queries in one run.

    Attributes:
        text: what is shown.
        names: names of the queries' images.
        images: (n, S, S, 3) uint8, the queries' images.
        queries: tile of each query.
        after: a strip of neighbors for each query, by the trained network.
        before: the same by the network before training; None without such a network.
        before_note: what the network before training is, or why there is none.
    """

    text: str
    names: list[str]
    images: np.ndarray
    queries: list[Html]
    after: list[Html]
    before: list[Html] | None
    before_note: str


def collect_neighbors(outputs: EncoderOutputs) -> Neighbors:
    """The neighbors of the first queries of each class, or of evenly spaced ones."""
    places = examples(outputs, EXAMPLES)
    ids = outputs.queries[places]
    names = None if outputs.labels is None else [outputs.class_names[label] for label in outputs.labels[places]]
    images = pixels(outputs, outputs.source, ids, THUMBNAIL)
    queries = [
        tile(image, own or "query image", own or "query", "query")
        for image, own in zip(images, names or [""] * len(places), strict=True)
    ]
    kind = "held-out" if outputs.is_held_out else "training"
    selection = f"evenly spaced {kind} images" if outputs.labels is None else f"the first {kind} image of each class"
    note = "" if outputs.is_held_out else " (no images are held out)"
    count = outputs.neighbors.shape[1]
    text = (
        f"On the left: {selection}{note}. Beside each: the {counted(count, 'training image')} with the most similar "
        f"features, out of {len(outputs.bank):,}. The choice does not depend on the result. {shown_classes(outputs)}"
    )
    return Neighbors(
        text.strip(),
        [outputs.source.names[int(each)] for each in ids],
        images,
        queries,
        _strips(outputs, places, outputs.neighbors[places], names, outputs.similarity[places]),
        None if outputs.before is None else _strips(outputs, places, outputs.before[places], names, None),
        outputs.before_note,
    )


def render_neighbors(parts: Sequence[tuple[ReportedRun, Neighbors | Html]]) -> list[Child]:
    """A row for each query: the neighbors of all runs that have the same queries stand in it beside each other."""
    groups: list[list[tuple[ReportedRun, Neighbors]]] = []
    reasons = []
    for run, part in parts:
        if isinstance(part, Html):
            reasons.append(element("div", heading([run], len(parts)), part))
            continue
        group = next((each for each in groups if _have_same_queries(each[0][1], part)), None)
        if group is None:
            groups.append([(run, part)])
        else:
            group.append((run, part))
    return [[_table(group, len(parts)) for group in groups], reasons]


def _have_same_queries(one: Neighbors, other: Neighbors) -> bool:
    """Whether names and pixels are the same, up to the rounding of the two modes of decoding."""
    if one.names != other.names:
        return False
    return bool(np.abs(one.images.astype(float) - other.images.astype(float)).mean() < SAME)


def _table(group: Sequence[tuple[ReportedRun, Neighbors]], total: int) -> list[Child]:
    texts = list(dict.fromkeys(part.text for _, part in group))
    befores: dict[str, list[tuple[ReportedRun, Neighbors]]] = {}
    for run, part in group:
        if part.before is not None:
            befores.setdefault(joined(part.before), []).append((run, part))
    columns: list[tuple[Child, list[Html]]] = []
    for having in befores.values():
        letters = "" if len(having) == total else f" ({', '.join(run.letter for run, _ in having)})"
        columns.append((element("h3", f"Before training{letters}"), having[0][1].before or []))
    for run, part in group:
        columns.append((heading([run], total) or element("h3", "After training"), part.after))
    wide = len(group) + 1 if len(befores) == 1 else len(group)
    head = element("div", [element("div", title) for title, _ in columns], class_="strips head")
    rows = []
    for row, query in enumerate(group[0][1].queries):
        strips = [element("div", title, each[row]) for title, each in columns]
        rows.append(element("li", query, element("div", strips, class_="strips")))
    notes = list(dict.fromkeys((part.before is None, part.before_note) for _, part in group))
    before = [
        f"Neighbors before training are missing: {note}." if is_missing else f"Before training: the network {note}."
        for is_missing, note in notes
    ]
    return [
        [element("p", text) for text in [*texts, *before]],
        element("div", head, element("ol", rows), class_="neighbors", style=f"--columns: {wide}"),
    ]


def _strips(
    outputs: EncoderOutputs,
    places: np.ndarray,
    nearest: np.ndarray,
    names: list[str] | None,
    similarity: np.ndarray | None,
) -> list[Html]:
    """For each query a strip with its neighbors, (n, k) indices in the bank."""
    count = nearest.shape[1]
    images = pixels(outputs, outputs.encoder.train, outputs.bank[nearest].flatten(), THUMBNAIL)
    strips = []
    for row in range(len(places)):
        tiles, same = [], 0
        for column, neighbor in enumerate(nearest[row]):
            title = None if similarity is None else f"cosine similarity {similarity[row, column]:.2f}"
            caption: Child = "" if similarity is None else f"{similarity[row, column]:.2f}"
            kind = ""
            if names is not None and outputs.bank_labels is not None:
                label = outputs.class_names[outputs.bank_labels[neighbor]]
                same += label == names[row]
                caption, kind = _marked(label, label == names[row])
            alt = f"neighbor {column + 1}" + ("" if title is None else f", {title}")
            tiles.append(tile(images[row * count + column], alt, caption, kind, title))
        said = "" if names is None else f"{same} of {count} in the class of the query"
        strips.append(element("div", tiles, class_="strip", style=f"--tiles: {count}", title=said or None))
    return strips


def _marked(label: str, is_same: bool) -> tuple[Html, str]:
    """A neighbor's class with a mark, and the CSS class of its tile: same as the query's class or different."""
    kind = "same" if is_same else "different"
    mark = element("span", "✓" if is_same else "✗", class_="mark", role="img", aria_label=f"{kind} class")
    return element("span", label, " ", mark), kind


def shown_classes(outputs: EncoderOutputs) -> str:
    """A sentence about the classes that are left out; empty if all are shown."""
    shown = len(outputs.class_names)
    if shown == outputs.num_classes:
        return ""
    return (
        f"Only {shown} of the {outputs.num_classes:,} classes, evenly spaced, are shown and compared, which is easier "
        "than telling all of them apart. sslrun eval knn measures all classes."
    )
