from sslrun.data.transforms.base import Transform
from sslrun.data.transforms.random_applied import RandomAppliedTrans


class SharedTrans(RandomAppliedTrans):
    """Transforms that do the same to all views of an image in their group of views: their draws are shared.

    A SharedTrans at the head of a list is done once for each image.

    Args:
        transforms: the members, in order.
        p: probability of the whole group.
    """

    shared = True

    def __init__(self, transforms: list[Transform], p: float = 1.0) -> None:
        super().__init__(transforms, p)
