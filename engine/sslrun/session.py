"""Builds a run from its recipe, sets it up at its first step or at the step of a checkpoint, and saves it."""

import contextlib
import functools
import logging
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from sslrun import run_state
from sslrun.advice import advice
from sslrun.allowed_imports import require_allowed
from sslrun.config import Config
from sslrun.config.annotations import describe
from sslrun.config.files import shorten
from sslrun.config.paths import absolute, with_absolute_paths, without_paths
from sslrun.contract import Progress
from sslrun.data.loader import Loader
from sslrun.data.sources import Source
from sslrun.errors import Diverged, RunFailed, UsageError
from sslrun.evaluation.features import FeatureExtractor
from sslrun.evaluation.monitors.monitors import Monitors
from sslrun.initial_weights import load_frozen_weights, load_initial_weights
from sslrun.nn.checkpointing import checkpoint_activations
from sslrun.nn.norm import RunningStatistics, convert_batch_norms
from sslrun.plan import (
    Machine,
    Plan,
    choose_machine,
    cuda_graphs_note,
    device_of,
    make_plan,
    norms_notes,
    require_whole_sync_bn,
    restricted_by_accumulation,
)
from sslrun.preparation import preparation_in_training
from sslrun.randomness import seed_weights
from sslrun.recipe import Recipe
from sslrun.run_parts import make_executor, make_loader, make_monitors
from sslrun.run_state import RunState
from sslrun.runtime import agreement, checkpoint, compilation, distributed, heartbeat, signals
from sslrun.runtime.agreement import require_agreement
from sslrun.runtime.environment import environment
from sslrun.runtime.executor import Executor
from sslrun.runtime.host_copies import HostCopies
from sslrun.runtime.log import RunLog, start_logging
from sslrun.runtime.numerics import fix_cublas_workspaces, set_numerics
from sslrun.runtime.run_files import ENVIRONMENT, MESSAGES
from sslrun.runtime.run_folder import RunFolder, record_loss, set_aside
from sslrun.runtime.safetensors_file import require_storable
from sslrun.runtime.writer import Writer
from sslrun.step_metrics import StepMetrics

logger = logging.getLogger("sslrun")


@dataclass
class Run:
    """The state of a run in one process. Only rank 0 has `folder` and `log`.

    `is_measured`: whether the measurements that are due at `step` were made.
    """

    recipe: Recipe
    plan: Plan
    executor: Executor
    statistics: RunningStatistics
    loader: Loader
    features: FeatureExtractor
    monitors: Monitors
    folder: RunFolder | None
    log: RunLog | None
    step_metrics: StepMetrics
    step: int
    is_measured: bool = False
    writer: Writer = field(default_factory=Writer)
    copies: HostCopies = field(default_factory=HostCopies)

    @cached_property
    def images(self) -> str:
        """`Source.identity` of the training images."""
        return self.loader.source.identity()

    @property
    def progress(self) -> Progress:
        """Where the run stands: before the step `step`."""
        return Progress(self.step, self.plan.total_steps, self.plan.steps_per_epoch, self.recipe.seed)

    @property
    def stop_code(self) -> int:
        """Exit code 1 if the run folder is lost, so that the run must stop; otherwise 0."""
        return int(self.folder is not None and self.folder.lost is not None)

    def write(self, row: Mapping[str, float]) -> None:
        """Writes a row of numbers on rank 0, and looks after the run folder.

        Raises:
            RunFailed: the row cannot be written, or the run folder is gone.
        """
        if self.folder is not None and self.log is not None:
            self.log.write(self.step, row)
            self.folder.look()


