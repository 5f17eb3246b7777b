"""The verb `eval`."""

import argparse
import functools
import sys
from typing import Any

from sslrun.commands.arguments import DONE, add_overrides

EVALUATIONS = {
    "knn": "k-nearest-neighbor classification by frozen features",
    "linear": "linear classification of frozen features, by a grid of settings or a published protocol",
    "spectrum": "how well features fill their space: RankMe, spread, alignment, uniformity",
    "finetune": "encoder and classifier trained together",
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

    from sslrun.finetune import finetune
    from sslrun.measure import evaluate
    from sslrun.runtime import distributed
    from sslrun.saved import open_saved

    overlays = [Path(overlay) for overlay in args.overlays]
    saved = open_saved(Path(args.run), overlays, args.overrides, args.recipe and Path(args.recipe))
    directory = Path(args.directory) if args.directory else (saved.folder or saved.weights.parent) / "eval"
    measure = finetune if args.kind == "finetune" else functools.partial(evaluate, args.kind)
    code, results, path = measure(saved, args.command, directory)
    if distributed.rank() == 0:
        for name, value in results.items():
            if isinstance(value, int | float):
                print(f"{name}  {value:.4g}")
        print(path if code == DONE else f"stopped and saved in {path}; the same command goes on", file=sys.stderr)
    return code
