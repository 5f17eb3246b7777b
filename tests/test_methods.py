"""The rules that every method keeps: it trains, keeps its contract, and resumes to the bit.

The recipes are those of `make learn` (configs/learn/), on a few images and at a small batch.
"""

import shutil
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import small_run
from learn_recipes import EVERY_RECIPE, RECIPES
from sslrun.cli import main
from sslrun.config import load
from sslrun.contract import Batch, Progress
from sslrun.data.loader import patch_masks
from sslrun.evaluation.monitors.held_out_loss import untouched
from sslrun.nn.norm import RunningStatistics, set_groups
from sslrun.recipe import Recipe
from sslrun.runtime import checkpoint
from sslrun.runtime.executor import LocalExecutor
from sslrun.session import build
from sslrun.training import joined, train_step

SMALL = [
    "epochs=2", "global_batch=16", "data.samples_per_gpu=4", "engine.device=cpu", "engine.threads=1",
    "checkpoint.interval=1", "checkpoint.by=iter", "checkpoint.max_keep_ckpts=100", "log.interval=1",
    "monitor.knn_interval=0",
]  # fmt: skip
SAMPLES, STEPS_PER_EPOCH = 80, 5

# Labels, a bank with labels, a queue with prototypes. MoCo resumes daily in test_resume.py.
DAILY = ["deepcluster", "odc", "swav"]

EVERY_METHOD = pytest.mark.parametrize("name", EVERY_RECIPE)


def nightly(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.nightly)


def recipe_of(name: str) -> Recipe:
    recipe = build(load(str(RECIPES[name]), SMALL))
    recipe.model.prepare(SAMPLES)
    return recipe


def batches_of(recipe: Recipe, step: int, micro_batch: int = 16) -> list[Batch]:
    """A global batch of random images, cut into micro-batches."""
    random = torch.Generator().manual_seed(step)
    index = torch.randperm(SAMPLES, generator=random)[:16]
    crops = [torch.randn(view.num_views, 16, 3, *view.size, generator=random) for view in recipe.data.views]
    parts = [slice(first, first + micro_batch) for first in range(0, 16, micro_batch)]
    layout = torch.channels_last
    return [
        Batch(
            [g[:, part].flatten(0, 1).contiguous(memory_format=layout) for g in crops],
            index[part],
            None,
            patch_masks(recipe.data.views, 0, step, np.arange(16)[part]),
        )
        for part in parts
    ]


def progress_at(step: int) -> Progress:
    return Progress(step, total_steps=2 * STEPS_PER_EPOCH, steps_per_epoch=STEPS_PER_EPOCH, seed=0)


def features(module: nn.Module) -> Tensor:
    """A stand-in for the pass over the training set: the outputs of a module for fixed random images."""
    random = torch.Generator().manual_seed(9)
    module.eval()
    with torch.no_grad():
        outputs = module(torch.randn(SAMPLES, 3, 40, 40, generator=random))
    module.train()
    outputs = outputs[-1] if isinstance(outputs, list) else outputs
    return outputs.mean(dim=(2, 3)) if outputs.dim() == 4 else outputs


