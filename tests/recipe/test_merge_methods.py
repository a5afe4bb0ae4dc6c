"""Parameters of the merge methods: names, ranges, references, and what is refused before a weight is read."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe.merge_methods import (
    OTHER_METHODS,
    PARAMETERS,
    BreadcrumbsParameters,
    DareTiesParameters,
    DellaParameters,
    LinearParameters,
    ModelStockParameters,
    SlerpParameters,
    TiesParameters,
    TsvParameters,
)


@pytest.mark.promise("U3")
def test_the_parameters_import_no_torch():
    script = "import sys, direct_rlhf.recipe.merge_methods; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"
    )


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_field_is_explained_and_has_a_default(name):
    for field in PARAMETERS[name].model_fields.values():
        assert field.description
    assert PARAMETERS[name]() == PARAMETERS[name].model_validate({})


def test_mergekits_names_and_truth_values_mean_settings_of_ours():
    parameters = DareTiesParameters.model_validate({"lambda": 0.5, "normalize": True, "rescale": False, "density": 0.3})
    assert (parameters.scale, parameters.merge, parameters.rescale, parameters.density) == (0.5, "mean", "none", (0.3,))
    assert DareTiesParameters.model_validate({"normalize": False, "rescale": True}).merge == "sum"
    assert BreadcrumbsParameters.model_validate({"beta": 0.7, "alpha": 2}) == BreadcrumbsParameters(
        density=0.7, scale=2
    )
    assert LinearParameters(normalize=False).normalize is False


def test_methods_of_mergekits_that_are_settings_of_ours_are_valid():
    for other in OTHER_METHODS.values():
        assert PARAMETERS[other.name].model_validate(other.settings)


def test_one_number_stands_for_all_experts():
    assert TiesParameters(density=0.3).of("density", 3) == (0.3, 0.3, 0.3)
    assert TiesParameters(density=(0.3, 0.4)).of("density", 2) == (0.3, 0.4)


def test_parameters_that_are_one_for_each_expert_are_known():
    assert DareTiesParameters.per_expert() == {"weight", "density", "trim"}
    assert DellaParameters.per_expert() == {"weight", "density", "epsilon"}
    assert ModelStockParameters.per_expert() == set()


@pytest.mark.parametrize("name", [name for name in PARAMETERS if PARAMETERS[name].references])
def test_a_reference_sets_its_settings_and_gives_way_to_what_is_given(name):
    parameters = PARAMETERS[name]
    for reference, settings in parameters.references.items():
        chosen = parameters(reference=reference)
        assert {key: getattr(chosen, key) for key in settings} == settings
        for key in settings:
            mine = getattr(parameters(), key)
            assert getattr(parameters.model_validate({"reference": reference, key: mine}), key) == mine


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("ties", {"densty": 0.2}, "Extra inputs are not permitted"),
        ("ties", {"density": 1.2}, "less than or equal to 1"),
        ("ties", {"scope": "layer"}, "'tensor' or 'global'"),
        ("ties", {"reference": "peft"}, "'original', 'mergekit' or 'fusion_bench'"),
        ("ties", {"scale": 1, "lambda": 2}, "lambda and scale are the same parameter: give one of them"),
        ("ties", {"scale": float("inf")}, "finite number"),
        ("slerp", {"t": -0.1}, "greater than or equal to 0"),
        ("della", {"density": 0.05, "epsilon": 0.07}, "density - epsilon must be above 0"),
        ("della", {"density": (0.5, 0.95), "epsilon": 0.07}, "density 0.95 and epsilon 0.07: "),
        ("pcb", {"clamp_tails": 0.5}, "less than 0.5"),
        ("tsv_m", {"rcond": 0}, "greater than 0"),
        ("r_tsvm", {"norm_cap": 0.5}, "greater than or equal to 1"),
        ("consensus_ta", {"agree": -1}, "greater than or equal to 0"),
    ],
)
def test_wrong_parameters_are_refused(name, settings, words):
    with pytest.raises(ValidationError) as error:
        PARAMETERS[name].model_validate(settings)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("parameters", "count", "base", "words"),
    [
        (SlerpParameters(), 3, True, "needs exactly 2 models to merge, got 3"),
        (TiesParameters(), 0, True, "needs at least 1 models to merge, got 0"),
        (TiesParameters(weight=(1, 2)), 3, True, "weight has 2 numbers for 3 models: give one, or one for each"),
        (TiesParameters(), 2, False, "needs a base_model: it merges differences to a base"),
        (SlerpParameters(on="delta"), 2, False, "on: delta needs a base_model"),
        (LinearParameters(weight=(1, -1)), 2, False, "the weights add up to 0"),
    ],
)
def test_what_cannot_be_merged_so_is_refused_before_a_weight_is_read(parameters, count, base, words):
    with pytest.raises(ConfigError) as error:
        parameters.check(count, base=base)
    assert words in str(error.value)


def test_the_ablations_of_our_reading_can_be_written_down():
    """TSV-M original and fixed; clamp only, g only, (a); rank cap only; (b) entropy, (b) stable; (a) and (b); c, p, G."""
    tsv, ours = PARAMETERS["tsv_m"], PARAMETERS["r_tsvm"]
    off = {"weighting": False, "rank": "equal"}
    a = {"rank": "equal"}
    rows = {
        "original": tsv(reference="original"),
        "fixed": tsv(),
        "clamp only": ours(**a, power=0),
        "g only": ours(**a, clamp=False),
        "(a)": ours(**a),
        "rank cap only": tsv(reference="original", rank_cap=True),
        "(b) entropy": ours(weighting=False),
        "(b) stable": ours(weighting=False, rank="stable"),
        "(a) and (b)": ours(),
        "neither": ours(**off),
        **{f"c {c}": ours(threshold=c) for c in (3, 4.5, 6)},
        **{f"p {p}": ours(power=p) for p in (0, 1, 2)},
        **{f"G {g}": ours(norm_cap=g) for g in (1, 1.5, None)},
    }
    assert len({parameters.model_dump_json() for parameters in rows.values()}) == len(rows) - 3  # c 4.5, p 1, G 1.5
    assert isinstance(rows["rank cap only"], TsvParameters)
    assert rows["rank cap only"].orthogonalise == "polar"
