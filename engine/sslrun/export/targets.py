"""`sslrun export`: a trained encoder as a file, or a folder, that other programs load."""

from pathlib import Path

from sslrun.errors import RunFailed, UsageError
from sslrun.export.encoder import Encoder
from sslrun.export.files import SafetensorsFile, TimmFile, TorchvisionFile
from sslrun.export.huggingface import HuggingFaceFolder
from sslrun.export.onnx_file import OnnxFile
from sslrun.export.verify import NotTheSame
from sslrun.runtime.durable import arriving

Target = TorchvisionFile | TimmFile | SafetensorsFile | HuggingFaceFolder | OnnxFile

# Made of an encoder and a path, a target raises UsageError where the format has no such encoder. `write` makes the file
# under another name, `verify` reads it back from there and raises NotTheSame.
TARGETS: dict[str, type[Target]] = {
    "torchvision": TorchvisionFile,
    "timm": TimmFile,
    "safetensors": SafetensorsFile,
    "huggingface": HuggingFaceFolder,
    "onnx": OnnxFile,
}


def export(encoder: Encoder, target: str, path: Path, force: bool = False) -> str | None:
    """Write a trained encoder in somebody else's format; it is read back and tried before it has its name.

    Args:
        encoder: what to write.
        target: one of `TARGETS`.
        path: the file; of "huggingface" the folder.
        force: replace what is there.

    Returns:
        what its reader has to know and would not notice, if there is such a thing.

    Raises:
        UsageError: the format has no such encoder, or something stands at `path` that is not to be replaced.
        RunFailed: it could not be written, or did not read back as it should: nothing is left of it.
    """
    made = TARGETS[target](encoder, path)
    make_way(path, force)
    try:
        with arriving(path) as beside:
            made.write(beside)
            made.verify(beside)
    except NotTheSame as error:
        raise RunFailed(f"{path} was not kept: {error}") from error
    except OSError as error:
        raise RunFailed(f"{path} could not be written: {error.strerror or error}") from error
    return made.note


def make_way(path: Path, force: bool) -> None:
    """Make the folder that `path` will stand in.

    Raises:
        UsageError: something stands there that is not to be replaced, or the folder cannot be made.
    """
    if path.is_symlink() or path.exists():
        if not force:
            raise UsageError(f"{path} exists; --force replaces it")
        if path.is_dir() and (others := {part.name for part in path.iterdir()} - HuggingFaceFolder.names):
            raise UsageError(
                f"{path} is a folder with other things in it ({min(others)}), which --force does not replace"
            )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path.parent} cannot be made: {error.strerror}") from error
