"""The verb `eval`."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from sslrun.commands.arguments import DONE, add_allow_imports, add_devices, add_overrides
from sslrun.errors import UsageError
from sslrun.number_format import measured

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sslrun.measure import Results


def add(verbs: Any) -> None:
    """Add the parsers of these verbs."""
    evaluation = verbs.add_parser(
        "eval",
        help="measure what an encoder has learned",
        description="Measure what an encoder has learned. The result, with all that is needed to repeat it, goes into "
        "eval/ of the run folder.",
        epilog=_kinds,
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
    add_allow_imports(evaluation)
    add_devices(evaluation)
    evaluation.add_argument("--recipe", metavar="TOML", help="the recipe that a file of weights was trained by")
    evaluation.add_argument("-o", dest="directory", metavar="DIR", help="where the result goes")
    evaluation.set_defaults(call=_eval)


def _kinds() -> str:
    """The end of the help of `eval`: the evaluations that ship, a line each."""
    from sslrun.config.schema_reader import classes, committed_schema, first_sentence, follow, kinds

    schema = committed_schema()
    known = {name.lower(): follow(schema["$defs"], at) for name, at in classes(kinds(schema)["evaluations"]).items()}
    lines = "\n".join(f"  {name:<10}  {first_sentence(table['description'])}" for name, table in known.items())
    return f"KIND is one of:\n{lines}\nor a name in [eval.extra] of the recipe."


def _eval(args: argparse.Namespace) -> int:
    from pathlib import Path

    from sslrun.runtime import distributed

    overlays, recipe = [Path(overlay) for overlay in args.overlays], args.recipe and Path(args.recipe)
    directory = Path(args.directory) if args.directory else None
    code, results, path = measure_encoder(
        args.kind, Path(args.run), args.overrides, overlays, recipe, directory, args.command
    )
    if distributed.rank() == 0:
        for name, value in results.items():
            if isinstance(value, int | float):
                print(f"{name}  {measured(name, value)}")
        print(path if code == DONE else f"stopped and saved in {path}; the same command goes on", file=sys.stderr)
    return code


def measure_encoder(
    kind: str,
    run: "Path",
    overrides: "Sequence[str]",
    overlays: "Sequence[Path]",
    recipe: "Path | None",
    directory: "Path | None",
    command: str,
) -> "tuple[int, Results, Path]":
    """Measures an encoder; for the command line and for Python.

    Args:
        kind: name of the evaluation.
        run: of `open_saved`, like `overrides`, `overlays` and `recipe`.
        overrides: see `run`.
        overlays: see `run`.
        recipe: see `run`.
        directory: where the result goes; None for eval/ of the run folder.
        command: what the user typed, for the record.

    Returns:
        The exit code; the results, empty unless the code is 0; and the file with the results, or with what there is
        after a stop.

    Raises:
        UsageError: the encoder cannot be opened, there is no such evaluation, or `directory` cannot be made.
    """
    from sslrun.evaluation.finetune_recipe import Finetune
    from sslrun.finetune import finetune
    from sslrun.measure import evaluate, evaluation_of
    from sslrun.runtime.run_files import EVAL
    from sslrun.saved import open_saved

    saved = open_saved(run, overlays, overrides, recipe)
    if directory is None:
        directory = (saved.folder or saved.weights.parent) / EVAL
    else:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{directory} cannot be made: {error.strerror}") from error
    evaluation = evaluation_of(saved, kind)
    if isinstance(evaluation, Finetune):
        return finetune(kind, evaluation, saved, command, directory)
    return evaluate(kind, evaluation, saved, command, directory)