def build(config: Config) -> Recipe:
    """Builds the recipe's objects. Initial weights depend only on the seed; torch's BatchNorm layers are converted."""
    seed = config.values.get("seed", Recipe.seed)
    if not 0 <= seed < 2**32:
        raise UsageError(f"{config.path}: seed is {seed}, expected 0 to {2**32 - 1}")
    require_allowed(config, is_for_training=True)
    seed_weights(seed)
    recipe: Recipe = config.build(Recipe)
    convert_batch_norms(recipe.model)
    parts = recipe.engine.checkpoint_activations
    checkpoint_activations(recipe.model.backbone, parts, "engine.checkpoint_activations")
    if recipe.epochs is None and recipe.max_iters is None:
        raise UsageError(f"{config.path}: neither epochs nor max_iters is set; how long should the run be?")
    views = sum(group.num_views for group in recipe.data.views)
    if recipe.model.num_views not in (None, views):
        place = config.origins("data.views")[-1]
        raise UsageError(
            f"{place}: data.views: {views} views of each image (num_views of all groups), but "
            f"{type(recipe.model).__name__} takes {recipe.model.num_views}"
        )
    unmasked = [place for place, group in enumerate(recipe.data.views) if group.mask is None]
    if recipe.model.needs_masks and unmasked:
        name = type(recipe.model).__name__
        raise UsageError(f"{config.path}: {name} predicts hidden patches: data.views.{unmasked[0]} needs a mask")
    for key, monitor in recipe.monitor.monitors().items():
        monitor.check(recipe.model, f"monitor.{key}")
    return recipe


@heartbeat.naming_lost_ranks()
def prepare(
    config: Config, recipe: Recipe, resume: str | None, stack: contextlib.ExitStack, restart: bool = False
) -> Run:
    """Sets a run up, at the step where its loop starts.

    Args:
        config: the config that `recipe` was built from.
        recipe: the recipe's objects.
        resume: None refuses a run folder that holds a run, "" continues from the run's newest good checkpoint, a path
            continues from that checkpoint.
        stack: closes the run folder and the log, and records how the run ended.
        restart: sets a run that the run folder holds aside, and starts from the beginning.
    """
    device = device_of(recipe, distributed.local_rank())
    if recipe.engine.deterministic:
        fix_cublas_workspaces()
    stack.push(distributed.leave)
    distributed.init(device, recipe.engine.timeout_s)
    start_logging(distributed.rank(), level=recipe.log.level)
    require_agreement("recipe", _without_data_paths(config.values))
    require_agreement("installation", agreement.code(recipe.custom_imports))
    source, holdout = recipe.data.open()
    if resume is not None:
        for opened in filter(None, (source, holdout)):
            opened.look_at_all()
    images = {"digest of the names and sizes": source.identity(), "class names": source.class_names}
    require_agreement("set of images", images)
    _check_labels(recipe, source)
    recipe.model.prepare(len(source))
    require_storable(recipe.model.state_dict())
    folder = _open_folder(config, recipe, resume, stack, restart)
    machine = _machine(recipe, device, folder)
    if folder is not None and machine.compile:
        folder.write_json(ENVIRONMENT, environment() | {"compile_cache": compilation.cache_folders()})
    torch.set_num_threads(machine.threads)
    set_numerics(
        device,
        tf32=machine.tf32,
        cudnn_benchmark=machine.cudnn_benchmark,
        deterministic=machine.deterministic,
    )
    plan = make_plan(recipe, len(source), machine, distributed.world_size())
    reading: dict[str, Any] = {"device": device, "augment": recipe.data.augment, "num_threads": machine.workers}
    loader = make_loader(recipe, source, machine.micro_batch, reading, machine.precision)
    bf16 = machine.precision == "bf16"
    features = FeatureExtractor(source, preparation_in_training(recipe), bf16=bf16, **reading)
    monitors = make_monitors(recipe, plan, features, holdout, reading)
    executor = make_executor(recipe, plan, device)
    statistics = RunningStatistics(recipe.model)  # after the executor has moved the model to its device
    step_metrics = StepMetrics(torch.float64 if machine.precision == "fp64" else torch.float32)
    run = Run(recipe, plan, executor, statistics, loader, features, monitors, folder, None, step_metrics, step=0)
    _restore(run, _checkpoint_to_continue(recipe, folder, resume))
    nodes = distributed.nodes()
    if folder is not None:
        folder.go_back_to(run.step)
        folder.record_ranks(run.step, plan.world_size, nodes, device.type)
    distributed.from_rank_0(lambda: _open_log(config, run, stack))
    stack.push(run.writer.leave)
    return run


