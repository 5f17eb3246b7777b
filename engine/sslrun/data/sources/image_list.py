"""Images that a text file lists."""

from sslrun.config.paths import FilePath
from sslrun.data.sources.files import FileSource, Paths, folder_of, read_annotations


class ImageList(FileSource):
    """Images that a text file lists: a line is `path`, or `path label` with a number. All lines have a label or none.

    Args:
        data_prefix: folder that relative paths start from.
        ann_file: the text file.
    """

    def __init__(self, data_prefix: FilePath, ann_file: FilePath) -> None:
        self.data_prefix = data_prefix
        self.ann_file = ann_file

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.ann_file!r})"

    def list_samples(self, key: str) -> Paths:
        root = folder_of(self.data_prefix, key)
        paths, self.labels = read_annotations(self.ann_file, root, key)
        return paths
