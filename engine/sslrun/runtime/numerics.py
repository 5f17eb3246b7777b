"""How CUDA computes: TensorFloat-32, cuDNN's choice of algorithms, and bit-exact repetition."""

import contextlib
import os
from collections.abc import Iterator

import torch

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")  # with others, cuBLAS may sum in another order each time


def fix_cublas_workspaces() -> None:
    """Lets cuBLAS repeat its sums bit for bit; to be called before anything runs on a CUDA device."""
    if os.environ.get(CUBLAS_WORKSPACE) not in DETERMINISTIC_WORKSPACES:
        os.environ[CUBLAS_WORKSPACE] = DETERMINISTIC_WORKSPACES[0]


def set_numerics(device: torch.device, *, tf32: bool, cudnn_benchmark: bool, deterministic: bool) -> None:
    """Sets torch's switches for a CUDA device. For the CPU it does nothing: there, runs are exact anyway.

    Args:
        device: device of the run.
        tf32: whether float32 matrix products and convolutions use TensorFloat-32.
        cudnn_benchmark: whether cuDNN times its algorithms and takes the fastest, which may be another one in each run.
        deterministic: whether torch takes only algorithms that repeat bit for bit, and Inductor times none. An
            operation without such an algorithm then raises RuntimeError.
    """
    if device.type != "cuda":
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = cudnn_benchmark
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        fix_cublas_workspaces()
    torch.use_deterministic_algorithms(deterministic)  # Inductor follows


@contextlib.contextmanager
def in_full_float32() -> Iterator[None]:
    """Within it, float32 matrix products and convolutions do not use TensorFloat-32: measurements are as exact in a run
    as after it."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = False
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before
