"""Activation checkpointing: activations of a part of a network are computed again in the backward pass instead of kept
(Chen et al. 2016, arXiv 1604.06174)."""

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sslrun.errors import UsageError
from sslrun.nn.norm import GroupBatchNorm, group_norms


def checkpoint_activations(network: nn.Module, patterns: list[str], key: str) -> list[str]:
    """Makes the named parts of a network recompute their activations; names and weights stay.

    Only the input of each part is kept for the backward pass. A part within a part that recomputes is left as it is.
    BatchNorm counts a recomputed pass once. Evaluation mode computes as before.

    Args:
        network: the network.
        patterns: names of submodules; `*` stands for any characters except dots.
        key: the key of the recipe that the patterns are from, for the error.

    Returns:
        The names of the parts.

    Raises:
        UsageError: a pattern fits no submodule; or a hook changes what is computed within a part, as stochastic depth
            does, so that a second pass may compute something else.
    """
    names = [name for name, _ in network.named_modules() if name]
    matching: set[str] = set()
    for pattern in patterns:
        expression = re.compile(re.escape(pattern).replace(r"\*", "[^.]*"))
        found = {name for name in names if expression.fullmatch(name)}
        if not found:
            near = difflib.get_close_matches(pattern, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(n for n in names if '.' not in n)}"
            raise UsageError(f"{key}: {type(network).__name__} has no part {pattern!r}{hint}")
        matching |= found
    outermost = [name for name in names if name in matching and not _is_within(name, matching)]
    for name in outermost:
        part: Any = network.get_submodule(name)
        hooked = [inner for inner, module in part.named_modules() if inner and module._forward_hooks]
        if hooked or "forward" in vars(part):
            hook = f"a hook (of drop_path, for example) changes the output of {name}.{hooked[0]}" if hooked else None
            reason = hook or "its forward has been replaced"
            raise UsageError(f"{key}: {name} cannot be computed again, since {reason}")
        part.forward = _Recomputing(part)
    return outermost


class _Recomputing:
    """The forward of a module, in a form that keeps only its input for the backward pass. It can be deep-copied."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.function: Callable[..., Any] = type(module).forward

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if not (self.module.training and torch.is_grad_enabled()):
            return self.function(self.module, *inputs, **named)
        if not torch.compiler.is_compiling():  # a compiled graph updates the statistics in its forward pass alone
            named["context_fn"] = self._contexts
        return checkpoint(self.function, self.module, *inputs, use_reentrant=False, **named)

    def _contexts(self) -> tuple[Any, Any]:
        return contextlib.nullcontext(), _statistics_kept(group_norms(self.module))


@contextlib.contextmanager
def _statistics_kept(layers: list[GroupBatchNorm]) -> Iterator[None]:
    """Undoes what forward passes within it add to the statistics of a step."""
    before = [layer.pending.clone() for layer in layers]
    try:
        yield
    finally:  # checkpoint leaves by an exception as soon as it has what it needs
        for layer, pending in zip(layers, before, strict=True):
            layer.pending.copy_(pending)


def _is_within(name: str, others: set[str]) -> bool:
    pieces = name.split(".")
    return any(".".join(pieces[:length]) in others for length in range(1, len(pieces)))
