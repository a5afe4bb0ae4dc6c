import json

import pytest

from merge.checkpoint_kit import merge, settings_for, write_family


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("family"))


def card_of(family, tmp_path, **values):
    return (merge(family, tmp_path / "out", **values) / "README.md").read_text()


@pytest.mark.promise("M7")
@pytest.mark.parametrize(
    ("method", "parameters", "said"),
    [
        ("linear", {}, "`normalize: true`, each weight is divided by the sum of the weights (default)"),
        ("linear", {"normalize": True}, "`normalize: true`, each weight is divided by the sum of the weights (file)"),
        (
            "linear",
            {"normalize": False},
            "`normalize: false`, weights are used as they are given, whatever their sum (file)",
        ),
        ("ties", {}, "`merge: mean`, what is added up is divided by the sum of its weights (default)"),
        (
            "ties",
            {"normalize": False},
            "`merge: sum`, what is added up is not divided by the sum of its weights (file)",
        ),
        ("task_arithmetic", {}, "`merge: sum`, what is added up is not divided by the sum of its weights (default)"),
        (
            "task_arithmetic",
            {"merge": "mean"},
            "`merge: mean`, what is added up is divided by the sum of its weights (file)",
        ),
        (
            "della_linear",
            {},
            "`merge: sum`, what is added up is not divided by the sum of its weights (merge_method: della_linear)",
        ),
        ("slerp", {}, "none: this method does not divide by a sum of weights"),
        ("model_stock", {}, "none: this method does not divide by a sum of weights"),
    ],
)
def test_the_card_shows_the_normalisation_default_or_not(family, tmp_path, method, parameters, said):
    text = card_of(family, tmp_path, parameters=parameters, **settings_for(method))
    assert f"**Normalisation: {said}.**" in text


@pytest.mark.promise("M7")
def test_a_reference_that_sets_the_normalisation_is_named(family, tmp_path):
    text = card_of(family, tmp_path, reference="fusion_bench", **settings_for("ties"))
    assert "`merge: sum`, what is added up is not divided by the sum of its weights (reference: fusion_bench)" in text
    assert "| reference | fusion_bench | file |" in text


def test_the_card_has_the_file_the_models_and_every_parameter_with_what_set_it(family, tmp_path):
    values = settings_for("ties") | {"parameters": {"density": [0.2, 0.8]}}
    text = card_of(family, tmp_path, **values)
    assert "merge_method: ties" in text.split("```yaml")[1]
    for line in (
        "| base | base |  |",
        "| a | merged |  |",
        "| density | 0.2 or 0.8 | file |",
        "| scope | tensor | default |",
    ):
        assert line in text


def test_what_a_method_found_is_summed_up_and_listed_by_tensor(family, tmp_path):
    out = merge(family, tmp_path / "out", **settings_for("slerp"))
    assert "| cosine |" in (out / "README.md").read_text()
    record = json.loads((out / "merge.json").read_text())
    assert len(record["tensors"]) == 21
    assert 0.5 < record["tensors"]["model.embed_tokens.weight"]["cosine"] < 1


def test_equal_merges_have_equal_cards(family, tmp_path):
    first, again = (merge(family, tmp_path / n / "out", **settings_for("tsv_m")) for n in "12")
    for name in ("README.md", "merge.json", "config.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes()


def test_a_fence_in_the_file_does_not_end_the_block(family, tmp_path):
    text = card_of(
        family, tmp_path, merge_method="linear", models=[{"model": "a"}, {"model": "./b"}], tokenizer_source="./b"
    )
    assert text.count("```") == 2
