"""What there is to say about a conversion: each part of the old configuration that has become another, or nothing."""

from enum import StrEnum
from typing import NamedTuple

from sslrun.config.node import Key, Origin, show

MAX_LINE = 1000  # characters of a finding


class Effect(StrEnum):
    """What became of a part; those that change what is computed come first."""

    LOST = "not converted"
    CHANGED = "changed"
    LEFT = "left out"


class Finding(NamedTuple):
    """One part of the old configuration, by its place and its key there."""

    where: Origin
    key: Key
    effect: Effect
    text: str

    def line(self, effect: str = "") -> str:
        """FILE:LINE: KEY: MESSAGE, with the effect before the message where it is asked for."""
        parts = [str(self.where), show(self.key), effect, self.text]
        return one_line(": ".join(part for part in parts if part))


class Report:
    """The findings of one conversion."""

    def __init__(self) -> None:
        self._findings: dict[Finding, None] = {}  # each once, in order

    def add(self, where: Origin, key: Key, effect: Effect, text: str) -> None:
        self._findings[Finding(where._replace(raw=None), key, effect, text)] = None

    def lost(self, where: Origin, key: Key, text: str) -> None:
        self.add(where, key, Effect.LOST, text)

    def changed(self, where: Origin, key: Key, text: str) -> None:
        self.add(where, key, Effect.CHANGED, text)

    def left(self, where: Origin, key: Key, text: str) -> None:
        self.add(where, key, Effect.LEFT, text)

    def findings(self, effect: Effect) -> list[Finding]:
        """All of one kind, file by file, line by line."""
        found = [finding for finding in self._findings if finding.effect is effect]
        return sorted(found, key=lambda finding: (finding.where.layer.order, finding.where.line or 0))

    def lines(self) -> list[str]:
        """All findings, those first that change what is computed."""
        return [finding.line(effect) for effect in Effect for finding in self.findings(effect)]

    def count(self) -> str:
        """How many of each, in words."""
        return ", ".join(f"{len(self.findings(effect))} {effect}" for effect in Effect)


def one_line(text: str) -> str:
    """A text that can stand in a comment, whatever it came from: one line, no control characters, not too long."""
    text = text if len(text) <= MAX_LINE else f"{text[:MAX_LINE]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)
