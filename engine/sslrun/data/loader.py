"""The training loop's interface to the data: batches in order, made ahead by one background thread.

One thread is enough, because DALI, the exact stage and the reading of files have threads of their own. A sample's views
do not depend on the prefetch depth, the number of threads or the sizes of the batches.
"""

import atexit
import functools
import logging
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch

from sslrun.contract import Batch, PatchMask
from sslrun.data import dali
from sslrun.data.bad_samples import BadSamples
from sslrun.data.exact import ExactStage
from sslrun.data.graph import graph_plan, outputs_by_group
from sslrun.data.masks import blocks_of, masks_of
from sslrun.data.order import Sampler
from sslrun.data.pipeline import BatchSpec, Cursor, Pipeline, needs_graph
from sslrun.data.sources import Source
from sslrun.data.split import fallbacks, num_dali_steps
from sslrun.data.views import ViewGroup
from sslrun.data.waiting import STEP_S, Wait, since
from sslrun.runtime import heartbeat

Augment = Literal["auto", "dali", "exact"]

logger = logging.getLogger("sslrun")

_POLL_S = 0.1
_STOP_AFTER_S = 2.0  # a run that is asked to stop waits as long: as a rule its batch comes, and all ranks stop at once
_STUCK_S = 5.0  # of one call of a source or a sampler: it is not waited for any longer


