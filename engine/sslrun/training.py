"""The training loop and the optimizer step. `session.py` sets up and saves runs."""

import contextlib
import functools
import gc
import itertools
import logging
import math
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslrun.advice import advice
from sslrun.config import Config
from sslrun.contract import Batch, Loss, Method, Progress
from sslrun.data.loader import BatchStream
from sslrun.data.order import Balanced, Order
from sslrun.data.pictures import sheet
from sslrun.errors import Diverged, UsageError
from sslrun.evaluation.collapse import collapse_warning, guessing_warning, prototype_warning
from sslrun.gradient_cache import compared
from sslrun.nn.norm import RunningStatistics
from sslrun.number_format import after, percent
from sslrun.optim import learning_rates, weight_decays
from sslrun.plan import Plan, choose_machine, describe, device_of, make_plan
from sslrun.randomness import Phase
from sslrun.recipe import Recipe
from sslrun.runtime import compilation, distributed, heartbeat
from sslrun.runtime.executor import Executor
from sslrun.runtime.log import SpeedMeter
from sslrun.runtime.metrics import of_a_step
from sslrun.runtime.profile import profiled
from sslrun.runtime.run_files import CHECKPOINTS, KNN, LOSS, MESSAGES, METRICS, RATE, is_number, rows
from sslrun.runtime.safetensors_file import require_storable
from sslrun.runtime.signals import Stopped, StopSignals
from sslrun.runtime.writer import Writer
from sslrun.session import Run, build, prepare, save
from sslrun.started import program

logger = logging.getLogger("sslrun")

TORN = 1000  # above all exit codes: added to a vote, it says that a step was queued that cannot be computed
GC_INTERVAL = 500  # steps between two garbage collections, at the same steps on all ranks


def run(config: Config, resume: str | None, command: str | None, restart: bool = False, profile: int = 0) -> int:
    """Trains a recipe; returns the exit code.

    Args:
        config: the recipe.
        resume: None refuses a run folder that holds a run, "" continues from the run's newest good checkpoint, a path
            continues from that checkpoint.
        command: the user's command line without --resume, for the advice printed at the end; None for no advice.
        restart: sets a run that the run folder holds aside, and starts from the beginning.
        profile: number of steps whose time is to be analyzed (`runtime/profile.py`); 0 for none.
    """
    recipe = build(config)
    config = config.with_absolute_paths(Recipe)
    try:
        with StopSignals() as signals, contextlib.ExitStack() as stack:
            signals.has_nothing_to_save, signals.raises = True, distributed.world_size() == 1
            signals.last_words.append(lambda code: _say_that_nothing_is_saved(command))
            with config.naming_places():
                state = prepare(config, recipe, resume, stack, restart)
            folder = None if state.folder is None else state.folder.path
            with profiled(profile, folder, state.executor.device, state.plan.global_batch):
                code = _loop(state, signals)
            if state.folder is not None:
                state.folder.record_end(code)
    except Stopped as stopped:
        _say_that_nothing_is_saved(command)
        return stopped.exit_code
    if state.folder is not None and command is not None:
        _print_advice(state.folder.path, config, command, code)
    return code


def dry_run(config: Config) -> str:
    """The text of `--dry-run`: the plan of a run. It writes nothing, and needs neither the data nor the hardware of the
    run."""
    recipe = _build_without_memory(config)
    device = device_of(recipe, 0)
    recipe.data.make_nothing()
    try:
        source, _ = recipe.data.open()
        num_samples, note = len(source), "; ".join([repr(source), *recipe.data.source.remarks])
    except UsageError as error:
        nominal = recipe.data.nominal_size
        if nominal is None:
            raise
        num_samples, note = nominal, f"as published; {error}"
    recipe.model.prepare(num_samples)
    require_storable(recipe.model.state_dict())
    with config.naming_places():
        machine = choose_machine(recipe, device, distributed.world_size(), distributed.ranks_on_node())
        plan = make_plan(recipe, num_samples, machine, distributed.world_size())
    (epoch, positions), *_ = plan.positions(0, 0)
    ids = Order(num_samples, recipe.seed).ids(epoch, positions[:4])
    lines = [f"{'advice':<13}{line}" for line in advice(recipe, plan)]
    return "\n".join([config.name, describe(recipe, plan, ids.tolist(), note), *lines])


