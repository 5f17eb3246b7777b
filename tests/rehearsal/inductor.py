"""Compiles a recipe's step for an H100: `python -m rehearsal.inductor CONFIG [--set KEY=VALUE]... [--assemble]`.

torch's compiler runs whole, up to the source code of each graph; the graph itself then runs on fake tensors, so that
the step goes on. With `--assemble`, the Triton kernels of that code are compiled and assembled for sm_90, with the
compiler's own options and for each set of sizes that it would try on the device. Prints one line of JSON (`Compiled`).

What the compiler decides by measuring on the device is left out: it pads no matrices.
"""

import argparse
import functools
import importlib.util
import json
import re
import tempfile
import types
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import triton
from ahead_of_time import assembled
from torch import Tensor, nn
from torch._inductor import compile_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.jit import JITFunction

from rehearsal import played_inductor, played_torch_cuda
from rehearsal.played_torch_cuda import DEVICE
from rehearsal.step import EAGER, FIRST_STEP, SAMPLES, batch_of
from rehearsal.watch import Watch
from sslrun import run_parts, session
from sslrun.config import load
from sslrun.contract import Progress
from sslrun.nn.norm import RunningStatistics
from sslrun.optim import learning_rates
from sslrun.plan import choose_machine, make_plan
from sslrun.training import train_step

