"""ImageNet-100: the 100 classes of ImageNet chosen by Tian et al. 2020 (arXiv 1906.05849)."""

import os

from sslrun.config.paths import FilePath
from sslrun.data.sources.annotations import text_lines
from sslrun.data.sources.files import FileSource, folder_of, is_folder, need
from sslrun.data.sources.folders import in_class_folders
from sslrun.data.sources.paths import Paths
from sslrun.data.sources.seen import Seen
from sslrun.errors import UsageError


class ImageNet100(FileSource):
    """100 of ImageNet's classes, 126,689 training images in the list of Tian et al. 2020 (arXiv 1906.05849).

    Args:
        data_prefix: folder of ImageNet's class folders (`n01440764`, ...). It may hold those of other classes, too.
        class_file: text file whose lines begin with the name of a class folder to use. Labels follow the sorted
            order of these names.
    """

    nominal_size = 126_689

    def __init__(self, data_prefix: FilePath, class_file: FilePath) -> None:
        self.data_prefix = data_prefix
        self.class_file = class_file

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.data_prefix!r})"

    def list_samples(self, key: str) -> Paths:
        root = folder_of(self.data_prefix, key)
        advice = f"set {key}.class_file to a list of classes"
        lists = Seen()
        with need(self.class_file, advice):
            lists.read(self.class_file)
        names = sorted({line.split()[0] for line in text_lines(self.class_file, advice)})
        missing = [name for name in names if not is_folder(os.path.join(root, name))]
        if missing:
            raise UsageError(
                f"{self.data_prefix} lacks {len(missing)} of the {len(names)} class folders that {self.class_file} "
                f"names, the first of them {missing[0]}"
            )
        paths, self.labels, self.class_names, self.remarks = in_class_folders(root, names)
        assert paths.seen is not None
        paths.seen.update(lists)
        return paths
