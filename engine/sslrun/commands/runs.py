"""The verbs that read run folders: `report` and `runs`."""

import argparse
import sys
from typing import Any

from sslrun.commands.arguments import DONE, add_allow_imports
from sslrun.errors import UsageError


def add(verbs: Any) -> None:
    """Add the verbs' parsers."""
    report = verbs.add_parser(
        "report",
        help="write an HTML page about one or several runs",
        description="Write report.html: curves, views, nearest neighbors and maps of the features, evaluations, "
        "recipe. The page is one file that needs no network. Several runs are shown side by side.",
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
        "because it was killed, has died.",
    )
    runs.add_argument("root", metavar="DIR", nargs="?", default="work_dirs", help="the folder to search (work_dirs)")
    runs.add_argument("--json", action="store_true", help="print JSON")
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

    from sslrun.runs import as_json, as_table, find_runs  # no torch

    if not os.path.isdir(args.root):
        state = "is not a folder" if os.path.exists(args.root) else "does not exist"
        raise UsageError(f"{args.root} {state}: name the folder that holds run folders")
    root = Path(args.root)
    runs = list(find_runs(root))
    if args.json:
        print(as_json(runs))
    elif runs:
        print(as_table(runs, root, shutil.get_terminal_size((10_000, 24)).columns))  # unlimited without a terminal
    else:
        print(f"no runs below {root}", file=sys.stderr)
    return DONE
