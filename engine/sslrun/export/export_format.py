"""The contract of an export format: what `sslrun export RUN --to FORMAT` writes.

To add one, write a class; FORMAT is its name in lower case (docs/add-a-metric.md).
"""

from pathlib import Path
from typing import ClassVar

from sslrun.config.component import Component
from sslrun.export.encoder import Encoder


class ExportFormat(Component, kind="formats"):
    """A file, or a folder, that another program loads. Calls come in the order `prepare`, `write`, `verify`."""

    suffixes: ClassVar[tuple[str, ...]] = ()
    """What PATH may end in; () for anything."""

    folder_names: ClassVar[frozenset[str]] = frozenset()
    """If the format is a folder: the names in it. A folder that has no others may be replaced (`--force`)."""

    note: str | None = None
    """What a reader of the file has to know and would not notice."""

    def prepare(self, encoder: Encoder, path: Path) -> None:
        """Check that the format can hold the encoder, before anything is written.

        Args:
            encoder: what to write.
            path: where the export will be.

        Raises:
            UsageError: the format has no such network, or a package is missing.
        """

    def write(self, encoder: Encoder, path: Path) -> None:
        """Write the encoder, under a temporary name."""
        raise NotImplementedError

    def verify(self, encoder: Encoder, path: Path) -> None:
        """Read back what was written. Raises NotTheSame (sslrun.export.verify) where it differs from the encoder."""
        raise NotImplementedError
