"""The `[eval]` table of a recipe: how its encoder is measured after training, by `sslrun eval`."""

from dataclasses import dataclass, field

from sslrun.data import Source
from sslrun.data.transforms import Transform
from sslrun.evaluation.finetune_recipe import FinetuneConfig
from sslrun.evaluation.knn import KnnConfig
from sslrun.evaluation.linear import LinearConfig
from sslrun.evaluation.spectrum import SpectrumConfig


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """On which labeled images a trained encoder is measured, and how.

    Attributes:
        train: labeled images that classifiers learn from; where it is not given, data.source without what is held
            out.
        test: labeled images that are classified; where it is not given, what data.holdout keeps out of training.
        transforms: how images are prepared; where they are not given, monitor.transforms, or a center crop of the
            first view's size.
        knn: classification by the nearest training images.
        spectrum: how well features fill their space.
        finetune: the encoder trained further, by labels.
        linear: linear classification of the frozen features.
    """

    train: Source | None = None
    test: Source | None = None
    transforms: list[Transform] | None = None
    knn: KnnConfig = field(default_factory=KnnConfig)
    spectrum: SpectrumConfig = field(default_factory=SpectrumConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    linear: LinearConfig = field(default_factory=LinearConfig)
