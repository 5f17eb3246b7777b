"""`sslrun export`: a trained encoder as a file, or a folder, that other programs load."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sslrun.config.merge import nearest
from sslrun.errors import RunFailed, UsageError
from sslrun.export import huggingface, onnx_file, tensor_files  # noqa: F401 (the formats that ship)
from sslrun.export.encoder import Encoder
from sslrun.export.export_format import ExportFormat
from sslrun.export.verify import NotTheSame
from sslrun.runtime.durable import arriving


def format_called(word: str) -> ExportFormat:
    """The format of this name (of the class, in lower case). UsageError: there is none."""
    known = {name.lower(): cls for name, cls in sorted(ExportFormat.registry.items())}
    if word.lower() not in known:
        near = nearest(word, list(known)) or f"; there are {', '.join(known)}; custom_imports adds your own"
        raise UsageError(f"there is no export format called {word!r}{near}")
    format: ExportFormat = known[word.lower()]()
    return format


def export(encoder: Encoder, to: str, path: Path, force: bool = False) -> str | None:
    """Write a trained encoder in another program's format; it is read back and tested before it gets its name.

    Args:
        encoder: what to write.
        to: name of the format.
        path: the file, or the folder.
        force: replace what is there.

    Returns:
        The format's note, if it has one.

    Raises:
        UsageError: the format has no such encoder, or something at `path` must not be replaced.
        RunFailed: the file could not be written, or did not read back as it should; nothing is left of it.
    """
    format = format_called(to)
    if format.suffixes and path.suffix not in format.suffixes:
        raise UsageError(f"{path} must end in {' or '.join(format.suffixes)}")
    format.prepare(encoder, path)
    make_way(path, force, format.folder_names)
    with verified(path) as beside:
        format.write(encoder, beside)
        format.verify(encoder, beside)
    return format.note


@contextlib.contextmanager
def verified(path: Path) -> Iterator[Path]:
    """A temporary path, at which the block writes something and reads it back; only then it gets its name.

    Raises:
        RunFailed: it could not be written, or the block raised NotTheSame; nothing is left of it.
    """
    try:
        with arriving(path) as beside:
            yield beside
    except NotTheSame as error:
        raise RunFailed(f"{path} was not kept: {error}") from error
    except OSError as error:
        raise RunFailed(f"{path} could not be written: {error.strerror or error}") from error


def make_way(path: Path, force: bool, folder_names: frozenset[str] = frozenset()) -> None:
    """Make the folder that `path` will stand in.

    Args:
        path: where something will be written.
        force: whether what is there may be replaced.
        folder_names: the names in a folder that may be replaced.

    Raises:
        UsageError: something stands there that must not be replaced, or the folder cannot be made.
    """
    if path.is_symlink() or path.exists():
        if not force:
            raise UsageError(f"{path} exists; --force replaces it")
        if path.is_dir() and (others := {entry.name for entry in path.iterdir()} - folder_names):
            raise UsageError(
                f"{path} is a folder with other things in it ({min(others)}), which --force does not replace"
            )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path.parent} cannot be made: {error.strerror}") from error
