"""The training run: build, resume, loop, step. Readable top to bottom; everything optional lives elsewhere."""

import contextlib
import gc
import itertools
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslrun.config import Config
from sslrun.data import BadSamples, Batch, Loader, Order, Source
from sslrun.errors import Diverged, RunFailed, UsageError
from sslrun.evaluation.collapse import collapse_warning
from sslrun.evaluation.features import FeatureExtractor
from sslrun.evaluation.monitor import KnnMonitor
from sslrun.methods import Method, Progress
from sslrun.nn.norm import commit_statistics, discard_statistics, group_norms, set_groups
from sslrun.optim import learning_rates
from sslrun.plan import Machine, Plan, choose_machine, describe, device_of, make_plan
from sslrun.recipe import Recipe
from sslrun.runtime import checkpoint, distributed
from sslrun.runtime.environment import environment
from sslrun.runtime.executor import Executor, LocalExecutor
from sslrun.runtime.log import LOSS, RATE, RunLog, SpeedMeter, start_logging
from sslrun.runtime.run_folder import RunFolder, rows
from sslrun.runtime.signals import PREEMPTED, StopSignals
from sslrun.window import Window

logger = logging.getLogger("sslrun")

GC_INTERVAL = 500  # steps between two collections, the same on every rank, so that none waits for another's


@dataclass
class Run:
    """All that one process holds of a run. `folder` and `log` exist on rank 0 only."""

    recipe: Recipe
    plan: Plan
    executor: Executor
    loader: Loader
    features: FeatureExtractor
    knn: KnnMonitor | None
    folder: RunFolder | None
    log: RunLog | None
    window: Window
    step: int


def run(config: Config, resume: str | None) -> int:
    """Train by a recipe; returns the exit code.

    Args:
        config: the recipe.
        resume: None refuses a run folder that holds a run, "" continues the run's own newest good checkpoint, a path
            continues that one.
    """
    try:
        recipe = build(config)
        device = device_of(recipe, distributed.local_rank())
        distributed.init(device)
        start_logging(distributed.rank(), level=recipe.log.level)
        source, holdout = recipe.data.open()
        with StopSignals() as signals, contextlib.ExitStack() as stack:
            folder = _open_folder(config, recipe, resume, stack)
            try:
                state = _prepare(config, recipe, source, holdout, device, folder, resume, stack)
                code = _loop(state, signals)
            except BaseException as error:
                _record_failure(folder, error)
                raise
            if folder is not None:
                folder.record_state("done" if code == 0 else "pre-empted" if code == PREEMPTED else "interrupted", code)
                _say_goodbye(folder.path, config, code)
            return code
    finally:
        distributed.shutdown()


def dry_run(config: Config) -> str:
    """The plan of a run, without data and without its hardware."""
    recipe = build(config)
    device = device_of(recipe, 0)
    try:
        source, _ = recipe.data.open()
        num_samples, note = len(source), repr(source)
    except UsageError as error:
        if recipe.data.source.nominal_size is None:
            raise
        num_samples, note = recipe.data.source.nominal_size, f"as published; {error}"
    machine = choose_machine(recipe, device, distributed.world_size(), distributed.ranks_on_node())
    plan = make_plan(recipe, num_samples, machine, distributed.world_size())
    (epoch, positions), *_ = plan.positions(0, 0)
    ids = Order(num_samples, recipe.seed).ids(epoch, positions[:4])
    return f"{config.name}\n{describe(recipe, plan, ids.tolist(), note)}"


def build(config: Config) -> Recipe:
    """The recipe's objects. Initial weights depend on the seed alone."""
    torch.manual_seed(config.values.get("seed", Recipe.seed))
    recipe: Recipe = config.build(Recipe)
    if recipe.epochs is None and recipe.max_iters is None:
        raise UsageError(f"{config.path}: neither epochs nor max_iters is set; how long should the run be?")
    return recipe


