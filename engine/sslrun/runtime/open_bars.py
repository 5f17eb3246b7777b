"""Ends the progress bars that an interrupted piece of work has left open. Imports nothing that takes time."""

import sys


def close_bars() -> None:
    """Closes all bars, the lowest first, so that the next line begins below them.

    Work that an exception interrupts keeps its bar as long as somebody looks at the exception.
    """
    module = sys.modules.get("tqdm")
    bars = list(module.tqdm._instances) if module is not None else []
    for bar in sorted(bars, key=lambda bar: -abs(bar.pos)):
        bar.close()
