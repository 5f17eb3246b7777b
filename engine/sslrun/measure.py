"""`sslrun eval`: measures a trained encoder, and stores the results with all settings in the run folder."""

import contextlib
import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sslrun.config.merge import nearest
from sslrun.data.classes import matched, num_left_out
from sslrun.data.sources import Source
from sslrun.errors import UsageError
from sslrun.evaluation.evaluation import Evaluation
from sslrun.evaluation.frozen_encoder import FrozenEncoder, labels
from sslrun.evaluation.partial_result import PartialResult, digest
from sslrun.plan import cores_of_a_rank, device_of, precision_of
from sslrun.preparation import preparation_of
from sslrun.recipe import Recipe
from sslrun.runtime import distributed, heartbeat
from sslrun.runtime.durable import replace_or_fail
from sslrun.runtime.environment import environment
from sslrun.runtime.log import start_logging
from sslrun.runtime.signals import Stopped
from sslrun.saved import Saved

logger = logging.getLogger("sslrun")

Results = dict[str, Any]


def evaluation_of(saved: Saved, kind: str) -> Evaluation:
    """The evaluation that `sslrun eval KIND` runs. Raises UsageError if the recipe has none of this name."""
    known = saved.recipe.eval.evaluations()
    if kind not in known:
        near = nearest(kind, list(known)) or f"; {saved.name} has {', '.join(known)}; [eval.extra.{kind}] adds one"
        raise UsageError(f"there is no evaluation called {kind!r}{near}")
    return known[kind]


@heartbeat.naming_lost_ranks()
def evaluate(
    kind: str, evaluation: Evaluation, saved: Saved, command: str, directory: Path
) -> tuple[int, Results, Path]:
    """Measures an encoder; all ranks of a launcher call it and share the work.

    Args:
        kind: name of the evaluation.
        evaluation: the evaluation to run.
        saved: the encoder.
        command: the user's command line.
        directory: folder of the result's file.

    Returns:
        The exit code; the results, empty unless the code is 0; and the file with the results, the settings, the data
        and the environment, or, after a stop signal, the file with the partial result.

    Raises:
        UsageError: there are no images to measure on.
        RunFailed: the file could not be written.
    """
    recipe = saved.recipe
    device = device_of(recipe, distributed.local_rank())
    distributed.init(device, recipe.engine.timeout_s)
    with contextlib.ExitStack() as stack:
        stack.push(distributed.leave)
        start_logging(distributed.rank(), level=recipe.log.level)
        encoder = frozen_encoder(saved, device)
        begin = time.perf_counter()
        path = directory / f"{name_of(kind, saved)}.json"
        partial_result = PartialResult(path.with_suffix(".part.safetensors"), lambda: _identity(saved, encoder))
        try:
            results = evaluation.run(encoder, partial_result)
        except Stopped as stopped:
            return stopped.exit_code, {}, partial_result.path
        wall_s = time.perf_counter() - begin
        details = {"data": described(encoder.train, encoder.test), "wall_s": round(wall_s, 2)}
        distributed.from_rank_0(lambda: keep(path, kind, saved, command, details, results))
        partial_result.remove()
    return 0, results, path


def keep(path: Path, kind: str, saved: Saved, command: str, details: Results, results: Results) -> None:
    """Writes the results of an evaluation, with the encoder, the settings and the environment.

    Raises:
        RunFailed: the file could not be written.
    """
    record = {
        "kind": kind,
        "name": saved.name,
        "weights": str(saved.weights if saved.folder is None else saved.weights.relative_to(saved.folder)),
        "step": saved.step,
        "epoch": saved.epoch,
        "command": command,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "config": saved.config.values,
        "ranks": distributed.world_size(),
        **details,
        "environment": environment(),
        "results": results,
    }
    replace_or_fail(path, (json.dumps(record, indent=1, default=str) + "\n").encode(), makes_folder=True)


def frozen_encoder(saved: Saved, device: torch.device) -> FrozenEncoder:
    """A saved encoder on the device, with the opened sources of the images to measure it on."""
    recipe: Recipe = saved.recipe
    cores = cores_of_a_rank(distributed.ranks_on_node())
    torch.set_num_threads(recipe.engine.threads or cores)
    train, test = sources(recipe)
    if test is not None and test is not train:
        test = matched(train, test)
    return FrozenEncoder(
        backbone=saved.backbone.to(device),
        train=train,
        test=test,
        transforms=preparation_of(recipe),
        views=recipe.data.views,
        device=device,
        bf16=precision_of(recipe, device) == "bf16",
        augment=recipe.data.augment,
        num_threads=min(recipe.data.workers_per_gpu, cores),
        seed=recipe.seed,
    )


def sources(recipe: Recipe) -> tuple[Source, Source | None]:
    """The opened sources of the images that classifiers learn from, and of those that are classified (None if there are
    none): eval.train and eval.test, else the training and held-out images of the run."""
    train, test = recipe.eval.train, recipe.eval.test
    for key, source in (("eval.train", train), ("eval.test", test)):
        if source is not None:
            source.open(key)
    if train is None or test is None:
        own_train, own_test = recipe.data.open()
        train, test = own_train if train is None else train, own_test if test is None else test
    return train, test


def described(train: Source, test: Source | None) -> dict[str, Any]:
    """A description of an evaluation's images, for the file of its results."""
    data: dict[str, Any] = {}
    for key, source in (("train", train), ("test", test)):
        if source is not None:
            data |= {key: repr(source), f"{key}_samples": len(source)}
            if source.labels is not None:
                data[f"{key}_classes"] = len(np.unique(source.labels))
    if test is not None and num_left_out(test):
        data["test_left_out"] = num_left_out(test)
    return data


def _identity(saved: Saved, encoder: FrozenEncoder) -> str:
    """A digest of settings, encoder weights and labels, which must be equal to continue an evaluation."""
    train, test = encoder.labeled()
    tensors = {**encoder.backbone.state_dict(), "train": labels(train), "test": labels(test)}
    return digest(json.dumps([saved.config.values, encoder.bf16], default=str), tensors)


def name_of(kind: str, saved: Saved) -> str:
    """The name of a result's file. It depends on the settings, so that only a repeated evaluation replaces a file."""
    values = saved.config.values
    tables = [values.get(key) for key in ("eval", "data", "monitor")]
    settings = json.dumps([saved.weights.name, *tables, saved.recipe.engine.precision], default=str)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
    origin = saved.weights.stem if saved.step is None else f"step_{saved.step:08d}"
    return f"{kind}_{origin}_{digest}"
