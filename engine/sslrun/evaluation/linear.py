"""Linear classification of frozen features.

The encoder is frozen and in evaluation mode. Features are those of the whole image: a ResNet's last stage averaged over
positions, a ViT's class token. A grid of settings is trained in one pass, see `linear_heads`. The reported setting is
chosen on training images that are held out for validation, never on test images.
"""

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sslrun.config.paths import FilePath
from sslrun.data.order import Order
from sslrun.data.sources import Source
from sslrun.data.sources.subset import split_holdout
from sslrun.data.transforms import Transform
from sslrun.data.views import ViewGroup
from sslrun.errors import RunFailed, UsageError
from sslrun.evaluation.evaluation import Evaluation
from sslrun.evaluation.feature_cache import FeatureCache, Normalization
from sslrun.evaluation.features import BATCH, evaluating, pooled
from sslrun.evaluation.frozen_encoder import FrozenEncoder, labels
from sslrun.evaluation.linear_heads import Heads, Scores, Setting
from sslrun.evaluation.partial_result import PartialResult
from sslrun.number_format import number, percent
from sslrun.optim import Optimizer, Schedule
from sslrun.optim.optimizers import LARS, SGD
from sslrun.optim.policies import CosineAnnealing
from sslrun.runtime import distributed
from sslrun.runtime.signals import Stopped, StopSignals
from sslrun.scheduled import Number, Scheduled

logger = logging.getLogger(__name__)

# For standardized features; the best learning rate falls with the number of features and with their correlation.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
DECAYS = (0.0, 1e-4, 1e-3, 1e-2)

REPORT_S = 30.0  # seconds between two lines of progress

Examples = Generator[tuple[Tensor, Tensor], None, None]


@dataclass(frozen=True, kw_only=True)
class LinearGrid:
    """The settings that are trained together: every learning rate with every weight decay.

    Attributes:
        lr: learning rates to try; by default that of the optimizer.
        weight_decay: weight decays to try; by default that of the optimizer.
    """

    lr: list[float] | None = None
    weight_decay: list[float] | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            values = getattr(self, name)
            if values is not None and (not values or min(values) < 0 or len(set(values)) < len(values)):
                raise UsageError(f"{name} must list different numbers, none below 0, not {values}")


