"""Shared by the verbs: exit codes, the arguments for a recipe, and error output."""

import argparse
import shutil
import sys
from pathlib import Path

from sslrun.errors import printable
from sslrun.runtime.open_bars import close_bars
from sslrun.runtime.run_files import CONFIG

DONE, FAILED, USAGE, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 130
FINDINGS = DIFFERENT = 1  # `config lint` has findings, `config diff` differences


def fail(error: object, code: int) -> int:
    """Prints an error as one line, below the progress bars, and returns the exit code."""
    close_bars()
    print(f"error: {printable(str(error))}", file=sys.stderr)
    return code


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="TOML recipe")
    add_overrides(parser, "set one value, like a line of TOML merged last; may be repeated")


def add_overrides(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[], help=help)


def add_allow_imports(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-imports",
        metavar="MODULE",
        action="append",
        default=[],
        help="import a Python module that custom_imports of a run's recipe names; its code runs; may be repeated",
    )


def add_devices(parser: argparse.ArgumentParser) -> None:
    """Adds `--devices`; the command line starts the ranks before the verb is called."""
    parser.add_argument(
        "--devices",
        metavar="N",
        type=_devices,
        help='start N processes here, each on a GPU of its own, or on the CPU where there is none; "auto": one for '
        "each GPU, and a single one on the CPU",
    )


def is_for_cpu(args: argparse.Namespace) -> bool:
    """Whether the recipe of a command with `--devices` says engine.device = "cpu". A run that is not there is for the
    command itself to find.

    Raises:
        UsageError: there is an error in the recipe.
    """
    from sslrun.config import load

    recipe = _recipe(args)
    if recipe is None:
        return False
    engine = load(recipe, args.overrides, overlays=getattr(args, "overlays", ())).values.get("engine", {})
    return bool(engine.get("device") == "cpu")


def _recipe(args: argparse.Namespace) -> str | Path | None:
    """The recipe that a command reads: its own, that of a run or of a checkpoint in one."""
    if "config" in args:
        return str(args.config)
    run = Path(args.run).resolve()
    files = [Path(args.recipe)] if args.recipe else [run / CONFIG, run.parent.parent / CONFIG]
    return next((file for file in files if file.is_file()), None)


def _devices(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected auto or a number from 1, not {text!r}")
    return int(text)


def number_of_steps(text: str) -> int:
    """The type of an option that takes a number of steps from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of steps from 1, not {text!r}")
    return int(text)


def width() -> int:
    """Number of columns for output: the terminal's, 60 to 120; 100 without a terminal."""
    return min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