def train_step(
    executor: Executor, method: Method, batches: list[Batch], progress: Progress, rates: list[float]
) -> tuple[dict[str, Tensor], bool]:
    """One optimiser step from this rank's micro-batches.

    Returns:
        Mean metrics over the micro-batches, still on the device, and whether the step was applied.
    """
    norms = group_norms(method)
    targets = executor.targets(batches, progress)
    losses = []
    for batch, target in zip(batches, targets, strict=True):
        loss = executor.forward(batch, progress, target)
        executor.backward(loss.value)
        losses.append(replace(loss, value=loss.value.detach()))
    outcome = executor.step(rates)
    applied = outcome.applied is not False
    if applied:
        following = replace(progress, step=progress.step + 1)  # the update after step t uses the schedule at t + 1
        commit_statistics(norms, distributed.all_reduce_mean_ if distributed.world_size() > 1 else None)
        executor.update_teachers(method.teachers(following))
        method.after_step(following, joined([loss.carry for loss in losses]))
    else:
        discard_statistics(norms)
    named = [{"loss": loss.value, **loss.metrics} for loss in losses]
    metrics = {name: torch.stack([one[name].float() for one in named]).mean() for name in named[0]}
    return {**metrics, "grad_norm": outcome.grad_norm}, applied


def joined(carries: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The carries of all micro-batches of all ranks, in the order of the global batch."""
    return {name: distributed.all_gather_rows(torch.cat([carry[name] for carry in carries])) for name in carries[0]}


def _loop(run: Run, signals: StopSignals) -> int:
    """From `run.step` to the end, or to the signal that stops it; returns the exit code."""
    plan, recipe, executor, method = run.plan, run.recipe, run.executor, run.recipe.model
    meter = SpeedMeter(executor.device)
    vote = distributed.Vote(executor.device)
    stream = run.loader.run(_cursor(plan, run.step))
    gc.collect()
    gc.disable()
    try:
        if run.step == 0:
            _monitor(run, meter)
        code = 0
        while run.step < plan.total_steps and not code:
            progress = Progress(run.step, plan.total_steps, plan.steps_per_epoch, recipe.seed)
            if run.step % plan.steps_per_epoch == 0:
                method.before_epoch(progress, lambda: _features(run))
            with meter.waiting():
                batches = list(itertools.islice(stream, plan.accumulation))
            rates = learning_rates(
                executor.optimizer.param_groups, recipe.lr, run.step, plan.steps_per_epoch, plan.total_steps
            )
            metrics, applied = train_step(executor, method, batches, progress, rates)
            run.step += 1
            if applied:
                run.window.add(metrics)
            else:
                logger.warning("step %d was left out: its loss or gradient was not finite", run.step)
            meter.count(plan.global_batch)
            if run.log is not None:
                run.log.tick(run.step)
            if run.step % recipe.log.interval == 0 or run.step == plan.total_steps:
                _write_row(run, meter, rates[0])
            _monitor(run, meter)
            code = vote.cast(signals.exit_code)
            if code or run.step == plan.total_steps or recipe.checkpoint.is_due(run.step, plan.steps_per_epoch):
                with meter.pausing():
                    save(run)
            if run.step % GC_INTERVAL == 0:
                gc.collect()
        return code
    finally:
        gc.enable()
        stream.close()


def _open_folder(config: Config, recipe: Recipe, resume: str | None, stack: contextlib.ExitStack) -> RunFolder | None:
    """Rank 0's run folder, locked. What goes wrong there goes wrong on every rank."""
    folder, error = None, None
    if distributed.rank() == 0:
        try:
            path = Path(recipe.work_dir) / config.name
            folder = stack.enter_context(RunFolder(path, config.values, resume=resume is not None))
            start_logging(0, folder.path / "log.txt", recipe.log.level)
            folder.write_json("env.json", environment())
        except (UsageError, RunFailed) as problem:
            error = problem
    error = distributed.broadcast_object(error)
    if error is not None:
        raise error
    return folder


def _prepare(
    config: Config,
    recipe: Recipe,
    source: Source,
    holdout: Source | None,
    device: torch.device,
    folder: RunFolder | None,
    resume: str | None,
    stack: contextlib.ExitStack,
) -> Run:
    """Everything that the loop needs, at the step where it begins."""
    machine = _machine(recipe, device, folder)
    torch.set_num_threads(machine.threads)
    plan = make_plan(recipe, len(source), machine, distributed.world_size())
    group = recipe.data.samples_per_gpu
    set_groups(recipe.model, group, machine.micro_batch // group)
    executor = _executor(recipe, plan, device)
    bf16 = machine.precision == "bf16"
    knn = None
    if recipe.monitor.knn_interval and holdout is None:
        logger.warning("no k-NN: monitor.knn_interval is set, but there are no held-out pictures (data.holdout)")
    elif recipe.monitor.knn_interval and holdout is not None:
        knn = KnnMonitor(recipe.monitor, recipe.data, source, holdout, device, bf16)
    loader = Loader(
        source,
        recipe.data.views,
        sampler=Order(len(source), recipe.seed),
        seed=recipe.seed,
        batch_size=machine.micro_batch,
        device=device,
        augment=recipe.data.augment,
        num_threads=recipe.data.workers_per_gpu,
        prefetch=recipe.data.prefetch,
        bad=BadSamples(recipe.data.max_bad_pct),
    )
    features = FeatureExtractor(source, recipe.data, recipe.monitor.transforms, device, bf16)
    run = Run(recipe, plan, executor, loader, features, knn, folder, log=None, window=Window(), step=0)
    _restore(run, _checkpoint_to_continue(recipe, folder, resume))
    if folder is not None:
        folder.go_back_to(run.step)
        run.log = RunLog(
            folder.path,
            name=config.name,
            values=config.values,
            first_step=run.step,
            total_steps=plan.total_steps,
            steps_per_epoch=plan.steps_per_epoch,
            hooks=recipe.log.hooks,
        )
        stack.callback(run.log.close)
        where = f"from step {run.step}" if run.step else f"{plan.total_steps} steps"
        logger.info("%s: %s, %s, in %s", config.name, where, _devices(plan), folder.path)
    return run


def _devices(plan: Plan) -> str:
    machine = plan.machine
    return f"{plan.world_size} x {machine.device}, {machine.precision}, {machine.micro_batch} samples at once"


def _machine(recipe: Recipe, device: torch.device, folder: RunFolder | None) -> Machine:
    """Rank 0 chooses for all; a resume on as many ranks of the same kind keeps what was chosen then."""
    ranks, on_node = distributed.world_size(), distributed.ranks_on_node()
    machine, error = None, None
    if folder is not None:
        try:
            before = folder.machine_choice(
                f"{device.type} x {ranks}", lambda: asdict(choose_machine(recipe, device, ranks, on_node))
            )
            machine = choose_machine(recipe, device, ranks, on_node, before)
        except (UsageError, RunFailed) as problem:
            error = problem
    machine, error = distributed.broadcast_object((machine, error))
    if error is not None:
        raise error
    return machine


def _executor(recipe: Recipe, plan: Plan, device: torch.device) -> Executor:
    clip = recipe.optimizer.grad_clip
    options: dict[str, Any] = {
        "device": device,
        "precision": plan.machine.precision,
        "accumulation": plan.accumulation,
        "grad_clip": None if clip is None else clip.max_norm,
        "max_skipped_steps": recipe.engine.max_skipped_steps,
        "compile": plan.machine.compile,
    }
    optimizer = recipe.optimizer.create(recipe.model.named_parameters())
    if plan.world_size == 1:
        return LocalExecutor(recipe.model, optimizer, **options)
    from sslrun.runtime.deepspeed_executor import DeepSpeedExecutor

    return DeepSpeedExecutor(recipe.model, optimizer, zero_stage=recipe.engine.zero_stage, **options)


def _checkpoint_to_continue(recipe: Recipe, folder: RunFolder | None, resume: str | None) -> Path | None:
    """The one named by --resume=, else the run's own newest good one, else resume_from; None to start afresh."""
    path, error = None, None
    if folder is not None:
        try:
            if resume:
                path = checkpoint.find(Path(resume))
            elif resume is not None and (own := checkpoint.newest_good(folder.checkpoints)) is not None:
                path = own
            elif recipe.resume_from is not None:
                path = checkpoint.find(Path(recipe.resume_from))
        except UsageError as problem:
            error = problem
    path, error = distributed.broadcast_object((path, error))
    if error is not None:
        raise error
    return path


def _restore(run: Run, path: Path | None) -> None:
    """Continue from a checkpoint, or take weights from load_from, or leave everything as it was built."""
    if path is not None:
        tensors, state = checkpoint.load(path)
        run.executor.load_state(tensors["model"])
        run.executor.load_optimizer_state(tensors["optimizer"])
        run.window.load(state["window"], run.executor.device)
        run.loader.bad.load_state_dict(state["bad_samples"])
        run.step = state["step"]
        logger.info("continuing from %s", path)
    elif run.recipe.load_from is not None:
        weights = checkpoint.load_weights(Path(run.recipe.load_from))
        mismatch = run.executor.load_state(weights, strict=run.recipe.load_strict)
        logger.info("weights from %s; %s", run.recipe.load_from, mismatch or "all of them fit")


def save(run: Run) -> None:
    """Write a checkpoint of the state after `run.step` steps; all ranks call it."""
    run.executor.check()
    tensors = {"model": run.executor.full_state(), "optimizer": run.executor.optimizer_state()}
    bad: dict[str, str] = {}
    for found in distributed.gather_objects(run.loader.bad.state_dict()):
        bad |= found
    state = {"step": run.step, "window": run.window.state(), "bad_samples": bad}
    if run.folder is not None and run.log is not None:
        run.log.sync()
        checkpoint.save(run.folder.checkpoints, run.step, tensors, state)
        checkpoint.prune(run.folder.checkpoints, run.recipe.checkpoint.max_keep_ckpts)


def _cursor(plan: Plan, first_step: int) -> Iterator[tuple[int, np.ndarray]]:
    """What the loader is to make, from a step to the end of the run."""
    for step in range(first_step, plan.total_steps):
        yield from plan.positions(step, distributed.rank())


def _write_row(run: Run, meter: SpeedMeter, rate: float) -> None:
    """One row of metrics, and a look at whether the run has collapsed."""
    means = run.window.read()
    epoch = run.step // run.plan.steps_per_epoch
    if run.log is not None:
        named = {f"train/{name}": value for name, value in means.items() if name != "loss"}
        run.log.write(run.step, {LOSS: means.get("loss", float("nan")), RATE: rate, **named, **meter.read()})
    if "loss" not in means:
        return
    chance = run.recipe.model.chance_loss()
    warning = collapse_warning(means.get("feature_std"), means["loss"], chance, epoch)
    if warning is None:
        return
    if run.recipe.monitor.collapse == "stop":
        raise Diverged(warning)
    if run.log is not None:
        logger.warning("%s", warning)


def _monitor(run: Run, meter: SpeedMeter) -> None:
    """k-NN on the held-out pictures, where it is due: before the first step, every so many epochs, and at the end."""
    is_last = run.step == run.plan.total_steps
    if run.knn is None or not (is_last or run.recipe.monitor.is_due(run.step, run.plan.steps_per_epoch)):
        return
    with meter.pausing():
        top1_pct = run.knn.top1_pct(run.recipe.model.backbone)
    if run.log is not None:
        run.log.write(run.step, {"knn/top1_pct": top1_pct})


def _features(run: Run) -> Tensor:
    """(N, D) features of the whole training source, for clustering methods."""
    return run.features.extract(run.recipe.model.backbone, np.arange(run.plan.num_samples))


def _record_failure(folder: RunFolder | None, error: BaseException) -> None:
    if folder is None:
        return
    code = {UsageError: 2, Diverged: 3, KeyboardInterrupt: 130}.get(type(error), 1)
    folder.record_state("interrupted" if code == 130 else "failed", code, error=str(error))


def _say_goodbye(folder: Path, config: Config, code: int) -> None:
    """Where everything is and what to do next."""
    command = f"bin/sslrun {config.path}"
    if code:
        print(f"stopped and saved in {folder}; continue with: {command} --resume")
        return
    print(f"done: {folder} (metrics.jsonl, log.txt, checkpoints/)")
    accuracies = [row["knn/top1_pct"] for _, row in rows(folder / "metrics.jsonl") if "knn/top1_pct" in row]
    if len(accuracies) > 1:
        print(f"k-NN on held-out pictures: {accuracies[0]:.1f} % before training, {accuracies[-1]:.1f} % after")
    print(f"train longer:       {command} --resume --set epochs=...")
    print("your own pictures:  see README.md, or: bin/sslrun config print " + str(config.path))
