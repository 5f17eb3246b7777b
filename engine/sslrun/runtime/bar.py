"""The line on a terminal that shows how far a run is. It fits any width: what is least needed is dropped first."""

import os
import sys
from collections.abc import Callable, Mapping

from tqdm import tqdm
from tqdm.std import Bar as Blocks

COLUMNS = 80  # of a terminal that does not tell
LEAST = 5  # characters of the bar itself
# The parts from the most needed to the least.
NEED = ("step", "ETA", "loss", "epoch", "speed", "bar", "rate", "wait", "memory")
# The same from left to right.
PLACES = ("epoch", "bar", "step", "loss", "rate", "speed", "wait", "memory", "ETA")


def line(parts: Mapping[str, str], columns: int, blocks: Callable[[int], str]) -> str:
    """The parts that fit, by their names in `PLACES`, in `columns` characters at most.

    Args:
        parts: text of each part, without the bar.
        columns: width of the terminal.
        blocks: the bar of a number of characters.
    """
    lengths = {name: len(text) for name, text in parts.items()} | {"bar": LEAST + 2}
    chosen = [name for name in NEED if name in lengths]
    while len(chosen) > 1 and sum(lengths[name] + 2 for name in chosen) - 2 > columns:
        chosen.pop()
    left = columns - (sum(lengths[name] + 2 for name in chosen) - 2)
    texts = {**parts, "bar": f"|{blocks(LEAST + max(0, left))}|"}
    return "  ".join(texts[name] for name in PLACES if name in chosen)[: max(0, columns)]


class WholeLine(tqdm):  # type: ignore[type-arg]
    """A tqdm bar that goes to its line, draws and comes back in one write.

    tqdm itself makes three, and an exception between them, as that of Ctrl-C, leaves the cursor on the line of another
    bar, so that one of them is left twice.
    """

    longest = 0

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        down = abs(self.pos) if pos is None else pos
        text = str(self) if msg is None else msg
        self.longest = max(self.longest, len(text))  # notebooks do not know the code that erases the rest of a line
        text = text.ljust(min(self.longest, _columns() - 1))
        self.fp.write("\n" * down + f"\r{text}\x1b[K" + "\r" * (msg == "") + "\x1b[A" * down)
        self.fp.flush()
        return True

    def clear(self, nolock: bool = False) -> None:
        if not self.disable:
            self.display("")


class Bar(WholeLine):
    """The bar of a run on stderr; messages go above it by `tqdm.write`.

    Args:
        total: steps of the run.
        initial: steps that are done.
        parts: the texts beside the bar at the start, by their names in `PLACES`, without "step".
    """

    def __init__(self, total: int, initial: int, parts: Mapping[str, str]) -> None:
        self.parts: dict[str, str] = dict(parts)
        super().__init__(total=total, initial=initial, file=sys.stderr, mininterval=0.2, ncols=COLUMNS, nrows=20)

    def __str__(self) -> str:
        def blocks(width: int) -> str:
            return format(Blocks(self.n / max(1, self.total), width, Blocks.ASCII if self.ascii else Blocks.UTF), "")

        steps = {"step": f"step {self.n}/{self.total}"}
        return line(self.parts | steps, _columns() - 1, blocks)  # a full line would begin another one


def _columns() -> int:
    """Width of the terminal now."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or COLUMNS
    except (OSError, ValueError):
        return COLUMNS
