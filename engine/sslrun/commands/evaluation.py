"""Verbs about what was learned: `eval`, and about all runs: `runs`."""

import argparse
import functools
import sys
from typing import Any

from sslrun.commands.arguments import DONE, add_overrides
from sslrun.errors import UsageError

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

    runs = verbs.add_parser(
        "runs",
        help="all runs and how they stand",
        description="All run folders below a folder: state, epoch, last loss, best k-NN accuracy, speed, and how long "
        "ago the last row was written. A run that is over without having said so, killed for example, has died.",
    )
    runs.add_argument("root", metavar="DIR", nargs="?", default="work_dirs", help="where to look (work_dirs)")
    runs.add_argument("--json", action="store_true", help="for programs")
    runs.set_defaults(call=_runs)


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
        print(as_table(runs, root, shutil.get_terminal_size((10_000, 24)).columns))  # uncut where it is no terminal
    else:
        print(f"no runs below {root}", file=sys.stderr)
    return DONE
