"""Recipes and overrides that a program gives as Python values, in the form that files and `--set` have."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from sslrun.config.dump import inline
from sslrun.errors import UsageError

Overrides = Mapping[str, Any] | Sequence[str] | None
"""Values by dotted keys, such as `{"data.views.0.num_views": 2}`, or `KEY=VALUE` texts as for `--set`."""


def override_texts(overrides: Overrides) -> list[str]:
    """Overrides as `KEY=VALUE` texts, in order. Raises UsageError if a value has no form in TOML."""
    if overrides is None:
        return []
    if isinstance(overrides, str):
        raise UsageError(f"overrides are a dict, or a list of KEY=VALUE texts, not the text {overrides!r}")
    if isinstance(overrides, Mapping):
        return [f"{key}={inline(toml(value, str(key)))}" for key, value in overrides.items()]
    return [os.fspath(text) for text in overrides]


def toml(value: Any, key: str) -> Any:
    """A Python value as TOML's types: paths become texts, tuples lists.

    Args:
        value: the value.
        key: its dotted key, for messages.

    Raises:
        UsageError: it has no form in TOML.
    """
    if isinstance(value, Mapping):
        if wrong := [each for each in value if not isinstance(each, str)]:
            raise UsageError(f"{key or 'the table'}: {wrong[0]!r} is no key: keys are texts")
        return {name: toml(below, f"{key}.{name}" if key else name) for name, below in value.items()}
    if isinstance(value, list | tuple):
        return [toml(below, f"{key}.{place}") for place, below in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool | int | float | str):
        return value
    if value is None:
        raise UsageError(f"{key}: TOML has no None: leave the key out, or drop an inherited one with _delete_")
    raise UsageError(
        f"{key}: no value of a recipe has the type {type(value).__name__}: give a number, text, list or dict"
    )