def started(recipe: Recipe, **options: Any) -> LocalExecutor:
    """An executor at the first step, with the clusters of the first epoch."""
    set_groups(recipe.model, 4, 4 // options.get("accumulation", 1))
    optimizer = recipe.optimizer.create(recipe.model.named_parameters())
    executor = LocalExecutor(recipe.model, optimizer, device=torch.device("cpu"), **options)
    executor.rewrite(recipe.model.before_epoch(progress_at(0), features))
    return executor


def take_step(recipe: Recipe, executor: LocalExecutor, step: int, micro_batch: int = 16) -> dict[str, Tensor]:
    """One optimizer step, as the training loop does it; it must be applied."""
    rates = [1e-3] * len(executor.optimizer.param_groups)
    metrics, applied = train_step(
        executor, recipe.model, RunningStatistics(recipe.model), batches_of(recipe, step, micro_batch),
        progress_at(step), rates,
    )  # fmt: skip
    assert applied and all(bool(value.isfinite()) for value in metrics.values())
    return metrics


@EVERY_METHOD
def test_gradients_reach_everything_that_is_trained_and_nothing_else(name):
    recipe = recipe_of(name)
    method = recipe.model
    started(recipe)
    late = replace(progress_at(0), step=10**6, total_steps=10**7)  # no loss is left out and nothing is frozen any more
    (batch,) = batches_of(recipe, 0)
    with torch.no_grad():
        (target,) = method.targets([batch], late)
    method(batch, late, target).value.backward()
    trained = {name: parameter for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert trained
    without = [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()]
    assert without == [] or all(_has_no_effect(name, method) for name in without), without
    assert all(parameter.grad is None for parameter in method.parameters() if not parameter.requires_grad)


def _has_no_effect(name: str, method: nn.Module) -> bool:
    """Whether a parameter is a bias right before a batch normalization, which has no effect."""
    return name.endswith("bias") and method.get_submodule(name.rpartition(".")[0]).__class__ is nn.Linear


@EVERY_METHOD
def test_two_steps_move_the_student_and_only_the_momentum_moves_the_teacher(name):
    recipe = recipe_of(name)
    method, executor = recipe.model, started(recipe)
    names = {parameter: name for name, parameter in method.named_parameters()}
    trained = [name for name, parameter in method.named_parameters() if parameter.requires_grad]
    for step in range(2):
        before = {name: parameter.detach().clone() for name, parameter in method.named_parameters()}
        take_step(recipe, executor, step)
        followers = set()
        for teacher, student, momentum in method.teachers(progress_at(step + 1)):
            students = dict(student.named_parameters())
            for key, parameter in teacher.named_parameters():
                followers.add(names[parameter])
                expected = momentum * before[names[parameter]] + (1 - momentum) * students[key].detach()
                torch.testing.assert_close(parameter.detach(), expected)
        moved = {name for name, value in before.items() if not torch.equal(value, method.get_parameter(name))}
        assert moved <= followers | set(trained)
        assert moved & set(trained)


@EVERY_METHOD
def test_measuring_the_loss_leaves_no_trace(name):
    """The loss is measured between two steps, as the held-out loss is; the second step is as without that."""
    seen = []
    for is_measured in (True, False):
        recipe = recipe_of(name)
        executor = started(recipe)
        take_step(recipe, executor, 0)
        if is_measured:
            with untouched(recipe.model, executor.device):
                batches = batches_of(recipe, 7)
                (target,) = executor.targets(batches, progress_at(1))
                assert executor.forward(batches[0], progress_at(1), target).value.isfinite()
        metrics = take_step(recipe, executor, 1)
        seen.append({**recipe.model.state_dict(), **executor.optimizer_state(), **metrics})
    assert [key for key in seen[0] if not torch.equal(seen[0][key], seen[1][key])] == []


@EVERY_METHOD
def test_bf16_computes_low_and_keeps_float32(name):
    recipe = recipe_of(name)
    take_step(recipe, started(recipe, precision="bf16"), 0)
    assert {parameter.dtype for parameter in recipe.model.parameters()} == {torch.float32}


@EVERY_METHOD
def test_accumulation_updates_once_with_the_whole_batch(name):
    recipe, seen = recipe_of(name), []
    executor = started(recipe, accumulation=2)
    with mock.patch.object(recipe.model, "after_step", lambda progress, carry: seen.append(carry)):
        take_step(recipe, executor, 0, micro_batch=8)
    take_step(recipe, executor, 1, micro_batch=8)
    assert len(seen) == 1
    assert all(len(rows) % 16 == 0 for rows in seen[0].values())


class NoWaiting(TorchDispatchMode):
    """Fails on a copy between devices for which the host would wait."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        result = function(*arguments, **options)
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            tensors = [x for x in (*arguments, result) if isinstance(x, Tensor)]
            is_asynchronous = options.get("non_blocking") or arguments[2:] == (True,)
            assert is_asynchronous or len({x.device for x in tensors}) == 1, "a copy that is waited for"
        return result


def take_step_without_values(method: nn.Module, batch: Batch) -> None:
    """The method's part of a late step, on the meta device, where an operation that needs a value raises."""
    method.to("meta")
    batch, late = batch.to(torch.device("meta")), replace(progress_at(0), step=10**6, total_steps=10**7)
    with mock.patch("torch.autocast", lambda *_, **__: nullcontext()), NoWaiting():  # autocast knows no such device
        with torch.no_grad():
            (target,) = method.targets([batch], late)
        loss = method(batch, late, target)
        loss.value.backward()
        for parameter, function in method.rewrites(late):
            function(parameter.detach())
        method.after_step(late, joined([loss.carry]))


@EVERY_METHOD
def test_a_step_waits_for_nothing(name):
    recipe = recipe_of(name)
    set_groups(recipe.model, 4, 4)
    (batch,) = batches_of(recipe, 0)
    no_small_clusters = mock.Mock(**{"return_value.read.return_value": False})  # ODC reads that one step late
    with mock.patch("sslrun.nn.clustering.LateValue", no_small_clusters):
        take_step_without_values(recipe.model, batch)


@EVERY_METHOD
def test_there_is_no_state_outside_parameters_and_buffers(name):
    recipe = recipe_of(name)
    take_step(recipe, started(recipe), 0)
    for path, module in recipe.model.named_modules():
        held = [key for key, value in vars(module).items() if not key.startswith("_") and _holds_tensor(value)]
        assert held == [], f"{path or 'the method'} holds tensors in {held}"
    passing = dict(recipe.model.named_buffers()).keys() - recipe.model.state_dict().keys()
    written_before_each_pass = {"key", "micro_batch"}  # by the executor: network_draws.begin
    assert {name.rpartition(".")[2] for name in passing} <= {"pending", "one_pass"} | written_before_each_pass


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_tensor(each) for each in value.values())
    if isinstance(value, (list, tuple, set)):
        return any(_holds_tensor(each) for each in value)
    return isinstance(value, Tensor)


@EVERY_METHOD
def test_a_copy_of_the_state_goes_on_alike(name):
    """The state dict and the optimizer's state are all that there is."""
    recipe, twin = recipe_of(name), recipe_of(name)
    executor, other = started(recipe), started(twin)
    take_step(recipe, executor, 0)
    other.load_state(deepcopy(executor.full_state()))
    other.load_optimizer_state(deepcopy(executor.optimizer_state()))
    for step in (1, 2):
        metrics, others = take_step(recipe, executor, step), take_step(twin, other, step)
        assert [key for key in metrics if not torch.equal(metrics[key], others[key])] == []
    state, others = ({**each.full_state(), **each.optimizer_state()} for each in (executor, other))
    assert [key for key in state if not torch.equal(state[key], others[key])] == []


# Two steps an epoch. SwAV's queue is full after three steps, and its prototypes are frozen for two.
SHORT = [*SMALL, "global_batch=32", "data.samples_per_gpu=8"]
SHORT_BY_NAME = {
    "swav": ["model.queue_length=96", "model.epoch_queue_starts=0", "model.freeze_prototypes_iters=2"],
}


@pytest.mark.parametrize("name", [name if name in DAILY else nightly(name) for name in RECIPES])
def test_a_resume_is_the_same_bits(name, tmp_path, images):
    """From the step after the first clustering, from the end of an epoch, before the next, and from the step after."""
    source = f'{{ _delete_ = true, type = "ImageFolder", data_prefix = "{images}" }}'
    recipe = tmp_path / f"{name}.toml"
    recipe.write_text(f'extends = "{RECIPES[name]}"\n[data]\nsource = {source}\nholdout = {source}\n')
    arguments = [str(recipe), *(f"--set={each}" for each in [*SHORT, *SHORT_BY_NAME.get(name, [])])]
    assert main([*arguments, "--work-dir", str(tmp_path / "straight")]) == 0
    straight = tmp_path / "straight" / name
    for step in (1, 2, 3):
        resumed = small_run.as_of(straight, step, tmp_path / f"from_{step}")
        assert main([*arguments, "--work-dir", str(resumed.parent), "--resume"]) == 0
        ends = [small_run.saved(run, 4) for run in (straight, resumed)]
        assert small_run.differences(*ends) == [], f"from step {step}"
        assert small_run.timeless(small_run.metrics(straight)) == small_run.timeless(small_run.metrics(resumed))
    if name == "deepcluster":
        _check_clustering_in_between(straight, arguments, tmp_path / "control")
    if name == "swav":
        rows = checkpoint.load(small_run.saved(straight, 2))[0]["model"]["queue.rows"]
        assert rows.any(dim=1).tolist() == [True] * 64 + [False] * 32, "the resume from step 2 has a queue half full"


def _check_clustering_in_between(straight: Path, arguments: list[str], work_dir: Path) -> None:
    """The next clustering lies between steps 2 and 3, and other labels give other weights: the comparison can fail."""
    end, following = (checkpoint.load(small_run.saved(straight, step))[0] for step in (2, 3))
    assert not torch.equal(end["model"]["labels"], following["model"]["labels"])
    assert "head.fc.weight/momentum_buffer" not in end["optimizer"]
    control = small_run.as_of(straight, 3, work_dir)
    tensors, state = checkpoint.load(small_run.saved(control, 3))
    tensors["model"]["labels"] = tensors["model"]["labels"].roll(1)
    shutil.rmtree(control / "checkpoints")
    checkpoint.save(control / "checkpoints", state["step"], tensors, state)
    assert main([*arguments, "--work-dir", str(work_dir), "--resume"]) == 0
    ends = [small_run.saved(run, 4) for run in (straight, control)]
    assert "model/backbone.conv1.weight" in small_run.differences(*ends)
