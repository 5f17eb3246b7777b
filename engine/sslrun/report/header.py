"""The top of a report: which runs it shows, how they stand, their main results, and whether they collapsed."""

from collections.abc import Sequence

from sslrun.evaluation.collapse import THRESHOLDS, Verdict, verdict
from sslrun.glossary import meaning
from sslrun.number_format import after, duration, number, percent
from sslrun.report.html import Child, Html, element, joined
from sslrun.report.reported_run import PROBE, RANKME, SPREAD, ReportedRun
from sslrun.report.results import result_table
from sslrun.report.words import breakable, encoder, epochs, letter, method, prefix, speed, state
from sslrun.runtime.run_files import KNN, LOSS, SPEED


def header(runs: Sequence[ReportedRun]) -> Html:
    """Title, state, main results and verdicts; then errors and files that could not be read."""
    if len(runs) > 1:
        parts: list[Child] = [
            element("h1", f"{_word(len(runs))} runs compared"),
            _best_runs(runs),
            result_table(runs),
            _folders(runs),
            verdicts(runs),
        ]
    else:
        run = runs[0]
        lead = f"{method(run)} with {encoder(run)}, {epochs(run)} epochs"
        parts = [
            element("h1", breakable(run.name)),
            element("p", lead, " ", state(run), class_="lead"),
            _tiles(run),
            verdicts(runs),
        ]
    errors = [element("p", prefix(run), run.summary.error, class_="alert") for run in runs if run.summary.error]
    problems = [
        element("p", f"{prefix(run)}{name} cannot be read: {reason}.", class_="note")
        for run in runs
        for name, reason in run.problems.items()
    ]
    return element("header", element("p", "sslrun report", class_="eyebrow"), parts, errors, problems)


def verdicts(runs: Sequence[ReportedRun]) -> Html:
    """Whether each run has collapsed, in words."""
    items = []
    for run in runs:
        found = run_verdict(run)
        word = element("strong", found.word.capitalize(), class_=f"verdict {found.word.replace(' ', '-')}")
        items.append(element("li", letter(run) if run.letter else None, " ", word, ". ", found.reason))
    listed = element("ul", items, class_="verdicts", aria_label="Collapse")
    return joined([listed, element("p", THRESHOLDS, class_="note thresholds")])


def run_verdict(run: ReportedRun) -> Verdict:
    """The verdict on the newest measurements that were made after the first step."""
    most = [count for count in (run.encoder.num_features, run.num_images) if count]
    found = verdict(run.trained(SPREAD), run.rankme, min(most) if run.encoder.num_features else None)
    unfit = [name for name, key in (("RankMe", RANKME), ("the spread", SPREAD)) if run.is_last_bad(key)]
    if unfit and found.word != "collapsed":
        return Verdict("cannot be judged", f"The newest value of {' and of '.join(unfit)} is not a finite number.")
    return found


def _best_runs(runs: Sequence[ReportedRun]) -> Html | None:
    """A sentence about the highest accuracy; None if fewer than two runs measured it."""
    found = [(run.last(KNN), run) for run in runs]
    known = sorted([(value, run) for value, run in found if value is not None], key=lambda each: -each[0])
    if len(known) < 2:
        return None
    (best, first), (second, _) = known[:2]
    if best == second:
        return element("p", f"The highest k-NN accuracy is {percent(best)}, of more than one run.", class_="lead")
    text = f" has the highest k-NN accuracy: {percent(best)}, {best - second:.1f} points above the next."
    return element("p", letter(first), f" {first.name}", text, class_="lead")


def _folders(runs: Sequence[ReportedRun]) -> Html | None:
    """The runs' folders, if their names do not tell them apart."""
    if len({run.name for run in runs}) == len(runs):
        return None
    items = [element("li", letter(run), element("span", breakable(str(run.path)))) for run in runs]
    return element("ul", items, class_="runs")


def _tiles(run: ReportedRun) -> Html:
    """The main results of a single run, in large type."""
    tiles: list[tuple[str, str, str, str]] = []
    for key, name in ((KNN, "k-NN accuracy"), (PROBE, "online probe accuracy")):
        series = run.series(key)
        if series:
            (first_epoch, first), (last_epoch, last) = series[0], series[-1]
            before = f"{percent(first)} {after(first_epoch)}" if len(series) > 1 else "held out"
            tiles.append((key, name, percent(last), f"{after(last_epoch)}; {before}"))
    for key, name in ((LOSS, "training loss"), (RANKME, "RankMe")):
        series = run.series(key)
        if series:
            (first_epoch, first), (last_epoch, last) = series[0], series[-1]
            total = run.encoder.num_features if key == RANKME else None
            value = number(last) if total is None else f"{number(last)} of {total:,}"
            tiles.append((key, name, value, f"{after(last_epoch)}; {number(first)} {after(first_epoch)}"))
    images_per_s = speed(run)
    if images_per_s is not None:
        tiles.append((SPEED, "images per second", number(images_per_s), "median of the training"))
    if run.wall_s is not None:
        tiles.append(("wall_s", "time", duration(run.wall_s), f"{epochs(run)} epochs"))
    items = [
        element(
            "div",
            element("dt", name, title=meaning(key)),
            element("dd", value),
            element("dd", detail, class_="detail"),
        )
        for key, name, value, detail in tiles
    ]
    return element("dl", items, class_="tiles")


def _word(count: int) -> str:
    words = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
    return words[count] if count < len(words) else str(count)
