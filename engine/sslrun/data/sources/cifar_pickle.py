"""Reads the pickled files of CIFAR-10 and CIFAR-100 ("python version") without unpickling: nothing in them is called.

A file is one dictionary of strings, numbers, lists and one numpy array, as Python 2 wrote them in protocol 2. The
operations of a pickle are walked with `pickletools`, which knows how long each is and runs none; the few that occur in
such a file are followed here with lists and dictionaries. What a pickle would import and call (numpy's functions, for
the array) stays a name with its arguments, from which the array is made by hand. Anything else is an error.
"""

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

_PLAIN = {"BININT", "BININT1", "BININT2", "SHORT_BINSTRING", "SHORT_BINUNICODE", "BINUNICODE"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_SIZES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


@dataclass
class _Call:
    """What a pickle asks to be called: never is."""

    function: str
    arguments: tuple[Any, ...]
    state: Any = None


def read(content: bytes) -> dict[str, Any]:
    """The dictionary of a file, its array as a read-only view of `content`.

    Raises:
        ValueError: anything but such a file.
    """
    try:
        found = _read(content)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a pickled CIFAR file: {error}") from None
    if not isinstance(found, dict):
        raise ValueError("not a pickled CIFAR file: no dictionary")
    return {key: _array(value) if isinstance(value, _Call) else value for key, value in found.items()}


def _read(content: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        place = max(i for i, item in enumerate(stack) if item is _MARK)
        items = stack[place + 1 :]
        del stack[place:]
        return items

    operations: Iterator[tuple[Any, Any, Any]] = pickletools.genops(content)
    for operation, argument, place in operations:
        name = operation.name
        if name in _PLAIN:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "BINSTRING":  # one byte says so, four say how long it is
            stack.append(memoryview(content)[place + 5 : place + 5 + len(argument)])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _SIZES:
            first = len(stack) - _SIZES[name]
            stack[first:] = [tuple(stack[first:])]
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "APPEND":
            item = stack.pop()
            stack[-1].append(item)
        elif name == "APPENDS":
            items = since_mark()
            stack[-1].extend(items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            stack[-1][key] = value
        elif name == "SETITEMS":
            items = since_mark()
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(argument)
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_Call(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].state = state
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO":
            raise ValueError(f"not a pickled CIFAR file: it contains {name}")
    raise ValueError("not a pickled CIFAR file: it has no end")


def _array(call: _Call) -> np.ndarray:
    """The array that numpy would rebuild: a call without content, then (version, shape, dtype, is Fortran's, bytes)."""
    module, _, function = call.function.rpartition(" ")
    if function != "_reconstruct" or module not in ("numpy.core.multiarray", "numpy._core.multiarray"):
        raise ValueError(f"not a pickled CIFAR file: it calls {call.function}")
    _, shape, dtype, is_fortrans, content = call.state
    if dtype.function != "numpy dtype" or dtype.arguments[0] not in ("u1", "|u1"):
        raise ValueError("not a pickled CIFAR file: its array does not hold bytes")
    if isinstance(content, str):
        content = content.encode("latin-1")  # below 256 bytes
    return np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if is_fortrans else "C")
