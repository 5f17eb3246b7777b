"""write_views: the bits of exact mode's torch forms for any recipe, batch and device; launches; bad input.

On the CPU without the interpreter, the tests look at the reference.
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ahead_of_time import launched
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction
from view_cases import KINDS, arguments_of, by_kernel, byol, check, group_of, in_torch, moco, pixels, tables

from sslkernels import pixel_operations, views
from sslkernels.device import INTERPRETED
from sslkernels.views import Table, write_views
from sslrun.data import operations
from sslrun.data.transforms import (
    ColorJitter,
    GaussianBlur,
    Normalize,
    RandomGrayscale,
    RandomHorizontalFlip,
    Solarization,
    Transform,
)

ONLY_INTERPRETED = pytest.mark.skipif(not INTERPRETED, reason="looks into the kernels as they run")
ONLY_COMPILED = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
META = torch.device("meta")

# By day a few small images; at night the sizes of the recipes and all kinds of images.
IMAGES = [
    *(("noise", 3, 33, 40), ("extreme", 1, 47, 33)),
    *(pytest.param(kind, 4, h, w, marks=pytest.mark.nightly) for kind in KINDS for h, w in ((32, 32), (33, 47))),
    *(pytest.param("smooth", 2, s, s, marks=pytest.mark.nightly) for s in (96, 224)),
    *(
        pytest.param("noise", 2, h, w, marks=pytest.mark.nightly)
        for h, w in ((9, 9), (16, 24), (11, 101), (65, 64), (130, 31), (250, 97))
    ),
]


@pytest.mark.parametrize(("kind", "count", "height", "width"), IMAGES)
@pytest.mark.parametrize("steps", [moco(), moco(strength=0.8, hue=0.2), byol()], ids=["moco", "swav", "byol"])
def test_the_recipes(device, steps, kind, count, height, width):
    check(steps, pixels(kind, count, height, width), device, seed=height)


FACTORS = {
    "drawn": None, "low": [0, 0, 0, -127], "high": [2, 2, 2, 127], "mixed": [1.8, 0.2, 1.8, -51], "huge": [9, 7, 5, 1],
    "odd": [1.1, 0.9000001, 1.3333334, 12],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["noise", pytest.param("extreme", marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    "factors",
    [pytest.param(v, id=k, marks=[] if k == "drawn" else [pytest.mark.nightly]) for k, v in FACTORS.items()],
)
def test_all_orders_of_the_jitter(device, kind, factors):
    changes = {"order": np.array(list(itertools.permutations(range(4))), dtype=np.int32)}
    if factors is not None:
        changes["factors"] = np.tile(np.array(factors, dtype=np.float32), (24, 1))
    check([ColorJitter(0.8, 0.8, 0.8, 0.5)], pixels(kind, 24, 11, 13), device, **changes)


def always(p: float, gray: float) -> list[Transform]:
    colors = [ColorJitter(0.8, 0.8, 0.8, 0.5, p=p), RandomGrayscale(gray)]
    return [*colors, GaussianBlur(p=p), Solarization(p=p), RandomHorizontalFlip(p)]


@pytest.mark.parametrize(
    "steps",
    [
        *([always(p, gray) for p in (0.0, 1.0) for gray in (0.0, 1.0)]),
        [],
        [RandomHorizontalFlip(), RandomHorizontalFlip()],
        [GaussianBlur(0.1, 7.9, p=1.0)],
        [GaussianBlur(p=1.0), Solarization(p=0.6), ColorJitter(brightness=0.4), RandomHorizontalFlip()],
        [Solarization(60, p=0.7), *moco()],
        [*moco(), *byol()],  # two contrasts and two blurs: two passes with bytes between them
        [GaussianBlur(p=0.7), RandomGrayscale(0.5), ColorJitter(contrast=0.5), GaussianBlur(0.5, 0.6)],
    ],
)
def test_other_lists_of_steps(device, steps):
    check(steps, pixels("noise", 3, 33, 40), device, seed=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_views_are_rounded_once_to_their_dtype(device, dtype):
    check(byol(), pixels("smooth", 3, 33, 34), device, dtype)


@pytest.mark.parametrize("tensors", [2, 3, 6])
def test_crops_lie_in_several_tensors(device, tensors):
    check(moco(), pixels("smooth", 6, 33, 20), device, tensors=tensors)


def test_an_images_neighbors_decide_no_bit(device):
    crops = pixels("noise", 5, 34, 33)
    group = group_of(moco(), crops)
    (table,) = tables(group, arguments_of(group, 5))
    whole = by_kernel([table], crops, device)
    assert table.taps is not None
    for row in (0, 3):
        own = slice(row, row + 1)
        blurred = int((table.codes[:row] == pixel_operations.BLUR).sum())
        taps = table.taps[:, blurred : blurred + int((table.codes[row] == pixel_operations.BLUR).sum())]
        part = Table(table.codes[own], table.values[own], table.flips[own], taps, table.scales)
        assert torch.equal(by_kernel([part], crops[own], device), whole[own])


def lattice(levels: Any) -> Tensor:
    """All colors of these levels as one image (1, n, n * n, 3)."""
    levels = torch.as_tensor(levels, dtype=torch.uint8)
    return torch.cartesian_prod(levels, levels, levels).view(1, len(levels), -1, 3)


def single(kind: int, value: float) -> dict[str, np.ndarray]:
    """The numbers of a jitter that does one thing to one image."""
    factors = np.ones((1, 4), dtype=np.float32)
    factors[0, kind] = value
    return {"order": np.array([[kind, -1, -1, -1]], dtype=np.int32), "factors": factors}


@pytest.mark.parametrize(("kind", "value"), [(3, -127), (3, 0), (3, 85), (2, 1.4), (1, 0.3)])
def test_colors_of_a_lattice_with_grays_and_ties(device, kind, value):
    levels = [0, 1, 2, 49, 50, 51, 85, 127, 128, 170, 204, 253, 254, 255]
    check([ColorJitter(0.8, 0.8, 0.8, 0.5)], lattice(levels), device, **single(kind, value))


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(0, 256, 16))
def test_all_colors(device, monkeypatch, first):
    """All 2**24 colors through hue, saturation and gray."""
    monkeypatch.setattr(views, "BLOCK", 2**17 if INTERPRETED else views.BLOCK)
    level = torch.arange(256, dtype=torch.uint8)
    crops = torch.cartesian_prod(level[first : first + 16], level, level).view(1, 1024, 1024, 3)
    steps = [ColorJitter(0.8, 0.8, 0.8, 0.5)]
    for numbers in (single(3, first * 5 % 255 - 127), single(2, 0.3 + first / 200)):
        check(steps, crops, device, **numbers)
    check([RandomGrayscale(1.0)], crops, device)


# What the arithmetic rests on: planted faults must be seen.


@triton.jit
def _cut_off_mean(total, count):
    return total // count


@triton.jit
def _quotient_without_half_unit(dividend, half_unit, divisor):
    return tl.floor(dividend * pixel_operations.reciprocal(divisor))


@triton.jit
def _reciprocal_too_large(x):
    return (1.0 / x) * 1.000004


@triton.jit
def _reciprocal_too_small(x):
    return (1.0 / x) * 0.999996


FAULTS = {
    "mean": (views, "rounded_mean", _cut_off_mean),
    "half unit": (pixel_operations, "floor_quotient", _quotient_without_half_unit),
}


def differences(kind: int, value: float, crops: Tensor) -> int:
    group = group_of([ColorJitter(0.8, 0.8, 0.8, 0.5)], crops)
    arguments = arguments_of(group, 1, **single(kind, value))
    expected = in_torch(group, crops, arguments)
    return int((by_kernel(tables(group, arguments), crops) != expected).sum())


@ONLY_INTERPRETED
@pytest.mark.parametrize(("fault", "kind", "value"), [("mean", 1, 0.3), ("half unit", 3, 12)])
def test_a_planted_fault_is_seen(monkeypatch, fault, kind, value):
    crops = lattice(range(0, 256, 15))
    assert differences(kind, value, crops) == 0
    monkeypatch.setattr(*FAULTS[fault])
    assert differences(kind, value, crops) > 0


@ONLY_INTERPRETED
@pytest.mark.parametrize("inexact", [_reciprocal_too_large, _reciprocal_too_small])
def test_quotients_bear_an_inexact_reciprocal(monkeypatch, inexact):
    monkeypatch.setattr(pixel_operations, "reciprocal", inexact)
    assert differences(3, 12, lattice(range(0, 256, 15))) == 0


def test_every_quotient_bears_a_reciprocal_that_is_wrong_by_32_units():
    """Both quotients of the hue for all dividends and divisors, and that half a unit is what they need."""
    chroma, value = np.meshgrid(np.arange(256), np.arange(1, 256))
    turn, divisor = np.meshgrid(np.arange(-255, 1276), np.arange(1, 256))
    cases = [
        (chroma * 255.0, value, 0.5, 255 * chroma // value, chroma <= value),
        (turn * 42.5, divisor, 0.25, 85 * turn // (2 * divisor), (turn >= -divisor) & (turn <= 5 * divisor)),
    ]
    for dividend, by, half_unit, expected, possible in cases:
        without = np.floor(dividend.astype(np.float32) * (np.float32(1) / by.astype(np.float32)))
        assert (without != expected)[possible].any()
        for units in (-32, -1, 0, 1, 32):
            reciprocal = ((np.float32(1) / by.astype(np.float32)).view(np.int32) + units).view(np.float32)
            quotient = np.floor((dividend + half_unit).astype(np.float32) * reciprocal)
            assert (quotient == expected)[possible].all()


def test_a_few_contracted_blends_would_differ():
    x, degenerate = (a.astype(np.float32) for a in np.meshgrid(np.arange(256), np.arange(256)))
    differ = 0
    for factor in np.random.default_rng(0).uniform(0.2, 1.8, 100).astype(np.float32):
        blended = np.floor(np.clip((x - degenerate) * factor + degenerate, 0, 255))
        exact = (x - degenerate).astype(np.float64) * factor + degenerate  # rounded once, as a fused multiply-add
        differ += (np.floor(np.clip(exact.astype(np.float32), 0, 255)) != blended).sum()
    assert 0 < differ < 100


def test_the_codes_are_those_of_the_transforms():
    names = ("NOTHING", "BRIGHTNESS", "CONTRAST", "SATURATION", "HUE", "GRAY", "SOLARIZE", "BLUR")
    assert all(getattr(operations, name) == getattr(pixel_operations, name) for name in names)


# Launches


def on_meta(steps: list[Transform], count: int, side: int, dtype: torch.dtype, seed: int) -> None:
    crops = torch.empty((count, side, side, 3), dtype=torch.uint8, device=META)
    group = group_of(steps, crops)
    (table,) = tables(group, arguments_of(group, count, seed))
    by_kernel([table], crops, META, dtype, tensors=2)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """The launches since the test began, none of which runs: kernel, arguments, constants and options."""
    seen: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        seen.append((self.__name__, args, options))

    monkeypatch.setattr(JITFunction, "run", run)
    return seen


@ONLY_COMPILED
def test_at_most_four_launches_without_contraction(launches):
    on_meta(moco(), 512, 224, torch.bfloat16, 0)
    names = ["_gray_sums", "_colors", "_blur_rows", "_blur_columns"]
    assert [name for name, _, _ in launches] == names
    assert all(options["enable_fp_fusion"] is False for *_, options in launches)
    launches.clear()
    on_meta([RandomHorizontalFlip()], 512, 224, torch.bfloat16, 0)
    assert [name for name, _, _ in launches] == ["_colors"]


class Copies(TorchDispatchMode):
    """Counts the tensors that are copied from the host to the device."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = [x for x in args if isinstance(x, Tensor)]
        self.count += isinstance(result, Tensor) and result.is_meta and any(not x.is_meta for x in given)
        return result


