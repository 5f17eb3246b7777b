"""Reading and decoding: DALI graphs fed from Python, and what to do when an image does not decode.

Images that a source keeps in memory enter the graph as they are; where nothing is left to it, there is no graph.

A graph holds no random state. What enters it (paths, boxes, factors) is computed per batch from (seed, epoch,
positions), so the same batch comes out whatever ran before it, and a graph that failed is thrown away and built anew at
the same place. DALI fails a whole batch, at the iteration that holds the bad image, and rarely says which one it is:
each is then tried alone.
"""

import itertools
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from sslrun.data.bad_samples import BadSamples
from sslrun.data.decoding import Trial, as_inputs, brief, decoded, file_trouble, other_size
from sslrun.data.graph import Arguments, argument_names, dali_views, graph_arguments, num_inputs, view_arguments
from sslrun.data.order import Sampler
from sslrun.data.sources import Source
from sslrun.data.views import ViewGroup
from sslrun.errors import RunFailed

Cursor = Iterable[tuple[int, np.ndarray]]


@dataclass(frozen=True)
class BatchSpec:
    """Everything about a batch but its pixels. B samples.

    Attributes:
        epoch: counts from 0.
        positions: (B,) int64, places in the epoch.
        ids: (B,) int64, the samples that stand there, bad ones replaced.
        sizes: (B, 2) int32, height and width of the images.
        arguments: what the transforms do, of `view_arguments`.
    """

    epoch: int
    positions: np.ndarray
    ids: np.ndarray
    sizes: np.ndarray
    arguments: Arguments


