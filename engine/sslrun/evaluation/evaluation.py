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
        """Measures the encoder. All ranks of a launcher call it, share the work and return the same results.

        Args:
            encoder: the trained backbone and the images to measure it on. The backbone must not be changed.
            partial_result: where a long evaluation may save its state, to continue after an interruption.

        Returns:
            JSON values, which become "results" of the file in eval/. Numbers with names `group/name` at the top level
            are printed.
        """
        raise NotImplementedError
