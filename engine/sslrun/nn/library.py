"""Networks of other libraries: importing the library, finding a network by its name, and seeing what it returns."""

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sslrun.config.merge import nearest
from sslrun.errors import UsageError
from sslrun.nn.without_values import without_values

# Operators of torchvision's compiled part that its Python part declares more about when it is imported.
_DECLARED = ("nms", "qnms")
_FORM = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def imported(library: str) -> Any:
    """The module of an optional library.

    Raises:
        UsageError: it is not installed, or does not import; one line names the cause.
    """
    for needed in ("torchvision", library):  # timm imports torchvision
        if importlib.util.find_spec(needed) is None:
            raise UsageError(
                f"{library} networks need {needed}, which is not installed: pip install 'sslrun[{library}]'"
            )
    try:
        _import_torchvision()
        return importlib.import_module(library)
    except Exception as error:  # a library that does not fit torch raises anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(
            f"{library} is installed, but its import fails: {reason} (torch is {torch.__version__}, and "
            "torchvision must be the one for it)"
        ) from error


def _import_torchvision() -> None:
    """Imports torchvision, also one that was compiled for CUDA beside a torch that was not, as pip installs them.

    Its compiled part cannot be loaded then, and the import ends at a declaration about operators of that part (for
    boxes, which no network here uses). They get a name, so that there is something to declare about.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        operators = torch.library.Library("torchvision", "FRAGMENT")
        for name in _DECLARED:
            operators.define(name + _FORM)
        _kept.append(operators)
        importlib.import_module("torchvision")


_kept: list[Any] = []  # operators go when the object that defined them does


def require_known(library: str, name: str, names: Iterable[str]) -> None:
    """Raises UsageError if a library has no network of this name; it names the nearest."""
    known = list(names)
    if name in known:
        return
    base, tag, _ = name.partition(".")
    if tag and base in known:
        raise UsageError(f"name is {name!r}, which names weights too, and none are downloaded: write {base!r}")
    near = nearest(name, known) or f"; it has {len(known)}, such as {', '.join(known[:3])}"
    raise UsageError(f"{library} has no network called {name!r}{near}")


def created(library: str, name: str, create: Callable[..., nn.Module], **arguments: Any) -> nn.Module:
    """A network of random weights.

    Args:
        library: what it is a network of.
        name: its name there.
        create: the library's function that makes it.
        arguments: keyword arguments of `create`.

    Raises:
        UsageError: the library refuses the arguments; one line.
    """
    try:
        return create(name, **arguments)
    except Exception as error:  # whatever a network does with arguments that it does not know
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        given = ", ".join(f"{key} = {value!r}" for key, value in arguments.items())
        raise UsageError(f"{library} cannot make {name} with {given}: {reason}") from error


@dataclass(frozen=True)
class Outputs:
    """What a network returns.

    Attributes:
        shapes: shape of each output for one image.
        unused: names of the parameters that the outputs do not depend on.
    """

    shapes: list[tuple[int, ...]]
    unused: list[str]


def outputs_of(network: nn.Module, run: Callable[[Any, Tensor], list[Tensor]], images: tuple[int, int, int]) -> Outputs:
    """What a network returns for one image, found out without computing.

    Args:
        network: the network.
        run: from a copy of the network and images (1, C, H, W) to its outputs.
        images: channels, height and width of the image.

    Raises:
        UsageError: the network does not take such an image.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    copied = without_values(network, mode).eval()
    with mode:
        try:
            outputs = run(copied, torch.empty(1, *images))
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UsageError(f"it does not take an image of {images[1]} x {images[2]} pixels: {reason}") from error
    used = _leaves(outputs)
    unused = [name for name, parameter in copied.named_parameters() if id(parameter) not in used]
    return Outputs([tuple(output.shape) for output in outputs], unused)


def _leaves(outputs: list[Tensor]) -> set[int]:
    """The ids of the parameters that outputs were computed from, by the graph that autograd has recorded."""
    found, visited = set(), set()
    waiting = [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            found.add(id(variable))
        waiting += [function for function, _ in node.next_functions]
    return found
