"""`sslrun report`: one HTML page about one or several runs, complete in one file."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from sslrun.allowed_imports import require_allowed
from sslrun.errors import UsageError
from sslrun.report import encoder_sections
from sslrun.report.curves import curves
from sslrun.report.encoder_outputs import EncoderOutputs, run_encoder
from sslrun.report.evaluations import evaluations
from sslrun.report.header import header, letter
from sslrun.report.html import Child, Html, element
from sslrun.report.recipe import environment, recipe, recipe_differences
from sslrun.report.reported_run import ReportedRun, read_run
from sslrun.runtime.durable import replace_or_fail

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Sections that need the encoder's outputs: id, title, function of the outputs and of a suffix for ids.
EncoderSection = Callable[[EncoderOutputs, str], list[Child]]
ENCODER_SECTIONS: tuple[tuple[str, str, EncoderSection], ...] = (
    ("neighbors", "Nearest neighbors", encoder_sections.neighbors),
    ("map", "Map of the features", encoder_sections.feature_maps),
    ("confusion", "Confusion of the k-NN", encoder_sections.confusion),
    ("attention", "Attention", encoder_sections.attention_maps),
)


def write_report(paths: Sequence[Path], output: Path | None = None, has_images: bool = True) -> Path:
    """Write report.html.

    Args:
        paths: run folders, or checkpoints in them.
        output: the file to write; None for report.html in the first run folder.
        has_images: whether to include the sections that need the images and the encoders.

    Returns:
        the file.

    Raises:
        UsageError: a path is not a run.
        RunFailed: the file could not be written.
    """
    runs = [read_run(path, number if len(paths) > 1 else None) for number, path in enumerate(paths)]
    if has_images:
        _warn_of_imports(runs)
    output = output or runs[0].path / "report.html"
    replace_or_fail(output, render(runs, has_images).encode("utf-8", "replace"))
    return output


def render(runs: Sequence[ReportedRun], has_images: bool) -> str:
    """The HTML of the page."""
    sections: list[tuple[str, str, list[Child]]] = [("curves", "Curves", curves(runs))]
    if len(runs) > 1:
        sections.append(("differences", "Recipe differences", recipe_differences(runs)))
    if has_images:
        sections += [("views", "Training views", _side_by_side(runs, encoder_sections.augmentations))]
        sections += _encoder_sections(runs)
    sections += [
        ("results", "Evaluations", evaluations(runs)),
        ("recipe", "Recipe", _side_by_side(runs, recipe)),
        ("environment", "Environment", _side_by_side(runs, environment)),
    ]
    links = [element("a", title, href=f"#{name}") for name, title, _ in sections]
    body = [
        element("section", element("h2", title), content, id=name, aria_label=title)
        for name, title, content in sections
    ]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs, {', '.join(run.name for run in runs)}"
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
    main = element("main", header(runs), element("nav", links, aria_label="Sections"), body)
    return f"<!DOCTYPE html>\n{element('html', head, element('body', main), lang='en')}\n"


def _warn_of_imports(runs: Sequence[ReportedRun]) -> None:
    for run in runs:
        try:
            if run.config is not None:
                require_allowed(run.config, is_for_training=False)
        except UsageError as error:
            logger.warning("sections that need the encoder are left out: %s", error)


def _encoder_sections(runs: Sequence[ReportedRun]) -> list[tuple[str, str, list[Child]]]:
    """The sections that need the encoders, made run by run: one encoder is in memory at a time."""
    content: dict[str, list[Child]] = {name: [] for name, _, _ in ENCODER_SECTIONS}
    for run in runs:
        outputs = _or_reason(partial(run_encoder, run.checkpoint))
        for name, _, section in ENCODER_SECTIONS:
            part = outputs if isinstance(outputs, Html) else _or_reason(partial(section, outputs, str(run.color)))
            content[name].append(_article(run, [part]))
    return [
        (name, title, [element("div", content[name], class_="side-by-side")]) for name, title, _ in ENCODER_SECTIONS
    ]


def _or_reason(function: Callable[[], T]) -> T | Html:
    """The result of the function, or a sentence that says why there is none, so that the rest is still reported."""
    try:
        return function()
    except (ValueError, OSError, RuntimeError) as error:  # UsageError, RunFailed, a GPU without free memory
        return element("p", f"Left out: {str(error).partition(chr(10))[0]}.", class_="note")


def _side_by_side(runs: Sequence[ReportedRun], section: Callable[[ReportedRun], list[Child]]) -> list[Child]:
    articles = [_article(run, [_or_reason(partial(section, run))]) for run in runs]
    return [element("div", articles, class_="side-by-side")]


def _article(run: ReportedRun, content: list[Child]) -> Html:
    """One run's part of a section."""
    if not run.letter:
        return element("div", content)
    return element("article", element("h3", letter(run), " ", element("span", run.name)), content)
