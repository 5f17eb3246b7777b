"""torch.compile and CUDA graphs: which networks are compiled, when their graphs are replayed, what that takes.

A compiled network is a few hundred launches. With CUDA graphs a launch of the whole network replaces them, which pays
where the host launches slower than the device computes: with few images at once, or small networks. The graphs are
those of Inductor ("CUDA graph trees"), one for each compiled graph and each place in the step where it runs. Inductor
warms them up, records them on a stream of its own, registers torch's generators with them, keeps all of them in one
pool of memory, and runs what it cannot record without a graph, with a reason that `log_skips` passes on.

What a graph returns lies in that pool. It is valid until the graphs of the next generation run; then it is overwritten.
A generation is a whole optimizer step: targets, all micro-batches with their gradients, the update (`Executor.targets`
begins it), or one batch of an evaluation. Within a generation nothing is overwritten, however often a network runs. So
whatever outlives a step must be a copy: metrics and carries are (`train_step`), and gradients are dropped by then.

Parameters and the method's buffers keep their addresses for the whole run, so graphs read and update them in place.
All other inputs, such as images, are copied into the graph's own memory in each step.

Not tried, for want of a GPU: recording and replay themselves, and all of it with DeepSpeed, where "auto" stays without.
"""

import logging
import os
import re
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from sslrun.contract import Method

logger = logging.getLogger("sslrun")

# Inductor says here why a part of a network runs without a CUDA graph.
_SKIPS = "torch._inductor.cudagraph_utils.__cudagraphs"


def compile_children(method: Method, cuda_graphs: bool) -> None:
    """Compiles the direct submodules of a method in place, except its `uncompiled`; names stay.

    Student and teacher share one cache of graphs: one graph for each resolution, batch size and mode.
    """
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    options = {"triton.cudagraphs": True} if cuda_graphs else None
    for name, child in method.named_children():
        if name not in method.uncompiled:
            child.compile(dynamic=False, options=options)
    if cuda_graphs:
        for buffer in method.buffers():  # a queue that is passed to a network is not copied in each step
            torch._dynamo.mark_static_address(buffer)
        log_skips()


def is_compiled(module: nn.Module) -> bool:
    """Whether a module or a part of it is compiled."""
    return any(part._compiled_call_impl is not None for part in module.modules())


def begin_generation() -> None:
    """Lets CUDA graphs overwrite what they have returned so far. Without CUDA graphs it does nothing."""
    torch.compiler.cudagraph_mark_step_begin()


def why_no_cuda_graphs(
    wanted: Literal["auto", "on", "off"],
    *,
    device: str,
    compile: bool,
    ranks: int,
    zero_stage: int,
    accumulation: int,
    deterministic: bool,
) -> str | None:
    """The reason why a run does not use CUDA graphs; None if it does.

    Args:
        wanted: `engine.cuda_graphs`. "on" uses them wherever they are possible, "auto" where they are also known to pay
            and to be safe: one process, no accumulation, no deterministic mode.
        device: "cpu" or "cuda".
        compile: whether the networks are compiled.
        ranks: number of processes.
        zero_stage: ZeRO stage, if there are several processes.
        accumulation: micro-batches per optimizer step and process.
        deterministic: whether the run must be exact on CUDA.
    """
    if wanted == "off":
        return "engine.cuda_graphs is off"
    if device != "cuda":
        return "they need a CUDA device"
    if not compile:
        return "they record compiled networks, and engine.compile is off"
    if ranks > 1 and zero_stage == 3:
        return "ZeRO stage 3 moves the parameters, and graphs need fixed addresses"
    if wanted == "on":
        return None
    if ranks > 1:
        return "they are untried with DeepSpeed (engine.cuda_graphs = on tries them)"
    if accumulation > 1:
        return (
            f"the gradients of {accumulation} micro-batches are held at once, and each micro-batch would record graphs "
            "of its own"
        )
    if deterministic:
        return "engine.deterministic is set, and without them exactness rests on less"
    return None


class _SkipLogger(logging.Handler):
    """Passes each reason on once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.logged: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        reason = record.getMessage().splitlines()[0].removeprefix("skipping cudagraphs due to ").rstrip(" :")
        reason = reason.removesuffix(". Found from")
        if reason not in self.logged:
            self.logged.add(reason)
            logger.info("a part of the networks runs without CUDA graphs: %s", reason)


def log_skips() -> None:
    """From now on, logs each reason for which Inductor leaves a CUDA graph out; once, however often it is called."""
    skips = logging.getLogger(_SKIPS)
    if not any(isinstance(handler, _SkipLogger) for handler in skips.handlers):
        skips.addHandler(_SkipLogger())


def note_the_switch(error: RuntimeError) -> None:
    """Adds advice to an error that CUDA graphs may have caused: torch cannot go on without them in the same process."""
    if re.search(r"captur|cuda ?graph", str(error), re.IGNORECASE):
        error.add_note('this may come from CUDA graphs: engine.cuda_graphs = "off" trains without them')


def num_graphs() -> int:
    """Number of graphs that torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def compile_s() -> float:
    """Seconds that torch.compile has taken in this process."""
    return float(torch._dynamo.utils.calculate_time_spent()["total_wall_time"])


def what_it_took() -> str:
    """How many graphs torch.compile has made in this process, in which time, and how many it found in its cache."""
    found = torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
    return f"{num_graphs()} graphs in {compile_s():.1f} s, {found} of them from the cache"


def where_code_is_kept() -> str:
    """Why the first start takes long, and what makes the next one fast."""
    (variable, folder), *_ = cache_folders().items()
    return f"the first start takes minutes, later ones find the code in {folder} ({variable})"


def cache_folders() -> dict[str, str]:
    """The folders of compiled code by the environment variable that sets each. A start that finds its code is fast."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    triton = os.environ.get("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    return {"TORCHINDUCTOR_CACHE_DIR": inductor, "TRITON_CACHE_DIR": triton}
