"""Verbs about a run's weights: `publish`."""

import argparse
from typing import Any

from sslrun.commands.arguments import DONE


def add(verbs: Any) -> None:
    """Their parsers."""
    publish = verbs.add_parser(
        "publish",
        help="a run's weights as one file, named by recipe, date and hash",
        description="Write the model of a run's newest good checkpoint as {config_name}_{date}-{hash}.pth, verify it, "
        "and print its path. `load_from` takes it, and so does torch.load with weights_only=True.",
    )
    publish.add_argument("run", metavar="RUN", help="a run folder, or one of its checkpoints")
    publish.add_argument("-o", dest="directory", metavar="DIR", help="where the file goes (the run folder)")
    publish.set_defaults(call=_publish)


def _publish(args: argparse.Namespace) -> int:
    from pathlib import Path

    from sslrun.export.publish import publish
    from sslrun.runtime.log import start_logging

    start_logging()
    print(publish(Path(args.run), Path(args.directory) if args.directory is not None else None))
    return DONE
