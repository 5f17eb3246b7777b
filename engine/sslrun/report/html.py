"""HTML as text that cannot be confused with other text: whatever is not `Html` is escaped where it is put in."""

import html
from collections.abc import Iterable

EMPTY = {"img", "meta", "link", "br", "hr"}  # elements without an end


class Html(str):
    """Text that is HTML already."""


Child = str | int | float | None | Iterable["Child"]


def element(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """`<name attributes>children</name>`.

    Args:
        name: of the element.
        children: texts, numbers, HTML and sequences of them; None is nothing.
        attributes: without those that are None or False; True has no value. `class_` is class, `aria_label` aria-label.
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.rstrip("_").replace("_", "-")
            words.append(key if value is True else f'{key}="{escape(str(value))}"')
    opening = f"<{' '.join(words)}>"
    return Html(opening if name in EMPTY else f"{opening}{joined(children)}</{name}>")


def joined(children: Iterable[Child]) -> Html:
    """Children one after the other."""
    return Html("".join(_text(child) for child in children))


def escape(text: str) -> str:
    """Text as it may stand in an element and in an attribute; what no document may hold becomes U+FFFD."""
    text = text.encode("utf-8", "replace").decode()  # file names that are not UTF-8 come with lone surrogates
    return html.escape("".join(c if c >= " " or c in "\n\t" else "\ufffd" for c in text), quote=True)


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]], caption: Child = None, class_: str = "") -> Html:
    """A table in a box that scrolls sideways; the first cell of a row is its heading."""
    head_row = element("tr", [element("th", each, scope="col") for each in head])
    body = [
        element(
            "tr", [element("td", cell) if place else element("th", cell, scope="row") for place, cell in enumerate(row)]
        )
        for row in rows
    ]
    inner = element(
        "table", element("caption", caption) if caption else None, element("thead", head_row), element("tbody", body)
    )
    # Keyboards scroll what has the focus.
    return element("div", inner, class_=f"scroll {class_}".strip(), tabindex=0, role="region", aria_label="table")


def _text(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, (str, int, float)):
        return escape(str(child))
    return joined(child)
