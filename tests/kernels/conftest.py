"""Where the kernels' tests run: on the CPU, which means Triton's interpreter where TRITON_INTERPRET=1, and on a GPU."""

import pytest
import torch

from sslkernels.device import INTERPRETED


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _one_thread_when_interpreted() -> None:
    if INTERPRETED:
        torch.set_num_threads(1)
