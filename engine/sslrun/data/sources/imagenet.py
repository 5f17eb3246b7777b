"""ImageNet-1k (Russakovsky et al. 2015)."""

import os

from sslrun.data.sources.annotations import AnnotatedImages
from sslrun.data.sources.files import exists, folder_of
from sslrun.data.sources.folders import images_below
from sslrun.data.sources.paths import Paths

# The lists that the shipped recipes name. They are part of the published data set, but not of every copy of it.
_USUAL_LISTS = ("/data/imagenet/meta/train.txt", "/data/imagenet/meta/val.txt")


class ImageNet(AnnotatedImages):
    """ImageNet-1k training or validation images, about 1.28 million in 1000 classes.

    Args:
        data_prefix: folder of the class folders (`n01440764`, ...), or of the images that `ann_file` names.
        ann_file: text file of lines `n01440764/n01440764_10026.JPEG 0`. If it is not given, the classes are taken from
            the folders, which gives the same labels; so they are if the list that the shipped recipes name,
            `data/imagenet/meta/train.txt` or `val.txt`, does not exist.
    """

    nominal_size = 1_281_167

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.data_prefix!r})"

    def list_samples(self, key: str) -> Paths:
        if self.ann_file is None:
            is_absent = False
        else:
            is_usual = os.path.abspath(self.ann_file).endswith(_USUAL_LISTS)
            is_absent = is_usual and not exists(self.ann_file)
            if not is_absent:
                return super().list_samples(key)
        listing = images_below(folder_of(self.data_prefix, key), self.data_prefix, key)
        paths, self.labels, self.class_names, self.remarks = listing
        if is_absent:
            assert self.ann_file is not None and paths.seen is not None
            paths.seen.linked(self.ann_file)
            self.remarks = [f"there is no {self.ann_file}: the classes are the folders", *self.remarks]
        return paths
