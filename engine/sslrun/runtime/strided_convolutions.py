"""Keeps the CPU from a fault of oneDNN that ends the process, in 1x1 convolutions with a stride."""

from typing import Any

from torch import Tensor, nn

FEWEST_CHANNELS = 16  # of the input, with which the fault was not seen


def avoid_strides(network: nn.Module) -> None:
    """Let 1x1 convolutions with a stride and few input channels see only the pixels that they use.

    They compute the same, with a stride of 1. Otherwise the backward pass on the CPU writes beyond its memory, and the
    process dies by SIGSEGV or SIGABRT. Seen with torch 2.13.0 (oneDNN 3.12, jit_1x1:avx512_core): channels-last images
    of 56 pixels and more, 2 to 12 input channels, 8 to 64 output channels; not with 16 input channels or more, without
    stride, with other kernels, or with contiguous images. The shortcuts of a ResNet whose base_width is below 16 are
    such convolutions.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and _is_unsafe(module):
            module.register_forward_pre_hook(_EveryNth(*module.stride))
            module.stride = (1, 1)


def _is_unsafe(layer: nn.Conv2d) -> bool:
    is_plain = layer.kernel_size == (1, 1) and layer.padding in ((0, 0), "valid")
    return is_plain and max(layer.stride) > 1 and layer.in_channels // layer.groups < FEWEST_CHANNELS


class _EveryNth:
    """A hook that leaves every n-th row and column of a layer's input, from the first; it can be copied and pickled."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        return (inputs[0][..., :: self.rows, :: self.columns],)
