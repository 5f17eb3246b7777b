"""The verb `report`."""

import argparse
from typing import Any

from sslrun.commands.arguments import DONE


def add(verbs: Any) -> None:
    """Add the verb's parser."""
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
    report.set_defaults(call=_report)


def _report(args: argparse.Namespace) -> int:
    from pathlib import Path

    from sslrun.report.page import write_report
    from sslrun.runtime.log import start_logging

    start_logging()
    output = Path(args.output) if args.output is not None else None
    print(write_report([Path(run) for run in args.runs], output, not args.no_images))
    return DONE
