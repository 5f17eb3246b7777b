"""The three ways a run ends badly that a user can act on; each becomes one line and an exit code."""


class UsageError(ValueError):
    """Something the user wrote or pointed to is wrong: one line, no traceback, exit code 2."""


class RunFailed(RuntimeError):
    """The run itself cannot go on (too many bad pictures, disk full): one line, exit code 1."""


class Diverged(RuntimeError):
    """Loss or gradient became non-finite, or the features collapsed and the recipe says stop: exit code 3."""
