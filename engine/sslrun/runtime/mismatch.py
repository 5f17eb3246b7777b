"""How a loaded state differs from a method."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mismatch:
    """Names of tensors in which a loaded state and a method differ.

    Attributes:
        missing: in the method only.
        unexpected: in the state only.
        reshaped: in both, with different shapes.
        recast: in both, with equal shapes and different dtypes.
    """

    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]
    recast: list[str]

    @property
    def fits(self) -> bool:
        """Whether names and shapes are equal."""
        return not (self.missing or self.unexpected or self.reshaped)

    def __str__(self) -> str:
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.reshaped,
            "of another dtype": self.recast,
        }
        return "; ".join(f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds.items() if names)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
