"""The functions of `torch.cuda` that a step calls, for a torch without CUDA; and addresses for tensors without memory.

Importing this module changes torch for the whole process.
"""

import contextlib
import os
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

os.environ.pop("LD_PRELOAD", None)  # this process has the played device; processes that it starts need none

DEVICE = torch.device("cuda", 0)
MEMORY = 80 * 10**9  # bytes, of an H100
FIRST_ADDRESS = 2**40
ALIGNMENT = 512  # bytes, of torch's allocator on CUDA

on_synchronize: list[Callable[["PlayedEvent | None"], None]] = []  # told of every wait for an event, or for the device


class ByStorage(dict[int, Any]):
    """A value for each storage, for as long as the storage lives."""

    def put(self, tensor: Tensor, value: Any, gone: Callable[[Any], None] = lambda value: None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        self[key] = value

        def end() -> None:
            if key in self:
                gone(self.pop(key))

        weakref.finalize(storage, end).atexit = False

    def of(self, tensor: Tensor) -> Any:
        """The value of the tensor's storage, or None."""
        return self.get(tensor.untyped_storage()._cdata)


class PlayedEvent:
    """A CUDA event.

    Attributes:
        age: steps since it was recorded.
        stream: where it was recorded.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        self.age = 0
        self.stream: PlayedStream | None = None
        _events.add(self)

    def record(self, stream: "PlayedStream | None" = None) -> None:
        self.age, self.stream = 0, stream or _current_stream()

    def wait(self, stream: "PlayedStream | None" = None) -> None:
        (stream or _current_stream()).wait_event(self)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        for told in on_synchronize:
            told(self)


class PlayedStream:
    """A CUDA stream.

    Attributes:
        waits_for: events that it waits for.
    """

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.waits_for: list[PlayedEvent] = []

    def record_event(self, event: PlayedEvent | None = None) -> PlayedEvent:
        event = event or PlayedEvent()
        event.record(self)
        return event

    def wait_event(self, event: PlayedEvent) -> None:
        self.waits_for.append(event)

    def wait_stream(self, stream: "PlayedStream") -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        _synchronize()


_events: weakref.WeakSet[PlayedEvent] = weakref.WeakSet()
_streams = [PlayedStream()]  # the current one is the last
used_by = ByStorage()  # storage: the stream of `Tensor.record_stream`
pinned = ByStorage()  # storages on the host that the device can write to without a wait
_addresses = ByStorage()
_next_address = [FIRST_ADDRESS]
_real_address = torch.Tensor.data_ptr


def _current_stream(*_: Any) -> PlayedStream:
    return _streams[-1]


@contextlib.contextmanager
def _on_stream(stream: PlayedStream | None) -> Iterator[None]:
    _streams.append(stream or _streams[-1])
    try:
        yield
    finally:
        _streams.pop()


def next_step() -> None:
    """What was recorded so far is of an earlier step."""
    for event in _events:
        event.age += 1


def _synchronize(*_: Any) -> None:
    for told in on_synchronize:
        told(None)


def _address(tensor: Tensor) -> int:
    """An address for each storage of a fake tensor, aligned as CUDA's allocator does it."""
    if not isinstance(tensor, FakeTensor):
        return _real_address(tensor)
    if _addresses.of(tensor) is None:
        _addresses.put(tensor, _next_address[0])
        _next_address[0] += -(-tensor.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT
    return _addresses.of(tensor) + tensor.storage_offset() * tensor.element_size()


def _pin(tensor: Tensor, *_: Any) -> Tensor:
    copy = tensor.clone()
    pinned.put(copy, True)
    return copy


def fake_on_cuda(module: nn.Module, mode: FakeTensorMode) -> None:
    """What `Module.to` does with the device and with channels-last, which fails on fake tensors. Tensors that are
    neither parameters nor buffers stay as they are, as with `Module.to`, and fail when the step meets them."""
    with mode:
        for each in module.modules():
            for tensors in (each._parameters, each._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=DEVICE)
                    if fake.dim() == 4 and fake.is_floating_point():
                        fake = fake.to(memory_format=torch.channels_last)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    moved: Any = module
    moved.to = lambda *_, **__: module


cuda: Any = torch.cuda
cuda.Event, cuda.Stream = PlayedEvent, PlayedStream
cuda.current_stream, cuda.default_stream, cuda.stream = _current_stream, lambda *_: _streams[0], _on_stream
cuda.device = cuda.device_of = lambda *_: contextlib.nullcontext()
cuda.synchronize = _synchronize
cuda.is_current_stream_capturing = lambda: False
cuda.is_bf16_supported = lambda *_: True
cuda.mem_get_info = lambda *_: (MEMORY, MEMORY)
cuda.get_device_properties = lambda *_: types.SimpleNamespace(
    multi_processor_count=132, major=9, minor=0, name="NVIDIA H100", total_memory=MEMORY
)
cuda.get_device_capability = lambda *_: (9, 0)
cuda.default_generators = (torch.Generator(),)  # a generator of the CPU: it is seeded, and nothing is drawn
cuda.amp.common.amp_definitely_not_available = lambda: False
tensor: Any = torch.Tensor
tensor.data_ptr = _address
tensor.pin_memory = _pin
tensor.record_stream = lambda self, stream: used_by.put(self, stream)
