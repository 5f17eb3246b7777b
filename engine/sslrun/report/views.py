"""The views that a run is trained on."""

from sslrun.allowed_imports import require_allowed
from sslrun.config import load
from sslrun.number_format import counted
from sslrun.preview import as_text, describe, load_samples
from sslrun.preview.description import describe_sample, sample_in_words
from sslrun.report.encoder_outputs import ANY_DEVICE
from sslrun.report.html import Child, element
from sslrun.report.reported_run import ReportedRun
from sslrun.report.tiles import small, tile
from sslrun.runtime.run_files import CONFIG

SAMPLES = 6


def training_views(run: ReportedRun) -> list[Child]:
    """The first samples of the recipe's order, each with its views."""
    config = load(run.path / CONFIG, [ANY_DEVICE])
    require_allowed(config, is_for_training=False)
    preview = load_samples(config, SAMPLES)
    rows, views = [], len(preview.columns)
    for row, original in enumerate(preview.originals):
        described = describe_sample(preview, row)
        tiles = [tile(small(original), sample_in_words(described), described["class"] or "original", "query")]
        for number, (g, view) in enumerate(preview.columns):
            applied = [each["type"] for each in described["views"][number]["transforms"] if each["applied"]]
            image = small(preview.shown(g, view, row))
            title = ", ".join(applied) or "unchanged"
            tiles.append(tile(image, f"view {number + 1}: {title}", f"view {number + 1}", title=title))
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