TRITON_CALL = re.compile(r"^\s+triton_\w+\.run\(", re.MULTILINE)
LIBRARY_CALL = re.compile(r"(?:extern_kernels\.\w+|torch\.ops\.[\w.]+)\(")
KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)'''", re.DOTALL)


@dataclass
class Graph:
    """Code that torch's compiler has made.

    Attributes:
        child: the network, by its name in the method.
        phase: "forward", "backward", or "inference" for a pass without gradient.
        input: shape of the network's input; None for the backward pass.
        launches: launches of Triton kernels in one run.
        library_calls: calls of cuDNN, cuBLAS and of operators that are not torch's, in one run.
        gb: 10^9 bytes that one run reads and writes, as the compiler counts them.
        runs: how often a step runs it.
    """

    child: str
    phase: str
    input: list[int] | None
    launches: int
    library_calls: int
    gb: float
    runs: int = 0


@dataclass
class Compiled:
    """What the compiler made of a step.

    Attributes:
        micro_batch: images that enter the device at once.
        crops: number of different sizes of the views.
        graphs: in the order in which they were made.
        compilations: for each graph that was made of Python code: the child, the shape of its input, whether with
            gradient.
        breaks: reasons for which the compiler has cut a network into several graphs.
        outside: launches and 10^9 bytes of the step outside of all graphs.
        num_kernels: different Triton kernels in all graphs.
        spilling: "kernel: sizes": bytes per thread that these spill.
        unusable: kernels that spill with all sizes that the compiler would try.
    """

    micro_batch: int
    crops: int
    graphs: list[Graph] = field(default_factory=list)
    compilations: list[tuple[str, list[int], bool]] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)
    outside: dict[str, float] = field(default_factory=dict)
    num_kernels: int = 0
    spilling: dict[str, int] = field(default_factory=dict)
    unusable: list[str] = field(default_factory=list)


class WatchOutside(Watch):
    """Watches operators and Triton's launches outside of compiled graphs."""

    def __enter__(self) -> Any:
        run: Any = JITFunction
        self._run, run.run = run.run, self._launched
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        run: Any = JITFunction
        run.run = self._run
        super().__exit__(*error)

    def _launched(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        self.launch("triton", [arg for arg in args if isinstance(arg, Tensor)], [])

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class Compiler:
    """Instead of torch's default backend: keeps the code, and runs the graph that it was made of.

    Args:
        names: names of a method's networks.
        mode: the mode of all tensors.
    """

    def __init__(self, names: dict[nn.Module, str], mode: FakeTensorMode) -> None:
        self.names, self.mode = names, mode
        self.graphs: list[Graph] = []
        self.compilations: list[tuple[str, list[int], bool]] = []
        self.sources: dict[str, str] = {}  # source of a kernel: its name
        self._child, self._input = "", None
        original: Any = GraphLowering
        original.compile_to_module = lambda lowering: self._keep(lowering)
        module: Any = nn.Module
        compiler = self

        def compile_module(self: Any, **options: Any) -> None:
            backend = functools.partial(compiler.backend, child=compiler.names[self])
            self._compiled_call_impl = torch.compile(self._call_impl, **options, backend=backend)

        module.compile = compile_module

    def backend(self, graph: torch.fx.GraphModule, inputs: list[Any], child: str, **_: Any) -> Any:
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        given = [
            value
            for node, value in zip(placeholders, inputs, strict=True)
            if isinstance(value, Tensor) and "self" not in node.name and not isinstance(value, nn.Parameter)
        ]
        shape = list(given[0].shape) if given else []
        self.compilations.append((child, shape, torch.is_grad_enabled()))

        def inner(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
            self._child, self._input = child, shape
            return compile_fx.compile_fx_inner(graph, inputs, **options)

        return compile_fx.compile_fx(graph, inputs, inner_compile=inner)

    def _keep(self, lowering: Any) -> Any:
        """Instead of a module of the generated code: one that runs the graph."""
        code = lowering.codegen()[0].value
        num_bytes = lowering.count_bytes()[0]
        self.sources |= {source: name for name, source in KERNEL.findall(code)}
        calls = code.partition("def call(")[2]
        phase = "inference" if lowering.is_inference else "backward" if lowering.is_backward else "forward"
        made = Graph(
            self._child, phase, None if phase == "backward" else self._input,
            len(TRITON_CALL.findall(calls)), len(LIBRARY_CALL.findall(calls)), round(num_bytes / 1e9, 3),
        )  # fmt: skip
        self.graphs.append(made)
        graph = lowering.orig_gm

        def call(arguments: list[Any]) -> Any:
            made.runs += 1
            taken = list(arguments)
            arguments.clear()
            with _disable_current_modes(), self.mode:
                return [_whole(output) for output in graph(*taken)]

        return types.SimpleNamespace(call=call)


def _whole(output: Any) -> Any:
    """Generated code returns no views, whatever the graph does."""
    if not isinstance(output, Tensor) or not output._is_view():
        return output
    return torch.empty_strided(output.shape, output.stride(), dtype=output.dtype, device=output.device)


def configure() -> None:
    """Sets the compiler up to compile anew, in this process, without measurements."""
    config: Any = torch._inductor.config
    config.force_disable_caches, config.compile_threads, config.shape_padding = True, 1, False


def compile_step(config: str, settings: list[str], breaks_in: str | None = None) -> tuple[Compiled, dict[str, str]]:
    """The compiled form of a step, and the sources of its kernels with their names.

    Args:
        breaks_in: name of a network in which a graph break is planted.
    """
    configure()
    recipe = session.build(load(config, [*settings, *EAGER]))
    recipe.model.prepare(SAMPLES)
    machine = replace(choose_machine(recipe, DEVICE, 1, 1), compile=True)
    plan = make_plan(recipe, SAMPLES, machine, 1)
    plan = replace(plan, total_steps=max(plan.total_steps, 1000))
    method, mode = recipe.model, FakeTensorMode(allow_non_fake_inputs=False)
    compiler = Compiler({module: name for name, module in method.named_modules()}, mode)
    if breaks_in is not None:
        method.get_submodule(breaks_in).register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    played_torch_cuda.fake_on_cuda(method, mode)
    with mode:
        executor = run_parts.make_executor(recipe, plan, DEVICE)
        statistics = RunningStatistics(method)
        batches = [batch_of(recipe, machine.micro_batch) for _ in range(plan.accumulation)]
        progress = Progress(FIRST_STEP, plan.total_steps, plan.steps_per_epoch, recipe.seed)
        groups = executor.optimizer.param_groups
        rates = learning_rates(groups, recipe.lr, progress)
        with WatchOutside(mode) as watch:
            train_step(executor, method, statistics, batches, progress, rates)
    outside = {"launches": watch.counts.launches, "gb": round(watch.counts.bytes / 1e9, 3)}
    breaks = list(torch._dynamo.utils.counters["graph_break"])
    compiled = Compiled(
        machine.micro_batch,
        crops=len({tuple(view.size) for view in recipe.data.views}),
        graphs=compiler.graphs,
        compilations=compiler.compilations,
        breaks=breaks,
        outside=outside,
        num_kernels=len(compiler.sources),
    )
    return compiled, compiler.sources


def spills(source: str, name: str) -> dict[str, int]:
    """Bytes per thread that a kernel of generated code spills, for each set of sizes that would be tried."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.py")
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tuner, found = getattr(module, name), {}
        for config in tuner.configs:
            meta = tuner._create_compile_meta(config)
            kernel = triton.compiler.ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
            options = tuner._create_compile_options(config, meta)
            made = triton.compile(kernel, target=played_inductor.TARGET, options=options)
            found[str(config)] = assembled(made.asm["ptx"]).spilled_bytes
        return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--assemble", action="store_true")
    parser.add_argument("--break-in")
    args = parser.parse_args()
    compiled, sources = compile_step(args.config, args.set, args.break_in)
    if args.assemble:
        set_driver: Any = triton_helpers
        set_driver.set_driver_to_gpu = lambda: None
        for source, name in sources.items():
            found = spills(source, name)
            compiled.spilling |= {f"{name}: {sizes}": size for sizes, size in found.items() if size}
            if min(found.values()) > 0:
                compiled.unusable.append(name)
    print(json.dumps(asdict(compiled)))


if __name__ == "__main__":
    main()
