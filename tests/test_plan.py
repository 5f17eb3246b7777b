"""The plan: how global batches are cut up for the hardware, and that samples and pixels do not depend on it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sslrun.cli import main
from sslrun.config import load
from sslrun.data.loader import Loader
from sslrun.data.order import Order
from sslrun.data.sources.image_folder import ImageFolder
from sslrun.data.transforms import ColorJitter, Normalize, RandomResizedCrop
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError
from sslrun.methods.moco import MoCo
from sslrun.nn.heads import ContrastiveHead
from sslrun.nn.necks import MoCoV2Neck
from sslrun.nn.resnet import ResNet
from sslrun.optim.optimizers import SGD, AdamW
from sslrun.optim.policies import Constant, CosineRestart
from sslrun.plan import Machine, Plan, choose_machine, describe, make_plan, restricted_by_accumulation
from sslrun.recipe import EngineConfig
from sslrun.rehearsal import StepMemory, rehearse
from sslrun.session import build
from sslrun.step_metrics import StepMetrics

ROOT = Path(__file__).parents[1]
MEMORY = StepMemory(weights=5, gradients=3, optimizer=2, images=1, activations=30)
MACHINE = Machine("cpu", "fp32", compile=False, micro_batch=8, threads=1, workers=1, memory=MEMORY)
VIEWS = [ViewGroup(num_views=2, transforms=[RandomResizedCrop(size=24), ColorJitter(brightness=0.4), Normalize()])]


def recipe(batch: int = 32, group: int = 8, **changes) -> SimpleNamespace:
    drop_last = changes.pop("drop_last", True)
    data = SimpleNamespace(samples_per_gpu=group, drop_last=drop_last, views=VIEWS, workers_per_gpu=1)
    model = MoCo(ResNet(18, base_width=4), MoCoV2Neck(32, 16, 8), ContrastiveHead(), queue_len=16, feat_dim=8)
    fields = {"global_batch": batch, "data": data, "model": model, "epochs": 3, "max_iters": None, "seed": 0}
    fields["lr"] = changes.pop("lr", Constant())
    fields["optimizer"] = SGD(lr=0.1)
    return SimpleNamespace(**fields, engine=EngineConfig(**changes))


def plan(world_size: int, micro_batch: int, num_samples: int = 100, **changes) -> Plan:
    return make_plan(recipe(**changes), num_samples, replace(MACHINE, micro_batch=micro_batch), world_size)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 32), (1, 8), (2, 16), (2, 8), (4, 8)])
@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_and_micro_batches_unite_to_the_global_batch(world_size, micro_batch, drop_last):
    cut = plan(world_size, micro_batch, drop_last=drop_last)
    assert (cut.steps_per_epoch, cut.total_steps) == ((3, 9) if drop_last else (4, 12))
    for step in range(cut.total_steps):
        parts = [part for rank in range(world_size) for part in cut.positions(step, rank)]
        assert {epoch for epoch, _ in parts} == {step // cut.steps_per_epoch}
        first = step % cut.steps_per_epoch * 32
        assert np.concatenate([positions for _, positions in parts]).tolist() == list(range(first, first + 32))
        assert all(len(positions) == micro_batch for _, positions in parts)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (2, 16), (4, 8)])
def test_any_cut_sees_the_same_pixels(images, world_size, micro_batch):
    source = ImageFolder(str(images))
    source.open()

    def step_of(cut: Plan, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"sampler": Order(len(source), 5), "seed": 5, "batch_size": cut.machine.micro_batch}
        batches = list(Loader(source, VIEWS, **options).run(cut.positions(1, rank)))
        crops = torch.stack([torch.cat(view) for view in zip(*(b.crops() for b in batches), strict=True)], dim=1)
        return crops, torch.cat([batch.index for batch in batches])

    crops, index = step_of(plan(1, 32, num_samples=len(source)), 0)
    parts = [step_of(plan(world_size, micro_batch, num_samples=len(source)), rank) for rank in range(world_size)]
    assert torch.equal(torch.cat([part[1] for part in parts]), index)
    assert torch.equal(torch.cat([part[0] for part in parts]), crops)
    assert not torch.equal(crops[:, 0], crops[:, 1]), "two views are two crops"


def test_impossible_cuts_list_the_possible_ones():
    def choose(world_size: int = 1, **changes) -> Machine:
        return choose_machine(recipe(**changes), torch.device("cpu"), world_size, 1)

    with pytest.raises(UsageError, match=r"cannot be split among 3 processes; possible numbers of processes: 1, 2, 4$"):
        choose(3)
    with pytest.raises(UsageError, match=r"global_batch 30 is not a multiple of data.samples_per_gpu 8; .*: 32$"):
        choose(batch=30)
    with pytest.raises(UsageError, match=r"engine.micro_batch is 24, .* can be cut into: 8, 16, 32$"):
        choose(micro_batch=24)
    with pytest.raises(UsageError, match="has 31 samples, fewer than one global_batch of 32"):
        plan(1, 8, num_samples=31)
    assert choose(2, micro_batch=16).micro_batch == 16


def test_a_schedule_shorter_than_the_run_is_refused():
    assert plan(1, 8, lr=CosineRestart(periods=[1, 2])).total_steps == 9
    with pytest.raises(UsageError, match=r"CosineRestart ends after 6 steps \(2 epochs\), but has to last for 9"):
        plan(1, 8, lr=CosineRestart(periods=[1, 1]))


def test_the_recipe_comes_before_what_was_chosen_before_and_that_before_a_new_choice():
    device, before = torch.device("cpu"), {"micro_batch": 16, "threads": 7, "precision": "bf16"}
    assert choose_machine(recipe(), device, 1, 1).micro_batch == 32, "all of it fits"
    chosen = choose_machine(recipe(), device, 1, 1, before)
    assert (chosen.micro_batch, chosen.threads, chosen.precision) == (16, 7, "bf16")
    chosen = choose_machine(recipe(micro_batch=8, threads=2, precision="fp32"), device, 1, 1, before)
    assert (chosen.micro_batch, chosen.threads, chosen.precision) == (8, 2, "fp32")


def test_micro_batch_is_what_fits(monkeypatch):
    monkeypatch.setattr("sslrun.plan.rehearse", lambda recipe, precision, images: MEMORY)
    sizes = []
    for free in (1, 92, 93, 168):  # 10 bytes, 4 for the images of the whole step, and 30 for each group at once
        monkeypatch.setattr("sslrun.plan.free_bytes_of_host", lambda free=free: free)
        sizes.append(choose_machine(recipe(), torch.device("cpu"), 1, 1).micro_batch)
    assert sizes == [8, 8, 16, 32], "one group at least, and 0.8 of what is free at most"


def test_a_dry_run_rehearses_once(monkeypatch):
    calls = []
    monkeypatch.setattr("sslrun.plan.rehearse", lambda recipe, precision, images: (calls.append(precision), MEMORY)[1])
    tried = build(load(str(ROOT / "configs/learn/simclr.toml")))
    machine = choose_machine(tried, torch.device("cpu"), 1, 1)
    assert machine.memory is MEMORY
    told = describe(tried, make_plan(tried, 100, machine, 1), [0], "")
    assert calls == ["fp32"]
    assert "weights 0.00, gradients 0.00, optimizer 0.00, images 0.00, activations 0.00" in told


@pytest.mark.parametrize(
    ("optimizer", "copies"), [(SGD(lr=0.1), 0), (SGD(lr=0.1, momentum=0.9), 1), (AdamW(lr=0.1), 2)]
)
def test_memory_is_counted_by_kind(optimizer, copies):
    tried = recipe(group=8)
    tried.optimizer = optimizer
    memory = rehearse(tried, "fp32")
    model = tried.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert memory.weights == everything and memory.gradients == 4 * trained
    counters = 4 * len(optimizer.create(model.named_parameters()).param_groups[0]["params"]) if copies == 2 else 0
    assert memory.optimizer == copies * 4 * trained + counters
    assert memory.images == 2 * 8 * 3 * 24 * 24 * 4
    assert rehearse(tried, "bf16", torch.bfloat16).images == memory.images // 2
    assert memory.fixed == memory.weights + memory.gradients + memory.optimizer
    assert memory.total(4, 2) == memory.fixed + 4 * memory.images + 2 * memory.activations


def test_activations_are_those_that_autograd_keeps():
    """Against the tensors that a real forward pass saves: these are there at the end of it, and little beside them."""
    tried = recipe(batch=64, group=64)  # its activations outweigh its gradients
    memory = rehearse(tried, "fp32")
    assert all(buffer.abs().sum() == 0 for name, buffer in tried.model.named_buffers() if name.endswith("pending"))
    parameters = {parameter.data_ptr() for parameter in (*tried.model.parameters(), *tried.model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    alive: list[torch.Tensor] = []
    images = torch.randn(64, 3, 24, 24)
    parameters.add(images.data_ptr())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = tried.model.neck(tried.model.backbone(images)[-1])
        tried.model.head(features, torch.randn(64, 8), tried.model.queue.rows)
    assert sum(kept.values()) <= memory.activations <= 1.2 * sum(kept.values())
    assert rehearse(tried, "bf16").activations < 0.8 * memory.activations


class Recomputing:
    """A module's forward that keeps only its input for the backward pass."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(type(self.module).forward, self.module, x, use_reentrant=False)


