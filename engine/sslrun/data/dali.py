"""Whether DALI is installed, and what to do where it is needed and is not."""

import functools
import importlib.util

from sslrun.errors import UsageError


@functools.cache
def is_installed() -> bool:
    """Whether `nvidia.dali` can be imported; it is not imported for the answer."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even its parent package
        return False


def require(purpose: str) -> None:
    """Do nothing where DALI is installed.

    Args:
        purpose: what needs it, the beginning of the error's sentence.

    Raises:
        UsageError: DALI is not installed; one line with the command that installs it.
    """
    if not is_installed():
        raise UsageError(f"{purpose} needs NVIDIA DALI, which is not installed: {install_command()}")


def install_command() -> str:
    """The command that installs the DALI for the CUDA version of this torch; CUDA 12's runs without a GPU too."""
    import torch

    major = (torch.version.cuda or "12").partition(".")[0]
    return f"pip install nvidia-dali-cuda{major}0"
