import numpy as np

from sslrun.data.transforms.cropping import Cropping


class RandomCrop(Cropping):
    """A window anywhere in the image; where the image is smaller, black is added around it.

    Args:
        size: height and width in pixels; one number for a square.
        p: probability; an image that is not cropped keeps its size.
    """

    num_draws = 3

    def starts(self, uniforms: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        slack = sizes - self.size
        return np.where(slack < 0, -(-slack // 2), np.floor(uniforms * (slack + 1)).astype(np.int64))
