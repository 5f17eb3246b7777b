"""Compiles the kernels that a call would launch, without a GPU, and reads the assembler's report.

`launched(call, arch)` runs `call` with tensors on the meta device; every `kernel[grid](...)` in it is compiled for that
architecture with exactly the constants, types, alignments and options of the launch, and nothing runs.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from sslkernels import device

ASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """Resources of a kernel: registers and spilled bytes per thread, shared bytes and warps per program."""

    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    ptx: str = field(repr=False)


def launched(call: Callable[[], Any], arch: int) -> list[Resources]:
    """The kernels that `call` launches, compiled for `arch` (80, 90), each once, in order of first launch."""
    compiled: dict[tuple[Any, ...], Resources] = {}

    def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert all(isinstance(size, int) for size in grid), "grids are tuples of whole numbers"
        source, options = _source(self, args, options)
        key = (self.__name__, str(source.signature), str(source.constants), str(source.attrs), str(options))
        if key not in compiled:
            compiled[key] = _compiled(source, options, arch)

    with (
        mock.patch.object(JITFunction, "run", compile_instead),
        mock.patch.object(device, "ASSUMED_ARCHITECTURE", arch),
    ):
        call()
    return list(compiled.values())


def _source(kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, args, strict=False)) | {name: options.pop(name) for name in names if name in options}
    assert values.keys() == set(names), f"{kernel.__name__} is called without {set(names) - values.keys()}"
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(kernel, signature, constants, attributes), options


def _compiled(source: ASTSource, options: dict[str, Any], arch: int) -> Resources:
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    report = assembled(compiled.asm["ptx"], options.get("enable_fp_fusion", True))
    return Resources(
        kernel=compiled.metadata.name,
        registers=report.registers,
        spilled_bytes=report.spilled_bytes,
        shared_bytes=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        ptx=compiled.asm["ptx"],
    )


@dataclass(frozen=True)
class Report:
    """What the assembler says: registers and spilled bytes per thread."""

    registers: int
    spilled_bytes: int


def assembled(ptx: str, contracts: bool = True) -> Report:
    """Assembles a kernel for the architecture that it names, with contraction as Triton does it or without."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.ptx").write_text(ptx)
        target = re.search(r"^\.target (\S+)", ptx, re.MULTILINE)[1].rstrip(",")
        contraction = [] if contracts else ["--fmad=false"]
        command = [str(ASSEMBLER), "-v", *contraction, f"--gpu-name={target}", "kernel.ptx", "-o", "kernel.cubin"]
        report = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    return Report(
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spilled_bytes=sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)),
    )
