"""Verbs about what was learned: `eval`."""

import argparse
import sys
from typing import Any

from sslrun.commands.arguments import DONE, add_overrides

EVALUATIONS = {
    "knn": "k-nearest-neighbour classification by frozen features",
    "spectrum": "how well features fill their space: RankMe, spread, alignment, uniformity",
}


def add(verbs: Any) -> None:
    """Their parsers."""
    evaluation = verbs.add_parser("eval", help="measure what an encoder has learned")
    kinds = evaluation.add_subparsers(required=True, metavar="KIND", dest="kind")
    for kind, help in EVALUATIONS.items():
        parser = kinds.add_parser(
            kind,
            help=help,
            description=f"{help[0].upper()}{help[1:]}. The result, with all that is needed to repeat it, goes into "
            "eval/ of the run folder.",
        )
        parser.add_argument("run", metavar="RUN", help="a run folder, a checkpoint in one, or a file of weights")
        parser.add_argument(
            "--with",
            dest="overlays",
            metavar="TOML",
            action="append",
            default=[],
            help="settings to merge over the run's recipe, such as configs/benchmarks/...; may be repeated",
        )
        add_overrides(parser, "set one value, such as eval.knn.temperature=0.1; may be repeated")
        parser.add_argument("--recipe", metavar="TOML", help="what a file of weights is of")
        parser.add_argument("-o", dest="directory", metavar="DIR", help="where the result goes")
        parser.set_defaults(call=_eval)


def _eval(args: argparse.Namespace) -> int:
    from pathlib import Path

    from sslrun.evaluate import evaluate
    from sslrun.runtime import distributed
    from sslrun.saved import open_saved

    saved = open_saved(
        Path(args.run), [Path(overlay) for overlay in args.overlays], args.overrides, args.recipe and Path(args.recipe)
    )
    results, path = evaluate(args.kind, saved, args.command, args.directory and Path(args.directory))
    if distributed.rank() == 0:
        for name, value in results.items():
            if isinstance(value, int | float):
                print(f"{name}  {value:.4g}")
        print(path, file=sys.stderr)
    return DONE
