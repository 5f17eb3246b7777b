"""Kernels run on the device of their tensors, whichever device is the current one."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sslkernels import ema_update_
from sslkernels.device import launch

KERNELS = Path(__file__).parents[1] / "kernels/sslkernels"


class Pretended(Tensor):
    """A CPU tensor that says that it is on the second GPU."""

    is_cuda = True
    device = torch.device("cuda", 1)

    def get_device(self) -> int:
        return 1


class Kernel:
    """Instead of a compiled kernel: remembers its launches, and the current device of each."""

    def __init__(self, current: list[int]) -> None:
        self.current, self.launches = current, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.launches.append((self.current[-1], grid, args, options))


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The devices that were current one after the other, at first the first GPU."""
    devices = [0]

    def exchange(index: int) -> int:
        before = devices[-1]
        if index >= 0:
            devices.append(index)
        return before

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    return devices


def test_a_launch_takes_the_device_of_its_tensors_and_leaves_the_current_one(current):
    kernel, x = Kernel(current), torch.zeros(3).as_subclass(Pretended)
    launch(kernel, (2, 1), None, x, 5, x, num_warps=4)
    assert kernel.launches == [(1, (2, 1), (None, x, 5, x), {"num_warps": 4})]
    assert current == [0, 1, 0]


def test_a_launch_of_tensors_on_the_cpu_changes_no_device(current):
    kernel = Kernel(current)
    launch(kernel, (1,), torch.zeros(3))
    assert [device for device, *_ in kernel.launches] == [0] and set(current) == {0}


def test_tensors_of_two_devices_are_not_launched(current):
    kernel = Kernel(current)
    with pytest.raises(AssertionError, match="one device"):
        launch(kernel, (1,), torch.zeros(3).as_subclass(Pretended), torch.zeros(3))
    assert kernel.launches == []


def launches_past_the_guard(source: str) -> Iterator[int]:
    """Lines of the calls `kernel[grid](...)`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            yield node.lineno


def test_only_one_function_launches_kernels():
    found = [path.name for path in sorted(KERNELS.glob("*.py")) for _ in launches_past_the_guard(path.read_text())]
    assert found == ["device.py"]


def test_a_launch_past_the_guard_would_be_found():
    assert list(launches_past_the_guard("x = 1\n_sweep[(4, 2)](queries, keys, num_warps=4)\n")) == [2]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_second_gpu_computes_while_the_first_is_current():
    teacher, student = torch.zeros(5000, device="cuda:1"), torch.ones(5000, device="cuda:1")
    with torch.cuda.device(0):
        ema_update_([teacher], [student], 0.75)
    assert torch.equal(teacher, torch.full_like(teacher, 0.25))
