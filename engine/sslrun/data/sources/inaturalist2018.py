"""iNaturalist 2018 (Van Horn et al. 2018)."""

import json

import numpy as np

from sslrun.data.sources.annotations import AnnotatedImages
from sslrun.data.sources.files import need
from sslrun.data.sources.paths import Paths
from sslrun.data.sources.seen import Seen
from sslrun.errors import UsageError


class INaturalist2018(AnnotatedImages):
    """iNaturalist 2018 (Van Horn et al. 2018): 437,513 training images of 8,142 species.

    Args:
        data_prefix: folder that holds `train_val2018`.
        ann_file: `train2018.json` as published, or a text file of lines `path label`. If it is not given, each folder
            that holds images is a class, and validation images, which are in the same folders, are among them.
    """

    nominal_size = 437_513

    def read_annotations(self, ann_file: str, root: str, key: str) -> tuple[Paths, np.ndarray | None]:
        if not ann_file.endswith(".json"):
            return super().read_annotations(ann_file, root, key)
        seen = Seen()
        with need(ann_file, f"set {key}.ann_file to train2018.json"):
            seen.read(ann_file)
            with open(ann_file, "rb") as file:
                content = file.read()
        try:
            table = json.loads(content)
            classes = {one["image_id"]: one["category_id"] for one in table["annotations"]}
            labels = np.array([classes[one["id"]] for one in table["images"]], dtype=np.int64)
            return Paths(root, (one["file_name"] for one in table["images"]), seen), labels
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UsageError(f"{ann_file} is not an annotation file of iNaturalist: {error!r}") from None
