"""Images that a text file lists."""

from sslrun.data.sources.annotations import read_annotations
from sslrun.data.sources.files import FileSource, Paths, folder_of


class ImageList(FileSource):
    """Images that a text file lists: a line is `path`, or `path label` with a number. All lines have a label or none.

    The file is UTF-8, or UTF-16 with a byte-order mark. Blanks or tabs separate path and label, and may end a line.

    Args:
        data_prefix: folder that relative paths start from.
        ann_file: the text file.
    """

    def __init__(self, data_prefix: str, ann_file: str) -> None:
        self.data_prefix = data_prefix
        self.ann_file = ann_file

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.ann_file!r})"

    def list_samples(self, key: str) -> Paths:
        root = folder_of(self.data_prefix, key)
        paths, self.labels = read_annotations(self.ann_file, root, key)
        return paths
