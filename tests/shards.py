"""Tar shards for tests."""

import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sslrun.data.sources.web_dataset import WebDataset


def write_tar(path: Path, members: Mapping[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def opened(shards: Path | str, **options: Any) -> WebDataset:
    source = WebDataset(str(shards), **options)
    source.open()
    return source


def members(source: WebDataset) -> list[str]:
    """The names of the samples without the folder of the shards."""
    return [os.path.basename(name.partition("#")[0]) + "#" + name.partition("#")[2] for name in source.names]
