"""HTML elements as strings of their own type: every other string is escaped when it is put into an element."""

import html
from collections.abc import Iterable

EMPTY = {"img", "meta", "link", "br", "hr"}  # elements without an end tag


class Html(str):
    """A string of HTML."""


Child = str | int | float | None | Iterable["Child"]


def element(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """`<name attributes>children</name>`.

    Args:
        name: tag of the element.
        children: strings, numbers, HTML and sequences of them; None is left out.
        attributes: None and False are left out, True is written without a value. `class_` becomes class, `aria_label`
            aria-label.
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.rstrip("_").replace("_", "-")
            words.append(key if value is True else f'{key}="{escape(str(value))}"')
    opening = f"<{' '.join(words)}>"
    return Html(opening if name in EMPTY else f"{opening}{joined(children)}</{name}>")


def joined(children: Iterable[Child]) -> Html:
    """Children, concatenated."""
    return Html("".join(_text(child) for child in children))


def escape(text: str) -> str:
    """Text as it may stand in an element and in an attribute."""
    return html.escape(legal(text), quote=True)


def legal(text: str) -> str:
    """Text with U+FFFD in place of characters that no document may contain."""
    text = text.encode("utf-8", "replace").decode()  # file names that are not UTF-8 have lone surrogates
    return "".join(c if (c >= " " and c not in "\ufffe\uffff") or c in "\n\t" else "\ufffd" for c in text)


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]], class_: str = "") -> Html:
    """A table in a box that scrolls horizontally. The first cell of each row is its heading."""
    head_row = element("tr", [element("th", each, scope="col") for each in head])
    body = [
        element(
            "tr", [element("td", cell) if place else element("th", cell, scope="row") for place, cell in enumerate(row)]
        )
        for row in rows
    ]
    return scrollable(element("table", element("thead", head_row), element("tbody", body)), "table", class_)


def scrollable(content: Html, label: str, class_: str = "") -> Html:
    """A box that scrolls horizontally; with tabindex, so that the keyboard can scroll it when it has the focus."""
    return element("div", content, class_=f"scroll {class_}".strip(), tabindex=0, role="region", aria_label=label)


def _text(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, (str, int, float)):
        return escape(str(child))
    return joined(child)
