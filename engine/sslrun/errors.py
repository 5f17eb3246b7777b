"""The errors that a user can act on; the command line prints one line for each and exits with its code."""


class UsageError(ValueError):
    """Something the user wrote or pointed to is wrong: one line, no traceback, exit code 2.

    Attributes:
        is_common: whether all ranks raise this error, so that rank 0 alone prints it. Else one per machine does.
    """

    is_common = False

    def __str__(self) -> str:
        """The message with control characters escaped, since it may quote anything that the user gave."""
        return printable(super().__str__())


class RunFailed(RuntimeError):
    """The run itself cannot go on (too many bad images, disk full): one line, exit code 1.

    Attributes:
        is_common: whether all ranks raise this error, so that rank 0 alone prints it.
    """

    is_common = False


class Diverged(RuntimeError):
    """Loss or gradient became non-finite, or the features collapsed and the recipe says stop: exit code 3."""


def printable(text: str) -> str:
    """The text in one line: line breaks, control characters and undecodable bytes of a path are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