@ONLY_COMPILED
def test_one_copy_to_the_device_for_each_batch(launches):
    with Copies() as copies:
        on_meta(byol(), 64, 96, torch.bfloat16, 0)
    assert len(launches) == 4 and copies.count == 1


@ONLY_COMPILED
def test_the_batch_decides_nothing_that_is_compiled(launches):
    """Batches of all sizes, with and without contrasts and blurs: one variant of each kernel."""
    for steps in (moco(p=0.5), byol(blurred=0.3)):
        launches.clear()
        for seed, count in enumerate((512, 510, 64, 32, 16, 6, 4, 4, 2, 2, 2, 2)):
            on_meta(steps, count, 96, torch.bfloat16, seed)
        assert len(launches) < 4 * 12, "no batch had nothing to do"
        variants = {(name, *(arg.dtype for arg in args), *sorted(options.items())) for name, args, options in launches}
        assert all(isinstance(arg, Tensor) for _, args, _ in launches for arg in args)  # numbers are specialized
        assert len(variants) == 4
    two_sizes = launches[-1][2] | {}
    on_meta(byol(), 2, 64, torch.bfloat16, 0)
    assert launches[-1][2] != two_sizes, "another size is another variant"


@ONLY_COMPILED
@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_tables_begin_at_16_bytes(monkeypatch, launches, count):
    """Triton compiles another variant for an address that is no multiple of 16."""
    monkeypatch.setattr(views, "runs_triton", lambda *tensors: True)
    for seed in range(4):
        crops = pixels("noise", count, 33, 35)
        group = group_of(moco(), crops)
        by_kernel(tables(group, arguments_of(group, count, seed)), crops)
    assert all(arg.data_ptr() % 16 == 0 for _, args, _ in launches for arg in args)


