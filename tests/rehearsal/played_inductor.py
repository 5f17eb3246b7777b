"""An H100 for torch's compiler and for Triton: code is generated for it and assembled, and nothing runs.

Importing this module changes torch and Triton for the whole process.
"""

import types
from typing import Any

import torch
import torch._dynamo
from torch._dynamo import device_interface
from torch._inductor.fx_passes import joint_graph
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from rehearsal.played_torch_cuda import MEMORY

TARGET = GPUTarget("cuda", 90, 32)
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=MEMORY,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    L2_cache_size=50 * 2**20, shared_memory_per_block_optin=227 * 1024,
)  # fmt: skip


class PlayedDriver:
    """What Triton asks its driver while it compiles."""

    utils = types.SimpleNamespace(
        get_device_properties=lambda _: {
            "max_shared_mem": H100.shared_memory_per_block_optin,
            "multiprocessor_count": H100.multi_processor_count,
            "warpSize": H100.warp_size,
        }
    )

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


driver.set_active(PlayedDriver())
cuda: Any = torch.cuda
cuda.get_device_properties = lambda *_: H100
cuda.device_count = lambda: 1
cuda.current_device = lambda: 0
version: Any = torch.version
version.cuda = "13.0"
interface: Any = device_interface.CudaInterface
for name, answer in {
    "is_available": True, "device_count": 1, "current_device": 0, "get_compute_capability": 90,
    "is_triton_capable": True, "raise_if_triton_unavailable": None, "is_bf16_supported": True, "get_raw_stream": 0,
    "exchange_device": 0, "maybe_exchange_device": 0, "set_device": None, "get_device_properties": H100,
}.items():  # fmt: skip
    setattr(interface, name, staticmethod(lambda *_, answer=answer, **__: answer))
interface.Worker.get_device_properties = staticmethod(lambda *_, **__: H100)
interface.Worker.current_device = staticmethod(lambda: 0)


class OnTheHost(TorchDispatchMode):
    """Computes on the CPU what names the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs or {}))
        return func(*args, **kwargs)


folder: Any = joint_graph.UniformValueConstantFolder
_deduce_value = folder._deduce_value


def _deduce_on_the_host(self: Any, node: torch.fx.Node) -> Any:
    """The value of a constant of one element, which a compiler on a machine with a GPU computes there."""
    with OnTheHost():
        return _deduce_value(self, node)


folder._deduce_value = _deduce_on_the_host
