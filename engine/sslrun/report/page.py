"""`sslrun report`: one page of one or several runs, complete in one file."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from sslrun.errors import RunFailed
from sslrun.report import gallery, settings
from sslrun.report.curves import curves_section
from sslrun.report.evidence import Evidence, gather
from sslrun.report.html import Child, Html, element
from sslrun.report.overview import masthead, recipe_differences
from sslrun.report.record import Record, read_record
from sslrun.runtime.durable import replace_file

T = TypeVar("T")

# What is shown of each run's images: name, title, what makes it.
Maker = Callable[[Evidence, str], list[Child]]
IMAGES: tuple[tuple[str, str, Maker], ...] = (
    ("neighbors", "Nearest neighbors", gallery.neighbors),
    ("map", "Map of the embedding", gallery.embedding),
    ("confusion", "Confusion of the k-NN", gallery.confusion),
    ("attention", "Attention", gallery.attention_maps),
)


def write_report(runs: Sequence[Path], output: Path | None = None, has_images: bool = True) -> Path:
    """Write report.html.

    Args:
        runs: run folders, or checkpoints in them; the first has the page, unless `output` says where.
        output: the file.
        has_images: whether the encoders are asked about images; else the page tells what the folders tell.

    Returns:
        the file.

    Raises:
        UsageError: a path is no run.
        RunFailed: the file could not be written.
    """
    records = [read_record(run, place if len(runs) > 1 else None) for place, run in enumerate(runs)]
    output = output or records[0].path / "report.html"
    page = render(records, has_images)
    try:
        replace_file(output, page.encode("utf-8", "replace"))
    except OSError as error:
        raise RunFailed(f"{output} could not be written: {error.strerror}") from error
    return output


def render(records: Sequence[Record], has_images: bool) -> str:
    """The page."""
    sections: list[tuple[str, str, list[Child]]] = [("curves", "Curves", curves_section(records))]
    if len(records) > 1:
        sections.append(("differences", "Recipe differences", recipe_differences(records)))
    if has_images:
        sections += [("views", "What the network sees", _side_by_side(records, gallery.augmentations))]
        sections += _images(records)
    sections += [
        ("results", "Evaluations", settings.results_section(records)),
        ("recipe", "Recipe", _side_by_side(records, settings.recipe)),
        ("environment", "Environment", _side_by_side(records, settings.environment)),
    ]
    links = [element("a", title, href=f"#{name}") for name, title, _ in sections]
    body = [
        element("section", element("h2", title), content, id=name, aria_label=title)
        for name, title, content in sections
    ]
    title = (
        records[0].name if len(records) == 1 else f"{len(records)} runs, {', '.join(record.name for record in records)}"
    )
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; img-src data:; style-src 'unsafe-inline'",
        ),
        element("title", f"{title} · sslrun report"),
        element("link", rel="icon", href="data:,"),
        element("style", Html(style)),
    )
    main = element("main", masthead(records), element("nav", links, aria_label="Sections"), body)
    return f"<!DOCTYPE html>\n{element('html', head, element('body', main), lang='en')}\n"


def _images(records: Sequence[Record]) -> list[tuple[str, str, list[Child]]]:
    """The sections that need the encoders, run by run: one encoder is in memory at a time."""
    content: dict[str, list[Child]] = {name: [] for name, _, _ in IMAGES}
    for record in records:
        evidence = _attempt(partial(gather, record.checkpoint))
        for name, _, make in IMAGES:
            made = evidence if isinstance(evidence, Html) else _attempt(partial(make, evidence, str(record.color)))
            content[name].append(_article(record, [made]))
    return [(name, title, [element("div", content[name], class_="side-by-side")]) for name, title, _ in IMAGES]


def _attempt(make: Callable[[], T]) -> T | Html:
    """What comes out, or one sentence that says why nothing does: a report is written whatever is missing."""
    try:
        return make()
    except (ValueError, OSError, RuntimeError) as error:  # UsageError, RunFailed, no memory left on a busy GPU
        return element("p", f"Left out: {str(error).partition(chr(10))[0]}.", class_="note")


def _side_by_side(records: Sequence[Record], make: Callable[[Record], list[Child]]) -> list[Child]:
    made = [_attempt(partial(make, record)) for record in records]
    articles = [_article(record, [content]) for record, content in zip(records, made, strict=True)]
    return [element("div", articles, class_="side-by-side")]


def _article(record: Record, content: list[Child]) -> Html:
    """One run's part of a section."""
    if not record.letter:
        return element("div", content)
    letter = element("span", record.letter, class_=f"letter run-{record.color % 6}")
    return element("article", element("h3", letter, " ", element("span", record.name)), content)
