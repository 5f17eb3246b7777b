"""The features in the plane: colored by class, or by clusters and with thumbnails where there are no labels."""

import numpy as np

from sslrun.number_format import counted, percent
from sslrun.report import plots
from sslrun.report.encoder_outputs import EncoderOutputs, clusters, maps, pixels
from sslrun.report.html import Child, Html, element
from sslrun.report.tiles import data_uri, tile

FEWEST = 10  # images of a map
CLUSTERS, PER_CLUSTER = 8, 6  # clusters, and images that stand for each
MOST_THUMBNAILS, THUMBNAIL = 60, 48  # images in a map, and their size in pixels


def feature_maps(outputs: EncoderOutputs) -> list[Child]:
    """The features in two dimensions, by t-SNE and by PCA."""
    count = len(outputs.queries)
    if count < FEWEST:
        return [element("p", f"Left out: a map needs at least {FEWEST} images.", class_="note")]
    linear, share, nearby = maps(outputs.features)
    kind = "held-out" if outputs.is_held_out else "training"
    held = counted(count, f"{kind} image")
    subtitles = (
        "close images have similar features; distances between clusters mean little",
        f"the two directions of largest variance, with {percent(100 * share)} of it",
    )
    if outputs.labels is None:
        numbers, distances = clusters(outputs.features, min(CLUSTERS, count // 5))
        names = [f"cluster {number + 1}" for number in range(int(numbers.max()) + 1)]
        text = (
            f"Features of {held}, one marker each. There are no labels to color them by: color and shape show "
            f"{len(names)} clusters, found by k-means in the features. Their number is chosen, not found."
        )
        options = {"thumbnails": _thumbnails(outputs, nearby, numbers), "has_names": False}
        below: list[Child] = [_clusters(outputs, numbers, distances)]
        groups, groups_are = numbers, "clusters"
    else:
        names = [outputs.class_names[label] for label in np.unique(outputs.labels)]
        groups, groups_are = np.unique(outputs.labels, return_inverse=True)[1], "classes"
        text = f"Features of {held}, one marker each. Color and shape show the class."
        options = {"has_names": True}
        below = [_legend(names)]
    is_short = all(len(name) <= plots.longest_name() for name in names)
    written = names if is_short else [str(number + 1) for number in range(len(names))]
    figures = []
    for place, (title, points, subtitle) in enumerate(zip(("t-SNE", "PCA"), (nearby, linear), subtitles, strict=True)):
        alt = f"{title} of the features of {count} images in {len(names)} {groups_are}."
        chosen = options if place == 0 else {"has_names": False}
        plot = plots.scatter(points, groups, written, alt=alt, **chosen)
        caption = element("figcaption", element("strong", title), element("p", subtitle))
        figures.append(element("figure", caption, plot, class_="panel map"))
    return [element("p", text), element("div", figures, class_="maps"), below]


def _thumbnails(outputs: EncoderOutputs, points: np.ndarray, groups: np.ndarray) -> list[tuple[np.ndarray, str, int]]:
    """Images at their places in the map: as many as there is room for without one covering another."""
    places = plots.frame_places(points)
    chosen = apart(places, 1.08 * plots.thumbnail_side(MOST_THUMBNAILS), MOST_THUMBNAILS)
    images = pixels(outputs, outputs.source, outputs.queries[chosen], THUMBNAIL)
    return [(places[each], data_uri(image), int(groups[each])) for each, image in zip(chosen, images, strict=True)]


def apart(places: np.ndarray, distance: float, most: int) -> np.ndarray:
    """Indices of at most `most` of the places (n, 2), ascending, no two closer than `distance` in both directions."""
    chosen: list[int] = []
    for each in np.random.default_rng(0).permutation(len(places)):
        if len(chosen) < most and (np.abs(places[chosen] - places[each]).max(axis=1) >= distance).all():
            chosen.append(int(each))
    return np.sort(np.array(chosen, dtype=np.int64))


def _clusters(outputs: EncoderOutputs, numbers: np.ndarray, distances: np.ndarray) -> Html:
    """A row for each cluster: its size, and the images nearest to its center."""
    rows = []
    for number in range(int(numbers.max()) + 1):
        own = np.flatnonzero(numbers == number)
        central = own[np.argsort(distances[own], kind="stable")][:PER_CLUSTER]
        images = pixels(outputs, outputs.source, outputs.queries[central], THUMBNAIL)
        tiles = [tile(image, f"cluster {number + 1}, image {place + 1}", None) for place, image in enumerate(images)]
        name = element("span", plots.marker(number), f" cluster {number + 1}, {counted(len(own), 'image')}")
        strip = element("div", tiles, class_="strip", style=f"--tiles: {PER_CLUSTER}")
        rows.append(element("li", name, strip))
    return element("ol", rows, class_="clusters", aria_label="Clusters, each with its most central images")


def _legend(names: list[str]) -> Html:
    """The classes with their markers; with their numbers, if the map has these because names are long."""
    is_short = all(len(name) <= plots.longest_name() for name in names)
    items = [
        element("li", plots.marker(place), element("span", name if is_short else f"{place + 1}: {name}"))
        for place, name in enumerate(names)
    ]
    return element("ul", items, class_="legend")
