"""`sslrun report`: one HTML page about one or several runs, complete in one file."""

import base64
import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sslrun.allowed_imports import require_allowed
from sslrun.errors import UsageError
from sslrun.report.attention import attention_maps
from sslrun.report.columns import columns, or_reason
from sslrun.report.confusion import confusion
from sslrun.report.curves import curves
from sslrun.report.encoder_outputs import EncoderOutputs, run_encoder
from sslrun.report.evaluations import evaluations
from sslrun.report.feature_map import feature_maps
from sslrun.report.header import header
from sslrun.report.html import Child, Html, element
from sslrun.report.neighbors import collect_neighbors, render_neighbors
from sslrun.report.patches import patch_colors
from sslrun.report.profile import has_profile, profile
from sslrun.report.recipe import environments, recipe, recipe_differences
from sslrun.report.reconstruction import reconstructions
from sslrun.report.reported_run import ReportedRun, read_run
from sslrun.report.views import training_views
from sslrun.runtime.durable import replace_or_fail

logger = logging.getLogger(__name__)

# Sections that need the encoders: id, title, what one encoder gives (one is in memory at a time), and how the parts of
# all runs are shown.
Parts = Sequence[tuple[ReportedRun, Any]]
ENCODER_SECTIONS: tuple[tuple[str, str, Callable[[EncoderOutputs], Any], Callable[[Parts], list[Child]]], ...] = (
    ("neighbors", "Nearest neighbors", collect_neighbors, render_neighbors),
    ("map", "Map of the features", feature_maps, columns),
    ("confusion", "Confusion of the k-NN", confusion, columns),
    ("attention", "Attention", attention_maps, columns),
    ("patches", "Patches as colors", patch_colors, columns),
    ("reconstruction", "Predicted pixels", reconstructions, columns),
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
    if any(has_profile(run) for run in runs):
        sections.append(("profile", "Where the time goes", columns([(run, profile(run)) for run in runs])))
    if len(runs) > 1:
        sections.append(("differences", "Recipe differences", recipe_differences(runs)))
    if has_images:
        sections += [("views", "Training views", _each(runs, training_views))]
        sections += _encoder_sections(runs)
    sections += [
        ("results", "Evaluations", evaluations(runs)),
        ("recipe", "Recipe", _each(runs, recipe)),
        ("environment", "Environment", environments(runs)),
    ]
    links = [element("a", title, href=f"#{name}") for name, title, _ in sections]
    body = [
        element("section", element("h2", title), content, id=name, aria_label=title)
        for name, title, content in sections
    ]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs, {', '.join(run.name for run in runs)}"
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("title", f"{title} · sslrun report"),
        element("link", rel="icon", href="data:,"),
        element("style", Html(style)),
    )
    kind = "several" if len(runs) > 1 else None
    main = element("main", header(runs), element("nav", links, aria_label="Sections"), body, class_=kind)
    page = element("body", main, element("script", Html(script)))
    return f"<!DOCTYPE html>\n{element('html', head, page, lang='en')}\n"


def _warn_of_imports(runs: Sequence[ReportedRun]) -> None:
    for run in runs:
        try:
            if run.config is not None:
                require_allowed(run.config, is_for_training=False)
        except UsageError as error:
            logger.warning("sections that need the encoder are left out: %s", error)


def _encoder_sections(runs: Sequence[ReportedRun]) -> list[tuple[str, str, list[Child]]]:
    """The sections that need the encoders, made run by run: one encoder is in memory at a time. A section in which no
    run has anything (an empty list) is left out."""
    parts: dict[str, list[tuple[ReportedRun, Any]]] = {name: [] for name, *_ in ENCODER_SECTIONS}
    for run in runs:
        outputs = or_reason(partial(run_encoder, run.checkpoint))
        for name, _, collect, _ in ENCODER_SECTIONS:
            part = outputs if isinstance(outputs, Html) else or_reason(partial(collect, outputs))
            parts[name].append((run, part))
    return [
        (name, title, render_parts(parts[name]))
        for name, title, _, render_parts in ENCODER_SECTIONS
        if not all(isinstance(part, list) and not part for _, part in parts[name])
    ]


def _each(runs: Sequence[ReportedRun], section: Callable[[ReportedRun], list[Child]]) -> list[Child]:
    """A section that is made for each run alone."""
    return columns([(run, or_reason(partial(section, run))) for run in runs])
