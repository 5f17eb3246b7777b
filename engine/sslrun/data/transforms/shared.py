from sslrun.data.transforms.base import Transform
from sslrun.data.transforms.random_applied import RandomAppliedTrans


class SharedTrans(RandomAppliedTrans):
    """Applies transforms with the same draws to all views of an image in their group of views.

    A SharedTrans at the head of a list is done once for each image.

    Args:
        transforms: transforms of the group, in order.
        p: probability of applying the whole group to an image.
    """

    shared = True

    def __init__(self, transforms: list[Transform], p: float = 1.0) -> None:
        super().__init__(transforms, p)
