"""The exact stage: the steps of the views that DALI does not do, with PIL's arithmetic.

Steps that may change an image's shape are done image by image, in torch; the steps after the last of them by blocks of
images of one size. On the CPU a crop that resizes, if it is the last of the former, belongs to the latter: C does it.
A block goes through runs of steps, with bytes between two runs: in compiled code where all steps of the run name their
operations (`operations.py`), C on the CPU (`native.py`) and Triton on a GPU (`sslkernels.views`), in torch otherwise.
All give the same bits. On a GPU the block is the whole batch, and a usual run is four launches.
"""

import itertools
import math
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sslrun.data import native, operations, split
from sslrun.data.graph import Arguments
from sslrun.data.transforms import Numbers, Transform
from sslrun.data.transforms.resampling import Resampling
from sslrun.data.views import ViewGroup
from sslrun.errors import UsageError

if TYPE_CHECKING:
    from sslkernels.views import Table

Step = tuple[Transform, Numbers]

# Pixels of one block: few enough images to stay in the cache and to share among threads, enough to be worth a call.
_BLOCK_PIXELS = 2**17


class ExactStage:
    """Turns decoded images, or what DALI made of them, into views.

    Results depend neither on the number of threads nor on whether compiled code or torch makes them.

    Args:
        views: view groups.
        device: where the images are and the views are made.
        dali_steps: how many of the first steps of each group are done already; None: no steps.
        num_threads: threads that share the images of a batch, on the CPU.
        compiled: whether C, where a compiler is found, or Triton may be used.
        dtype: of the views on a GPU, where normalized values are rounded to it; on the CPU views are float32.
    """

    def __init__(
        self,
        views: Sequence[ViewGroup],
        device: torch.device,
        *,
        dali_steps: Sequence[int] | None = None,
        num_threads: int = 1,
        compiled: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.views = list(views)
        self.device = device
        self.dali_steps = [0] * len(self.views) if dali_steps is None else list(dali_steps)
        is_rgb = all(group.channels == 3 for group in self.views)
        self.compiled = split.compiled_code(device) if compiled and is_rgb else None
        self._memory = _Memory(device, dtype if self._is_gpu else torch.float32)
        # Threads of its own: torch's number of threads belongs to a thread, and these tensors are too small for two. On
        # a GPU this thread does it all, whose CUDA stream it is.
        self._pool = ThreadPoolExecutor(num_threads, "sslrun-exact", initializer=torch.set_num_threads, initargs=(1,))
        self._map: Callable[..., Iterator[Any]] = map if self._is_gpu else self._pool.map

    def __call__(self, images: Sequence[Sequence[torch.Tensor]], arguments: Arguments) -> list[torch.Tensor]:
        """Does the remaining steps and normalizes.

        Args:
            images: for each view group B images, or num_views * B view-major where the views differ already: tensors
                (H, W, C) uint8 of one image, or (n, H, W, C) of n images of one size.
            arguments: of `view_arguments` for these images.

        Returns:
            For each view group (num_views * B, C, h, w), normalized, channels-last, view-major.
        """
        views: list[torch.Tensor] = []
        tasks: list[Iterator[None]] = []
        for group, own, numbers, done in zip(self.views, images, arguments, self.dali_steps, strict=True):
            given = [image.view(-1, *image.shape[-3:]).permute(0, 3, 1, 2) for image in own]
            remaining = _RemainingSteps(group, numbers, done, self.compiled)
            out = self._memory.views(group, remaining.count)
            if remaining.by_image:
                singles = [image for batch in given for image in batch.split(1)]
                if remaining.common:
                    singles = list(self._map(remaining.common_part, singles, range(len(singles))))
                parts = list(self._blocks(0, len(out), group.size))
                blocks = [[singles[row % len(singles)] for row in range(rows.start, rows.stop)] for rows in parts]
                tasks.append(self._map(remaining.from_images, blocks, parts, itertools.repeat(out)))
            elif self._is_gpu:
                repeated = given * (len(out) // sum(map(len, given)))  # views that share all steps so far
                tasks.append(self._map(remaining.from_crops, [repeated], [slice(0, len(out))], [out]))
            else:
                first = 0
                for batch in itertools.cycle(given):
                    parts = list(self._blocks(first, len(batch), group.size))
                    crops = [[batch[rows.start - first : rows.stop - first]] for rows in parts]
                    tasks.append(self._map(remaining.from_crops, crops, parts, itertools.repeat(out)))
                    first += len(batch)
                    if first >= len(out):
                        break
            views.append(out)
        for task in tasks:
            deque(task, maxlen=0)  # waits, and raises what the task raised
        return views

    def close(self) -> None:
        """End the threads; work that has not begun is dropped."""
        self._pool.shutdown(cancel_futures=True)

    def _blocks(self, first: int, count: int, size: tuple[int, int]) -> Iterator[slice]:
        """Rows from `first` on in blocks; a GPU takes all at once."""
        length = count if self._is_gpu else max(1, _BLOCK_PIXELS // (size[0] * size[1]))
        for start in range(first, first + count, length):
            yield slice(start, min(start + length, first + count))

    @property
    def _is_gpu(self) -> bool:
        return self.device.type != "cpu"


class _RemainingSteps:
    """The remaining steps of one view group, with the numbers of one batch.

    Args:
        group: the view group.
        numbers: of all its steps.
        done: how many of the first steps are done already.
        compiled: what does the runs of steps that name their operations; None: torch.

    Attributes:
        count: views of the group in the batch.
        common: steps that all views of an image have in common, done once for each image.
        by_image: whether some of the steps are done image by image.
        resized: the numbers and the interpolation of the last of them, if compiled code does it.
        runs: the steps after those: programs for compiled code, and lists of steps for torch.
        scales: (2, C) float32, scale and offset of each channel.
    """

    def __init__(
        self, group: ViewGroup, numbers: Sequence[Numbers], done: int, compiled: split.Compiled | None
    ) -> None:
        self.count = len(numbers[0].apply)
        steps = list(zip(group.steps, numbers, strict=True))[done:]
        single = split.num_image_steps([transform for transform, _ in steps])
        common = min(max(0, group.num_common - done), single)
        self.by_image = single > 0
        self.size = group.size
        self.common, self._own = steps[:common], steps[common:single]
        self.resized: tuple[Numbers, str] | None = None
        mean, std = np.array(group.normalize.mean), np.array(group.normalize.std)
        self.scales = torch.from_numpy(np.stack([1 / (255 * std), -mean / std]).astype(np.float32))
        self._compiled = compiled
        self.runs: list[operations.Program | list[Step]] = []
        is_compiled = compiled is not None
        by_kind = itertools.groupby(steps[single:], lambda step: is_compiled and step[0].operations is not None)
        for has_operations, run in [(key, list(run)) for key, run in by_kind] or [(is_compiled, [])]:
            if has_operations:
                named = _operations(run)
                lists = operations.passes(named) if compiled == "Triton" else [named]
                self.runs += [operations.program(own, self.count) for own in lists]
            else:
                self.runs.append(run)

        if compiled == "C" and self._own and split.does_c_resize(group, done + single - 1):
            last, own = self._own.pop()
            assert isinstance(last, Resampling) and (own.size == self.size).all()
            self.resized = own, last.interpolation

    def common_part(self, image: torch.Tensor, row: int) -> torch.Tensor:
        """An image (1, C, H, W) uint8 after the steps that its views, of which `row` is the first, have in common."""
        return _one_image(self.common, image, row)

    def from_images(self, images: Sequence[torch.Tensor], rows: slice, out: torch.Tensor) -> None:
        """Makes `out[rows]` from one image each, (1, C, H, W) uint8, of `common_part`."""
        if self.resized is not None:
            numbers, interpolation = self.resized
            made = [_one_image(self._own, image, rows.start + i) for i, image in enumerate(images)]
            contiguous = [image.contiguous(memory_format=torch.channels_last)[0].permute(1, 2, 0) for image in made]
            self._from_pixels(native.Boxes(contiguous, numbers["box"][rows], interpolation), rows, out)
            return
        shape = (len(images), *self.size, out.shape[1])
        crops = torch.empty(shape, dtype=torch.uint8, device=out.device).permute(0, 3, 1, 2)
        for i, image in enumerate(images):
            crops[i : i + 1] = _one_image(self._own, image, rows.start + i)
        self.from_crops([crops], rows, out)

    def from_crops(self, crops: Sequence[torch.Tensor], rows: slice, out: torch.Tensor) -> None:
        """Makes `out[rows]` from images that have their size: tensors (n, C, h, w) uint8, contiguous as channels-last,
        which hold the images of `rows` together."""
        self._from_pixels(crops, rows, out)

    def _from_pixels(self, crops: Sequence[torch.Tensor] | native.Boxes, rows: slice, out: torch.Tensor) -> None:
        last = len(self.runs) - 1
        for place, run in enumerate(self.runs):
            scales = self.scales if place == last else None
            target = out[rows] if place == last else _bytes_like(out[rows])
            if isinstance(crops, native.Boxes):
                assert isinstance(run, operations.Program), "of C"
                native.run(run, crops, rows, target, scales)
            elif not isinstance(run, operations.Program):
                x = _run_in_torch(run, _one(crops), rows)
                if scales is not None:
                    scale, offset = scales.to(x.device, non_blocking=True).view(2, 1, -1, 1, 1)
                    x = x.mul_(scale).add_(offset)
                target.copy_(x)
            elif self._compiled == "C":
                native.run(run, _one(crops), rows, target, scales)
            else:
                assert rows == slice(0, self.count), "Triton takes all images at once"
                _run_in_triton(run, crops, target, scales)
            crops = [target]


def _bytes_like(views: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(views, dtype=torch.uint8, memory_format=torch.channels_last)


def _one(crops: Sequence[torch.Tensor]) -> torch.Tensor:
    return crops[0] if len(crops) == 1 else torch.cat(list(crops))


def _operations(steps: Sequence[Step]) -> list[operations.Operation]:
    named = []
    for transform, numbers in steps:
        assert transform.operations is not None
        named += transform.operations(numbers)
    return named


def _run_in_triton(
    program: operations.Program, crops: Sequence[torch.Tensor], out: torch.Tensor, scales: torch.Tensor | None
) -> None:
    from sslkernels import views  # on first use: without a GPU nobody waits for Triton

    views.write_views(out, [crop.permute(0, 2, 3, 1) for crop in crops], table_of(program, scales))


def table_of(program: operations.Program, scales: torch.Tensor | None) -> "Table":
    """A program as `write_views` takes it."""
    from sslkernels.views import Table

    codes, values, flips = (torch.from_numpy(array) for array in (program.codes, program.values, program.flips))
    taps = None if program.taps is None else torch.from_numpy(program.taps)
    return Table(codes, values, flips, taps, scales)


def _run_in_torch(steps: Sequence[Step], crops: torch.Tensor, rows: slice) -> torch.Tensor:
    """Steps on a block: (N, C, h, w) uint8 -> float32, contiguous, whole numbers from 0 to 255."""
    flips, others = _flips_first(steps)
    if flips:
        crops = crops.clone(memory_format=torch.contiguous_format)
    for transform, numbers in flips:  # on bytes, a quarter of the memory
        crops = _change(transform, crops, numbers.rows(rows))
    x = crops.to(torch.float32, memory_format=torch.contiguous_format)
    for transform, numbers in others:
        x = _change(transform, x, numbers.rows(rows))
    return x


def _flips_first(steps: Sequence[Step]) -> tuple[list[Step], list[Step]]:
    """The flips that may be done before all other steps, since these do not see the difference; and the rest."""
    flips: list[Step] = []
    others: list[Step] = []
    for step in steps:
        can_move = step[0].is_flip and all(transform.ignores_flips for transform, _ in others)
        (flips if can_move else others).append(step)
    return flips, others


def _change(transform: Transform, x: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """One step on N images, (N, C, h, w), changed in place where it can be."""
    assert transform.torch_block is not None
    chosen = np.flatnonzero(numbers.apply)
    if len(chosen) == 0:
        return x
    if len(chosen) == len(x):
        return _whole_numbers(transform, transform.torch_block(x, numbers), x)
    where = torch.from_numpy(chosen).to(x.device, non_blocking=True)
    part = x[where]
    x[where] = _whole_numbers(transform, transform.torch_block(part, numbers.rows(chosen)), part)
    return x


def _whole_numbers(transform: Transform, result: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """What a block form returned, cut to whole numbers from 0 to 255; those with operations do so themselves."""
    if result.shape != before.shape:
        raise UsageError(
            f"{type(transform).__name__}.torch_block makes {tuple(result.shape)} of {tuple(before.shape)}: "
            "what changes the shape is a torch_image"
        )
    return result if transform.operations is not None else result.clamp(0.0, 255.0).floor_().to(before.dtype)


def _one_image(steps: Sequence[Step], image: torch.Tensor, row: int) -> torch.Tensor:
    """One image, (1, C, H, W) uint8, after some steps with the numbers of view `row`."""
    for transform, numbers in steps:
        if not numbers.apply[row]:
            continue
        if transform.torch_image is not None:
            own = numbers.rows(row)
            expected = (1, image.shape[1], *own.size.tolist())
            image = transform.torch_image(image, own)
            if image.shape != expected:
                raise UsageError(
                    f"{type(transform).__name__}.torch_image makes an image of {tuple(image.shape)}, "
                    f"but its numbers state {expected}"
                )
        else:
            x = image.to(torch.float32, memory_format=torch.contiguous_format)
            image = _change(transform, x, numbers.rows(slice(row, row + 1))).to(torch.uint8)
    return image


class _Memory:
    """Memory for views, used again once nothing refers to it: new pages for every batch would cost a fifth of all."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._free: defaultdict[int, list[np.ndarray]] = defaultdict(list)

    def views(self, group: ViewGroup, count: int) -> torch.Tensor:
        """(count, C, h, w) as channels-last, uninitialized."""
        shape = (count, *group.size, group.channels)
        if (self._device.type, self._dtype) != ("cpu", torch.float32):
            return torch.empty(shape, dtype=self._dtype, device=self._device).permute(0, 3, 1, 2)
        free = self._free[math.prod(shape)]
        memory = free.pop() if free else np.empty(math.prod(shape), dtype=np.float32)
        lent = memory.view()  # lives as long as the storage of the tensor, whoever shares that
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent).view(shape).permute(0, 3, 1, 2)