@ONLY_COMPILED
def test_the_assembler_may_contract_nothing():
    """PTX says of each product and sum that it is rounded by itself; with contraction allowed, it does not."""
    plain = re.compile(r"\b(mul|add|sub)\.f32")
    call = lambda: on_meta([ColorJitter(0.4)], 4, 32, torch.float32, 0)  # noqa: E731
    (colors,) = launched(call, 90)
    assert not plain.search(colors.ptx) and "mul.rn.f32" in colors.ptx
    with mock.patch.dict(views.OPTIONS, enable_fp_fusion=True):
        (contracted,) = launched(call, 90)
    assert plain.search(contracted.ptx)


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, set[int]]]:
    """Addresses of the bytes that each interpreted launch reads and those that it writes, each once."""
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    seen: dict[str, set[int]] = {}
    current = [""]
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def note(kind: str, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        places = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)].astype(np.int64).ravel()
        seen.setdefault(f"{current[0]} {kind}", set()).update((places[:, None] + np.arange(size)).ravel().tolist())

    def loaded(self: Any, pointers: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        note("reads", pointers, mask)
        return load(self, pointers, mask, *rest, **more)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note("writes", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    run = InterpretedFunction.run

    def named(self: Any, *args: Any, **options: Any) -> Any:
        current[0] = self.fn.__name__
        return run(self, *args, **options)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", loaded)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", stored)
    monkeypatch.setattr(InterpretedFunction, "run", named)
    return seen


@ONLY_INTERPRETED
def test_the_bytes_that_are_moved_are_those_that_are_stated(touched):
    crops = pixels("noise", 4, 48, 64)
    group = group_of(moco(p=0.6), crops)
    (table,) = tables(group, arguments_of(group, 4, seed=1))
    for code in (operations.CONTRAST, operations.BLUR):
        assert 0 < (table.codes == code).sum() < 4
    out = by_kernel([table], crops)
    assert sum(map(len, touched.values())) == pytest.approx(views.bytes_moved(out, table), rel=0.02)


def test_512_views_of_mocov2_move_at_most_0_6_gb():
    out = torch.empty((512, 3, 224, 224), dtype=torch.bfloat16, device=META)
    group = group_of(moco(), torch.empty((1, 224, 224, 3), device=META))
    (table,) = tables(group, arguments_of(group, 512))
    assert 0.5e9 < views.bytes_moved(out, table) <= 0.6e9


def test_fake_tensors_pass(device):
    with FakeTensorMode(allow_non_fake_inputs=True):
        crops = torch.empty((2, 16, 16, 3), dtype=torch.uint8, device=device)
        table = Table(*(torch.zeros((2, 3), dtype=kind) for kind in (torch.int32, torch.float32)), torch.zeros(2) > 0)
        write_views(torch.empty_like(crops).permute(0, 3, 1, 2), [crops], table)


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    crops = pixels("noise", 8, 64, 64).cuda()
    group = group_of(moco(), crops, Normalize())
    passes = tables(group, arguments_of(group, 8))
    by_kernel(passes, crops, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        by_kernel(passes, crops, "cuda", torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def arguments(**changes: Any) -> tuple[Tensor, list[Tensor], Table]:
    fields = {"codes": torch.zeros((2, 1), dtype=torch.int32), "values": torch.ones(2, 1), "flips": torch.ones(2) > 0}
    out, crops = torch.zeros((2, 8, 9, 3)).permute(0, 3, 1, 2), [torch.zeros((2, 8, 9, 3), dtype=torch.uint8)]
    table = Table(**fields | {"scales": torch.ones(2, 3)} | {k: v for k, v in changes.items() if k in Table._fields})
    return changes.get("out", out), changes.get("crops", crops), table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": torch.zeros(2, 3, 8, 9)}, r"out: expected \(N, 3, h, w\) floating, contiguous as channels-last"),
        ({"scales": None}, r"out: expected \(N, 3, h, w\) uint8"),
        ({"crops": [torch.zeros(2, 8, 9, 3)]}, r"crops\[0\]: expected \(n, 8, 9, 3\) uint8, contiguous, got"),
        (
            {"crops": [torch.zeros((1, 8, 9, 3), dtype=torch.uint8)]},
            "crops: expected 2 images, as many as in out, got 1",
        ),
        ({"crops": [torch.zeros((2, 8, 9, 3), dtype=torch.uint8, device="meta")]}, r"crops\[0\]: expected the device"),
        ({"codes": torch.zeros(2, 1)}, r"codes: expected \(2, 1\) torch.int32 on the CPU"),
        ({"codes": torch.ones((2, 2), dtype=torch.int32), "values": torch.ones(2, 2)}, "at most one CONTRAST"),
        ({"codes": torch.tensor([[6, -1], [-1, 6]], dtype=torch.int32), "values": torch.ones(2, 2)}, "BLUR in one"),
        ({"codes": torch.tensor([[6, 4], [-1, 4]], dtype=torch.int32), "values": torch.ones(2, 2)}, r"BLUR, got \[4\]"),
        ({"values": torch.ones(2, 2)}, r"values: expected \(2, 1\) torch.float32"),
        ({"flips": torch.ones(2)}, r"flips: expected \(2,\) torch.bool"),
        ({"scales": torch.ones(3, 2)}, r"scales: expected \(2, 3\)"),
        ({"taps": torch.ones(2, 1, 9)}, r"taps: expected \(2, M, T\) with T of at most 8"),
    ],
)
def test_bad_input_is_named_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        write_views(*arguments(**changes))
    assert "\n" not in str(raised.value)
    write_views(*arguments())
