"""Where the kernels' tests run: on the CPU, which means Triton's interpreter where TRITON_INTERPRET=1, and on a GPU."""

import pytest
import torch

from sslkernels.device import INTERPRETED


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter is slow: by day, what is tested in several dtypes is tested in one of them, in turn."""
    cases: dict[tuple, list[pytest.Item]] = {}
    for item in items if INTERPRETED else []:
        parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        if parameters.pop("dtype", None) is not None:
            cases.setdefault((item.function, *map(repr, parameters.items())), []).append(item)
    for turn, case in enumerate(cases.values()):
        for place, item in enumerate(case):
            if place != turn % len(case):
                item.add_marker(pytest.mark.nightly)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _one_thread_when_interpreted() -> None:
    if INTERPRETED:
        torch.set_num_threads(1)
