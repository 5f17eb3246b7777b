"""The contrastive operations with their references and random arguments."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sslkernels import bank_nce, batch_nce, info_nce, nt_xent
from sslkernels.bank_nce import reference as bank_nce_reference
from sslkernels.batch_nce import reference as batch_nce_reference
from sslkernels.info_nce import reference as info_nce_reference
from sslkernels.nt_xent import reference as nt_xent_reference


@dataclass(frozen=True)
class Operation:
    """`function` and `reference` take queries (B, D), the tensors of `others(queries, num_keys, random)`, and T."""

    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    others: Callable[[Tensor, int, torch.Generator], list[Tensor]]

    def __call__(self, *arguments: Any) -> Tensor:
        return self.function(*arguments)


def unit_rows(rows: int, dim: int, like: Tensor, random: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(rows, dim, generator=random), dim=1).to(like)


def near(queries: Tensor, random: torch.Generator) -> Tensor:
    """Positives: unit rows near the queries, as a half-trained network gives them."""
    noise = torch.randn(queries.shape, generator=random) * 0.5
    return F.normalize(F.normalize(queries.float().cpu(), dim=1) * queries.shape[1] ** 0.5 + noise, dim=1).to(queries)


def _info_nce(queries: Tensor, num_keys: int, random: torch.Generator) -> list[Tensor]:
    return [near(queries, random), unit_rows(num_keys, queries.shape[1], queries, random)]


def _batch_nce(queries: Tensor, num_keys: int, random: torch.Generator) -> list[Tensor]:
    keys = unit_rows(num_keys, queries.shape[1], queries, random)
    own = torch.randint(num_keys, (len(queries),), generator=random).to(queries.device)
    keys[own] = near(queries, random)
    return [keys, own]


def _bank_nce(queries: Tensor, num_keys: int, random: torch.Generator) -> list[Tensor]:
    bank, own = _batch_nce(queries, num_keys, random)
    drawn = torch.randint(num_keys, (len(queries), num_keys), generator=random).to(queries.device)
    return [bank, own, drawn]


OPERATIONS = {
    "info_nce": Operation(
        lambda *args: info_nce(*args)[0],
        lambda *args: info_nce_reference(*args)[0],
        _info_nce,
    ),
    "batch_nce": Operation(batch_nce, batch_nce_reference, _batch_nce),
    "bank_nce": Operation(lambda *args: bank_nce(*args)[0], lambda *args: bank_nce_reference(*args)[0], _bank_nce),
    "nt_xent": Operation(nt_xent, nt_xent_reference, lambda queries, num_keys, random: []),
}
# One loss per row: the same kernels, another path through autograd.
PER_ROW = Operation(
    lambda *args: info_nce(*args, reduction="none")[0],
    lambda *args: info_nce_reference(*args, reduction="none")[0],
    _info_nce,
)


def nt_xent_over_ranks(num_ranks: int) -> tuple[float, Tensor]:
    """Loss, and gradient of a linear map's weight, averaged over ranks that each have a share of 24 images."""
    dist.init_process_group("gloo")
    first, second, weight = _images()
    mine = slice(dist.get_rank(), None, num_ranks)
    loss = nt_xent(torch.cat([first[mine], second[mine]]) @ weight, 0.2, group=dist.group.WORLD)
    return _averaged(loss, weight)


def batch_nce_over_ranks(num_ranks: int) -> tuple[float, Tensor]:
    """As `nt_xent_over_ranks`; the keys are the first numbers of the second views."""
    dist.init_process_group("gloo")
    first, second, weight = _images()
    own = torch.arange(len(first)).chunk(num_ranks)[dist.get_rank()]
    loss = batch_nce(first[own] @ weight, _keys(second)[own], own, 0.2, group=dist.group.WORLD)
    return _averaged(loss, weight)


def one_process(name: str) -> tuple[float, Tensor]:
    """Loss and gradient of one process in float64, which the ranks must reproduce."""
    first, second, weight = (x.detach().double() for x in _images())
    weight.requires_grad_()
    if name == "nt_xent":
        loss = nt_xent_reference(torch.cat([first, second]) @ weight, 0.2)
    else:
        loss = batch_nce_reference(first @ weight, _keys(second), torch.arange(len(first)), 0.2)
    loss.backward()
    return loss.item(), weight.grad


def _images() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    first = torch.randn(24, 20, generator=random)
    second = first + 0.3 * torch.randn(24, 20, generator=random)
    return first, second, torch.randn(20, 13, generator=random).requires_grad_()


def _keys(views: Tensor) -> Tensor:
    return F.normalize(views[:, :13], dim=1)


def _averaged(loss: Tensor, weight: Tensor) -> tuple[float, Tensor]:
    loss.backward()
    mean = torch.cat([loss.detach().reshape(1), weight.grad.flatten()])
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    return mean[0].item(), mean[1:].view_as(weight)
