"""Places205 (Zhou et al. 2014)."""

from sslrun.data.sources.annotations import AnnotatedImages


class Places205(AnnotatedImages):
    """Places205 (Zhou et al. 2014): 2,448,873 training images of 205 kinds of scene.

    Args:
        data_prefix: folder of the class folders (`a/abbey`, ...), or of the images that `ann_file` names.
        ann_file: text file of lines `a/abbey/gsun_0123.jpg 0`, such as `train_places205.csv`. If it is not given,
            each folder that holds images is a class.
    """

    nominal_size = 2_448_873
