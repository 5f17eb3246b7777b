"""The recipes of `make learn`, one for each method, and a parametrization of tests over them."""

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = {path.stem: path for path in [*sorted(ROOT.glob("configs/learn/*.toml")), ROOT / "configs/quickstart.toml"]}

# Transformers and others that take long: by day their own tests in tests/methods and those of their neighbors run.
AT_NIGHT = {"dinov2", "dinov3", "distillation", "ijepa", "lejepa", "maskfeat", "msn", "simmim"}

EVERY_RECIPE: list[Any] = [
    pytest.param(name, marks=[pytest.mark.nightly] * (name in AT_NIGHT), id=name) for name in RECIPES
]
