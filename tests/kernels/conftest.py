"""Devices of the kernel tests: the CPU, which means Triton's interpreter if TRITON_INTERPRET=1, and CUDA if present."""

import pytest
import torch

from sslkernels.device import INTERPRETED


@pytest.hookimpl(tryfirst=True)  # before pytest applies `-m`
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as nightly all but one dtype of every case that is parametrized by `dtype`.

    Each parameter value has a number, its place among the test's values of that parameter. The dtype that stays is the
    sum of the other parameters' numbers modulo the number of dtypes, so that each value of each parameter still meets
    each dtype (pairwise coverage).
    """
    places: dict[tuple[object, str], list[str]] = {}
    cases: dict[tuple, list[pytest.Item]] = {}
    for item in items:
        parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        if parameters.pop("dtype", None) is None:
            continue
        numbers = []
        for name, value in parameters.items():
            values = places.setdefault((item.function, name), [])
            if repr(value) not in values:
                values.append(repr(value))
            numbers.append(values.index(repr(value)))
        cases.setdefault((item.function, *numbers), []).append(item)
    for (_, *numbers), dtypes in cases.items():
        for index, item in enumerate(dtypes):
            if index != sum(numbers) % len(dtypes):
                item.add_marker(pytest.mark.nightly)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _one_thread_when_interpreted() -> None:
    if INTERPRETED:
        torch.set_num_threads(1)
