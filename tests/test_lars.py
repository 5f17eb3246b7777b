"""LARS against the formula, longhand, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslrun.optim.lars import LARS


def longhand(weight: Tensor, gradients: list[Tensor], rates: list[float], group: dict[str, Any]) -> Tensor:
    w, buffer = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient, lr in zip(gradients, rates, strict=True):
        g = gradient.double()
        trust = torch.tensor(1.0, dtype=torch.float64)
        if not group["lars_exclude"] and w.norm() > 0 and g.norm() > 0:
            trust = group["eta"] * w.norm() / (g.norm() + group["weight_decay"] * w.norm() + group["eps"])
        buffer = group["momentum"] * buffer + (g + group["weight_decay"] * w) * trust * lr
        w = w - buffer
    return w


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_matches_the_formula_step_by_step(momentum: float) -> None:
    torch.manual_seed(0)
    scaled = [nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(7, 5) * 10), nn.Parameter(torch.zeros(3))]
    excluded = [nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(()))]
    groups = [{"params": scaled}, {"params": excluded, "lars_exclude": True, "weight_decay": 0.0}]
    optimizer = LARS(groups, lr=1.0, momentum=momentum, weight_decay=0.01, eta=0.02)
    parameters = [*scaled, *excluded]
    start = [parameter.detach().clone() for parameter in parameters]
    gradients = [[torch.randn_like(parameter) for parameter in parameters] for _ in range(3)]
    gradients[1][1].zero_()  # no gradient: the trust ratio is 1, not infinite
    rates = [3.0, 2.0, 0.5]
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter, gradient in zip(parameters, gradients[step], strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for i, parameter in enumerate(parameters):
        group = optimizer.param_groups[0 if i < len(scaled) else 1]
        expected = longhand(start[i], [gradients[step][i] for step in range(3)], rates, group)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=2e-6, atol=2e-6)


def test_memory_layout_does_not_matter() -> None:
    torch.manual_seed(0)
    weight, gradient = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    results = []
    for weight_format in (torch.contiguous_format, torch.channels_last):
        for gradient_format in (torch.contiguous_format, torch.channels_last):
            parameter = nn.Parameter(weight.clone(memory_format=weight_format))
            optimizer = LARS([parameter], lr=1.0, momentum=0.9, weight_decay=0.1)
            for _ in range(2):
                parameter.grad = gradient.clone(memory_format=gradient_format)
                optimizer.step()
            results.append(parameter.detach().clone())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-7)


def test_a_loaded_buffer_may_have_other_strides() -> None:
    """Checkpoints hold contiguous tensors; the weights may be channels-last."""
    torch.manual_seed(0)
    results = []
    for is_loaded in (False, True):
        parameter = nn.Parameter(torch.linspace(-1, 1, 300).view(4, 3, 5, 5).to(memory_format=torch.channels_last))
        optimizer = LARS([parameter], lr=1.0, momentum=0.9, weight_decay=0.1)
        for step in range(3):
            if is_loaded and step:
                state = optimizer.state[parameter]
                state["momentum_buffer"] = state["momentum_buffer"].contiguous()
            parameter.grad = torch.linspace(0, step + 1, 300).view(4, 3, 5, 5).to(memory_format=torch.channels_last)
            optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)


def test_float64_is_exact_and_leaves_gradients_alone() -> None:
    torch.manual_seed(0)
    parameter, gradients = nn.Parameter(torch.randn(40, 30).double()), [torch.randn(40, 30).double() for _ in range(3)]
    start, optimizer = parameter.detach().clone(), LARS([parameter], lr=1.0, momentum=0.9, weight_decay=0.01, eta=0.02)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(parameter.grad, gradient)
    expected = longhand(start, gradients, [1.0] * 3, optimizer.param_groups[0])
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-13, atol=1e-14)


def test_segments_of_flat_tensors_get_the_ratios_of_whole_parameters() -> None:
    """Three parameters laid end to end and cut in two, as ZeRO does; the other half's share of the norms is added."""
    torch.manual_seed(0)
    wholes, grads = [torch.randn(n) for n in (5, 7, 4)], [torch.randn(n) for n in (5, 7, 4)]
    parameters = [nn.Parameter(whole.clone()) for whole in wholes]
    reference = LARS(parameters, lr=2.0, momentum=0.9, weight_decay=0.1)
    flat, flat_grad = torch.cat(wholes), torch.cat(grads)
    halves = [nn.Parameter(flat[:8].clone()), nn.Parameter(flat[8:].clone())]
    segments = [[(0, 5), (5, 3), (0, 0)], [(0, 0), (0, 4), (4, 4)]]
    squares: list[Tensor] = [torch.zeros(()), torch.zeros(())]

    def squares_of(half: int) -> Tensor:
        gradient = flat_grad[:8] if half == 0 else flat_grad[8:]
        pieces = [(halves[half].detach()[o : o + n], gradient[o : o + n]) for o, n in segments[half]]
        return torch.stack([torch.stack([w.norm() ** 2, g.norm() ** 2]) for w, g in pieces], dim=1).double()

    optimizers = [LARS([half], lr=2.0, momentum=0.9, weight_decay=0.1) for half in halves]
    for i, optimizer in enumerate(optimizers):
        optimizer.set_segments({halves[i]: segments[i]}, lambda own, other=1 - i: own + squares[other])
    for _ in range(3):
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        reference.step()
        squares = [squares_of(0), squares_of(1)]
        for half, grad, optimizer in zip(halves, flat_grad.split(8), optimizers, strict=True):
            half.grad = grad.clone()
            optimizer.step()
    result = torch.cat([half.detach() for half in halves])
    torch.testing.assert_close(result, torch.cat([p.detach() for p in parameters]), rtol=1e-6, atol=1e-7)


def test_found_inf_leaves_weights_and_momentum_untouched() -> None:
    parameter = nn.Parameter(torch.randn(5))
    optimizer = LARS([parameter], lr=1.0, momentum=0.9)
    parameter.grad = torch.randn(5)
    optimizer.step()
    weight, buffer = parameter.detach().clone(), optimizer.state[parameter]["momentum_buffer"].clone()
    parameter.grad = torch.full((5,), float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(parameter, weight)
    assert torch.equal(optimizer.state[parameter]["momentum_buffer"], buffer)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert parameter.isnan().all()  # the control: without the flag it would have got in
