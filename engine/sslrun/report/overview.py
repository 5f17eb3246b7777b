"""What a reader wants first: which runs, how they ended, what came out; and, of several, in what they differ."""

import statistics
from collections.abc import Sequence

from sslrun.config.diff import differences
from sslrun.config.dump import inline
from sslrun.config.node import Node, plain, show
from sslrun.report.figures import counted, duration, number, percent
from sslrun.report.html import Child, Html, element, joined, table
from sslrun.report.record import Record

KNN = "knn/top1_pct"
MARKS = {"done": "✓", "running": "▸", "failed": "✗", "died": "✗", "pre-empted": "⏸", "interrupted": "⏸"}


def masthead(records: Sequence[Record]) -> Html:
    """Title, state and the figures that count."""
    if len(records) > 1:
        title = f"{_word(len(records))} runs side by side"
        parts: list[Child] = [element("h1", title), _run_key(records), comparison(records)]
    else:
        record = records[0]
        parts = [
            element("h1", _breakable(record.name)),
            element("p", _described(record), " ", state(record), class_="lead"),
            _tiles(record),
        ]
    errors = [element("p", _of(record), record.run.error, class_="alert") for record in records if record.run.error]
    broken = [element("p", f"{_of(record)}{text}.", class_="note") for record in records for text in record.broken]
    return element("header", element("p", "sslrun report", class_="eyebrow"), parts, errors, broken)


def state(record: Record) -> Html:
    """How the run stands, as a mark and a word."""
    word, code = record.run.state or "unknown", record.run.exit_code
    said = f"{word}, exit code {code}" if code else word
    mark = element("span", MARKS.get(word, "?"), aria_hidden="true")
    return element("span", mark, f" {said}", class_=f"state {word}")


def comparison(records: Sequence[Record]) -> Html:
    """The figures of several runs, a row for each."""
    columns = ("run", "state", "method", "encoder", "epochs", "loss", "k-NN, %", "best k-NN, %", "images/s", "time")
    rows = []
    for record in records:
        knn = [value for _, value in record.series(KNN)]
        rows.append(
            [
                element("span", record.letter, class_=f"letter run-{record.color % 6}"),
                state(record),
                _method(record),
                _encoder(record),
                _epochs(record),
                _or_dash(record.last("train/loss")),
                _or_dash(record.last(KNN)),
                _or_dash(max(knn) if knn else None),
                _or_dash(_speed(record)),
                "–" if record.wall_s is None else duration(record.wall_s),
            ]
        )
    return table(columns, rows, class_="figures")


def recipe_differences(records: Sequence[Record]) -> list[Child]:
    """In what the recipes differ from the first."""
    readable = [record for record in records if record.config is not None]
    if len(readable) < 2:
        return [element("p", "Left out: there are no two recipes to compare.", class_="note")]
    first, *others = readable
    values: dict[str, dict[str, str]] = {}
    for other in others:
        assert first.config is not None and other.config is not None
        for old, new, is_moved in differences(first.config, other.config):
            if not is_moved and old.key[:1] != ("work_dir",):
                row = values.setdefault(show(new.key if new.node else old.key), {first.letter: _value(old.node)})
                row[other.letter] = _value(new.node)
    if not values:
        return [element("p", "The recipes are the same.")]
    rows = [
        [
            element("code", key),
            *(element("code", row.get(each.letter, row[first.letter])) for each in (first, *others)),
        ]
        for key, row in values.items()
    ]
    text = f"{counted(len(rows), 'key')} of the resolved recipes differ; what is not set counts with its default."
    return [element("p", text), table(["key", *(each.letter for each in (first, *others))], rows)]


def _tiles(record: Record) -> Html:
    tiles: list[tuple[str, str, str]] = []
    for key, name in ((KNN, "k-NN accuracy"), ("probe/top1_pct", "online probe")):
        series = record.series(key)
        if series:
            first, last = series[0][1], series[-1][1]
            gain = f"{last - first:+.1f} points since epoch {number(series[0][0])}" if len(series) > 1 else "held out"
            tiles.append((name, percent(last), gain))
    for key, name, told in (("train/loss", "loss", "at the first interval"), ("spectrum/rankme", "RankMe", "at first")):
        series = record.series(key)
        if series:
            tiles.append((name, number(series[-1][1]), f"{number(series[0][1])} {told}"))
    speed = _speed(record)
    if speed is not None:
        tiles.append(("images per second", number(speed), "median while training"))
    if record.wall_s is not None:
        tiles.append(("time", duration(record.wall_s), f"{_epochs(record)} epochs"))
    items = [
        element("div", element("dt", name), element("dd", value), element("dd", told, class_="told"))
        for name, value, told in tiles
    ]
    return element("dl", items, class_="tiles")


def _run_key(records: Sequence[Record]) -> Html:
    """Which letter is which run."""
    same_names = len({record.name for record in records}) < len(records)
    items = [
        element(
            "li",
            element("span", record.letter, class_=f"letter run-{record.color % 6}"),
            element("span", _breakable(record.name), element("small", str(record.path)) if same_names else None),
        )
        for record in records
    ]
    return element("ul", items, class_="runs")


def _described(record: Record) -> str:
    return f"{_method(record)} with {_encoder(record)}, {_epochs(record)} epochs"


def _method(record: Record) -> str:
    return str(record.value("model.type") or "–")


def _encoder(record: Record) -> str:
    kind, depth, arch = (record.value(f"model.backbone.{key}") for key in ("type", "depth", "arch"))
    if kind is None:
        return "–"
    return f"{kind}-{depth if arch is None else arch}" if (depth or arch) else str(kind)


def _epochs(record: Record) -> str:
    done, planned = record.run.epoch or 0.0, record.run.epochs
    return number(done) if planned is None else f"{number(done)} of {number(planned)}"


def _speed(record: Record) -> float | None:
    speeds = [value for _, value in record.series("speed/images_per_s")]
    return statistics.median(speeds) if speeds else None


def _or_dash(value: float | None) -> str:
    return "–" if value is None else number(value)


def _of(record: Record) -> str:
    return f"{record.letter}: " if record.letter else ""


def _value(node: Node | None) -> str:
    return "–" if node is None else inline(plain(node))


def _word(count: int) -> str:
    words = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
    return words[count] if count < len(words) else str(count)


def _breakable(name: str) -> Html:
    """A recipe's name, which may be broken after an underscore."""
    return Html(joined([name]).replace("_", "_<wbr>"))
