"""Where in a command line a word stands, by the parsers of the verbs: for TAB, and for errors about words."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Place:
    """Where in a command line a word stands.

    Attributes:
        parser: of the verb.
        values: the positional words of the verb so far.
        option: the option whose value the word is; None if it is none.
    """

    parser: argparse.ArgumentParser
    values: list[str] = field(default_factory=list)
    option: argparse.Action | None = None


def place_after(parser: argparse.ArgumentParser, words: Sequence[str]) -> Place:
    """Where a word after `words` stands.

    Args:
        parser: of the whole command line.
        words: the command line without the program.
    """
    place = Place(parser)
    for word in words:
        known = verbs_of(place.parser)
        if place.option is not None:
            place.option = None
        elif word.startswith("-"):
            if place.parser is parser and word not in parser._option_string_actions:  # of `train`, which is not named
                place = Place(known["train"])
            action = place.parser._option_string_actions.get(word)
            is_bare = action is None or action.nargs == 0 or word == "--resume"
            place.option = None if is_bare else action
        elif known:
            is_recipe = word not in known and place.parser is parser
            place = Place(known.get("train" if is_recipe else word, place.parser), [word] if is_recipe else [])
        else:
            place.values.append(word)
    return place


def options(parser: argparse.ArgumentParser) -> list[str]:
    """The long options of a verb, and the short ones that have no long form; without those that help does not show."""
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS and action.option_strings]
    return [([o for o in action.option_strings if o.startswith("--")] or action.option_strings)[0] for action in shown]


def verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a parser's verbs, by name; none if it has no verbs."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}
