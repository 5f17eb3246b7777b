"""A loss whose gradient came out of its forward pass, handed to autograd."""

import torch
from torch import Tensor


@torch.library.custom_op("sslkernels::with_gradient", mutates_args=())
def with_gradient(losses: Tensor, inputs: Tensor, gradients: Tensor) -> Tensor:
    """`losses`, known to autograd as a function of `inputs`.

    Args:
        losses: 0-d, or (B,).
        inputs: (B, D), what the losses were computed from.
        gradients: (B, D), of the one loss, or of loss i with respect to row i. Multiplied by what comes from above in
            their own dtype, then cast to that of `inputs`.

    A second derivative is an error, not zero: the gradient itself is no function that autograd knows.
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
