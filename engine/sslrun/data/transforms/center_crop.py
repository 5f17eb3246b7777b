import numpy as np

from sslrun.data.transforms.cropping import Cropping


class CenterCrop(Cropping):
    """Crops the center of the image; a smaller image is padded with black first, as in torchvision.

    Args:
        size: height and width in pixels; one number for a square.
        p: probability of cropping an image; other images keep their size.
    """

    def starts(self, uniforms: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        # torchvision puts half of the missing pixels, rounded down, at the top and left; half of the surplus is rounded
        # to the even number.
        missing = np.maximum(np.array(self.size) - sizes, 0)
        return np.where(missing > 0, -(missing // 2), np.rint((sizes - self.size) / 2.0).astype(np.int64))
