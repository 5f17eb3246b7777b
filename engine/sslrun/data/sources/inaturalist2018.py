"""iNaturalist 2018 (Van Horn et al. 2018)."""

import json

import numpy as np

from sslrun.data.sources.files import FileSource, Paths, folder_of, in_leaf_folders, read_annotations
from sslrun.errors import UsageError


class INaturalist2018(FileSource):
    """iNaturalist 2018 (Van Horn et al. 2018): 437,513 training images of 8,142 species.

    Args:
        data_prefix: folder that holds `train_val2018`.
        ann_file: `train2018.json` as published, or a text file of lines `path label`. If it is not given, each folder
            that holds images is a class, and validation images, which are in the same folders, are among them.
    """

    nominal_size = 437_513

    def __init__(self, data_prefix: str, ann_file: str | None = None) -> None:
        self.data_prefix = data_prefix
        self.ann_file = ann_file

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.ann_file or self.data_prefix!r})"

    def list_samples(self, key: str) -> Paths:
        root = folder_of(self.data_prefix, key)
        if self.ann_file is None:
            paths, self.labels, self.class_names = in_leaf_folders(root)
        elif self.ann_file.endswith(".json"):
            paths, self.labels = _read_json(self.ann_file, root, key)
        else:
            paths, self.labels = read_annotations(self.ann_file, root, key)
        return paths


def _read_json(ann_file: str, root: str, key: str) -> tuple[Paths, np.ndarray]:
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
