import numpy as np

from sslrun.data.transforms.base import Numbers, Transform, chain_numbers, size_with_probability

# A uniform draw is below 1, so "draw < p" is always true at p = 1; with this one it never is, whatever p.
_NEVER = 1.0


class RandomAppliedTrans(Transform):
    """Applies all of a list of transforms, in order, or none of them. Groups nest; each member keeps its own p.

    Args:
        transforms: transforms of the group, in order.
        p: probability of applying the whole group to an image.
    """

    def __init__(self, transforms: list[Transform], p: float = 0.5) -> None:
        super().__init__(p=p)
        self.transforms = transforms
        self.num_draws = 1 + sum(t.num_draws for t in transforms)

    def steps(self) -> list[Transform]:
        return [step for transform in self.transforms for step in transform.steps()]

    def members(self) -> list[Transform]:
        return [each for transform in self.transforms for each in (transform, *transform.members())]

    def step_numbers(self, uniforms: np.ndarray, sizes: np.ndarray) -> list[Numbers]:
        """Where the group does not apply, no member does."""
        gated = np.where(uniforms[:, :1] < self.p, uniforms[:, 1:], _NEVER)
        return chain_numbers(self.transforms, gated, sizes)

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        applied = size
        for transform in self.transforms:
            applied = transform.output_size(applied)
        return size_with_probability(self.p, applied, size)
