"""The verb `report`."""

import argparse
from typing import Any

from sslrun.commands.arguments import DONE


def add(verbs: Any) -> None:
    """Its parser."""
    report = verbs.add_parser(
        "report",
        help="one page of what runs did and learned",
        description="Write report.html: curves, what the encoder makes of images, results, recipe. It is one file "
        "that needs no network; several runs stand side by side in it.",
    )
    report.add_argument("runs", metavar="RUN", nargs="+", help="a run folder, or a checkpoint in one")
    report.add_argument("-o", dest="output", metavar="FILE", help="where the page goes (report.html in the first run)")
    report.add_argument(
        "--no-images", action="store_true", help="only what the folders tell: needs neither images nor weights"
    )
    report.set_defaults(call=_report)


def _report(args: argparse.Namespace) -> int:
    from pathlib import Path

    from sslrun.report.page import write_report
    from sslrun.runtime.log import start_logging

    start_logging()
    output = Path(args.output) if args.output is not None else None
    print(write_report([Path(run) for run in args.runs], output, not args.no_images))
    return DONE
