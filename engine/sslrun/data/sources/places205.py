"""Places205 (Zhou et al. 2014)."""

from sslrun.data.sources.files import FileSource, Paths, folder_of, in_leaf_folders, read_annotations


class Places205(FileSource):
    """Places205 (Zhou et al. 2014): 2,448,873 training images of 205 kinds of scene.

    Args:
        data_prefix: folder of the class folders (`a/abbey`, ...), or of the images that `ann_file` names.
        ann_file: text file of lines `a/abbey/gsun_0123.jpg 0`, such as `train_places205.csv`. If it is not given,
            each folder that holds images is a class.
    """

    nominal_size = 2_448_873

    def __init__(self, data_prefix: str, ann_file: str | None = None) -> None:
        self.data_prefix = data_prefix
        self.ann_file = ann_file

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.ann_file or self.data_prefix!r})"

    def list_samples(self, key: str) -> Paths:
        root = folder_of(self.data_prefix, key)
        if self.ann_file is not None:
            paths, self.labels = read_annotations(self.ann_file, root, key)
        else:
            paths, self.labels, self.class_names = in_leaf_folders(root)
        return paths
