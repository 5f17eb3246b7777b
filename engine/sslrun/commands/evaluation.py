"""The verbs `eval`, which measures an encoder, and `runs`, which lists all runs."""

import argparse
import sys
from typing import Any

from sslrun.commands.arguments import DONE, add_overrides
from sslrun.config.schema_reader import classes, first_sentence, follow, kinds
from sslrun.config.load import committed_schema
from sslrun.errors import UsageError


def add(verbs: Any) -> None:
    """Add the parsers of these verbs."""
    evaluation = verbs.add_parser(
        "eval",
        help="measure what an encoder has learned",
        description="Measure what an encoder has learned. The result, with all that is needed to repeat it, goes into "
        "eval/ of the run folder.",
        epilog=f"KIND is one of:\n{_built_in()}\nor a name in [eval.extra] of the recipe.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluation.add_argument("kind", metavar="KIND", help="which measurement: knn, linear, finetune, spectrum, ...")
    evaluation.add_argument("run", metavar="RUN", help="a run folder, a checkpoint in one, or a file of weights")
    evaluation.add_argument(
        "--with",
        dest="overlays",
        metavar="TOML",
        action="append",
        default=[],
        help="settings to merge over the run's recipe, such as configs/benchmarks/...; may be repeated",
    )
    add_overrides(evaluation, "set one value, such as eval.knn.temperature=0.1; may be repeated")
    evaluation.add_argument("--recipe", metavar="TOML", help="the recipe that a file of weights was trained by")
    evaluation.add_argument("-o", dest="directory", metavar="DIR", help="where the result goes")
    evaluation.set_defaults(call=_eval)

    runs = verbs.add_parser(
        "runs",
        help="list all runs and their states",
        description="List all run folders below a folder: state, epoch, last loss, best k-NN accuracy, speed, and how "
        "long ago the last row was written. A run that ended without recording its state, a killed one, has died.",
    )
    runs.add_argument("root", metavar="DIR", nargs="?", default="work_dirs", help="where to look (work_dirs)")
    runs.add_argument("--json", action="store_true", help="for programs")
    runs.set_defaults(call=_runs)


def _built_in() -> str:
    """The evaluations that ship, a line each."""
    schema = committed_schema()
    known = {name.lower(): follow(schema["$defs"], at) for name, at in classes(kinds(schema)["evaluations"]).items()}
    return "\n".join(f"  {name:<10}  {first_sentence(table['description'])}" for name, table in known.items())


def _eval(args: argparse.Namespace) -> int:
    from pathlib import Path

    from sslrun.evaluation.finetune_recipe import Finetune
    from sslrun.finetune import finetune
    from sslrun.measure import evaluate, evaluation_of
    from sslrun.runtime import distributed
    from sslrun.saved import open_saved

    overlays = [Path(overlay) for overlay in args.overlays]
    saved = open_saved(Path(args.run), overlays, args.overrides, args.recipe and Path(args.recipe))
    directory = Path(args.directory) if args.directory else (saved.folder or saved.weights.parent) / "eval"
    evaluation = evaluation_of(saved, args.kind)
    if isinstance(evaluation, Finetune):
        code, results, path = finetune(args.kind, evaluation, saved, args.command, directory)
    else:
        code, results, path = evaluate(args.kind, evaluation, saved, args.command, directory)
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