class Loader:
    """Makes batches.

    Args:
        source: opened.
        views: view groups.
        sampler: gives the sample at each position of an epoch.
        seed: seed of the run.
        batch_size: maximum number of samples in a batch.
        device: device of the batches.
        augment: "exact" is PIL's arithmetic, "dali" is all in DALI; "auto" is exact.
        hw_decoder_load: share of a batch that the GPU's JPEG engine decodes.
        num_threads: number of DALI's CPU threads, and of the exact stage's; `Readers` has its own.
        prefetch: number of batches that are being read, of batches in DALI's queue, and of finished batches that wait.
        bad: the bad images that are known; its state belongs into the checkpoint.
        dtype: of the views on CUDA; on the CPU they are float32.

    Raises:
        UsageError: DALI would have to work and is not installed.
    """

    def __init__(
        self,
        source: Source,
        views: Sequence[ViewGroup],
        *,
        sampler: Sampler,
        seed: int,
        batch_size: int,
        device: torch.device | str = "cpu",
        augment: Augment = "auto",
        hw_decoder_load: float = 0.0,
        num_threads: int = 1,
        prefetch: int = 2,
        bad: BadSamples | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.source = source
        self.views = [group.for_channels(source.channels) for group in views]
        self.sampler = sampler
        self.seed = seed
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.dtype = dtype
        self.augment = resolve_augment(augment)
        self.dali_steps = [num_dali_steps(group, self.augment, self.device) for group in self.views]
        for place, group in enumerate(self.views):
            for reason in fallbacks(group, self.augment, self.device):
                _tell_once(f"data.views.{place}, {self.augment} mode: {reason}")
        self.hw_decoder_load = hw_decoder_load
        self.num_threads = max(1, num_threads)
        self.prefetch = max(1, prefetch)
        self.bad = BadSamples() if bad is None else bad
        self.uses_dali = needs_graph(source, self.dali_steps)
        if self.uses_dali:
            dali.require("making these views" if source.is_decoded else f"decoding the images of {source!r}")

    def run(self, cursor: Cursor) -> "BatchStream":
        """One batch for each item of the cursor, in order.

        Args:
            cursor: (epoch, positions) of each batch, positions (B,) int64 in the global order, B at most `batch_size`;
                read ahead, from another thread.

        Raises:
            RunFailed, Stopped: of `read_sizes`, where the sizes are not known yet.
        """
        self.source.sizes_of(np.arange(0))  # if they are to be read, this thread waits for them, and can be stopped
        return BatchStream(self, cursor)

    def decoded(self, cursor: Cursor) -> Iterator[tuple[BatchSpec, list[torch.Tensor]]]:
        """The specification of each batch and its decoded images, (H, W, C) uint8 on the CPU."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        wait = Wait()
        for spec, (images,) in self._pipeline([0] * len(self.views)).run(cursor, stream, wait):
            wait.end()
            yield spec, [torch.from_dlpack(images[row]).cpu().clone() for row in range(len(spec.ids))]

    def _pipeline(self, dali_steps: Sequence[int]) -> Pipeline:
        return Pipeline(
            self.source,
            self.views,
            sampler=self.sampler,
            dali_steps=dali_steps,
            seed=self.seed,
            batch_size=self.batch_size,
            device=self.device,
            hw_decoder_load=self.hw_decoder_load,
            num_threads=self.num_threads,
            prefetch=self.prefetch,
            bad=self.bad,
        )

    def _batches(self, cursor: Cursor, go_on: Callable[[], None] | None = None) -> Iterator[tuple[Batch, Any]]:
        """Batches, each with the CUDA event after which it is ready; `go_on` as for `Pipeline.run`."""
        cuda = self.device.type == "cuda"
        options: dict[str, Any] = {"num_threads": self.num_threads, "dtype": self.dtype}
        stage = ExactStage(self.views, self.device, dali_steps=self.dali_steps, **options)
        stream = torch.cuda.Stream(self.device) if cuda else None
        plan = graph_plan(self.views, self.dali_steps)
        in_use: deque[tuple[Any, torch.cuda.Event]] = deque()
        try:
            with torch.cuda.stream(stream) if cuda else nullcontext():
                for spec, outputs in self._pipeline(self.dali_steps).run(cursor, stream, go_on):
                    images = outputs_by_group(plan, [_tensors(output) for output in outputs])
                    views = stage(images, spec.arguments)
                    batch = self._batch(spec, views)
                    ready = None
                    if stream is not None:
                        ready = stream.record_event()
                        in_use.append((outputs, ready))
                        _drop_finished(in_use)
                    yield batch, ready
        finally:
            stage.close()
            if stream is not None:
                stream.synchronize()  # before `in_use` is dropped

    def _batch(self, spec: BatchSpec, views: list[torch.Tensor]) -> Batch:
        known = self.source.labels_of(spec.ids)
        labels = None if known is None else torch.from_numpy(known)
        index = torch.from_numpy(spec.ids.copy())
        masks = patch_masks(self.views, self.seed, spec.epoch, spec.positions)
        if self.device.type == "cuda":
            index = index.pin_memory()
            labels = None if labels is None else labels.pin_memory()
            masks = [None if mask is None else mask.after(torch.Tensor.pin_memory) for mask in masks]
        return Batch(views, index, labels, masks).to(self.device)


def patch_masks(views: Sequence[ViewGroup], seed: int, epoch: int, positions: np.ndarray) -> list[PatchMask | None]:
    """The masks of a batch; arguments as in `masks_of`."""
    return [
        None
        if mask is None
        else PatchMask(
            torch.from_numpy(mask).flatten(1), int(mask.sum()), None if blocks is None else torch.from_numpy(blocks)
        )
        for mask, blocks in zip(
            masks_of(views, seed, epoch, positions), blocks_of(views, seed, epoch, positions), strict=True
        )
    ]


class BatchStream(Iterator[Batch]):
    """Batches of one `Loader.run`. It is closed by exhaustion, an error, `close()`, or its garbage collection.

    Attributes:
        wait_s: seconds that the consumer has waited for batches so far.
    """

    def __init__(self, loader: Loader, cursor: Cursor) -> None:
        self.wait_s = 0.0
        self._wait = Wait(_STOP_AFTER_S)
        self._queue: queue.Queue[Any] = queue.Queue(loader.prefetch)
        stop = threading.Event()
        thread = threading.Thread(
            target=_work, args=(loader, cursor, self._queue, stop), name="sslrun-data", daemon=True
        )
        self._finalizer = weakref.finalize(self, _shut_down, thread, self._queue, stop)
        _close_streams_at_exit(loader.uses_dali)
        _streams.add(self)
        thread.start()

    def __next__(self) -> Batch:
        """The next batch; while it does not come, the log says what is waited for.

        Raises:
            Stopped: the run is asked to stop, and has waited for this batch for some seconds.
            Whatever making the batch raised.
        """
        if not self._finalizer.alive:
            raise StopIteration
        start = time.perf_counter()
        self._wait.begin()
        try:
            item = self._next_item()
        except BaseException:
            self.close()
            raise
        self._wait.end()
        heartbeat.tick()
        self.wait_s += time.perf_counter() - start
        if item is None or isinstance(item, BaseException):
            self.close()
            raise StopIteration if item is None else item
        batch, ready = item
        if ready is not None:
            current = torch.cuda.current_stream(batch.index.device)
            current.wait_event(ready)
            masks = [each for mask in batch.masks if mask is not None for each in (mask.hidden, mask.blocks)]
            for tensor in (*batch.views, batch.index, batch.label, *masks):
                if tensor is not None:
                    tensor.record_stream(current)
        return batch

    def _next_item(self) -> Any:
        while True:
            try:
                return self._queue.get(timeout=STEP_S)
            except queue.Empty:
                self._wait()

    def close(self) -> None:
        """Stop the thread and wait for its end; batches made ahead are dropped. Reads that do not come back are not
        waited for."""
        self._finalizer()


_streams: weakref.WeakSet[BatchStream] = weakref.WeakSet()


@functools.cache
def _close_streams_at_exit(uses_dali: bool) -> None:
    """Exit handlers run in the reverse order of their registration: ours must run before DALI's, which is imported."""
    if uses_dali:
        import nvidia.dali  # noqa: F401

    atexit.register(_close_streams)


def _close_streams() -> None:
    for stream in list(_streams):
        stream.close()


@functools.cache
def _tell_once(text: str) -> None:
    logger.info(text)


def _tensors(output: Any) -> list[torch.Tensor]:
    """One output of the graph, zero copy: one tensor where all images have one size, else one for each image."""
    if hasattr(output, "is_dense_tensor") and output.is_dense_tensor():
        return [torch.from_dlpack(output.as_tensor())]
    return [torch.from_dlpack(image) for image in output]


def _drop_finished(in_use: deque[tuple[Any, torch.cuda.Event]]) -> None:
    """Drop outputs of DALI that the device has read, without waiting for it. If they were dropped while the work on
    them is still queued, DALI could fill their memory anew: it knows its own streams, and what it documents for DLPack
    is that reading waits for writing, not the reverse.

    Args:
        in_use: outputs and the event after which they have been read, in the order of the events.
    """
    while in_use and in_use[0][1].query():
        in_use.popleft()


def resolve_augment(augment: Augment) -> Literal["dali", "exact"]:
    """Resolve "auto": exact, which is closer to PIL than DALI's operators and has fewer of them to run."""
    return "exact" if augment == "auto" else augment


def _work(loader: Loader, cursor: Cursor, out: queue.Queue[Any], stop: threading.Event) -> None:
    """The thread's work. It has no reference to the stream, which otherwise would never be collected."""

    def go_on() -> None:
        if stop.is_set():
            raise _Closed

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                out.put(item, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False

    try:
        torch.set_num_threads(1)  # in this thread: the cores are for the training step
        for item in loader._batches(cursor, go_on):
            if not put(item):
                return
        put(None)
    except BaseException as error:
        put(error)


class _Closed(Exception):
    """The stream is closed: what its thread waits for is not needed any more."""


def _shut_down(thread: threading.Thread, out: queue.Queue[Any], stop: threading.Event) -> None:
    """The thread must not be in DALI when the process ends. In `Source.decoded` it may hang, and is left there."""
    stop.set()
    while not out.empty():  # makes room for a `put` that is under way
        out.get_nowait()
    if thread is threading.current_thread():  # the garbage collector runs in any thread
        return
    deadline = time.monotonic() + _STUCK_S
    while thread.is_alive():
        thread.join(_POLL_S)
        begun = since(thread.ident)
        if begun is not None and max(begun + _STUCK_S, deadline) < time.monotonic():
            return