def _build_without_memory(config: Config) -> Recipe:
    """As `build`, but weights and queues have sizes only; a model that computes with them at once is built as it is."""
    try:
        with torch.device("meta"):
            recipe = build(config)
        largest = max((tensor.nbytes for tensor in recipe.model.state_dict().values()), default=0)
        torch.empty(largest, dtype=torch.uint8)  # what is never touched takes no memory, unless there cannot be as much
        return recipe
    except (UsageError, RuntimeError):  # a fault of the recipe comes again, with its place
        return build(config)


def train_step(
    executor: Executor,
    method: Method,
    statistics: RunningStatistics,
    batches: list[Batch],
    progress: Progress,
    rates: list[float | None],
    decays: list[float] | None = None,
) -> tuple[dict[str, Tensor], bool]:
    """One optimizer step on this rank's micro-batches.

    Returns:
        Metrics on the device (`runtime.metrics.of_a_step`); and whether the step was applied (True also while the host
        does not know, see `StepOutcome`).
    """
    heartbeat.at("targets", progress.step + 1)
    targets = executor.targets(batches, progress)
    if executor.caches_gradients:
        losses = [compared(executor, statistics, batches, progress)]
    else:
        losses = [
            _accumulated(executor, batch, progress, target) for batch, target in zip(batches, targets, strict=True)
        ]
    heartbeat.at("update")
    outcome = executor.step(rates, decays)
    applied = outcome.applied is not False
    heartbeat.at("momentum")
    if applied:
        following = replace(progress, step=progress.step + 1)  # the update after step t uses the schedule at t + 1
        statistics.commit()
        executor.seed(progress, Phase.UPDATE)
        executor.rewrite(method.rewrites(following))
        executor.update_teachers(method.teachers(following))
        method.after_step(following, joined([loss.carry for loss in losses]))
    else:
        statistics.discard()
    return {**of_a_step(losses), "grad_norm": outcome.grad_norm}, applied


def _accumulated(executor: Executor, batch: Batch, progress: Progress, target: Any) -> Loss:
    """The loss of a micro-batch, whose gradient is added."""
    heartbeat.at("forward")
    loss = executor.forward(batch, progress, target)
    heartbeat.at("backward")
    executor.backward(loss.value)
    return replace(loss, value=loss.value.detach())


