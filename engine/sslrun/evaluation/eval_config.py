"""The `[eval]` table of a recipe: how its encoder is measured after training, by `sslrun eval`."""

from dataclasses import dataclass

from sslrun.data import Source
from sslrun.data.transforms import Transform


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """On which labelled pictures a trained encoder is measured, and how.

    Attributes:
        train: labelled pictures that classifiers learn from; where it is not given, data.source without what is held
            out.
        test: labelled pictures that are classified; where it is not given, what data.holdout keeps out of training.
        transforms: how pictures are prepared; where they are not given, monitor.transforms, or a centre crop of the
            first view's size.
    """

    train: Source | None = None
    test: Source | None = None
    transforms: list[Transform] | None = None
