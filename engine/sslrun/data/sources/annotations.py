"""What sources with lists share: text files as editors and tools write them, and lines `path label`."""

import codecs
from array import array
from collections.abc import Iterator

import numpy as np

from sslrun.config.paths import FilePath, stated
from sslrun.data.sources.files import FileSource, folder_of, need, open_regular
from sslrun.data.sources.folders import in_leaf_folders
from sslrun.data.sources.paths import Paths
from sslrun.data.sources.seen import Seen
from sslrun.errors import UsageError

_BLANKS = " \t\r\n\f\v"
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class AnnotatedImages(FileSource, listed=False):
    """Base of sources whose images an annotation file lists, or otherwise class folders at any depth.

    Args:
        data_prefix: folder of the class folders, or of the images that `ann_file` names.
        ann_file: text file of lines `path label`. If it is not given, each folder that holds images is a class.
    """

    def __init__(self, data_prefix: FilePath, ann_file: FilePath | None = None) -> None:
        self.data_prefix = data_prefix
        self.ann_file = ann_file

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.ann_file or self.data_prefix!r})"

    def list_samples(self, key: str) -> Paths:
        root = folder_of(self.data_prefix, key)
        if self.ann_file is not None:
            paths, self.labels = self.read_annotations(self.ann_file, root, key)
        else:
            paths, self.labels, self.class_names, self.remarks = in_leaf_folders(root)
        return paths

    def read_annotations(self, ann_file: str, root: str, key: str) -> tuple[Paths, np.ndarray | None]:
        """Paths and labels of the images that the annotation file lists."""
        return read_annotations(ann_file, root, key)


def text_lines(file: str, advice: str) -> Iterator[str]:
    """The lines of a text file that are not blank, without the blanks and tabs that they end with.

    The file is UTF-8, or UTF-16 with a byte-order mark (of PowerShell); line ends are those of any system.

    Args:
        file: path.
        advice: what to do if the file cannot be read, such as `set data.source.ann_file to a list of images`.

    Raises:
        UsageError: it cannot be read, or is no text.
    """
    with need(file, advice):
        with open(open_regular(file)[0], "rb") as content:
            start = content.read(3)
        encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
        errors = "strict" if encoding == "utf-16" else "surrogateescape"  # file names may be any bytes
        try:
            with open(file, encoding=encoding, errors=errors) as lines:
                for line in lines:
                    if "\0" in line:
                        raise UsageError(f"{file} is no text file, or UTF-16 without a byte-order mark: {advice}")
                    if line := line.rstrip(_BLANKS):
                        yield line
        except UnicodeError as error:
            raise UsageError(f"{file} is not the text that its byte-order mark says ({error}): {advice}") from None


def read_annotations(ann_file: str, root: str, key: str) -> tuple[Paths, np.ndarray | None]:
    """Paths and labels of an annotation file. A path may hold spaces: only a last word that is a number is a label."""
    labels = array("q")
    unlabeled = 0

    def images() -> Iterator[str]:
        nonlocal unlabeled
        for line in text_lines(ann_file, f"set {key}.ann_file to the file that lists the images"):
            words = line.rsplit(None, 1)
            if len(words) == 2 and words[1].isdecimal():
                labels.append(_number(words[1], ann_file))
                yield words[0]
            else:
                unlabeled += 1
                yield line

    seen = Seen()
    with need(ann_file, f"set {key}.ann_file to the file that lists the images"):
        seen.read(ann_file)
    paths = Paths(root, images(), seen)
    if len(paths) == 0:
        problem = stated(ann_file, " lists no images")
        raise UsageError(f"{problem}: set {key}.ann_file to a file of lines `path` or `path label`")
    if labels and unlabeled:
        raise UsageError(f"{ann_file}: {unlabeled} of {len(paths)} lines have no label: label all of them or none")
    return paths, np.frombuffer(labels, dtype=np.int64) if labels else None


def _number(label: str, ann_file: str) -> int:
    if len(label.lstrip("0")) > 18:  # int64 has no room for more
        shown = label if len(label) < 40 else f"{label[:40]}..."
        raise UsageError(f"{ann_file}: the label {shown} is too large: labels are class numbers from 0")
    return int(label)