class Pipeline:
    """Batches of decoded images, or of the views that the graph makes of them.

    Args:
        source: opened.
        views: view groups.
        sampler: which sample stands at a position.
        dali_steps: how many of the first steps of each view group the graph does; all 0: it decodes only.
        seed: of the run.
        batch_size: most samples of a batch.
        device: where the graph's outputs live; on CUDA, JPEGs are decoded there.
        num_threads: DALI's own CPU threads.
        prefetch: batches that a graph works ahead.
        bad: what is known of bad images; grows.
    """

    def __init__(
        self,
        source: Source,
        views: Sequence[ViewGroup],
        *,
        sampler: Sampler,
        dali_steps: Sequence[int],
        seed: int,
        batch_size: int,
        device: torch.device,
        num_threads: int,
        prefetch: int,
        bad: BadSamples,
    ) -> None:
        self.source = source
        self.views = list(views)
        self.sampler = sampler
        self.dali_steps = list(dali_steps)
        self.seed = seed
        self.batch_size = batch_size
        self.device = device
        self.num_threads = num_threads
        self.prefetch = prefetch
        self.bad = bad
        self._trial: Trial | None = None

    def run(self, cursor: Cursor, stream: Any = None) -> Iterator[tuple[BatchSpec, list[Any]]]:
        """One item per cursor item, in order: the plan and the graph's outputs as DALI tensor lists (of images that
        are in memory and only have to be handed on: one array of all).

        Args:
            cursor: (epoch, positions) of each batch; read a few items ahead.
            stream: CUDA stream that the outputs are bound to.

        Raises:
            RunFailed: too many bad images, or DALI fails on images that decode one by one.
            Whatever the cursor raises, after the batches before it.
        """
        cursor = iter(cursor)
        if self.source.in_memory and not any(self.dali_steps):
            for epoch, positions in cursor:
                plan = self._plan(epoch, positions)
                yield plan, [self.source.images(plan.ids, self.device)]
            return
        waiting: deque[BatchSpec] = deque()  # to be handed to DALI again, after a failure
        flying: deque[BatchSpec] = deque()  # handed to DALI, not yet come back
        trouble: list[Exception] = []  # what stopped the feeding

        def feed() -> BatchSpec:
            if not waiting and trouble:
                raise StopIteration
            try:
                flying.append(waiting.popleft() if waiting else self._plan(*next(cursor)))
            except StopIteration:
                raise
            except Exception as error:
                trouble.append(error)
                raise StopIteration from None
            return flying[-1]

        dali = self._build(feed)
        delivered, excused = 0, -1
        while True:
            try:
                outputs = dali.run(stream)
                changed = self._changed(flying[0], outputs)
            except StopIteration:
                if trouble:
                    raise trouble[0] from None
                return
            except RuntimeError as error:
                if not self._blame(flying[0], str(error)):
                    if excused == delivered:
                        told = brief(str(error))
                        raise RunFailed(f"DALI fails on images that decode one by one: {told}") from error
                    excused = delivered  # once: a file may have been out of reach for a moment
                changed = True
            if changed:
                waiting.extendleft([self._plan(plan.epoch, plan.positions) for plan in reversed(flying)])
                flying.clear()
                dali = self._build(feed)
            else:
                delivered += 1
                yield flying.popleft(), outputs

    def _plan(self, epoch: int, positions: np.ndarray) -> BatchSpec:
        positions = np.asarray(positions, dtype=np.int64)
        wanted = self.sampler.ids(epoch, positions)
        while True:
            ids = self.bad.replace(wanted, self.seed, epoch, positions, len(self.source))
            sizes = self.source.sizes[ids]
            unreadable = ids[sizes.min(axis=1) == 0]
            if len(unreadable) == 0:
                arguments = view_arguments(self.views, self.seed, epoch, positions, sizes)
                return BatchSpec(epoch, positions, ids, sizes, arguments)
            for sample in unreadable.tolist():
                self._add_bad(sample, file_trouble(self.source.paths[sample]) or "the header cannot be read")

    def _build(self, feed: Callable[[], BatchSpec]) -> Any:
        """The graph, its inputs taken from plans."""
        from nvidia.dali import fn, pipeline_def

        views, cuda, in_memory = self.views, self._cuda, self.source.in_memory
        names = argument_names(views, self.dali_steps)
        count = num_inputs(views, names)
        plans = iter(feed, None)
        # DALI asks for images and arguments in any order.
        plans, same_plans = itertools.tee(plans) if count else (plans, plans)

        def images() -> Any:
            ids = next(plans).ids
            return self.source.images(ids, self.device) if in_memory else self._encoded(ids)

        def arguments() -> list[np.ndarray]:
            return graph_arguments(views, next(same_plans).arguments, self.dali_steps)

        def whole() -> Any:
            if in_memory:
                device = "gpu" if cuda else "cpu"
                first = fn.external_source(source=images, batch=True, layout="HWC", device=device)
            else:
                first = decoded(fn.external_source(source=images, batch=True), cuda)
            nodes = fn.external_source(source=arguments, num_outputs=count, batch=True) if count else []
            return tuple(dali_views(first, views, nodes, names))

        graph = pipeline_def(enable_conditionals=any(self.dali_steps))(whole)
        dali = graph(batch_size=self.batch_size, prefetch_queue_depth=self.prefetch, **self._options)
        dali.build()
        return dali

    @cached_property
    def _options(self) -> dict[str, Any]:
        # With the dynamic executor, outputs keep their memory for as long as they are held.
        device_id = (self.device.index or 0) if self._cuda else None
        return {"num_threads": self.num_threads, "device_id": device_id, "exec_dynamic": True}

    @property
    def _cuda(self) -> bool:
        return self.device.type == "cuda"

    def _encoded(self, ids: np.ndarray) -> list[np.ndarray]:
        return as_inputs([self.source.paths[sample] for sample in ids.tolist()])

    def _add_bad(self, sample: int, reason: str) -> None:
        self.bad.add(sample, self.source.paths[sample], reason, len(self.source))

    def _changed(self, plan: BatchSpec, outputs: Sequence[Any]) -> bool:
        """Whether files are not the size they had when they were indexed (their boxes would be wrong): then bad."""
        if all(self.dali_steps):  # the decoded images are no output of the graph
            return False
        shapes = np.array(outputs[0].shape())[:, :2]
        changed = np.flatnonzero((shapes != plan.sizes).any(axis=1))
        for row in changed.tolist():
            self._add_bad(int(plan.ids[row]), other_size(shapes[row], plan.sizes[row]))
        return len(changed) > 0

    def _blame(self, plan: BatchSpec, message: str) -> bool:
        """Find the images of a failed batch that do not decode; False where all do."""
        if self.source.in_memory:
            return False
        paths = [self.source.paths[sample] for sample in plan.ids.tolist()]
        named = {int(row) for row in re.findall(r"sample #(\d+)", message)}
        named |= {row for row, path in enumerate(paths) if path in message}
        rest = set(range(len(paths))) - named
        for suspects in (named, rest):
            troubles = {row: self._trouble(paths[row], plan.sizes[row]) for row in suspects if row < len(paths)}
            found = {row: trouble for row, trouble in troubles.items() if trouble is not None}
            for row in sorted(found):
                self._add_bad(int(plan.ids[row]), found[row])
            if found:
                return True
        return False

    def _trouble(self, path: str, size: np.ndarray) -> str | None:
        """Why an image does not decode to its size, or None where it does: tried alone, with the graph's operators."""
        if self._trial is None:
            self._trial = Trial(1, self._cuda, self._options)
        return self._trial.trouble(path, size)


def import_dali() -> None:
    """Import DALI now: from here on its own work at interpreter exit comes after that of whoever registers later."""
    import nvidia.dali  # noqa: F401