@dataclass(frozen=True, kw_only=True)
class Linear(Evaluation):
    """Trains a linear classifier on frozen features, with a grid of settings or a published protocol.

    A grid is trained in one pass. The best setting is chosen on training images that are held out for validation, never
    on test images.

    Attributes:
        transforms: transforms of the training images; features are then extracted again in every epoch. By default
            training images are prepared like test images, and features are extracted once.
        optimizer: SGD or LARS, without paramwise and grad_clip; biases do not decay. By default SGD with momentum 0.9
            and a grid of 10 learning rates and 4 weight decays.
        grid: settings to try together, instead of the single setting of the optimizer.
        lr: learning-rate schedule of all settings.
        epochs: passes over the training images.
        global_batch: images per optimizer step over all ranks; the last batch is filled up with the epoch's first
            images.
        norm: normalization of the features: "standardize" uses mean and standard deviation of all training features,
            "batch" is BatchNorm without scale and shift, "none" is no normalization; "auto" is "standardize" if
            features are extracted once, else "none".
        validation: share of the training images that is held out to choose between the settings of a grid.
        cache_gib: memory per process, in GiB, for features that are extracted once. Features that do not fit are stored
            as fp16, and if these do not fit either, in a file.
        cache_dir: folder of the file for features that do not fit in memory; by default the system's folder for
            temporary files.
    """

    transforms: list[Transform] | None = None
    optimizer: Optimizer | None = None
    grid: LinearGrid = field(default_factory=LinearGrid)
    lr: Schedule = field(default_factory=lambda: CosineAnnealing(by="iter"))
    epochs: int = 100
    global_batch: int = 256
    norm: Literal["auto", "none", "batch", "standardize"] = "auto"
    validation: float = 0.1
    cache_gib: float = 16.0
    cache_dir: FilePath | None = None

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("global_batch", 2 if self.norm == "batch" else 1), ("cache_gib", 0)):
            if not getattr(self, name) >= least:
                raise UsageError(f"eval.linear.{name} must be at least {least}, not {getattr(self, name)}")
        if not 0 < self.validation < 1:
            raise UsageError(f"eval.linear.validation must be above 0 and below 1, not {self.validation}")
        has_groups = self.rule.paramwise or self.rule.layer_decay != 1
        if not isinstance(self.rule, SGD | LARS) or has_groups or self.rule.grad_clip:
            raise UsageError("eval.linear.optimizer must be SGD or LARS, without paramwise and grad_clip")
        if self.norm == "standardize" and self.is_fresh:
            raise UsageError('eval.linear.norm = "standardize" needs features that are extracted once: use "batch"')

    @property
    def is_fresh(self) -> bool:
        """Whether features are extracted again in every epoch."""
        return self.transforms is not None

    @property
    def rule(self) -> Optimizer:
        """The optimizer whose options all settings share."""
        return self.optimizer or SGD(lr=RATES[0], momentum=0.9)

    @property
    def settings(self) -> list[Setting]:
        """The settings to train, smallest learning rate first."""
        own = self.optimizer
        rates = self.grid.lr or (RATES if own is None else [own.lr])
        decays = self.grid.weight_decay or (DECAYS if own is None else [_plain(own.weight_decay)])
        return [Setting(rate, decay) for rate, decay in itertools.product(sorted(rates), sorted(decays))]

    def run(self, encoder: FrozenEncoder, partial_result: PartialResult | None = None) -> dict[str, Any]:
        """Trains and tests linear classifiers.

        Validation images decide between several settings (`_best`). If features are extracted once, the chosen
        classifier is then trained again on all training images.

        Args:
            encoder: the encoder, which is not changed, and its images.
            partial_result: the saved state of a training that extracts features in every epoch. Such a training saves
                its state when the process receives a stop signal, and continues from it.

        Raises:
            UsageError: there are too few images, or they have no labels.
            RunFailed: the classifier, or the encoder's features, are not finite; the state could not be written.
            Stopped: the process received a stop signal, and the state is saved.
        """
        ranks = distributed.world_size()
        for key, source in zip(("eval.train", "eval.test"), encoder.labeled(), strict=True):
            if len(source) < max(2, ranks):
                raise UsageError(f"{source!r} has {len(source)} images, too few: set {key} to a source with more")
        if self.transforms is not None:
            learning, testing = (ViewGroup(transforms=each).normalize for each in (self.transforms, encoder.transforms))
            if (learning.mean, learning.std) != (testing.mean, testing.std):
                raise UsageError("eval.transforms and eval.linear.transforms normalize differently (Normalize)")
        if self.global_batch < ranks:
            raise UsageError(
                f"eval.linear.global_batch is {self.global_batch}, expected {ranks}, one per process, or more"
            )
        with evaluating(encoder.backbone):
            return _Training(self, encoder, partial_result if self.is_fresh else None).run()


