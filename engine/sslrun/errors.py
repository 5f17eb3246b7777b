"""The three ways a run ends badly that a user can act on; each becomes one line and an exit code."""


class UsageError(ValueError):
    """Something the user wrote or pointed to is wrong: one line, no traceback, exit code 2."""

    def __str__(self) -> str:
        """With escapes for what would end the line or upset a terminal: messages quote what they were given."""
        return printable(super().__str__())


class RunFailed(RuntimeError):
    """The run itself cannot go on (too many bad images, disk full): one line, exit code 1."""


class Diverged(RuntimeError):
    """Loss or gradient became non-finite, or the features collapsed and the recipe says stop: exit code 3."""


def printable(text: str) -> str:
    """One line that no terminal minds, of text that may hold anything: a path's stray bytes, a line break."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
