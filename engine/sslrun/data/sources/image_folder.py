"""Images in a folder, with or without class folders."""

from typing import Literal

from sslrun.config.paths import FilePath
from sslrun.data.levels import checked
from sslrun.data.sources.files import FileSource, folder_of
from sslrun.data.sources.folders import images_below
from sslrun.data.sources.paths import Paths
from sslrun.errors import UsageError


class ImageFolder(FileSource):
    """A folder of images: one subfolder per class, or no classes at all.

    Images directly in the folder make it unlabeled, and everything below it is one flat set. Otherwise each
    subfolder is a class (an empty one too), numbered in sorted order, with all images below it. Hidden folders and
    `__MACOSX` are no classes. Files are images by their suffix (.jpg, .jpeg, .jpe, .jfif, .png, .webp, .bmp, .tif,
    .ppm, ...); others, such as .gif and .heic, are passed over, which is logged. Links are followed, except to folders
    that are listed elsewhere.

    Args:
        data_prefix: the folder; a relative path starts from the working directory.
        range: how images with more than 8 bits (16-bit PNG and TIFF, float TIFF) are read: the values that become black
            and white, such as [0, 1023]. "auto" takes 0 to the smallest of 255, 4095 and 65535 (and of 1, for floats)
            that no value of the image exceeds; "full" the whole range of the type, 0 to 65535 or 0 to 1.
        channels: channels of the images. Color images are read as gray for 1. Other numbers are read as the bands of
            TIFF files, as many as the file has ('sslrun[tiff]' has the reader), or of PNG files with an alpha channel.
    """

    def __init__(
        self,
        data_prefix: FilePath,
        range: Literal["auto", "full"] | list[float] = "auto",
        channels: int = 3,
    ) -> None:
        if channels < 1:
            raise UsageError(f"channels is {channels}, expected 1 or more")
        self.data_prefix, self.range, self.channels = data_prefix, checked(range), channels

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.data_prefix!r})"

    def list_samples(self, key: str) -> Paths:
        root = folder_of(self.data_prefix, key)
        paths, self.labels, self.class_names, self.remarks = images_below(root, self.data_prefix, key)
        self.remarks = [*self.remarks, *self.remarks_on_levels(paths)]
        return paths
