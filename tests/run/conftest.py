from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from direct_rlhf.recipe.schema import Recipe


@dataclass(frozen=True)
class Loaded:
    recipe: Recipe
    sha256: str
    yaml: str


@pytest.fixture
def load() -> Callable[..., Loaded]:
    """Makes what load_recipe returns, from values."""

    def make(**values: Any) -> Loaded:
        recipe = Recipe.model_validate({"name": "study", **values})
        text = yaml.safe_dump(recipe.model_dump(mode="json"))
        return Loaded(recipe, f"hash of {len(text)} characters", text)

    return make