def test_what_is_computed_again_in_the_backward_pass_is_not_counted_as_kept():
    tried = recipe(batch=64, group=64)
    kept = rehearse(tried, "fp32").activations
    for name in ("layer1", "layer2", "layer3", "layer4"):
        part = getattr(tried.model.backbone, name)
        part.forward = Recomputing(part)
    assert rehearse(tried, "fp32").activations < 0.8 * kept


def test_a_frozen_network_keeps_no_activations():
    tried = recipe(group=8)
    trained = rehearse(tried, "fp32").activations
    tried.model.backbone.requires_grad_(False)
    assert rehearse(tried, "fp32").activations < 0.5 * trained


@pytest.mark.parametrize("name", ["npid", "mocov3", "relative_loc"])  # methods that ask which rank they are
def test_memory_is_the_same_on_every_rank(name, monkeypatch):
    tried = build(load(str(ROOT / f"configs/learn/{name}.toml"), ["data.samples_per_gpu=8"]))
    tried.model.prepare(64)
    counted = rehearse(tried, "fp32")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert rehearse(tried, "fp32") == counted and counted.activations > 0


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mocov1", None),
        ("byol", "SyncBN's statistics"),
        ("mocov3", "SyncBN's statistics"),  # the keys of the whole batch are there before the first forward pass
        ("simclr", "SyncBN's statistics"),  # the gradient cache compares the whole batch
        ("barlowtwins", "SyncBN's statistics"),
    ],
)
def test_what_sees_a_part_of_an_accumulated_batch_is_said(name, told):
    tried = build(load(str(ROOT / f"configs/learn/{name}.toml")))
    whole, halves, two_ranks = (
        make_plan(tried, 100, replace(MACHINE, micro_batch=size), ranks) for size, ranks in ((64, 1), (32, 1), (32, 2))
    )
    assert restricted_by_accumulation(tried, whole) is None and restricted_by_accumulation(tried, two_ranks) is None
    found = restricted_by_accumulation(tried, halves)
    assert found == (None if told is None else f"{told}: of 32 samples at a time, not of all 64")
    if found is not None:
        assert f"in parts     {found}\n" in describe(tried, halves, [0], "") and found not in describe(
            tried, whole, [0], ""
        )


