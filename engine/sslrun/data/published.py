"""Published sets of image files beside ImageNet: its 100-class part, Places205, iNaturalist 2018."""

import json
import os
from collections.abc import Iterator, Sequence

import numpy as np

from sslrun.data.sources import Paths, Source, folder_of, in_class_folders, read_annotations, walk
from sslrun.errors import UsageError


class ImageNet100(Source):
    """100 of ImageNet's classes, 126,689 training images in the list of Tian et al. 2020 (arXiv 1906.05849).

    Args:
        data_prefix: folder of ImageNet's class folders (`n01440764`, ...); those of other classes may lie there too.
        class_file: text file that names the folders to use, the first word of each line. Labels follow their sorted
            order.
    """

    nominal_size = 126_689

    def __init__(self, data_prefix: str, class_file: str) -> None:
        self.data_prefix = data_prefix
        self.class_file = class_file

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.data_prefix!r})"

    def _list(self, key: str) -> Sequence[str]:
        root = folder_of(self.data_prefix, key)
        try:
            with open(self.class_file, encoding="utf-8") as lines:
                names = sorted({line.split()[0] for line in lines if line.strip()})
        except OSError as error:
            raise UsageError(
                f"{self.class_file}: {error.strerror}: set {key}.class_file to a list of classes"
            ) from None
        missing = [name for name in names if not os.path.isdir(os.path.join(root, name))]
        if missing:
            raise UsageError(
                f"{self.data_prefix} lacks {len(missing)} of the {len(names)} class folders that {self.class_file} "
                f"names, the first of them {missing[0]}"
            )
        paths, self.labels = in_class_folders(root, names)
        self.class_names = names
        return paths


class Listed(Source, listed=False):
    """Sets with an annotation file, or, without it, with a folder for each class at any depth.

    Args:
        data_prefix: folder of the class folders, or of the images that `ann_file` names.
        ann_file: lists the images; not given, all below `data_prefix` are taken.
    """

    def __init__(self, data_prefix: str, ann_file: str | None = None) -> None:
        self.data_prefix = data_prefix
        self.ann_file = ann_file

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.ann_file or self.data_prefix!r})"

    def _list(self, key: str) -> Sequence[str]:
        root = folder_of(self.data_prefix, key)
        if self.ann_file is not None:
            paths, self.labels = self._read(self.ann_file, root, key)
            return paths
        names: dict[str, int] = {}
        labels: list[int] = []

        def listed() -> Iterator[str]:
            for path in walk(root):
                labels.append(names.setdefault(os.path.dirname(path), len(names)))
                yield path

        paths = Paths(root, listed())
        self.class_names, self.labels = list(names), np.array(labels, dtype=np.int64)
        return paths

    def _read(self, ann_file: str, root: str, key: str) -> tuple[Paths, np.ndarray | None]:
        return read_annotations(ann_file, root, key)


class Places205(Listed):
    """Places205 (Zhou et al. 2014): 2,448,873 training images of 205 kinds of scene.

    Args:
        data_prefix: folder of the class folders (`a/abbey`, ...), or of the images that `ann_file` names.
        ann_file: lines `a/abbey/gsun_0123.jpg 0`, as in `train_places205.csv`; not given, each folder that holds
            images is a class.
    """

    nominal_size = 2_448_873


class INaturalist2018(Listed):
    """iNaturalist 2018 (Van Horn et al. 2018): 437,513 training images of 8,142 species.

    Args:
        data_prefix: folder of `train_val2018`.
        ann_file: `train2018.json` as published, or lines `path label`; not given, each folder that holds images is a
            class, and validation images, which lie in the same folders, are among them.
    """

    nominal_size = 437_513

    def _read(self, ann_file: str, root: str, key: str) -> tuple[Paths, np.ndarray | None]:
        if not ann_file.endswith(".json"):
            return read_annotations(ann_file, root, key)
        try:
            with open(ann_file, encoding="utf-8") as file:
                table = json.load(file)
            classes = {one["image_id"]: one["category_id"] for one in table["annotations"]}
            labels = np.array([classes[one["id"]] for one in table["images"]], dtype=np.int64)
            return Paths(root, (one["file_name"] for one in table["images"])), labels
        except OSError as error:
            raise UsageError(f"{ann_file}: {error.strerror}: set {key}.ann_file to train2018.json") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{ann_file} is not an annotation file of iNaturalist: {error!r}") from None