class _Training:
    """One call of `Linear.run`, with the same arguments."""

    def __init__(self, config: Linear, encoder: FrozenEncoder, partial_result: PartialResult | None) -> None:
        self.config, self.encoder, self.partial_result = config, encoder, partial_result
        train, test = encoder.labeled()
        self.classes = torch.unique(torch.cat([labels(train), labels(test)])).to(encoder.device)
        self.num_classes = len(self.classes)
        self.fit_source, self.fit_ids, self.all_ids = train, np.arange(len(train)), np.arange(len(train))
        self.validation_ids = np.arange(0)
        is_grid = len(config.settings) > 1
        if is_grid:
            self.fit_source, validating = split_holdout(train, config.validation)
            self.fit_ids, self.validation_ids = self.fit_source.ids, validating.ids
        for ids in (self.fit_ids, self.all_ids):  # checked before the extraction, which may take hours
            config.lr.check(self._steps(ids), self._steps(ids) * config.epochs)
        self.test_cache = self._cache(test)
        self.train_cache = None if config.is_fresh else self._cache(train)
        self.validation_cache = self.train_cache if is_grid else None
        if is_grid and config.is_fresh:
            self.validation_cache, self.validation_ids = self._cache(validating), np.arange(len(validating))

    def _cache(self, source: Source) -> FeatureCache:
        encoder, config = self.encoder, self.config
        extractor = encoder.extractor(source)
        return FeatureCache(extractor, encoder.backbone, memory_gib=config.cache_gib, folder=config.cache_dir)

    def _steps(self, ids: np.ndarray) -> int:
        """Optimizer steps of an epoch over these images."""
        return -(-len(ids) // self.config.global_batch)

    def run(self) -> dict[str, Any]:
        config, settings = self.config, self.config.settings
        heads, norm, losses = self._train(settings, self.fit_ids)
        tested = self._score(heads, norm, self.test_cache)
        grid: list[dict[str, Any]] = [setting._asdict() for setting in settings]
        for place, row in enumerate(grid):
            row |= {"train_loss": _finite(losses[place]), "test_top1_pct": tested.top1_pct[place].item()}
        best, used = 0, len(self.fit_ids)
        if self.validation_cache is not None:
            best = self._choose(heads, norm, self.validation_cache, grid)
        place = best
        if self.validation_cache is not None and self.train_cache is not None:
            heads, norm, losses = self._train([settings[best]], self.all_ids)
            tested = self._score(heads, norm, self.test_cache)
            place, used = 0, len(self.all_ids)
        if not math.isfinite(losses[place]):
            raise RunFailed("the linear classifier diverged: eval.linear.optimizer needs a smaller lr")
        top5 = {"linear/top5_pct": tested.top5_pct[place].item()} if self.num_classes > 5 else {}
        return {
            "linear/top1_pct": tested.top1_pct[place].item(),
            **top5,
            "chosen": {
                **settings[best]._asdict(),
                "train_loss": losses[place].item(),
                "train_samples": used,
                "validation_samples": len(self.validation_ids),
            },
            "grid": grid,
            "per_class_top1_pct": [_finite(value) for value in tested.per_class_pct[place]],
            "features": {
                "extracted": "every epoch" if config.is_fresh else "once",
                "dim": self.test_cache.num_features,
            },
        }

    def _choose(self, heads: Heads, norm: Normalization, cache: FeatureCache, grid: list[dict[str, Any]]) -> int:
        """The index of the best setting on the validation images; adds their accuracy and loss to the grid."""
        validated = self._score(heads, norm, cache, self.validation_ids)
        for place, row in enumerate(grid):
            row |= {"validation_top1_pct": validated.top1_pct[place].item()}
            row |= {"validation_loss": _finite(validated.loss[place])}
        best = _best(validated, len(self.validation_ids))
        chosen = grid[best]
        logger.info(
            "linear: of %d settings, lr %g with weight decay %g is chosen: %s of the validation images",
            len(grid),
            chosen["lr"],
            chosen["weight_decay"],
            percent(chosen["validation_top1_pct"]),
        )
        return best

    def _train(self, settings: Sequence[Setting], ids: np.ndarray) -> tuple[Heads, Normalization, Tensor]:
        """The trained classifiers, the normalization of their features, and (H,) mean losses over the last epoch."""
        config, width = self.config, self.test_cache.num_features
        device, seed = self.encoder.device, self.encoder.seed
        heads = Heads(settings, config.rule, width, self.num_classes, seed=seed, device=device)
        kind = config.norm
        if kind == "auto":
            kind = "none" if config.is_fresh else "standardize"
        norm = Normalization(kind, width, device)
        if self.train_cache is not None:
            norm.fit(self.train_cache.chunks(ids))
        steps = self._steps(ids)
        total = steps * config.epochs
        last_epoch = torch.zeros(len(settings), device=device)
        state = {**heads.state, **norm.state, "loss": last_epoch}
        first, partial_result, signals = 0, self.partial_result, StopSignals()
        if partial_result is not None and (first := partial_result.load(state)):
            logger.info("linear: continuing after %d of %d steps, from %s", first, total, partial_result.path)
        reported_s = time.monotonic()
        vote = distributed.Vote(device)
        with contextlib.ExitStack() as stack:
            if partial_result is not None:
                stack.enter_context(signals)
            batches = stack.enter_context(contextlib.closing(self._batches(ids, steps, first)))
            for step, (features, labels) in zip(range(first, total), batches, strict=False):
                epoch, place = divmod(step, steps)
                if place == 0 or step == first:
                    rates = _rates(settings, config.lr, range(epoch * steps, (epoch + 1) * steps), steps, total)
                    rates = rates.to(device)
                if place == 0:
                    last_epoch.zero_()
                numbers = torch.searchsorted(self.classes, labels)
                last_epoch += heads.step(norm.train(features), numbers, config.global_batch, rates[place])
                if place + 1 == steps and time.monotonic() - reported_s > REPORT_S:
                    reported_s = time.monotonic()
                    least = last_epoch.nan_to_num(nan=math.inf).min().item() / steps
                    logger.info("linear: epoch %d of %d, loss %s", epoch + 1, config.epochs, number(least))
                if partial_result is not None and step + 1 < total:  # the rest takes little time after the last step
                    code = vote.cast(signals.exit_code)
                    partial_result.save(state, step + 1, now=code > 0)
                    if code:
                        raise Stopped(code)
        return heads, norm, (last_epoch / steps).cpu()

    def _batches(self, ids: np.ndarray, steps: int, first: int) -> Examples:
        """Yields this rank's part of every training batch from step `first` on: features (b, D) and labels (b,)."""
        return self._fresh(steps, first) if self.train_cache is None else self._cached(self.train_cache, ids, steps)

    def _cached(self, cache: FeatureCache, ids: np.ndarray, steps: int) -> Examples:
        order = Order(len(ids), self.encoder.seed)
        positions = np.arange(steps * self.config.global_batch)
        for epoch in range(self.config.epochs):
            for batch in ids[order.ids(epoch, positions)].reshape(steps, -1):
                yield cache.take(batch)

    def _fresh(self, steps: int, first: int) -> Examples:
        assert self.config.transforms is not None
        encoder = self.encoder
        views = [ViewGroup(num_views=1, transforms=self.config.transforms)]
        loader = encoder.loader(self.fit_source, views, Order(len(self.fit_source), encoder.seed))
        batch = self.config.global_batch
        share = distributed.share(batch)
        pieces = [np.arange(begin, min(begin + BATCH, share.stop)) for begin in range(share.start, share.stop, BATCH)]
        cursor = (
            (step // steps, step % steps * batch + piece)
            for step in range(first, steps * self.config.epochs)
            for piece in pieces
        )
        with contextlib.closing(loader.run(cursor)) as stream:
            while rows := [  # images of one piece on the device at a time
                (pooled(encoder.backbone, batch.views[0], encoder.bf16), batch.label)
                for batch in itertools.islice(stream, len(pieces))
            ]:
                features, labels = zip(*rows, strict=True)
                yield torch.cat(features), torch.cat(labels)

    def _score(self, heads: Heads, norm: Normalization, cache: FeatureCache, ids: np.ndarray | None = None) -> Scores:
        chunks = cache.chunks(ids)
        return heads.score((norm(rows), torch.searchsorted(self.classes, labels)) for rows, labels in chunks)


def _rates(settings: Sequence[Setting], schedule: Schedule, steps: range, steps_per_epoch: int, total: int) -> Tensor:
    """(steps, H) learning rates."""
    bases = sorted({setting.lr for setting in settings})
    column = [bases.index(setting.lr) for setting in settings]
    table = [[schedule.value(base, step, steps_per_epoch, total) for base in bases] for step in steps]
    return torch.tensor(table)[:, column]


def _best(validated: Scores, num_samples: int) -> int:
    """The index of the lowest loss among the settings whose top-1 is within one standard error of the best top-1.

    With many images top-1 decides. A hundred images hardly separate settings by top-1, but the loss does.
    """
    top1, loss = validated.top1_pct / 100, validated.loss.nan_to_num(nan=math.inf)
    best = top1.max()
    is_near = top1 >= best - (best * (1 - best) / num_samples).sqrt()
    return int(loss.where(is_near, math.inf).argmin()) if loss[is_near].isfinite().any() else int(top1.argmax())


def _finite(value: Tensor) -> float | None:
    """The number, or None (null in JSON) if it is not finite."""
    return value.item() if value.isfinite() else None


def _plain(weight_decay: Number) -> float:
    if isinstance(weight_decay, Scheduled):
        raise UsageError("eval.linear.optimizer.weight_decay has a schedule; linear classifiers have one weight decay")
    return weight_decay
