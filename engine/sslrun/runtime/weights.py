"""Weights from a file or a run, for `load_from`. Tensors only: nothing is unpickled that could be code."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sslrun.errors import UsageError
from sslrun.runtime import checkpoint


def load_weights(path: Path) -> dict[str, Tensor]:
    """Name to tensor, from a checkpoint folder, a run folder, a `.safetensors` or a `.pth` file.

    Raises:
        UsageError: there is nothing there, or nothing that holds weights.
    """
    if path.is_dir():
        return checkpoint.load(checkpoint.find(path))[0]["model"]
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"load_from: no weights can be read from {path}: {reason}") from None
    weights = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UsageError(f"load_from: {path} holds something else than named tensors")
    return weights