@pytest.mark.parametrize("backbone", ["norm_cfg.type=BN", "norm_eval=true"])
def test_the_loss_alone_may_see_a_part(backbone):
    """There is no SyncBN, or it takes no statistics."""
    options = ["model.backbone.norm_cfg.type=SyncBN", f"model.backbone.{backbone}", "model.neck.norm_cfg.type=BN"]
    expected = {"true": None, "false": "the loss of SimCLR: of 32 samples at a time, not of all 64"}
    for cache, told in expected.items():
        settings = [*options, f"engine.gradient_cache={cache}"]
        tried = build(load(str(ROOT / "configs/learn/simclr.toml"), settings))
        halves = make_plan(tried, 100, replace(MACHINE, micro_batch=32), 1)
        assert restricted_by_accumulation(tried, halves) == told


def test_a_run_says_so_too(images, tmp_path):
    source = f'{{ _delete_ = true, type = "ImageFolder", data_prefix = "{images}" }}'
    recipe = tmp_path / "parts.toml"
    recipe.write_text(f'extends = "{ROOT}/configs/learn/simclr.toml"\n[data]\nsource = {source}\n')
    options = ["global_batch=64", "data.samples_per_gpu=16", "engine.micro_batch=32", "epochs=1", "engine.device=cpu"]
    options += [
        "engine.gradient_cache=false",
        "monitor.knn_interval=0",
        "model.backbone.base_width=4",
        "model.neck.in_channels=32",
    ]
    assert main([str(recipe), "--work-dir", str(tmp_path), *(f"--set={option}" for option in options)]) == 0
    told = "SyncBN's statistics and the loss of SimCLR: of 32 samples at a time, not of all 64"
    (line,) = [line for line in (tmp_path / "parts/log.txt").read_text().splitlines() if told in line]
    assert "WARNING" in line and "accumulation changes what the recipe computes: " in line


def test_window_means_and_state():
    step_metrics = StepMetrics()
    for value in (1.0, 2.0, 6.0):
        step_metrics.add({"loss": torch.tensor(value)})
    twin = StepMetrics()
    twin.load(step_metrics.state(), torch.device("cpu"))
    for one in (step_metrics, twin):
        one.add({"loss": torch.tensor(3.0)})
        assert one.read() == {"loss": 3.0}
        assert one.read() == {} and one.steps == 0
