"""Hands autograd a gradient that the forward pass of a loss already computed."""

import torch
from torch import Tensor


@torch.library.custom_op("sslkernels::with_gradient", mutates_args=())
def with_gradient(losses: Tensor, inputs: Tensor, gradients: Tensor) -> Tensor:
    """Return `losses` as a differentiable function of `inputs`.

    Args:
        losses: 0-d, or (B,).
        inputs: (B, D), the tensor that the losses were computed from.
        gradients: (B, D), gradient of the 0-d loss, or row i: gradient of loss i with respect to row i of `inputs`. The
            backward pass multiplies them by the upstream gradient in their own dtype, then casts to that of `inputs`.

    A second derivative is an error, not zero, because autograd does not know how the gradient was computed.
    """
    return losses.clone()


@with_gradient.register_fake
def _(losses: Tensor, inputs: Tensor, gradients: Tensor) -> Tensor:
    return torch.empty_like(losses)


@torch.library.custom_op("sslkernels::scaled_gradient", mutates_args=())
def _scaled_gradient(upstream: Tensor, gradients: Tensor, like: Tensor) -> Tensor:
    return (upstream.reshape(-1, 1) * gradients).to(like.dtype)


@_scaled_gradient.register_fake
def _(upstream: Tensor, gradients: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(gradients, dtype=like.dtype)


def _remember(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # type: ignore[no-untyped-def]
    _, rows, gradients = inputs
    ctx.save_for_backward(gradients, rows.new_empty(0))


def _backward(ctx, upstream: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[no-untyped-def]
    gradients, like = ctx.saved_tensors
    return None, _scaled_gradient(upstream, gradients, like), None


with_gradient.register_autograd(_backward, setup_context=_remember)