def save(run: Run) -> None:
    """Saves the state after `run.step` steps; all ranks call it.

    The state is copied to the memory of rank 0's host, which takes as many bytes as the checkpoint has. A thread then
    writes the copy while training goes on. It has written it when `run.writer.wait()` comes back; that, or the next
    save, raises RunFailed if it could not. A save waits for the one before. If the memory for a copy cannot be had, the
    checkpoint is written before this function returns.
    """
    run.executor.check()
    run.writer.wait()
    run.copies.begin()
    tensors = {
        "model": run.executor.full_state(run.copies),
        "optimizer": run.executor.optimizer_state(run.copies),
    }
    are_copies = run.copies.finish()
    bad: dict[str, str] = {}
    for bad_of_rank in distributed.gather_objects(run.loader.bad.state_dict()):
        bad |= bad_of_rank
    state = RunState(
        run.step, run.plan.num_samples, run.step_metrics.state(), bad, images=run.images, is_measured=run.is_measured
    )
    if run.folder is not None and run.log is not None:
        run.folder.look()
        keep = run.recipe.checkpoint.max_keep_ckpts
        run.writer.start(functools.partial(_write, run.log, run.folder.checkpoints, tensors, state, keep))
        if not are_copies:
            logger.warning("no memory for a copy of the state: training waits until the checkpoint is written")
            run.writer.wait()


def _write(log: RunLog, checkpoints: Path, tensors: checkpoint.Tensors, state: RunState, keep: int) -> None:
    """Writes a checkpoint after the rows that belong to it, and deletes the oldest."""
    log.sync()
    run_state.save(checkpoints, tensors, state)
    checkpoint.prune(checkpoints, keep)


