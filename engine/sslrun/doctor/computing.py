"""Checks of what computes: kernels, compiled code, sums over processes; each against torch."""

import math
import tempfile
import time

from sslrun.doctor import Finding


def triton_kernel() -> Finding:
    """A kernel of ours, compiled and compared with torch."""
    import torch

    from sslkernels.info_nce import info_nce, reference

    if not torch.cuda.is_available():
        return Finding("missing", "without a GPU there is nothing to compile; the kernels have CPU forms")
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, 128, generator=generator) for n in (64, 64, 1000)]
    query, key, queue = (torch.nn.functional.normalize(x, dim=1) for x in rows)
    losses, gradients = [], []
    for function, device in ((info_nce, "cuda"), (reference, "cpu")):
        q = query.to(device, copy=True).requires_grad_()
        result = function(q, key.to(device), queue.to(device), 0.2)
        value = result[0] if isinstance(result, tuple) else result
        value.backward()
        assert q.grad is not None
        losses.append(value.item())
        gradients.append(q.grad.cpu())
    apart = float((gradients[0] - gradients[1]).abs().max())
    if not math.isclose(*losses, rel_tol=1e-3) or apart > 1e-4:
        raise RuntimeError(f"the loss kernel gives {losses[0]:.5f} where torch gives {losses[1]:.5f}")
    return Finding("works", "the loss kernel compiles and agrees with torch")


def torch_compile() -> Finding:
    """A compiled layer and its gradient, against the same in eager mode."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()).to(device)
    x = torch.randn(32, 64, device=device)
    begin, gradients = time.monotonic(), []
    for function in (layer, torch.compile(layer, dynamic=False)):
        layer.zero_grad()
        function(x).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None])
    seconds = time.monotonic() - begin
    if not all(torch.allclose(one, two, rtol=1e-2, atol=1e-3) for one, two in zip(*gradients, strict=True)):
        raise RuntimeError("compiled code computes other gradients")
    off = "" if device.type == "cuda" else "; off on the CPU unless engine.compile is on"
    return Finding("works", f"compiled a layer and its gradient in {seconds:.0f} s{off}")


def collectives() -> Finding:
    """A sum over processes: one for each GPU by NCCL, or two on the CPU by gloo."""
    import torch

    cuda = torch.cuda.is_available()
    ranks = torch.cuda.device_count() if cuda else 2
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_sum_over_ranks, (ranks, cuda, f"{folder}/store"), nprocs=ranks)
    if not cuda:
        return Finding("works", "two processes have summed over gloo; NCCL needs a GPU")
    alone = "; more GPUs would tell more" if ranks == 1 else ""
    return Finding("works", f"{ranks} process(es) have summed over NCCL {_nccl_version()}{alone}")


def _sum_over_ranks(rank: int, ranks: int, cuda: bool, store: str) -> None:
    import torch
    import torch.distributed as dist

    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    x = torch.full((2**20,), float(rank + 1), device="cuda" if cuda else "cpu")
    dist.all_reduce(x)
    assert bool((x == ranks * (ranks + 1) / 2).all()), "the sum over processes is wrong"
    dist.destroy_process_group()


def _nccl_version() -> str:
    import torch

    return ".".join(map(str, torch.cuda.nccl.version()))
