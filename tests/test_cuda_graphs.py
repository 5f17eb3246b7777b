"""CUDA graphs, as far as a CPU can show: who uses them, what torch.compile is told, and that nothing of a step is read
after the next step has begun.

`Played` stands in for the graphs: what a network has returned, and gradients, are overwritten when a generation begins.
"""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch.utils._pytree import tree_map

import small_run
import sslrun.plan
import test_methods
import toy
from sslrun.cli import main
from sslrun.contract import Method, Progress
from sslrun.errors import Diverged
from sslrun.evaluation.monitors.held_out_loss import untouched
from sslrun.evaluation.monitors.monitor import Monitor, Snapshot
from sslrun.methods.moco import MoCo
from sslrun.nn.heads import ContrastiveHead
from sslrun.nn.necks import MoCoV2Neck
from sslrun.nn.norm import set_groups
from sslrun.nn.resnet import ResNet
from sslrun.plan import choose_machine
from sslrun.runtime import compilation
from test_plan import recipe

ON_A_GPU: dict[str, Any] = {
    "device": "cuda", "compile": True, "ranks": 1, "zero_stage": 1, "accumulation": 1, "deterministic": False,
}  # fmt: skip
MONITORS = [f"monitor.{name}_interval=1" for name in ("knn", "loss", "probe", "rankme")]