def joined(carries: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The carries of all micro-batches of all ranks, in the order of the global batch."""
    return {name: distributed.all_gather_rows(torch.cat([carry[name] for carry in carries])) for name in carries[0]}


@heartbeat.naming_lost_ranks()
def _loop(run: Run, signals: StopSignals) -> int:
    """Trains from `run.step` to the end, or until a signal stops the run; returns the exit code.

    Raises:
        Stopped: a signal stopped the run, and there is nothing to save: no step was done.
    """
    plan, recipe, executor, method = run.plan, run.recipe, run.executor, run.recipe.model
    is_compiling = plan.machine.compile and run.step < plan.total_steps
    if is_compiling:
        logger.info("compiling the networks; %s", compilation.where_code_is_kept())
    meter = SpeedMeter(executor.device)
    vote = distributed.Vote(executor.device)
    stream = None
    gc.collect()
    gc.disable()
    try:
        if not run.is_measured and not _has_measurements(run):
            _monitor(run, meter, signals)
        while run.step < plan.total_steps:
            progress = run.progress
            heartbeat.at("before the step", run.step + 1)
            run.writer.check()
            if run.step % plan.steps_per_epoch == 0:
                executor.seed(progress, Phase.EPOCH)
                with meter.pausing():
                    with signals.listening():
                        rewrites = method.before_epoch(progress, functools.partial(_features, run)) or []
                    executor.rewrite(rewrites)
            if stream is None or (run.step % plan.steps_per_epoch == 0 and method.draws_clusters):
                stream = _stream(run, stream)
            heartbeat.at("reading images")
            with meter.waiting():
                batches = _taken(stream, plan.accumulation)
            _stop_if_agreed(vote, signals, bool(batches), run.writer, run.stop_code)
            if run.log is not None and run.log.wants_images:
                run.log.images(run.step, sheet(batches[0], recipe.data.views))
            groups = executor.optimizer.param_groups
            rates, decays = learning_rates(groups, recipe.lr, progress), weight_decays(groups, progress)
            metrics, applied = train_step(executor, method, run.statistics, batches, progress, rates, decays)
            heartbeat.at("logging")
            run.step += 1
            signals.has_nothing_to_save = False
            if is_compiling:
                logger.info("compiled: %s", compilation.what_it_took())
                is_compiling = False
            if applied:
                run.step_metrics.add(metrics)
            else:
                logger.warning("step %d was skipped: its loss or gradient was not finite", run.step)
            meter.count(plan.global_batch)
            if run.log is not None:
                run.log.tick(run.step)
            if run.step % recipe.log.interval == 0 or run.step == plan.total_steps:
                base = recipe.optimizer.lr
                rate = recipe.lr.value(base, progress.step, progress.steps_per_epoch, progress.total_steps)
                _write_row(run, meter, rate)
            _monitor(run, meter, signals)
            if run.step == plan.total_steps or recipe.checkpoint.is_due(run.step, plan.steps_per_epoch):
                heartbeat.at("saving")
                with meter.pausing():
                    save(run)
            if run.step % GC_INTERVAL == 0:
                gc.collect()
        heartbeat.at("saving")
        run.writer.wait()
        return 0
    except Stopped as stopped:
        if signals.has_nothing_to_save:
            raise
        heartbeat.at("saving")
        save(run)
        run.writer.wait()
        return stopped.exit_code
    except RuntimeError as error:
        if executor.cuda_graphs:
            compilation.note_the_switch(error)
        raise
    finally:
        gc.enable()
        if stream is not None:
            stream.close()


def _taken(stream: BatchStream, count: int) -> list[Batch]:
    """The next batches; none if they do not come and the run was asked to stop."""
    try:
        return list(itertools.islice(stream, count))
    except Stopped:
        return []


def _stop_if_agreed(
    vote: distributed.Vote, signals: StopSignals, has_data: bool, writer: Writer, stop_code: int = 0
) -> None:
    """Raises Stopped on all ranks before the same step if one of them was asked to stop (a rank without data was), or
    has another reason, `stop_code`.

    On CUDA with several ranks the vote is read one step late, when the others have queued the step whose data one rank
    waits for. They cannot take it back, so such a run leaves without saving, to be resumed from its last checkpoint.
    """
    is_torn = vote.is_late and not has_data
    code = vote.cast((signals.exit_code or stop_code) + TORN * is_torn)
    if is_torn or code > TORN:
        writer.wait()  # from now on the signal may end the process
        signals.has_nothing_to_save = True
    if code or is_torn:
        raise Stopped(code % TORN or signals.exit_code)


def _stream(run: Run, previous: BatchStream | None) -> BatchStream:
    """Batches from the run's step to the end of the run, or to the end of the epoch if the method draws clusters."""
    if previous is not None:
        previous.close()
    plan, last, method = run.plan, run.plan.total_steps, run.recipe.model
    if method.draws_clusters:
        run.loader.sampler = Balanced(method.sampling_labels().cpu().numpy(), run.recipe.seed)
        last = min(last, (run.step // plan.steps_per_epoch + 1) * plan.steps_per_epoch)
    return run.loader.run(_cursor(plan, run.step, last))


def _cursor(plan: Plan, first_step: int, last_step: int) -> Iterator[tuple[int, np.ndarray]]:
    """(epoch, positions) of this rank's micro-batches for steps first_step to last_step - 1."""
    for step in range(first_step, last_step):
        yield from plan.positions(step, distributed.rank())


def _write_row(run: Run, meter: SpeedMeter, rate: float) -> None:
    """Writes one row of metrics, and checks whether the run has collapsed."""
    means = run.step_metrics.read()
    loss, chance = means.pop("loss", math.nan), run.recipe.model.chance_loss()
    if run.log is not None:
        row = {LOSS: loss, RATE: rate, **{f"train/{name}": value for name, value in means.items()}}
        for _, _, momentum in run.recipe.model.teachers(run.progress)[:1]:  # all teachers of a method have one momentum
            row["train/momentum"] = momentum
        if chance is not None:
            row["train/loss_of_chance"] = loss / chance
        if run.plan.machine.compile:
            row |= {"compile/graphs": compilation.num_graphs(), "compile/total_s": round(compilation.compile_s(), 2)}
        run.write({**row, **meter.read()})
    epoch = run.step // run.plan.steps_per_epoch
    collapsed = collapse_warning(means.get("feature_std"), epoch)
    if collapsed is not None and run.recipe.monitor.collapse == "stop":
        raise Diverged(collapsed)
    terms = means if chance is None else {**means, "loss_of_chance": loss / chance}
    warning = collapsed or prototype_warning(terms, epoch) or guessing_warning(loss, chance, epoch)
    if warning is not None and run.log is not None:
        logger.warning("%s", warning)


def _has_measurements(run: Run) -> bool:
    """Whether a row of measurements at this step is there."""

    def has_row() -> bool:
        assert run.folder is not None
        return any(row.get("step") == run.step and LOSS not in row for row in run.folder.rows())

    return distributed.from_rank_0(has_row)


def _monitor(run: Run, meter: SpeedMeter, signals: StopSignals) -> None:
    """Writes a row of the measurements that are due: before the first step, at their intervals, and at the end."""
    run.is_measured = False
    heartbeat.at("measuring")
    with meter.pausing(), signals.listening():
        measured = run.monitors.measure(run.executor, run.progress)
    if measured:
        run.write(measured)
    run.is_measured = True


def _features(run: Run, module: torch.nn.Module) -> Tensor:
    """(n, D) outputs of a module for this rank's share of the training source, for clustering methods."""
    return run.features.extract_share(module, np.arange(run.plan.num_samples))


def _say_that_nothing_is_saved(command: str | None) -> None:
    if distributed.rank() == 0 and command is not None:
        print(f"stopped with nothing new to save; start again with: {command} --resume")


def _print_advice(folder: Path, config: Config, command: str, code: int) -> None:
    """Prints where the results are and what to do next."""
    if code:
        print(f"stopped and saved in {folder}; continue with: {command} --resume")
        return
    print(f"done: {folder} ({METRICS}, {MESSAGES}, {CHECKPOINTS}/)")
    measured = [row for _, row in rows(folder / METRICS) if is_number(row.get(KNN)) and is_number(row.get("epoch"))]
    if len(measured) > 1:
        first, last = (f"{percent(row[KNN])} {after(row['epoch'])}" for row in (measured[0], measured[-1]))
        print(f"k-NN on held-out images: {first}, {last}")
    imports = "".join(f" --allow-imports {module}" for module in config.values.get("custom_imports", ()))
    print(f"look at it:         {program()} report {shlex.quote(str(folder))}{imports}")
    length = "epochs" if config.values.get("max_iters") is None else "max_iters"
    print(f"train longer:       {_without(command, length)} --resume --set {length}=...")
    print(f"your own images:    {program()} init DIR")


def _without(command: str, key: str) -> str:
    """A command line without the `--set` of a key."""
    words = shlex.split(command)
    is_set = [word.startswith(f"--set={key}=") for word in words]
    for place, (word, value) in enumerate(itertools.pairwise(words)):
        if word == "--set" and value.startswith(f"{key}="):
            is_set[place] = is_set[place + 1] = True
    return shlex.join(word for word, drop in zip(words, is_set, strict=True) if not drop)
