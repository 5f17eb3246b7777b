"""What hardware does per second: data sheets, published measurements, and operators timed on this CPU.

Every number here has its source beside it; `docs/scaling.md` lists them.
"""

import os
import statistics
import time
from dataclasses import dataclass

import torch

from sslrun.capacity.work import Operation, Work

# Share of the least time by data-sheet rates that published PyTorch training steps reach; the sources are the rows
# "published" of benchmarks/results/plan.jsonl, and docs/scaling.md shows them.
SHARE, LEAST_SHARE, MOST_SHARE = 0.5, 0.38, 0.57
LINK_SHARE = 0.8  # of a link's rate that large collectives reach; an assumption
LAUNCH_S = 2e-6  # least time of a launch on a GPU
LATENCY_S = 20e-6  # of a collective in a node, measured on 8 GPUs by others; an assumption for other nodes
REPEATS = 3  # of an operator that is timed here
clock = time.perf_counter  # seconds; benchmarks on a busy machine take those of the processor


@dataclass(frozen=True)
class Gpu:
    """A GPU in a node of a usual cluster.

    Attributes:
        memory_gib: as torch reports it.
        bandwidth: bytes per second from and to its memory.
        matrix: FLOP per second of dense matrix products, by dtype; float32 counts as TensorFloat-32.
        vector: FLOP per second of matrix products in float32 without TensorFloat-32.
        link: bytes per second to other GPUs of the node, in one direction.
        network: bytes per second to other nodes, in one direction.
        per_node: usual number of GPUs in a node.
        decoded: JPEGs per second that DALI decodes for one GPU.
    """

    name: str
    memory_gib: float
    bandwidth: float
    matrix: float
    vector: float
    link: float
    network: float
    per_node: int
    decoded: float

    def seconds(self, work: Work) -> float:
        """Expected time of operations: the least time by the data sheet, divided by the share that is reached."""
        return self.least_seconds(work) / SHARE

    def least_seconds(self, work: Work) -> float:
        """Sum over operations of the longest of three times: of its FLOP, of its bytes, of its launches."""
        return sum(times * max(self.parts(operation)) for operation, times in work.items())

    def parts(self, operation: Operation) -> tuple[float, float, float]:
        """Least seconds of an operation by FLOP, by bytes and by launches."""
        rate = self.matrix if operation.dtype in (torch.bfloat16, torch.float16) else self.vector
        return operation.flops / rate, operation.bytes / self.bandwidth, operation.launches * LAUNCH_S


# Data sheets (SXM, without sparsity): NVIDIA A100 80GB, H100, H200. Links: NVLink of 3rd and 4th generation, half of
# the stated sum of both directions. Networks: one InfiniBand port of 200 (DGX A100) or 400 Gbit/s (DGX H100, H200) per
# GPU. Decoding: A100, NVIDIA's blog on DALI (CUDA decoder, about 6,000); H100 and H200, MLPerf Training v4.0 by NVIDIA,
# whose ResNet-50 was fed with 7,159 and 7,945 images per second and GPU (with the JPEG engine and 14 cores per GPU).
GPUS = {
    "a100": Gpu("a100", 79.2, 2.04e12, 312e12, 19.5e12, 300e9, 25e9, 8, 6000),
    "h100": Gpu("h100", 79.1, 3.35e12, 989e12, 67e12, 450e9, 50e9, 8, 7159),
    "h200": Gpu("h200", 139.8, 4.8e12, 989e12, 67e12, 450e9, 50e9, 8, 7945),
}
CPU = "cpu"

# Seconds of one core that a JPEG of 500 x 375 pixels takes in exact mode with the two views of MoCo v2, decoding
# included (exact_core_ms in benchmarks/results/loader.jsonl).
CORE_S_PER_IMAGE = 1.52e-3


def seconds_here(work: Work, threads: int) -> dict[Operation, float]:
    """Seconds of each operation on this CPU: the median of a few calls on tensors of its form with random numbers.

    The step itself is not run. It takes some seconds, and the memory of the largest operation.

    Args:
        work: operations of a step.
        threads: CPU threads that compute.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            return {operation: _timed(operation) for operation in work}
    finally:
        torch.set_num_threads(before)


def _timed(operation: Operation) -> float:
    args, kwargs = operation.call.arguments()
    times = []
    for _ in range(REPEATS):
        begin = clock()
        result = operation.call.operator(*args, **kwargs)
        times.append(clock() - begin)
        del result
    return statistics.median(times)


def copy_rate_here() -> float:
    """Bytes per second that this CPU reads and writes in a copy of 64 MiB."""
    source, times = torch.zeros(2**24), []
    for _ in range(REPEATS):
        begin = clock()
        source.clone()
        times.append(clock() - begin)
    return 2 * source.nbytes / statistics.median(times)


def cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0))
