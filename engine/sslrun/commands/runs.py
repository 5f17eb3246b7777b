"""The verbs that read run folders: `report` and `runs`."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from sslrun.commands.arguments import DONE, FAILED, add_allow_imports, fail
from sslrun.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

POLL_S = 1.0  # between two looks at a run that is waited for


def add(verbs: Any) -> None:
    """Add the verbs' parsers."""
    report = verbs.add_parser(
        "report",
        help="write an HTML page about one or several runs",
        description="Write report.html: results, curves, views, nearest neighbors and maps of the features, "
        "evaluations, recipe. The page is one file that needs no network. Several runs are shown side by side.",
    )
    report.add_argument("runs", metavar="RUN", nargs="+", help="a run folder, or a checkpoint in one")
    report.add_argument(
        "-o", dest="output", metavar="FILE", help="the file to write; default: report.html in the first RUN"
    )
    report.add_argument(
        "--no-images", action="store_true", help="leave out the sections that need the data set and the weights"
    )
    report.add_argument("--no-pictures", dest="no_images", action="store_true", help=argparse.SUPPRESS)  # its old name
    add_allow_imports(report)
    report.set_defaults(call=_report)

    runs = verbs.add_parser(
        "runs",
        help="list all runs and their state",
        description="List the run folders below a folder: state, epoch, last loss, best k-NN accuracy, speed, and the "
        "time since the last row of metrics.jsonl. A run whose process ended without recording a state, for example "
        "because it was killed, has died. METRIC is a name in metrics.jsonl or in a result of `sslrun eval`, such as "
        "knn/top1_pct or linear/top1_pct; docs/metrics.md lists them, and says which way is good.",
    )
    runs.add_argument("root", metavar="DIR", nargs="?", default="work_dirs", help="the folder to search (work_dirs)")
    runs.add_argument(
        "--sort", metavar="METRIC", help="the best first, by a metric or by a column: run, epoch, loss, ..."
    )
    runs.add_argument(
        "--best", metavar="METRIC", action="append", default=[], help="show the best value and its epoch; repeatable"
    )
    runs.add_argument(
        "--tag", metavar="NAME", action="append", default=[], help="only runs with this word in log.tags; repeatable"
    )
    shown = runs.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print JSON")
    shown.add_argument("--csv", action="store_true", help="print comma-separated values, with every digit")
    shown.add_argument(
        "--wait", action="store_true", help="wait until the run in the folder DIR ends, and exit with its exit code"
    )
    runs.set_defaults(call=_runs)


def _report(args: argparse.Namespace) -> int:
    from pathlib import Path

    from sslrun.report.page import write_report
    from sslrun.runtime.log import start_logging

    start_logging()
    output = Path(args.output) if args.output is not None else None
    print(write_report([Path(run) for run in args.runs], output, not args.no_images))
    return DONE


def _runs(args: argparse.Namespace) -> int:
    import os
    import shutil
    from pathlib import Path

    from sslrun.runs import as_csv, as_json, as_table, find_runs, in_order, metrics_of, require_metrics  # no torch

    if not os.path.isdir(args.root):
        state = "is not a folder" if os.path.exists(args.root) else "does not exist"
        raise UsageError(f"{args.root} {state}: name the folder that holds run folders")
    root = Path(args.root)
    if args.wait:
        return _wait(root)
    metrics = metrics_of(args.sort, args.best)
    runs = [run for run in find_runs(root, metrics) if set(args.tag) <= set(run.tags)]
    require_metrics(runs, metrics)
    if args.sort is not None:
        runs = in_order(runs, args.sort)
    if args.json:
        print(as_json(runs))
    elif args.csv:
        print(as_csv(runs, metrics), end="")
    elif runs:
        columns = shutil.get_terminal_size((10_000, 24)).columns  # unlimited without a terminal
        print(as_table(runs, root, columns, metrics))
    if not runs and not args.json:
        tagged = f" with {' and '.join(args.tag)} in log.tags" if args.tag else ""
        print(f"no runs below {root}{tagged}", file=sys.stderr)
    return DONE


def _wait(run: "Path") -> int:
    """Waits for the end of a run and returns its exit code."""
    import time

    from sslrun.runtime.run_files import RunFiles

    files = RunFiles(run)
    while (status := files.status()) == "running":
        time.sleep(POLL_S)
    if status == "died":  # or it ended between the look at its record and the look at its lock
        status = files.status()
    if status is None:
        raise UsageError(f"{run} is not the folder of a run that has started: it records no state")
    code, error = files.state().get("exit_code"), files.state().get("error")
    if status == "died" or not isinstance(code, int):
        return fail(f"{run}: the process ended without recording how, as when it is killed; --resume continues", FAILED)
    print(f"{run}: {status}", file=sys.stderr)
    return fail(error, code) if isinstance(error, str) else code
