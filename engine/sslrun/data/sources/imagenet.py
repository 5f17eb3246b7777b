"""ImageNet-1k (Russakovsky et al. 2015)."""

import os

from sslrun.data.sources.files import AnnotatedImages, Paths, folder_of, images_below


class ImageNet(AnnotatedImages):
    """ImageNet-1k training or validation images, about 1.28 million in 1000 classes.

    Args:
        data_prefix: folder of the class folders (`n01440764`, ...), or of the images that `ann_file` names.
        ann_file: text file of lines `n01440764/n01440764_10026.JPEG 0`. If it does not exist or is not given, the
            classes are taken from the folders, which gives the same labels.
    """

    nominal_size = 1_281_167

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.data_prefix!r})"

    def list_samples(self, key: str) -> Paths:
        if self.ann_file is not None and os.path.exists(self.ann_file):
            return super().list_samples(key)
        paths, self.labels, self.class_names = images_below(folder_of(self.data_prefix, key), self.data_prefix, key)
        return paths
