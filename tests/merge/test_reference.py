"""The page of merge methods says what the code says."""

from pathlib import Path

import pytest

from direct_rlhf.merge.methods import METHODS
from direct_rlhf.merge.reference import page
from direct_rlhf.recipe.merge_methods import PARAMETERS

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "merge-methods.md"


def test_the_page_is_the_one_that_the_code_gives():
    words = "run: python -m direct_rlhf.merge.reference > docs/reference/merge-methods.md"
    assert PAGE.read_text(encoding="utf-8") == page(), words


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_method_says_its_formula_defaults_laws_and_source(method):
    section = page().split(f"\n## `{method.name}`")[1].split("\n## ")[0]
    for part in ("\n    ", " = ", "Defaults:", "Obeys:", "Does not:", "Source:"):
        assert part in section.split("```")[1], part


def test_methods_and_parameters_are_the_same_names_and_facts():
    assert METHODS.keys() == PARAMETERS.keys()
    for name, method in METHODS.items():
        parameters = PARAMETERS[name]
        assert (method.name, method.parameters) == (name, parameters)
        assert (method.needs_base, method.experts) == (parameters.needs_base, parameters.experts)
        assert method.random == ("seed" in parameters.model_fields)
        assert parameters.model_validate(method.neutral)


def test_our_reading_is_labelled_as_such_and_named_as_nothing_else():
    method = METHODS["r_tsvm"]
    assert "own reading" in method.title
    section = page().split("\n## `r_tsvm`")[1]
    assert "this project's own reading" in section
    assert "RESM" not in page()
