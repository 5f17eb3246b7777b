"""Stops long work between two steps of a run, on all ranks at the same place: none waits for one that has left."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from sslrun.runtime import distributed, signals
from sslrun.runtime.signals import Stopped

T = TypeVar("T")


def stop_if_asked(code: int = 0) -> None:
    """Stops work between two steps on all ranks if one of them was asked to stop; all ranks call it equally often.

    It does nothing in a step, in `alone`, and where no run is under way (`StopSignals.listening`).

    Args:
        code: the exit code of a stop that this rank knows of otherwise.

    Raises:
        Stopped: a rank was asked to stop.
    """
    if signals.is_listening() and not distributed.is_alone():
        code = distributed.largest(code or signals.requested())
    if code:
        raise Stopped(code)


def stoppable(items: Iterable[T], most: int = 0) -> Iterator[T]:
    """Yields the items of a long work between two steps, and looks before each with `stop_if_asked`.

    It also passes a stop on to the other ranks that one of them raises while it waits for its next item.

    Args:
        items: this rank's items.
        most: the largest number of items of a rank; to be given where they have different numbers.
    """
    iterator, looks = iter(items), 0
    while True:
        code, has_item = 0, False
        try:
            item = next(iterator)
            has_item = True
        except StopIteration:
            if looks >= most:
                return
        except Stopped as stopped:
            code = stopped.exit_code
        stop_if_asked(code)
        looks += 1
        if has_item:
            yield item
