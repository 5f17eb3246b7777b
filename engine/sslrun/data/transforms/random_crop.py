import numpy as np

from sslrun.data.transforms.cropping import Cropping


class RandomCrop(Cropping):
    """Crops a window at a random position; a smaller image is padded with black first.

    Args:
        size: height and width in pixels; one number for a square.
        p: probability of cropping an image; other images keep their size.
    """

    num_draws = 3

    def starts(self, uniforms: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        slack = sizes - self.size
        return np.where(slack < 0, -(-slack // 2), np.floor(uniforms * (slack + 1)).astype(np.int64))
