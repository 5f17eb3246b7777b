"""A small terminal: what a process writes to a pseudo-terminal, as a person sees it."""

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence

# Starts a command whose terminal is its stdin.
ADOPT = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"


class Terminal:
    """A command in a terminal of its own. `lines` are those of the screen and above it, without wrapping."""

    def __init__(self, command: Sequence[str], columns: int, environment: Mapping[str, str], **options: object) -> None:
        self.main, inside = pty.openpty()
        self.resize(columns)
        adopt = [sys.executable, "-c", ADOPT]
        self.process = subprocess.Popen(
            [*adopt, *command],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            env=dict(environment),
            start_new_session=True,
            **options,  # type: ignore[call-overload]
        )
        os.close(inside)
        self.lines = [""]
        self._row = self._column = 0
        self.longest = 0  # of the lines so far
        self.text = ""

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.main, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self.main, keys.encode())

    def read(self, until: Callable[[], bool] = lambda: False, timeout_s: float = 60) -> str:
        """Reads until a condition holds or the command has closed the terminal; returns all text so far."""
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(OSError):  # the other side is closed
            while not until():
                assert time.monotonic() < deadline, f"nothing more after {timeout_s} s:\n{self.text[-3000:]}"
                if select.select([self.main], [], [], 0.1)[0]:
                    piece = os.read(self.main, 65536).decode(errors="replace")
                    self.text += piece
                    self._show(piece)
        return self.text

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.main)

    def _show(self, piece: str) -> None:
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x1b]|\x1b", piece):
            if part == "\r":
                self._column = 0
            elif part == "\n":
                self._row += 1
                if self._row == len(self.lines):
                    self.lines.append("")
            elif part == "\x1b[A":
                self._row = max(0, self._row - 1)
            elif part == "\x1b[K":
                self.lines[self._row] = self.lines[self._row][: self._column]
            elif not part.startswith("\x1b") and part >= " ":
                line = self.lines[self._row].ljust(self._column)
                self.lines[self._row] = line[: self._column] + part + line[self._column + 1 :]
                self._column += 1
                self.longest = max(self.longest, self._column)
