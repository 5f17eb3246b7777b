"""What the verbs share: exit codes, the arguments that name a recipe, and how an error is said."""

import argparse
import shutil
import sys

DONE, FAILED, USAGE, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 130
FINDINGS = DIFFERENT = 1  # of `config lint` and `config diff`


def fail(error: object, code: int) -> int:
    """Say an error in one line; returns the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return code


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a TOML recipe")
    add_overrides(parser, "set one value, as a line of TOML merged last; may be repeated")


def add_overrides(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[], help=help)


def width() -> int:
    """Columns to write in: the terminal's, 100 without one."""
    return min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
