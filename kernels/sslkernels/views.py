"""Color operations, blur, horizontal flip and normalization of image crops in four launches.

Which operations an image gets, in which order and with which factors, differs from image to image and is read from a
table. Launches, left out where they have nothing to do:

    _gray_sums      images with a contrast: the operations before it, and the sum of the gray of each tile of pixels
    _colors         all images: all operations up to the blur; writes the view, or bytes if the image is blurred
    _blur_rows      images that are blurred: bytes -> 12 bits
    _blur_columns   images that are blurred: 12 bits -> bytes, the operations after the blur; writes the view

Every compile-time constant comes from the recipe (size, number of operations, width of the widest blur), none from the
batch, so a recipe compiles each kernel once. All numbers of a batch go to the device in one copy. The result has the
same bits on every device: `pixel_operations.py` says how. MoCo v2's 2 x 256 views of 224 pixels in bfloat16 move 0.53
GB (`bytes_moved`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.arguments import describe
from sslkernels.device import INTERPRETED, launch, runs_triton
from sslkernels.pixel_operations import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    NOTHING,
    SOLARIZE,
    blended,
    blur,
    brightened,
    luma,
    operation,
    rounded_mean,
    solarized,
    turned,
)

AFTER_BLUR = (BRIGHTNESS, SOLARIZE)  # they treat each channel by itself
HEAD = tl.constexpr(4)  # columns of the table before the operations; see `_tables`
BLOCK, WARPS = 1024, 4  # pixels of a tile, or values of a block of columns
# No contraction of a product and a sum to a fused multiply-add: a few of a million blends would differ.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}


class Table(NamedTuple):
    """What to do to N images; tensors on the CPU.

    Attributes:
        codes: (N, K) int32, codes of `pixel_operations.py`, done in the order of the row; NOTHING is skipped. An image
            may have one CONTRAST and one BLUR; all blurs are in one column, with only BRIGHTNESS and SOLARIZE after it.
        values: (N, K) float32: factor, steps or threshold.
        flips: (N,) bool, whether the view is mirrored.
        taps: for the M blurred images, in order, (2, M, T) float32: whole weights of the horizontal pass, which sum to
            2**16 with both sides, and of the vertical pass, to 2**12; center first. None if no image can be blurred.
        scales: (2, 3) float32, scale and offset of each channel: scale x + offset. None leaves bytes.
    """

    codes: Tensor
    values: Tensor
    flips: Tensor
    taps: Tensor | None = None
    scales: Tensor | None = None


def write_views(out: Tensor, crops: Sequence[Tensor], table: Table) -> None:
    """Fills `out` with views made of crops. Nothing waits for the device.

    Args:
        out: (N, 3, h, w), contiguous as channels-last: uint8, or float32, bfloat16 or float16 if `table` has scales.
        crops: uint8 tensors (n, h, w, 3), contiguous, on the device of `out`, with N images together.
        table: what to do to each image; a blur may not reach farther than the image.

    Raises:
        ValueError: an argument has the wrong shape, dtype or layout.
    """
    _check(out, crops, table)
    if type(out) is Tensor and not torch.compiler.is_compiling():
        _write_views(out, crops, table)
    else:  # fake tensors and compilers know a custom operator, which costs more than it does
        _write_views_op(out, list(crops), *table)


def reference(crops: Sequence[Tensor], table: Table) -> Tensor:
    """`write_views` in plain PyTorch, image by image; (N, 3, h, w), channels-last, uint8 or float32."""
    codes, values, flips, taps, scales = table
    views, blurred = [], 0
    for image, own, flipped in zip((image for crop in crops for image in crop), range(len(codes)), flips, strict=True):
        x = image.permute(2, 0, 1).to(torch.int64)
        for code, value in zip(codes[own].tolist(), values[own], strict=True):
            if code == BLUR:
                assert taps is not None
                x = blur(x, taps[:, blurred].to(x))
                blurred += 1
            elif code != NOTHING:
                x = operation(x, code, value.to(x.device))
        views.append(x.flip(-1) if flipped else x)
    result = torch.stack(views)
    if scales is None:
        return result.to(torch.uint8, memory_format=torch.channels_last)
    scale, offset = scales.to(result.device).view(2, 3, 1, 1)
    return (result.float() * scale).add_(offset).contiguous(memory_format=torch.channels_last)


def bytes_moved(out: Tensor, table: Table) -> float:
    """The bytes of pixels that the launches read and write, each once per launch."""
    contrast, blurred = (float((table.codes == code).any(1).float().mean()) for code in (CONTRAST, BLUR))
    reach = 0 if table.taps is None else table.taps.shape[2] - 1
    bordered, size = 1 + 2 * reach / out.shape[3], out.element_size()
    of_a_blur = 2 * bordered + 2 * 2 + size  # bytes with borders and 12 bits, written and read
    return out.numel() * (1 + contrast + (1 - blurred) * size + blurred * of_a_blur)


@torch.library.custom_op("sslkernels::write_views", mutates_args=("out",))
def _write_views_op(
    out: Tensor,
    crops: Sequence[Tensor],
    codes: Tensor,
    values: Tensor,
    flips: Tensor,
    taps: Tensor | None,
    scales: Tensor | None,
) -> None:
    _write_views(out, crops, Table(codes, values, flips, taps, scales))


def _write_views(out: Tensor, crops: Sequence[Tensor], table: Table) -> None:
    _check_codes(table.codes)
    if out.device.type != "meta" and not runs_triton(out):
        out.copy_(reference(crops, table))
    elif INTERPRETED and out.dtype in (torch.bfloat16, torch.float16):
        rounded_by_torch = torch.empty_like(out, dtype=torch.float32)  # the interpreter cuts off
        _launch(rounded_by_torch, crops, table)
        out.copy_(rounded_by_torch)
    else:
        _launch(out, crops, table)


def _check(out: Tensor, crops: Sequence[Tensor], table: Table) -> None:
    codes, values, flips, taps, scales = table
    count, channels, height, width = out.shape
    if channels != 3 or not out.permute(0, 2, 3, 1).is_contiguous() or out.is_floating_point() != (scales is not None):
        kind = "uint8" if scales is None else "floating"
        raise ValueError(f"out: expected (N, 3, h, w) {kind}, contiguous as channels-last, got {describe(out)}")
    for place, crop in enumerate(crops):
        if crop.shape[1:] != (height, width, 3) or crop.dtype != torch.uint8 or not crop.is_contiguous():
            expected = f"(n, {height}, {width}, 3) uint8, contiguous"
            raise ValueError(f"crops[{place}]: expected {expected}, got {describe(crop)}")
        if crop.device != out.device:
            raise ValueError(f"crops[{place}]: expected the device of out, {out.device}, got {crop.device}")
    if (found := sum(len(crop) for crop in crops)) != count:
        raise ValueError(f"crops: expected {count} images, as many as in out, got {found}")
    for name, x, shape, dtype in (
        ("codes", codes, (count, codes.shape[-1]), torch.int32),
        ("values", values, (count, codes.shape[-1]), torch.float32),
        ("flips", flips, (count,), torch.bool),
        ("scales", scales, (2, 3), torch.float32),
    ):
        if x is not None and (x.shape != shape or x.dtype != dtype or x.device.type != "cpu"):
            raise ValueError(f"{name}: expected {shape} {dtype} on the CPU, got {describe(x)} on {x.device}")
    most = min(height, width)
    if taps is not None and (taps.ndim != 3 or len(taps) != 2 or taps.shape[2] > most):
        raise ValueError(f"taps: expected (2, M, T) with T of at most {most}, got {describe(taps)}")


def _check_codes(codes: Tensor) -> None:
    array = codes.numpy()
    is_blur = array == BLUR
    if ((array == CONTRAST).sum(1) > 1).any():
        raise ValueError("codes: expected at most one CONTRAST for an image")
    (columns,) = is_blur.any(0).nonzero()
    if len(columns) > 1:
        raise ValueError(f"codes: expected BLUR in one column, got it in {columns.tolist()}")
    if len(columns) and (later := set(array[is_blur.any(1), columns[0] + 1 :].flat) - {NOTHING, *AFTER_BLUR}):
        raise ValueError(f"codes: expected BRIGHTNESS and SOLARIZE after BLUR, got {sorted(map(int, later))}")


def _launch(out: Tensor, crops: Sequence[Tensor], table: Table) -> None:
    count, _, height, width = out.shape
    area, reach = height * width, 0 if table.taps is None else table.taps.shape[2] - 1
    tiles = triton.cdiv(area, BLOCK)
    views = out.permute(0, 2, 3, 1)
    addresses, scales, todo, blurs, contrasts = _tables(out, crops, table)
    constants = {"STEPS": table.codes.shape[1], "BLOCK": BLOCK, **OPTIONS}
    image = {"AREA": area, "WIDTH": width, **constants}
    sums = todo.new_empty((count, tiles))
    if len(contrasts):
        launch(_gray_sums, (tiles, len(contrasts)), addresses, todo, contrasts, sums, TILES=tiles, **image)
    bordered = out.new_empty((len(blurs), height, width + 2 * reach, 3), dtype=torch.uint8)
    tiling = {"TILES": tiles, "TILES_2": triton.next_power_of_2(tiles)}
    launch(_colors, (tiles, count), addresses, todo, sums, scales, bordered, views, REACH=reach, **tiling, **image)
    if len(blurs) == 0:
        return
    rows = out.new_empty((len(blurs), height, 3 * width), dtype=torch.int16)
    launch(_blur_rows, (tiles, len(blurs)), bordered, blurs, rows, REACH=reach, **image)
    in_pairs = width % 2 == 0
    words = rows.view(torch.int32) if in_pairs else rows
    length = words.shape[2]
    grid = (triton.cdiv(height * length, BLOCK), len(blurs))
    line = {"WORDS": length, "PAIRS": in_pairs, "ALIGNED": next(run for run in (4, 2, 1) if length % run == 0)}
    launch(_blur_columns, grid, words, blurs, todo, scales, views, HEIGHT=height, REACH=reach, **line, **constants)


def _tables(out: Tensor, crops: Sequence[Tensor], table: Table) -> list[Tensor]:
    """The arguments of the kernels, on the device of `out`, by one copy.

    Returns:
        addresses: (N,) int64, of the crops, which lie where they were made.
        scales: (6,) float32, scale and offset of each channel.
        todo: (N, HEAD + 2 K) int32; row of the image in `blurs` or -1, whether it is flipped, how many operations
            `_colors` does, how many come before the contrast or -1, the codes, the bits of the values.
        blurs: (M, 2 + 2 T) int32; image, how far the weights reach, horizontal and vertical weights.
        contrasts: (C,) int32, images with a contrast.
    """
    # With arrays rather than tensors, whose operations take three times as long on so few numbers.
    codes, values, flips = (x.numpy() for x in table[:3])
    (count, steps), num_taps = codes.shape, 1 if table.taps is None else table.taps.shape[2]
    is_contrast, is_blur = codes == CONTRAST, codes == BLUR
    (contrasts,), (blurs,) = is_contrast.any(1).nonzero(), is_blur.any(1).nonzero()
    head = HEAD.value
    shapes = [(2 * count,), (6,), (count, head + 2 * steps), (len(blurs), 2 + 2 * num_taps), (len(contrasts),)]
    lengths = [math.prod(shape) for shape in shapes]
    padded = [-(-length // 4) * 4 for length in lengths]  # each begins at a multiple of 16 bytes
    buffer = torch.empty(sum(padded), dtype=torch.int32, pin_memory=out.is_cuda)

    def parts(of: Tensor) -> list[Tensor]:
        pieces = zip(of.split(padded), lengths, shapes, strict=True)
        first, second, *others = (piece[:length].view(shape) for piece, length, shape in pieces)
        return [first.view(torch.int64), second.view(torch.float32), *others]

    addresses, scales, todo, weights, with_contrast = (part.numpy() for part in parts(buffer))
    first = 0
    for crop in crops:
        start = 0 if crop.device.type == "meta" else crop.data_ptr()
        stop = start + crop.nbytes
        addresses[first : first + len(crop)] = range(start, stop, crop.stride(0)) if len(crop) > 1 else start
        first += len(crop)
    if table.scales is not None:
        scales[:] = table.scales.flatten().numpy()
    todo[:, 0] = -1
    todo[blurs, 0] = range(len(blurs))
    todo[:, 1] = flips
    todo[:, 2] = steps
    todo[blurs, 2] = is_blur[blurs].argmax(1) if len(blurs) else 0
    todo[:, 3] = -1
    todo[contrasts, 3] = is_contrast[contrasts].argmax(1) if len(contrasts) else 0
    todo[:, head : head + steps] = codes
    todo[:, head + steps :] = values.view("int32")
    with_contrast[:] = contrasts
    if len(blurs):
        assert table.taps is not None and table.taps.shape[1] == len(blurs), "weights for each blurred image"
        horizontal, vertical = table.taps.numpy()
        weights[:, 0] = blurs
        weights[:, 1] = (horizontal != 0).cumsum(1).argmax(1)  # a horizontal weight is 0 only beyond the last one
        weights[:, 2 : 2 + num_taps] = horizontal
        weights[:, 2 + num_taps :] = vertical
    return parts(buffer.to(out.device, non_blocking=True))


@triton.jit
def _operations(r, g, b, row, last, mean, STEPS: tl.constexpr):
    """The first `last` operations of the image whose row of the table is at `row`; codes of `pixel_operations.py`."""
    for step in range(last):
        code = tl.load(row + HEAD + step)
        value = tl.load(row + HEAD + STEPS + step).to(tl.float32, bitcast=True)
        if code == 0:  # BRIGHTNESS
            r, g, b = brightened(r, value), brightened(g, value), brightened(b, value)
        elif code == 1 or code == 2 or code == 4:  # CONTRAST, SATURATION, GRAY
            gray = luma(r, g, b)
            if code == 4:
                r, g, b = gray, gray, gray
            else:
                if code == 1:
                    gray = gray * 0.0 + mean
                r, g, b = blended(r, gray, value), blended(g, gray, value), blended(b, gray, value)
        elif code == 3:  # HUE
            r, g, b = turned(r, g, b, value)
        elif code == 5:  # SOLARIZE
            r, g, b = solarized(r, value), solarized(g, value), solarized(b, value)
    return r, g, b


@triton.jit
def _channel_operations(x, row, after, STEPS: tl.constexpr):
    """The operations from `after` on that treat each channel by itself."""
    for step in range(after, STEPS):
        code = tl.load(row + HEAD + step)
        value = tl.load(row + HEAD + STEPS + step).to(tl.float32, bitcast=True)
        if code == 0:
            x = brightened(x, value)
        elif code == 5:
            x = solarized(x, value)
    return x


@triton.jit
def _written(x, scale, offset, KIND: tl.constexpr):
    """The value of the view: a byte, or normalized."""
    if KIND.is_floating():
        return (x * scale + offset).to(KIND)
    else:
        return x.to(KIND)


@triton.jit
def _pixels(addresses, n, place):
    source = tl.load(addresses + n).to(tl.pointer_type(tl.uint8), bitcast=True) + place * 3
    return tl.load(source).to(tl.float32), tl.load(source + 1).to(tl.float32), tl.load(source + 2).to(tl.float32)


@triton.jit
def _gray_sums(
    addresses, table, contrasts, sums,
    AREA: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    n = tl.load(contrasts + tl.program_id(1))
    row = table + n * (HEAD + 2 * STEPS)
    place = tile * BLOCK + tl.arange(0, BLOCK)
    r, g, b = _pixels(addresses, n, tl.minimum(place, AREA - 1))
    r, g, b = _operations(r, g, b, row, tl.load(row + 3), 0.0, STEPS)
    gray = tl.where(place < AREA, luma(r, g, b), 0.0).to(tl.int32)
    tl.store(sums + n * TILES + tile, tl.sum(gray))


@triton.jit
def _store_bytes(target, r, g, b, mask):
    tl.store(target, r.to(tl.uint8), mask)
    tl.store(target + 1, g.to(tl.uint8), mask)
    tl.store(target + 2, b.to(tl.uint8), mask)


@triton.jit
def _colors(
    addresses, table, sums, scales, bordered, views,
    AREA: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, REACH: tl.constexpr,
    TILES: tl.constexpr, TILES_2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    n = tl.program_id(1)
    row = table + n * (HEAD + 2 * STEPS)
    place = tile * BLOCK + tl.arange(0, BLOCK)
    inside = place < AREA
    x = place % WIDTH
    source = tl.where(tl.load(row + 1) != 0, place + (WIDTH - 1) - 2 * x, place)
    r, g, b = _pixels(addresses, n, tl.minimum(source, AREA - 1))
    mean = 0.0
    if tl.load(row + 3) >= 0:
        parts = tl.arange(0, TILES_2)
        total = tl.sum(tl.load(sums + n * TILES + parts, parts < TILES, 0).to(tl.int64))
        mean = rounded_mean(total, AREA).to(tl.float32)
    r, g, b = _operations(r, g, b, row, tl.load(row + 2), mean, STEPS)
    slot = tl.load(row)
    if slot >= 0:
        # Rows with their reflected borders, so that the blur need not ask where a row ends.
        line = bordered + slot.to(tl.int64) * ((3 * WIDTH + 6 * REACH) * (AREA // WIDTH))
        line += (place // WIDTH) * (3 * WIDTH + 6 * REACH)
        _store_bytes(line + (REACH + x) * 3, r, g, b, inside)
        _store_bytes(line + (REACH - x) * 3, r, g, b, inside & (x > 0) & (x <= REACH))
        mirrored = REACH + 2 * (WIDTH - 1) - x
        _store_bytes(line + mirrored * 3, r, g, b, inside & (x >= WIDTH - 1 - REACH) & (x < WIDTH - 1))
    else:
        target = views + n.to(tl.int64) * (3 * AREA) + place * 3
        kind: tl.constexpr = views.dtype.element_ty
        tl.store(target, _written(r, tl.load(scales), tl.load(scales + 3), kind), inside)
        tl.store(target + 1, _written(g, tl.load(scales + 1), tl.load(scales + 4), kind), inside)
        tl.store(target + 2, _written(b, tl.load(scales + 2), tl.load(scales + 5), kind), inside)


@triton.jit
def _blur_rows(
    bordered, blurs, rows,
    AREA: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, REACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(1)
    line = blurs + slot * (4 + 2 * REACH)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < AREA
    safe = tl.minimum(place, AREA - 1)
    middle = bordered + slot.to(tl.int64) * ((3 * WIDTH + 6 * REACH) * (AREA // WIDTH))
    middle += (safe + (safe // WIDTH) * (2 * REACH) + REACH) * 3
    weight = tl.load(line + 2)
    r = tl.load(middle).to(tl.int32) * weight
    g = tl.load(middle + 1).to(tl.int32) * weight
    b = tl.load(middle + 2).to(tl.int32) * weight
    reach = tl.load(line + 1)
    for k in tl.static_range(1, REACH + 1):
        if k <= reach:
            weight = tl.load(line + 2 + k)
            r += (tl.load(middle - 3 * k).to(tl.int32) + tl.load(middle + 3 * k).to(tl.int32)) * weight
            g += (tl.load(middle + 1 - 3 * k).to(tl.int32) + tl.load(middle + 1 + 3 * k).to(tl.int32)) * weight
            b += (tl.load(middle + 2 - 3 * k).to(tl.int32) + tl.load(middle + 2 + 3 * k).to(tl.int32)) * weight
    target = rows + slot.to(tl.int64) * (3 * AREA) + place * 3
    tl.store(target, ((r + 2048) >> 12).to(tl.int16), inside)
    tl.store(target + 1, ((g + 2048) >> 12).to(tl.int16), inside)
    tl.store(target + 2, ((b + 2048) >> 12).to(tl.int16), inside)


@triton.jit
def _blurred_value(total, row, scales, channel, STEPS: tl.constexpr, KIND: tl.constexpr):
    """From the vertical sum to the value of the view, by way of the operations after the blur."""
    x = ((total + 32768) >> 16).to(tl.float32)
    x = _channel_operations(x, row, tl.load(row + 2) + 1, STEPS)
    red, green, blue = tl.load(scales), tl.load(scales + 1), tl.load(scales + 2)
    scale = tl.where(channel == 0, red, tl.where(channel == 1, green, blue))
    red, green, blue = tl.load(scales + 3), tl.load(scales + 4), tl.load(scales + 5)
    offset = tl.where(channel == 0, red, tl.where(channel == 1, green, blue))
    return _written(x, scale, offset, KIND)


@triton.jit
def _blur_columns(
    rows, blurs, table, scales, views,
    HEIGHT: tl.constexpr, WORDS: tl.constexpr, PAIRS: tl.constexpr, REACH: tl.constexpr, ALIGNED: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of WORDS words. Where PAIRS, a word holds two values of 12 bits, and one addition adds both: twice 4080 fits
    into 16 bits. Groups of ALIGNED words lie in one row."""
    slot = tl.program_id(1)
    line = blurs + slot * (4 + 2 * REACH)
    n = tl.load(line)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < HEIGHT * WORDS
    y = place // WORDS
    start = rows + slot.to(tl.int64) * (HEIGHT * WORDS)
    here = tl.load(start + place, inside, 0).to(tl.int32)
    weight = tl.load(line + 3 + REACH)
    low = (here & 0xFFFF) * weight
    high = (here >> 16) * weight
    reach = tl.load(line + 1)
    for k in range(1, reach + 1):
        weight = tl.load(line + 3 + REACH + k)
        up = tl.max_constancy(tl.multiple_of((tl.abs(y - k) - y) * WORDS, ALIGNED), ALIGNED)
        down = (HEIGHT - 1) - tl.abs((HEIGHT - 1) - k - y) - y
        down = tl.max_constancy(tl.multiple_of(down * WORDS, ALIGNED), ALIGNED)
        both = tl.load(start + (place + up), inside, 0).to(tl.int32)
        both += tl.load(start + (place + down), inside, 0).to(tl.int32)
        low += (both & 0xFFFF) * weight
        if PAIRS:
            high += (both >> 16) * weight
    row = table + n * (HEAD + 2 * STEPS)
    kind: tl.constexpr = views.dtype.element_ty
    if PAIRS:
        first = (place * 2) % 3
        second = tl.where(first == 2, 0, first + 1)
        values = tl.interleave(
            _blurred_value(low, row, scales, first, STEPS, kind), _blurred_value(high, row, scales, second, STEPS, kind)
        )
        each = tl.program_id(0) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
        tl.store(views + n.to(tl.int64) * (HEIGHT * WORDS * 2) + each, values, each < HEIGHT * WORDS * 2)
    else:
        value = _blurred_value(low, row, scales, place % 3, STEPS, kind)
        tl.store(views + n.to(tl.int64) * (HEIGHT * WORDS) + place, value, inside)
