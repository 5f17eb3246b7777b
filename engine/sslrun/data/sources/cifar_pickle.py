"""Reads the pickled files of CIFAR-10 and CIFAR-100 ("python version") without unpickling: nothing in them is called.

A file is one dictionary of strings, numbers, lists and one numpy array, as Python 2 wrote them in protocol 2.
`pickletools` lists the operations of a pickle and runs none; the few that occur in such a file are carried out here
with lists and dictionaries. A function that a pickle would import and call (numpy's, for the array) stays a name with
its arguments, from which the array is built here. Anything else is an error.
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
    """A call that a pickle asks for; it is never made."""

    function: str
    arguments: tuple[Any, ...]
    state: Any = None


def read(content: bytes) -> dict[str, Any]:
    """The dictionary of a file; its array is a read-only view of `content`.

    Raises:
        ValueError: the content is not such a file.
    """
    try:
        table = _read(content)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a pickled CIFAR file: {error}") from None
    if not isinstance(table, dict):
        raise ValueError("not a pickled CIFAR file: no dictionary")
    return {key: _array(value) if isinstance(value, _Call) else value for key, value in table.items()}


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
        elif name == "BINSTRING":  # one byte for the operation, four for the length
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
    """The array that numpy would build: a call without content, then (version, shape, dtype, Fortran order, bytes)."""
    module, _, function = call.function.rpartition(" ")
    if function != "_reconstruct" or module not in ("numpy.core.multiarray", "numpy._core.multiarray"):
        raise ValueError(f"not a pickled CIFAR file: it calls {call.function}")
    _, shape, dtype, is_fortran, content = call.state
    if dtype.function != "numpy dtype" or dtype.arguments[0] not in ("u1", "|u1"):
        raise ValueError("not a pickled CIFAR file: its array does not hold bytes")
    if isinstance(content, str):
        content = content.encode("latin-1")  # below 256 bytes
    return np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if is_fortran else "C")
