"""The `[eval]` table of a recipe: how its encoder is measured after training, by `sslrun eval`."""

import re
from dataclasses import dataclass, field

from sslrun.data.sources import Source
from sslrun.data.transforms import Transform
from sslrun.errors import UsageError
from sslrun.evaluation.evaluation import Evaluation
from sslrun.evaluation.finetune_recipe import Finetune
from sslrun.evaluation.knn import Knn
from sslrun.evaluation.linear import Linear
from sslrun.evaluation.spectrum import Spectrum


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The `[eval]` table: on which labeled images a trained encoder is measured, and how.

    Attributes:
        train: labeled images that classifiers learn from; if not given, data.source without what is held out.
        test: labeled images that are classified; if not given, the images that data.holdout keeps out of training.
        transforms: how images are prepared; if not given, monitor.transforms, or a center crop of the first view's
            size.
        knn: classification by the nearest training images, for `sslrun eval knn`.
        spectrum: how well features fill their space, for `sslrun eval spectrum`.
        finetune: encoder and classifier trained together, for `sslrun eval finetune`.
        linear: linear classification of the frozen features, for `sslrun eval linear`.
        extra: further evaluations, also a user's own, by the name that `sslrun eval NAME` calls them by; each a table
            with a `type`.
    """

    train: Source | None = None
    test: Source | None = None
    transforms: list[Transform] | None = None
    knn: Knn = field(default_factory=Knn)
    spectrum: Spectrum = field(default_factory=Spectrum)
    finetune: Finetune = field(default_factory=Finetune)
    linear: Linear = field(default_factory=Linear)
    extra: dict[str, Evaluation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.extra:
            if name in self.built_in() or not re.fullmatch(r"[\w-]+", name):
                taken = ", ".join(self.built_in())
                raise UsageError(f"extra.{name}: a name has letters, digits, _ and -, and is none of {taken}")

    def evaluations(self) -> dict[str, Evaluation]:
        """Every evaluation by the KIND of `sslrun eval KIND`."""
        return {**self.built_in(), **self.extra}

    def built_in(self) -> dict[str, Evaluation]:
        return {"finetune": self.finetune, "knn": self.knn, "linear": self.linear, "spectrum": self.spectrum}
