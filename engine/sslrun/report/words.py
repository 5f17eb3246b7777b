"""What several parts of a report say of a run in a word or two."""

import statistics

from sslrun.number_format import number
from sslrun.report.html import Html, element, joined
from sslrun.report.plots import RUN_COLORS
from sslrun.report.reported_run import ReportedRun
from sslrun.runtime.run_files import SPEED

MARKS = {"done": "✓", "running": "▸", "failed": "✗", "died": "✗", "pre-empted": "⏸", "interrupted": "⏸"}


def letter(run: ReportedRun) -> Html:
    """The run's letter on its color."""
    return element("span", run.letter, class_=f"letter run-{run.color % RUN_COLORS}")


def state(run: ReportedRun) -> Html:
    """The run's state, as a mark and a word."""
    word, code = run.summary.state or "unknown", run.summary.exit_code
    mark = element("span", MARKS.get(word, "?"), aria_hidden="true")
    return element("span", mark, f" {word}, exit code {code}" if code else f" {word}", class_=f"state {word}")


def method(run: ReportedRun) -> str:
    return str(run.value("model.type") or "–")


def encoder(run: ReportedRun) -> str:
    """The encoder's name and size, such as "ResNet-18, base width 24, 1.6 M parameters"."""
    count = run.encoder.num_parameters
    return run.encoder.name if count is None else f"{run.encoder.name}, {count_of_parameters(count)} parameters"


def count_of_parameters(count: int) -> str:
    """Such as "23.5 M"; exact below a thousand."""
    for size, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{number(count / size)} {name}"
    return str(count)


def epochs(run: ReportedRun) -> str:
    """Epochs done, of those planned."""
    done, planned = run.summary.epoch or 0.0, run.summary.epochs
    return number(done) if planned is None or planned == done else f"{number(done)} of {number(planned)}"


def speed(run: ReportedRun) -> float | None:
    """Images per second, median of the training."""
    speeds = [value for _, value in run.series(SPEED)]
    return statistics.median(speeds) if speeds else None


def prefix(run: ReportedRun) -> str:
    """What stands before a sentence about one of several runs."""
    return f"{run.letter}: " if run.letter else ""


def breakable(name: str) -> Html:
    """A recipe's name that may be broken after an underscore."""
    return Html(joined([name]).replace("_", "_<wbr>"))