def _without_data_paths(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the folders of the images, which may differ on each machine."""
    return values | {"data": without_paths(values, describe(Recipe)).get("data")}


def _check_labels(recipe: Recipe, source: Source) -> None:
    """Raises UsageError if the method learns from labels, and the source has none or more classes than the method."""
    classes = recipe.model.num_classes
    if classes is None:
        return
    name = type(recipe.model).__name__
    if source.labels is None:
        raise UsageError(f"{name} learns from labels, but {source!r} has none: set data.source to one that has some")
    if source.labels.max() >= classes:
        raise UsageError(f"model.num_classes is {classes}, but {source!r} has labels up to {source.labels.max()}")


def _open_folder(
    config: Config, recipe: Recipe, resume: str | None, stack: contextlib.ExitStack, restart: bool
) -> RunFolder | None:
    """Opens and locks rank 0's run folder; an error that ends the run will be recorded in it."""
    opened: list[RunFolder] = []

    def open_it() -> tuple[Path, dict[str, Any]]:
        path = Path(shorten(Path(absolute(recipe.work_dir)) / config.name))
        if restart:
            set_aside(path)
        schema = describe(Recipe)
        folder = RunFolder(path, config.values, resume, lambda old: with_absolute_paths(old, schema))
        opened.append(stack.enter_context(folder))
        stack.push(record)
        signals.record_by(record_stop)
        start_logging(0, folder.path / MESSAGES, recipe.log.level)
        folder.write_json(ENVIRONMENT, environment())
        return folder.path, folder.state()

    def record_stop(code: int) -> None:
        if opened[0].lost is not None:
            raise RunFailed(opened[0].lost)
        opened[0].record_state("pre-empted" if code == signals.PREEMPTED else "interrupted", code)

    def record(kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, signals.Stopped):
            record_stop(error.exit_code)
        elif error is not None:
            code = _exit_code(error)
            opened[0].record_state("interrupted" if code == 130 else "failed", code, error=str(error))

    path, begun = distributed.from_rank_0(open_it)
    heartbeat.on_loss(
        (lambda error: opened[0].record_state("failed", 1, error=error))
        if opened
        else functools.partial(record_loss, path, begun)
    )
    return opened[0] if opened else None


def _exit_code(error: BaseException) -> int:
    """Exit code of a run that an error ends."""
    if isinstance(error, signals.Stopped):
        return error.exit_code
    return {UsageError: 2, Diverged: 3, KeyboardInterrupt: 130}.get(type(error), 1)


def _machine(recipe: Recipe, device: torch.device, folder: RunFolder | None) -> Machine:
    """Rank 0's choices for all ranks; a resume on the same number and kind of devices reuses the run's choices."""
    ranks, on_node = distributed.world_size(), distributed.ranks_on_node()

    def choose() -> Machine:
        assert folder is not None
        name = f"{device.type} x {ranks}"
        machine = choose_machine(recipe, device, ranks, on_node, folder.machine_choice(name))
        require_whole_sync_bn(recipe, machine.micro_batch, ranks)
        folder.record_machine_choice(name, asdict(machine))
        return machine

    return distributed.from_rank_0(choose)


def _checkpoint_to_continue(recipe: Recipe, folder: RunFolder | None, resume: str | None) -> Path | None:
    """The checkpoint of --resume=PATH, else the run's newest good one, else resume_from; None for a new start."""

    def choose() -> Path | None:
        assert folder is not None
        if resume:
            return checkpoint.find(Path(absolute(resume)))
        if folder.newest is None and recipe.resume_from is not None:
            return checkpoint.find(Path(recipe.resume_from))
        return folder.newest

    return distributed.from_rank_0(choose)


def _restore(run: Run, path: Path | None) -> None:
    """Loads a checkpoint, or else the weights of load_from, if there are any."""
    if path is not None:
        if distributed.rank() > 0 and not path.exists():
            raise UsageError(f"{path} is not on {socket.gethostname()}: work_dir must be on storage of all machines")
        tensors, state = run_state.load(path)
        if state.num_samples != run.plan.num_samples:
            raise UsageError(
                f"{path} was trained on {state.num_samples} samples, but data.source has {run.plan.num_samples}: "
                "the order of samples would differ; start a new run in another --work-dir with load_from"
            )
        if state.images not in (None, run.images) and run.folder is not None:
            logger.warning(
                "images of data.source have other names, sizes or lengths than at %s: the run goes on, but not exactly "
                "as it would have with the same images",
                path,
            )
        try:
            run.executor.load_state(tensors["model"])
            run.executor.load_optimizer_state(tensors["optimizer"])
        except UsageError as error:
            raise UsageError(f"{path} is of another model or optimizer than the recipe's: {error}") from None
        run.step_metrics.load(state.step_metrics, run.executor.device)
        run.loader.bad.load_state_dict(state.bad_samples)
        run.step, run.is_measured = state.step, state.is_measured
        logger.info("continuing from %s", path)
        return
    for place, file in run.recipe.model.frozen_weights().items():
        load_frozen_weights(run.executor, place, Path(file))
    if run.recipe.load_from is not None:
        load_initial_weights(run.executor, Path(run.recipe.load_from), run.recipe.load_strict, run.progress)


def _open_log(config: Config, run: Run, stack: contextlib.ExitStack) -> None:
    """Opens the log on rank 0, and says what kind of run begins."""
    plan, machine, folder = run.plan, run.plan.machine, run.folder
    assert folder is not None
    log = run.log = RunLog(
        folder.path,
        name=config.name,
        values=config.values,
        first_step=run.step,
        total_steps=plan.total_steps,
        steps_per_epoch=plan.steps_per_epoch,
        hooks=run.recipe.log.all_hooks(),
    )

    def close(kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        log.close((folder.exit_code or 0) if error is None else _exit_code(error))

    stack.push(close)
    folder.hold(folder.metrics, log.descriptor)
    if run.step >= plan.total_steps:
        logger.info("nothing is left to do: %d of %d steps are done", run.step, plan.total_steps)
        return
    logger.info(
        "%s: %s of %d steps on %d x %s (%s, %d samples at once), in %s",
        config.name,
        f"from step {run.step}" if run.step else "all",
        plan.total_steps,
        plan.world_size,
        machine.device,
        machine.precision,
        machine.micro_batch,
        folder.path,
    )
    restricted, no_graphs = restricted_by_accumulation(run.recipe, plan), cuda_graphs_note(run.recipe, plan)
    if restricted is not None:
        logger.warning("accumulation changes what the recipe computes: %s", restricted)
    notes = [None if no_graphs is None else f"CUDA graphs are {no_graphs}", *norms_notes(run.recipe)]
    for note in notes:
        if note is not None:
            logger.info("%s", note)
    for line in advice(run.recipe, plan):
        logger.info("advice: %s", line)
