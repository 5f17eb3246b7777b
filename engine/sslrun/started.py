"""How sslrun was started: the name of the program in the commands that it prints. Imports no torch."""

import os
import shlex
import shutil
import sys

SPINNING = "GOMP_SPINCOUNT", "4000"
"""The environment variable that limits how long OpenMP threads spin, and its value."""


def program() -> str:
    """The program as the user can type it where the user stands: `sslrun` if the shell finds it, or else a path."""
    started = sys.argv[0]
    if os.path.basename(started) != "sslrun" or not os.path.isfile(started):  # `python -m sslrun`, or a test
        return "sslrun"
    found = shutil.which("sslrun")
    if found is not None and os.path.samefile(found, started):
        return "sslrun"
    path = os.path.abspath(started)
    if path.startswith(os.path.join(os.getcwd(), "")):
        path = os.path.relpath(path)
        path = path if os.sep in path else os.path.join(os.curdir, path)
    return shlex.quote(path)


def lasting_program() -> str:
    """The program as a script can start it from any folder, with another PATH."""
    script = _script()
    return f"{shlex.quote(sys.executable)} -m sslrun" if script is None else shlex.quote(script)


def words_of_program() -> list[str]:
    """The program as a process of its own, by the same interpreter."""
    script = _script()
    return [sys.executable, *(["-m", "sslrun"] if script is None else [script])]


def _script() -> str | None:
    """The script `sslrun` that was started; None if it was `python -m sslrun`, or a test."""
    started = sys.argv[0]
    is_script = os.path.basename(started) == "sslrun" and os.path.isfile(started)
    return os.path.abspath(started) if is_script else None


def limit_spinning() -> None:
    """Sets how long OpenMP threads spin at barriers, unless the user has; torch reads it when it is imported.

    Threads that spin starve each other when another process uses a core. With this limit and one of two cores busy, the
    quickstart on two threads processes 240 images/s instead of 80; on idle cores it is 4 % slower.
    """
    os.environ.setdefault(*SPINNING)
