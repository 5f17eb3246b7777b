"""Which classes the k-NN takes for which."""

import numpy as np

from sslrun.number_format import counted, percent
from sslrun.report.encoder_outputs import EncoderOutputs
from sslrun.report.html import Child, element, scrollable
from sslrun.report.neighbors import shown_classes


def confusion(outputs: EncoderOutputs) -> list[Child]:
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
        f"{counted(len(outputs.labels), 'image')} are classified by the "
        f"{counted(min(monitor.knn_k, len(outputs.bank)), 'most similar image')} out of {len(outputs.bank):,}. "
        f"A row is a class; its cells are the percentages predicted as each class. {shown_classes(outputs)}"
    )
    result = f"{percent(accuracy)} are classified correctly. {_most_confused(share, names)}"
    caption = element(
        "caption", "Percentage of each class (rows) predicted as each class (columns)", class_="screen-reader-only"
    )
    table = element("table", caption, element("thead", head), element("tbody", body), class_="confusion")
    return [element("p", text), element("p", result), scrollable(table, "Confusion of the k-NN")]


def _most_confused(share: np.ndarray, names: list[str]) -> str:
    """A sentence about the most frequent confusion."""
    others = share.copy()
    np.fill_diagonal(others, 0)
    row, column = np.unravel_index(int(others.argmax()), others.shape)
    if others[row, column] == 0:
        return "No class is confused with another."
    return f"Most frequent confusion: {names[row]} predicted as {names[column]}, {percent(100 * others[row, column])}."
