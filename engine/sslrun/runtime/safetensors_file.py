"""Files of tensors in the safetensors format: 8 bytes with the length of the header, a JSON header, raw bytes.

Every dtype that the format has is stored under its name there. complex32 and complex128, which it does not have, are
stored as their real view, and the file's metadata lists them.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sslrun.errors import UsageError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float4_e2m1fn_x2: "F4",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
AS_REAL = (torch.complex32, torch.complex128)
_COMPLEX = "complex"  # metadata key: JSON list of the tensors that are stored as their real view


def require_storable(state: Mapping[str, Any]) -> None:
    """Check that every entry of a model's `state_dict()` can be written to a checkpoint. Called before training.

    Raises:
        UsageError: an entry cannot be written; the message has its name and its dtype.
    """
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            kind = f"is a {type(value).__name__}, not a tensor"
        elif value.layout != torch.strided:
            kind = f"has the layout {value.layout}"
        elif value.dtype == torch.float4_e2m1fn_x2 and value.dim() == 0:
            kind = f"is a scalar of dtype {value.dtype}, which is half a byte to a reader"
        elif value.dtype not in DTYPES and value.dtype not in AS_REAL:
            kind = f"has the dtype {value.dtype}"
        else:
            continue
        raise UsageError(
            f"model state {name!r} {kind}: a checkpoint cannot store it; use another dtype, or register the buffer "
            "with persistent=False if it can be recomputed"
        )


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write a file of tensors, wait until it is on the disk, and return its size and hash for a manifest.

    The library's own writer is not used: it refuses tensors that share storage or are strided, needs all of them on the
    CPU at once, and its file could be hashed only by reading it back. This one copies one tensor at a time, wide dtypes
    first so that the data stays aligned.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    as_real = [name for name in order if tensors[name].dtype in AS_REAL]
    about = dict(metadata or {}) | ({_COMPLEX: json.dumps(as_real)} if as_real else {})
    header: dict[str, Any] = {"__metadata__": about} if about else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {**_entry(tensor), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for data in (len(text).to_bytes(8, "little"), text):
            file.write(data)
            digest.update(data)
        for name in order:
            whole = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous()
            raw = whole.reshape(-1).view(torch.uint8).numpy()
            file.write(raw.data)
            digest.update(raw.data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": 8 + len(text) + end, "sha256": digest.hexdigest()}


def _entry(tensor: torch.Tensor) -> dict[str, Any]:
    """`dtype` and `shape` of a tensor in a safetensors header."""
    shape = list(tensor.shape)
    if tensor.dtype in AS_REAL:
        return {"dtype": DTYPES[tensor.dtype.to_real()], "shape": [*shape, 2]}
    if tensor.dtype == torch.float4_e2m1fn_x2:  # torch counts pairs, safetensors single values
        shape[-1] *= 2
    return {"dtype": DTYPES[tensor.dtype], "shape": shape}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that `write_tensors`, or any other program, wrote in the safetensors format.

    Raises:
        OSError, SafetensorError: the file cannot be read.
    """
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        as_real = json.loads((file.metadata() or {}).get(_COMPLEX, "[]"))
    return tensors | {name: torch.view_as_complex(tensors[name]) for name in as_real}
