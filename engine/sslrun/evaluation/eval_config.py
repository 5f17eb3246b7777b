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
        train: labeled images that classifiers learn from; by default data.source without the held-out images.
        test: labeled images to classify; by default the held-out images (data.holdout).
        transforms: how images are prepared; by default monitor.transforms, or a center crop of the first view's size.
        knn: settings of `sslrun eval knn`.
        spectrum: settings of `sslrun eval spectrum`.
        finetune: settings of `sslrun eval finetune`.
        linear: settings of `sslrun eval linear`.
        extra: further evaluations, including your own: a table `[eval.extra.NAME]` with a `type` for each, which
            `sslrun eval NAME` runs.
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
                raise UsageError(f"extra.{name}: expected a name of letters, digits, _ and - that is none of {taken}")

    def evaluations(self) -> dict[str, Evaluation]:
        """Every evaluation by the KIND of `sslrun eval KIND`."""
        return {**self.built_in(), **self.extra}

    def built_in(self) -> dict[str, Evaluation]:
        return {"finetune": self.finetune, "knn": self.knn, "linear": self.linear, "spectrum": self.spectrum}
