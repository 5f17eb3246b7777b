"""The only file that imports pyarrow, which reads and writes .parquet."""

from typing import Any

from sslrun.errors import UsageError


def pyarrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet.

    Raises:
        UsageError: they are not installed; one line.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(f".parquet needs pyarrow (pip install 'sslrun[parquet]'): {error}") from None
    return pyarrow, pyarrow.parquet
