"""Feeds DALI graphs from Python, and replaces images that cannot be read or decoded.

Threads (`reading.py`) read encoded images ahead; they enter the graph as bytes. Images of a decoded source enter it as
pixels; if no step of the views runs in DALI, no graph is built for them. A read that the storage fails for is waited
for (`outage.py`); nothing here waits for storage without looking, again and again, whether to go on.

A graph holds no random state. What enters it (images, boxes, factors) is computed per batch from (seed, epoch,
positions), so the same batch comes out whatever ran before it, and a graph that failed is replaced by a new one at the
same batch. A read that fails names its sample. DALI fails a whole batch, at the iteration that holds the bad image, and
rarely says which one it is: each is then tried alone.
"""

import itertools
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from sslrun.data import waiting
from sslrun.data.bad_samples import BadSamples
from sslrun.data.decoding import Trial, brief, decoder_arguments, other_size
from sslrun.data.graph import Arguments, dali_views, graph_arguments, graph_plan, num_inputs, view_arguments
from sslrun.data.index import size_in
from sslrun.data.order import Sampler
from sslrun.data.outage import Patience, Unreadable, is_outage
from sslrun.data.reading import Read, Readers, Reading
from sslrun.data.sources import Source
from sslrun.data.views import ViewGroup
from sslrun.errors import RunFailed

Cursor = Iterable[tuple[int, np.ndarray]]


@dataclass(frozen=True)
class BatchSpec:
    """Everything about a batch of B samples except their pixels.

    Attributes:
        epoch: number of the epoch, from 0.
        positions: (B,) int64, positions in the epoch.
        ids: (B,) int64, sample ids at these positions; bad samples are replaced.
        sizes: (B, 2) int32, height and width of the images.
        arguments: what the transforms do, of `view_arguments`.
    """

    epoch: int
    positions: np.ndarray
    ids: np.ndarray
    sizes: np.ndarray
    arguments: Arguments


