"""The nearest names for words of a command line that are not known."""

import argparse
import re
from collections.abc import Sequence
from difflib import get_close_matches

from sslrun.commands.command_line import options, place_after
from sslrun.errors import UsageError


def require_known_options(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Raises UsageError for a long option that the verb does not have, with the nearest option or key of a recipe.

    Args:
        parser: of the whole command line.
        words: the command line without the program.
    """
    for number, word in enumerate(words):
        option, has_value, value = word.partition("=")
        if word.startswith("--") and word != "--":
            verb = place_after(parser, words[:number]).parser
            if option not in verb._option_string_actions:
                raise UsageError(_unknown(verb, options(parser), option, value if has_value else "..."))


def _unknown(verb: argparse.ArgumentParser, of_all: list[str], option: str, value: str) -> str:
    known = [*options(verb), *of_all]
    keys = {f"--{key}": key for key in _top_keys()} if "--set" in known else {}
    near = get_close_matches(option.replace("_", "-"), known, 1, 0.7) or get_close_matches(option, keys, 1, 0.7)
    if not near:
        return f"{verb.prog} has no option {option}; see {verb.prog} --help"
    meant = f"--set {keys[near[0]]}={value}" if near[0] in keys else near[0]
    return f"{verb.prog} has no option {option}: did you mean {meant}?"


def nearest_choice(message: str) -> str | None:
    """What to say instead of a message of argparse about a word that is no choice; None for any other message."""
    found = re.fullmatch(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL)
    if found is None:
        return None
    name, word, listed = found.groups()
    choices = re.findall(r"[\w.-]+", listed)
    near = get_close_matches(word, choices, 1)
    return f"there is no {name} {word}: " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(choices)}")


def _top_keys() -> list[str]:
    from sslrun.config.schema_reader import committed_schema, follow

    schema = committed_schema()
    return list(follow(schema["$defs"], schema)["properties"])