class Played:
    """Plays the graphs of a method's compiled networks.

    Attributes:
        generations: how often a generation has begun.
    """

    def __init__(self, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
        self.generations = 0
        self._returned: list[Tensor] = []
        monkeypatch.setattr(compilation, "begin_generation", self.begin)
        for name, child in method.named_children():
            if name not in method.uncompiled:
                child.register_forward_hook(self._return)
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._keep_gradient)

    @torch.no_grad()
    def begin(self) -> None:
        self.generations += 1
        for tensor in self._returned:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -(2**40))
        self._returned.clear()

    def _return(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        def own(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.clone()
            self._returned.append(value.detach())
            return value

        return tree_map(own, output)

    def _keep_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._returned.append(parameter.grad)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks stay as they are when an executor compiles them."""
    monkeypatch.setattr(compilation, "compile_children", lambda *_: None)


@pytest.mark.parametrize(
    ("wanted", "changes", "reason"),
    [
        ("auto", {}, None),
        ("on", {}, None),
        ("off", {}, "engine.cuda_graphs is off"),
        ("on", {"device": "cpu"}, "they need a CUDA device"),
        ("on", {"compile": False}, "they record compiled networks, and engine.compile is off"),
        ("auto", {"ranks": 8}, "they are untried with DeepSpeed (engine.cuda_graphs = on tries them)"),
        ("on", {"ranks": 8}, None),
        ("on", {"ranks": 8, "zero_stage": 3}, "ZeRO stage 3 moves the parameters, and graphs need fixed addresses"),
        ("on", {"zero_stage": 3}, None),  # a stage that one process does not use
        ("auto", {"accumulation": 4}, "the gradients of 4 micro-batches are held at once"),
        ("on", {"accumulation": 4}, None),
        ("auto", {"deterministic": True}, "engine.deterministic is set"),
        ("on", {"deterministic": True}, None),
    ],
)
def test_who_uses_them(wanted, changes, reason):
    found = compilation.why_no_cuda_graphs(wanted, **ON_A_GPU | changes)
    assert found is None if reason is None else found.startswith(reason)


@pytest.mark.parametrize(
    ("changes", "ranks", "used"),
    [
        ({}, 1, True),
        ({"micro_batch": 16}, 1, False),
        ({"micro_batch": 16, "cuda_graphs": "on"}, 1, True),
        ({"compile": "off"}, 1, False),
        ({"deterministic": True}, 1, False),
        ({}, 2, False),
        ({"cuda_graphs": "on"}, 2, True),
        ({"cuda_graphs": "off"}, 1, False),
    ],
)
def test_the_machine_has_them_by_its_recipe(changes, ranks, used):
    options = {"micro_batch": 32 // ranks, "precision": "bf16"} | changes
    assert choose_machine(recipe(**options), torch.device("cuda"), ranks, ranks).cuda_graphs is used
    assert not choose_machine(recipe(**options), torch.device("cpu"), ranks, ranks).cuda_graphs


def test_a_run_says_why_it_has_none(tmp_path, images, capsys):
    path = small_run.write_recipe(tmp_path, images, steps=1)
    told = "they need a CUDA device"
    for wanted, is_told in (("on", True), ("auto", False), ("off", False)):
        options = [f"--set=engine.cuda_graphs={wanted}", "--set=monitor.knn_interval=0"]
        _, plan, _ = small_run.call(capsys, path, *options, "--dry-run")
        assert (f"CUDA graphs  not used: {told}\n" in plan) is is_told
        assert small_run.call(capsys, path, *options, "--work-dir", tmp_path / wanted)[0] == 0
        log = (tmp_path / wanted / "small/log.txt").read_text()
        assert log.count(f"CUDA graphs are not used: {told}") == is_told


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_torch_compile_is_told(monkeypatch, cuda_graphs):
    asked: dict[Any, dict[str, Any]] = {}

    def compile(function: Any, **options: Any) -> Any:
        asked[function.__self__] = options
        return function

    monkeypatch.setattr(torch, "compile", compile)
    method = toy.ToyMethod()
    method.uncompiled = ("sometimes",)
    compilation.compile_children(method, cuda_graphs)
    assert set(asked) == {method.student, method.teacher}
    options = {"triton.cudagraphs": True} if cuda_graphs else None
    assert all(each == {"dynamic": False, "options": options} for each in asked.values())


def test_torch_knows_the_option():
    assert "triton.cudagraphs" in torch._inductor.list_options()


class Traced:
    """Traces networks as Inductor gets them, and looks at their inputs.

    Attributes:
        inputs: for each shape of an input of a forward pass, whether its address is taken for fixed, once per input.
        changed: the same, of the inputs that a graph changes.
        unfit: operations that a CUDA graph cannot contain.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inputs: dict[tuple[int, ...], list[bool]] = {}
        self.changed: list[bool] = []
        self.unfit: list[Any] = []
        real = torch.compile
        monkeypatch.setattr(torch, "compile", lambda function, **_: real(function, backend=self._make, dynamic=False))

    def _make(self, graph: Any, examples: list[Tensor]) -> Any:
        compile = aot_autograd(
            fw_compiler=self._forward,
            bw_compiler=self._backward,
            inference_compiler=self._forward,
            keep_inference_input_mutations=True,  # as Inductor
        )
        return compile(graph, examples)

    def _forward(self, graph: Any, examples: list[Tensor]) -> Any:
        fixed = TracingContext.get().fw_metadata.static_input_indices
        for place, node in enumerate(node for node in graph.graph.nodes if node.op == "placeholder"):
            self.inputs.setdefault(tuple(examples[place].shape), []).append(place in fixed)
            if any(user.target is torch.ops.aten.copy_.default and user.args[0] is node for user in node.users):
                self.changed.append(place in fixed)
        return self._backward(graph, examples)

    def _backward(self, graph: Any, examples: list[Tensor]) -> Any:
        node = get_first_incompatible_cudagraph_node(graph)
        if node is not None:
            self.unfit.append(node.target)
        return graph.forward


@pytest.mark.parametrize("is_marked", [True, False])
def test_graphs_read_and_update_parameters_and_buffers_in_place(monkeypatch, is_marked):
    """Inductor records no graph that changes an input whose address it takes for changeable, and copies such inputs in
    each step: there must be none among parameters, statistics and the queue."""
    traced = Traced(monkeypatch)
    if not is_marked:
        monkeypatch.setattr(torch._dynamo, "mark_static_address", lambda _: None)
    method = MoCo(ResNet(18, base_width=4), MoCoV2Neck(32, 16, 8), ContrastiveHead(), queue_len=24, feat_dim=8)
    set_groups(method, 4, 2)
    compilation.compile_children(method, cuda_graphs=True)
    batch = test_methods.Batch([torch.randn(16, 3, 24, 24)], torch.arange(8), None)
    with torch.no_grad():
        (keys,) = method.targets([batch], toy.progress_at(0))
    method(batch, toy.progress_at(0), keys).value.backward()
    inputs = traced.inputs
    assert len(traced.changed) == 2 * 20 and all(traced.changed), "the statistics of student and teacher"
    assert inputs.pop((24, 8)) == [is_marked], "the queue"
    assert inputs.pop((8, 3, 24, 24)) == [False] * 2 == inputs.pop((8, 32, 1, 1)), "images and features are copied"
    assert inputs.pop((8, 8)).count(False) == 2, "queries and keys"
    assert all(all(places) for places in inputs.values())
    assert traced.unfit == []


@pytest.mark.nightly
@test_methods.EVERY_METHOD
def test_every_method_can_be_recorded(name, monkeypatch):
    """No operation that a CUDA graph cannot contain, no break, and nothing changed at an address that is not fixed."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    traced = Traced(monkeypatch)
    tried = test_methods.recipe_of(name)
    executor = test_methods.started(tried, compile=True, cuda_graphs=True)
    for step in range(2):
        test_methods.take_step(tried, executor, step)
    assert traced.inputs and traced.unfit == [] and all(traced.changed)
    has_statistics = any(name.endswith("running_mean") for name, _ in tried.model.named_buffers())
    assert traced.changed or not has_statistics
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.nightly)])
@test_methods.EVERY_METHOD
def test_nothing_of_a_step_is_read_in_the_next(name, accumulation, monkeypatch):
    states = []
    for is_played in (False, True):
        tried = test_methods.recipe_of(name)
        played = Played(tried.model, monkeypatch) if is_played else None
        executor = test_methods.started(tried, accumulation=accumulation, compile=True, cuda_graphs=True)
        metrics = [test_methods.take_step(tried, executor, step, 16 // accumulation) for step in range(3)]
        if played is not None:
            assert played.generations == 3
            played.begin()
        states.append(toy.state_of(executor) | {f"{i}/{key}": row[key] for i, row in enumerate(metrics) for key in row})
    assert toy.is_equal(*states)


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("optimizer", list(toy.OPTIMIZERS))
def test_no_optimizer_keeps_a_gradient(optimizer, monkeypatch):
    executors = [toy.build(optimizer, compile=True, cuda_graphs=True, accumulation=2) for _ in range(2)]
    toy.train(executors[0], range(3), toy.RATES[optimizer])
    Played(executors[1].method, monkeypatch)
    toy.train(executors[1], range(3), toy.RATES[optimizer])
    assert toy.is_equal(*map(toy.state_of, executors))


class Hoarder(toy.ToyMethod):
    """Keeps what a network has returned until the next step, which graphs do not allow."""

    last: Tensor | None = None

    def targets(self, batches: list[Any], progress: Progress) -> list[Tensor]:
        targets = super().targets(batches, progress)
        kept, self.last = self.last, self.student(batches[0].views[0])
        return targets if kept is None else [target + 0 * kept for target in targets]


@pytest.mark.usefixtures("no_compiler")
def test_played_graphs_find_what_is_kept_too_long(monkeypatch):
    """The controls: an output that is kept, and generations that begin with each micro-batch."""
    monkeypatch.setattr(toy, "ToyMethod", Hoarder)
    executor = toy.build(compile=True, cuda_graphs=True)
    Played(executor.method, monkeypatch)
    with pytest.raises(Diverged):
        toy.train(executor, range(2), 0.1)
    monkeypatch.undo()

    monkeypatch.setattr(compilation, "compile_children", lambda *_: None)
    executor = toy.build(compile=True, cuda_graphs=True, accumulation=2)
    played = Played(executor.method, monkeypatch)
    forward = executor.forward
    monkeypatch.setattr(executor, "forward", lambda *arguments: played.begin() or forward(*arguments))
    with pytest.raises(Diverged):
        toy.train(executor, range(1), 0.1)


class Keeping(Monitor):
    """Keeps the losses themselves until all batches are done, where `HeldOutLoss` keeps copies."""

    needs_held_out = True

    def measure(self, snapshot: Snapshot) -> dict[str, float]:
        executor, progress = snapshot.executor, snapshot.progress
        assert snapshot.held_out_batches is not None
        losses = []
        with untouched(executor.method, executor.device):
            for batches in snapshot.held_out_batches():
                for batch, target in zip(batches, executor.targets(batches, progress), strict=True):
                    losses.append(executor.forward(batch, progress, target).value)
        return {"kept/loss": torch.stack(losses).mean().item()}


def test_monitors_measure_the_same_with_graphs(tmp_path, images, monkeypatch):
    """Features and held-out losses, too, are copied before the next batch overwrites them; the control is not."""
    games: list[Played] = []

    def run(where: Path, is_played: bool) -> list[dict[str, Any]]:
        def compile_children(method: Method, cuda_graphs: bool) -> None:
            assert cuda_graphs
            if is_played:
                games.append(Played(method, monkeypatch))

        monkeypatch.setattr(compilation, "compile_children", compile_children)
        options = [*MONITORS, "engine.compile=on", "engine.micro_batch=8", "monitor.by=iter", "global_batch=8"]
        options += ["custom_imports=['test_cuda_graphs']", "monitor.extra=[{type='Keeping'}]"]
        assert main([str(path), "--work-dir", str(where), *(f"--set={option}" for option in options)]) == 0
        return small_run.timeless(small_run.metrics(where / "small"))

    monkeypatch.setattr(sslrun.plan, "why_no_cuda_graphs", lambda *_, **__: None)
    monkeypatch.setattr(compilation, "is_compiled", lambda _: True)
    path = small_run.write_recipe(tmp_path, images, steps=4)
    plain, played = run(tmp_path / "plain", is_played=False), run(tmp_path / "played", is_played=True)
    kept = [[row.pop("kept/loss") for row in rows if "kept/loss" in row] for rows in (plain, played)]
    assert plain == played
    assert len(kept[0]) == 5 and None not in kept[0] and kept[1] == [None] * 5, "NaN is null"
    assert games[0].generations > 4 * 3, "each step, batch of an extraction and held-out batch"


@pytest.mark.parametrize(
    ("message", "is_noted"),
    [
        ("CUDA error: operation not permitted when stream is capturing", True),
        ("Error: accessing tensor output of CUDAGraphs that has been overwritten by a subsequent run.", True),
        ("CUDA out of memory", False),
    ],
)
def test_an_error_of_graphs_comes_with_advice(tmp_path, images, monkeypatch, message, is_noted):
    def fail(*_: Any) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(compilation, "compile_children", lambda *_: None)
    monkeypatch.setattr(sslrun.plan, "why_no_cuda_graphs", lambda *_, **__: None)
    monkeypatch.setattr("sslrun.training.train_step", fail)
    options = ["--set=engine.compile=on", "--set=monitor.knn_interval=0"]
    with pytest.raises(RuntimeError, match=message) as raised:
        main([str(small_run.write_recipe(tmp_path, images)), *options])
    notes = ['this may come from CUDA graphs: engine.cuda_graphs = "off" trains without them']
    assert getattr(raised.value, "__notes__", []) == notes * is_noted


def test_what_inductor_leaves_out_is_told_once(caplog):
    from torch._inductor.cudagraph_utils import log_cudagraph_skip_and_bump_counter

    caplog.set_level(logging.INFO, logger="sslrun")
    for _ in range(2):
        compilation.log_skips()
        log_cudagraph_skip_and_bump_counter("skipping cudagraphs due to cpu device (arg0_1). Found from : \n file.py")
    told = [record.getMessage() for record in caplog.records if record.name == "sslrun"]
    assert told == ["a part of the networks runs without CUDA graphs: cpu device (arg0_1)"]