@dataclass(eq=False)
class Pipeline:
    """Batches of decoded images, or of the views that the graph makes of them.

    Attributes:
        source: opened.
        views: view groups.
        sampler: gives the sample at each position.
        dali_steps: number of leading steps of each view group that the graph does; if all are 0, it decodes only.
        seed: seed of the run.
        batch_size: maximum number of samples in a batch.
        device: device of the graph's outputs; on CUDA, JPEGs are decoded there.
        hw_decoder_load: share of a batch that the GPU's JPEG engine decodes.
        num_threads: number of DALI's CPU threads; `Readers` has its own.
        prefetch: number of batches in DALI's queue, and of batches that are being read.
        bad: the bad images that are known; grows.
    """

    source: Source
    views: Sequence[ViewGroup]
    _: KW_ONLY
    sampler: Sampler
    dali_steps: Sequence[int]
    seed: int
    batch_size: int
    device: torch.device
    hw_decoder_load: float = 0.0
    num_threads: int
    prefetch: int
    bad: BadSamples

    def run(
        self, cursor: Cursor, stream: Any = None, go_on: Callable[[], None] | None = None
    ) -> Iterator[tuple[BatchSpec, list[Any]]]:
        """Yields, for each cursor item in order, the batch and the outputs of the graph as DALI tensor lists. Without a
        graph, the output is the pixels of the source: one array, or a list of arrays.

        Args:
            cursor: (epoch, positions) of each batch; read some items ahead.
            stream: CUDA stream that the outputs are bound to; None on the CPU.
            go_on: called every now and then while data does not come; it may raise to end the waiting. None: a `Wait`.

        Raises:
            RunFailed: too many bad images, no image can be read, or DALI fails on images that decode one by one.
            Whatever the cursor, the source or `go_on` raises, after the batches before it.
        """
        self.bad.forget_absent()
        if not needs_graph(self.source, self.dali_steps):
            for epoch, positions in cursor:
                spec = self._spec(epoch, positions)
                yield spec, [self._pixels(spec.ids)]
            return
        feed = _Feed(self, iter(cursor), go_on or waiting.Wait())
        try:
            yield from self._decoded(feed, stream)
        finally:
            feed.close()

    def _decoded(self, feed: "_Feed", stream: Any) -> Iterator[tuple[BatchSpec, list[Any]]]:
        dali = self._build(feed)
        delivered, excused = 0, -1
        while True:
            try:
                outputs = dali.run(stream)
                changed = self._changed(feed.oldest.spec, outputs)
            except StopIteration:
                if feed.error is not None:
                    raise feed.error from None
                return
            except RuntimeError as error:
                if not self._blame(feed.oldest, str(error)):
                    if excused == delivered:
                        message = brief(str(error))
                        raise RunFailed(f"DALI fails on images that decode one by one: {message}") from error
                    excused = delivered  # once: memory may have been short for a moment
                changed = True
            if changed:
                feed.repeat()
                dali = self._build(feed)
            else:
                delivered += 1
                yield feed.delivered().spec, outputs

    def _placed(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Samples at some positions of an epoch, those that are known to be bad replaced, and their sizes."""
        with waiting.doing("the order of samples", "is being made"):
            wanted = self.sampler.ids(epoch, positions)
        ids = self.bad.replace(wanted, self.seed, epoch, positions, len(self.source))
        return ids, self.source.sizes_of(ids)

    def _spec(self, epoch: int, positions: np.ndarray) -> BatchSpec:
        positions = np.asarray(positions, dtype=np.int64)
        return self._spec_of(epoch, positions, *self._placed(epoch, positions))

    def _spec_of(self, epoch: int, positions: np.ndarray, ids: np.ndarray, sizes: np.ndarray) -> BatchSpec:
        arguments = view_arguments(self.views, self.seed, epoch, positions, sizes)
        return BatchSpec(epoch, positions, ids, sizes, arguments)

    def _build(self, feed: "_Feed") -> Any:
        """The graph, which takes its inputs from `feed`."""
        from nvidia.dali import fn, pipeline_def

        plan, cuda = graph_plan(self.views, self.dali_steps), self._cuda
        gives_pixels = self.source.is_decoded or self.source.has_bands
        decoder = self._decoder
        batches = iter(feed, None)
        # DALI asks for images and arguments in any order.
        batches, same_batches = itertools.tee(batches) if num_inputs(plan) else (batches, batches)

        def images() -> Any:
            return next(batches).images

        def arguments() -> list[np.ndarray]:
            return graph_arguments(plan, next(same_batches).spec.arguments)

        def whole() -> Any:
            if gives_pixels:
                device = "gpu" if cuda else "cpu"
                first = fn.external_source(source=images, batch=True, layout="HWC", device=device)
            else:
                first = fn.decoders.image(fn.external_source(source=images, batch=True), **decoder)
            return tuple(dali_views(first, plan, arguments))

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
    def _decoder(self) -> dict[str, Any]:
        return decoder_arguments(self._cuda, self.hw_decoder_load, is_gray=self.source.channels == 1)

    @property
    def _cuda(self) -> bool:
        return self.device.type == "cuda"

    def _pixels(self, ids: np.ndarray) -> Any:
        """Decoded images of the source, on the device: contiguous arrays and writable ones, as torch and DALI want
        them, or tensors."""
        with waiting.doing(self.source.names[int(ids[0])]):
            pixels = self.source.decoded(ids, self.device)
        if isinstance(pixels, torch.Tensor):
            return pixels.to(self.device)
        if isinstance(pixels, np.ndarray):
            return self._on_device(pixels)
        return [self._on_device(image) for image in pixels]

    def _on_device(self, pixels: np.ndarray) -> Any:
        usable = np.require(pixels, requirements=["C", "W"])  # a copy only where it is neither
        return torch.from_numpy(usable).to(self.device) if self._cuda else usable

    def _add_bad(self, sample: int, reason: str, epoch: int | None = None) -> None:
        """Replace a sample for good, or in one epoch."""
        name, count = self.source.names[sample], len(self.source)
        if epoch is None:
            self.bad.add(sample, name, reason, count)
        else:
            self.bad.set_absent(sample, epoch, name, reason, count)

    def _changed(self, spec: BatchSpec, outputs: Sequence[Any]) -> bool:
        """Whether images are not the size they had when they were indexed (their boxes would be wrong): then bad."""
        if all(self.dali_steps):  # the decoded images are no output of the graph
            return False
        shapes = np.array(outputs[0].shape())[:, :2]
        changed = np.flatnonzero((shapes != spec.sizes).any(axis=1))
        for row in changed.tolist():
            self._add_bad(int(spec.ids[row]), other_size(shapes[row], spec.sizes[row]))
        return len(changed) > 0

    def _blame(self, batch: "_Fed", message: str) -> bool:
        """Find the images of a failed batch that do not decode; False if all do."""
        if self.source.is_decoded or self.source.has_bands:
            return False
        count = len(batch.images)
        named = {int(row) for row in re.findall(r"sample #(\d+)", message)} & set(range(count))
        for suspects in (named, set(range(count)) - named):
            troubles = {row: self._trial.trouble(batch.images[row], batch.spec.sizes[row]) for row in sorted(suspects)}
            damaged = {row: trouble for row, trouble in troubles.items() if trouble is not None}
            for row, trouble in damaged.items():
                self._add_bad(int(batch.spec.ids[row]), trouble)
            if damaged:
                return True
        return False

    @cached_property
    def _trial(self) -> Trial:
        """Decodes single images with the graph's operators."""
        return Trial(1, self._decoder, self._options)


def needs_graph(source: Source, dali_steps: Sequence[int]) -> bool:
    """Whether DALI has work to do: it decodes files, and does the leading steps of some view group."""
    return not source.is_decoded or any(dali_steps)


@dataclass(frozen=True)
class _Fed:
    """A batch that DALI has: its specification, and what was handed over, which is kept until it comes back."""

    spec: BatchSpec
    images: Any


class _Feed:
    """Batches on their way into the graph: specified and read ahead, handed over, handed over again after a failure.

    Calling it gives DALI the next batch. What goes wrong on the way ends the feeding (StopIteration), so that the
    batches before it still come out; then it is found in `error`.
    """

    def __init__(self, pipeline: Pipeline, cursor: Iterator[tuple[int, np.ndarray]], go_on: Callable[[], None]) -> None:
        self.error: Exception | None = None
        self._pipeline, self._cursor, self._go_on = pipeline, cursor, go_on
        source = pipeline.source
        self._readers = None if source.is_decoded else Readers(source, pipeline.num_threads)
        self._patience = Patience(self._read, source.names, go_on, pipeline.bad.record)
        self._ahead: deque[tuple[BatchSpec, Reading | None]] = deque()  # being read
        self._handed: deque[_Fed] = deque()  # in DALI, not yet come back
        self._is_ended = False

    def __call__(self) -> _Fed:
        try:
            self._read_ahead()
            if self._ahead:
                self._handed.append(self._ready(*self._ahead.popleft()))
                return self._handed[-1]
        except Exception as error:
            self.error, self._is_ended = error, True
            self._ahead.clear()
        raise StopIteration

    @property
    def oldest(self) -> _Fed:
        """The batch that DALI gives back next."""
        return self._handed[0]

    def delivered(self) -> _Fed:
        """Forget the oldest batch: it came back."""
        return self._handed.popleft()

    def repeat(self) -> None:
        """Feed the batches that DALI has not returned again, with substitutes for samples that are known to be bad."""
        specs = [self._spec(fed.spec.epoch, fed.spec.positions) for fed in self._handed]
        self._handed.clear()
        self._ahead.extendleft([(spec, self._start(spec)) for spec in reversed(specs)])

    def close(self) -> None:
        """End the threads that read."""
        if self._readers is not None:
            self._readers.close()

    def _read_ahead(self) -> None:
        """Keep `prefetch` batches in reading beside the one that is handed over now."""
        while not self._is_ended and len(self._ahead) <= self._pipeline.prefetch:
            try:
                spec = self._spec(*next(self._cursor))
            except Exception as error:
                self._is_ended = True
                self.error = None if isinstance(error, StopIteration) else error
                return
            self._ahead.append((spec, self._start(spec)))

    def _spec(self, epoch: int, positions: np.ndarray) -> BatchSpec:
        """A batch whose images have a size; one without is read: either its header is broken, or it could not be read
        when the sizes were."""
        positions = np.asarray(positions, dtype=np.int64)
        while True:
            ids, sizes = self._pipeline._placed(epoch, positions)
            unknown = np.unique(ids[sizes.min(axis=1) == 0])
            if len(unknown) == 0:
                return self._pipeline._spec_of(epoch, positions, ids, sizes)
            reads = self._settled(unknown, self._read(unknown), epoch, known=unknown.tolist())
            for sample, read in zip(unknown.tolist(), reads, strict=True):
                if not isinstance(read, Unreadable):
                    size = read.shape[:2] if self._pipeline.source.has_bands else size_in(read)
                    if size is None or not self._pipeline.source.set_size(sample, size):
                        self._pipeline._add_bad(sample, "the header cannot be read")

    def _start(self, spec: BatchSpec) -> Reading | None:
        return None if self._readers is None else self._readers.start(spec.ids)

    def _read(self, ids: np.ndarray) -> list[Read]:
        if self._readers is None:
            return [Unreadable("it has no pixels")] * len(ids)
        return self._readers.start(ids).result(self._go_on)

    def _settled(self, ids: np.ndarray, reads: list[Read], epoch: int, known: Collection[int] = ()) -> list[Read]:
        """Images as they are read at last; those that cannot be read are replaced in this epoch, or for good."""
        bad = self._pipeline.bad
        reads = self._patience.settle(ids, reads, {*known, *bad.absent})
        if bad.absent:
            bad.forget_absent(s for s, read in zip(ids.tolist(), reads, strict=True) if not is_outage(read))
        for sample, read in zip(ids.tolist(), reads, strict=True):
            if isinstance(read, Unreadable):
                self._pipeline._add_bad(sample, read.reason, epoch if read.is_outage else None)
        return reads

    def _ready(self, spec: BatchSpec, reading: Reading | None) -> _Fed:
        """A batch that has been read; samples that cannot be read are replaced."""
        if reading is None:
            return _Fed(spec, self._pipeline._pixels(spec.ids))
        while True:
            images = self._settled(spec.ids, reading.result(self._go_on), spec.epoch)
            if not any(self._pipeline.bad.is_replaced(sample, spec.epoch) for sample in spec.ids.tolist()):
                return _Fed(spec, images)
            spec = self._spec(spec.epoch, spec.positions)
            reading = self._start(spec)
            assert reading is not None
