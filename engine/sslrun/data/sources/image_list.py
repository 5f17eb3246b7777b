"""Images that a text file lists."""

from typing import Literal

from sslrun.config.paths import FilePath
from sslrun.data.levels import checked
from sslrun.data.sources.annotations import read_annotations
from sslrun.data.sources.files import FileSource, folder_of
from sslrun.data.sources.paths import Paths
from sslrun.errors import UsageError


class ImageList(FileSource):
    """Images that a text file lists: a line is `path`, or `path label` with a number. All lines have a label or none.

    The file is UTF-8, or UTF-16 with a byte-order mark. Blanks or tabs separate path and label, and may end a line.

    Args:
        data_prefix: folder that relative paths start from.
        ann_file: the text file.
        range: how images with more than 8 bits (16-bit PNG and TIFF, float TIFF) are read: the values that become black
            and white, such as [0, 1023]. "auto" takes 0 to the smallest of 255, 4095 and 65535 (and of 1, for floats)
            that no value of the image exceeds; "full" the whole range of the type, 0 to 65535 or 0 to 1.
        channels: channels of the images. Color images are read as gray for 1. Other numbers are read as the bands of
            TIFF files, as many as the file has ('sslrun[tiff]' has the reader), or of PNG files with an alpha channel.
    """

    def __init__(
        self,
        data_prefix: FilePath,
        ann_file: FilePath,
        range: Literal["auto", "full"] | list[float] = "auto",
        channels: int = 3,
    ) -> None:
        if channels < 1:
            raise UsageError(f"channels is {channels}, expected 1 or more")
        self.data_prefix, self.range, self.channels = data_prefix, checked(range), channels
        self.ann_file = ann_file

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.ann_file!r})"

    def list_samples(self, key: str) -> Paths:
        root = folder_of(self.data_prefix, key)
        paths, self.labels = read_annotations(self.ann_file, root, key)
        self.remarks = self.remarks_on_levels(paths)
        return paths
