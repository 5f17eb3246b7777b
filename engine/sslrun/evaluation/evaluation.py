"""The contract of an evaluation kind: what `sslrun eval KIND` runs.

To add one, write a class and name it in `[eval.extra.KIND]` (docs/add-a-metric.md).
"""

from typing import Any

from sslrun.config.component import Component
from sslrun.evaluation.frozen_encoder import FrozenEncoder
from sslrun.evaluation.partial_result import PartialResult


class Evaluation(Component, kind="evaluations"):
    """A measurement of a trained encoder. Its constructor's arguments are the keys of its table in `[eval]`."""

    names_itself = False

    def run(self, encoder: FrozenEncoder, partial_result: PartialResult) -> dict[str, Any]:
        """Measure; all ranks of a launcher call it, share the work and return the same.

        Args:
            encoder: the trained backbone and the images to measure it on. It must be left as it is.
            partial_result: where an evaluation of hours may save its state, to continue after an interruption.

        Returns:
            What the file in eval/ has under "results"; JSON values. Numbers by `group/name` at its top are printed.
        """
        raise NotImplementedError
