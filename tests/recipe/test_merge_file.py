"""Merge files: what they mean for each tensor, and what a user gets for a wrong one, word for word."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe.merge import load_merge, merge_of
from direct_rlhf.recipe.merge_reference import page
from direct_rlhf.recipe.merge_settings import depths, read_setting

HEAD = "merge_method: ties\nbase_model: base\nmodels:\n  - model: a\n  - model: b\n"


def load(tmp_path, text):
    (tmp_path / "m.yaml").write_text(text)
    return load_merge(tmp_path / "m.yaml")


WRONG_FILES = [
    pytest.param("", "m.yaml: the file is empty.", id="empty"),
    pytest.param("- a", "m.yaml:1: a merge file is a mapping (lines of `key: value`), not a list.", id="a list"),
    pytest.param(
        "merge_method: [linear\n", "m.yaml:2: not valid YAML: expected ',' or ']', but it ends here.", id="not YAML"
    ),
    pytest.param(
        HEAD.replace("ties", "tie"),
        (
            'merge_method = "tie": must be one of: linear, slerp, task_arithmetic, ties, dare_linear, dare_ties, della, '
            "breadcrumbs, model_stock, consensus_ta, pcb, tsv_m, iso_c, iso_cts, wudi, r_tsvm, della_linear, "
            "breadcrumbs_ties (m.yaml:1). Did you mean ties?"
        ),
        id="method",
    ),
    pytest.param("models:\n  - model: a\n", "merge_method: is required (m.yaml:1).", id="no method"),
    pytest.param(
        "merge_method: linear\n", "models: is required: what is merged, each as `- model: FOLDER`.", id="no models"
    ),
    pytest.param(
        HEAD + "paramters: {}\n", "paramters: unknown key (m.yaml:6). Did you mean parameters?", id="unknown key"
    ),
    pytest.param(
        HEAD.replace("- model: a", "- name: a"),
        "models.0.model: is required (m.yaml:4).\nmodels.0.name: unknown key (m.yaml:4). Known here: model, parameters.",
        id="unknown key of a model",
    ),
    pytest.param(
        HEAD + "parameters:\n  densty: 0.5\n",
        "parameters.densty: unknown parameter (m.yaml:7). Did you mean parameters.density?",
        id="unknown parameter",
    ),
    pytest.param(
        HEAD + "parameters: {int8_mask: true}\n",
        (
            "parameters.int8_mask: unknown parameter (m.yaml:6). ties has: precision, weight, scale, merge, zero_sign, "
            "reference, density, scope, at_cut, lambda, alpha, normalize."
        ),
        id="parameter like no other",
    ),
    pytest.param(
        HEAD + "parameters:\n  density: 20\n  scope: everywhere\n",
        (
            "parameters.density = 20: must be at most 1 (m.yaml:7). Did you mean 0.2?\n"
            'parameters.scope = "everywhere": must be one of: tensor, global (m.yaml:8).'
        ),
        id="two values",
    ),
    pytest.param(
        HEAD + "parameters:\n  density: true\n", "parameters.density = true: must be a number (m.yaml:7).", id="truth"
    ),
    pytest.param(
        HEAD + "parameters:\n  density: high\n", 'parameters.density = "high": must be a number (m.yaml:7).', id="text"
    ),
    pytest.param(
        HEAD + "parameters:\n  density: .nan\n",
        "parameters.density = nan: must be a finite number (m.yaml:7).",
        id="nan",
    ),
    pytest.param(
        HEAD + "parameters:\n  density: [0.2, 1.5]\n",
        "parameters.density.1 = 1.5: must be at most 1 (m.yaml:7). Did you mean 0.015?",
        id="in a list over the layers",
    ),
    pytest.param(
        HEAD + "parameters:\n  scope: [tensor, global]\n",
        (
            'parameters.scope.0 = "tensor": must be a number: a list goes over the layers (m.yaml:7).\n'
            'parameters.scope.1 = "global": must be a number: a list goes over the layers (m.yaml:7).'
        ),
        id="a list of words",
    ),
    pytest.param(
        HEAD + "parameters:\n  density: []\n",
        "parameters.density = []: must not be an empty list (m.yaml:7).",
        id="empty list",
    ),
    pytest.param(
        HEAD
        + "parameters:\n  density:\n    - filter: mlp\n      value: [0.1, 2]\n    - {filtr: x, value: 1}\n    - value: [[1]]\n",
        (
            "parameters.density.1: must have a value, and perhaps a filter, and nothing else (m.yaml:10).\n"
            "parameters.density.2.value.0 = [1]: must be one value, a list over the layers, or a list of {filter, value} "
            "(m.yaml:11).\n"
            "parameters.density.0.value.1 = 2: must be at most 1 (m.yaml:9). Did you mean 0.02?"
        ),
        id="by tensor name",
    ),
    pytest.param(
        HEAD.replace("- model: b", "- {model: b, parameters: {lambda: 1}}"),
        "models.1.parameters.lambda: is one value for the whole merge. Move it to parameters.lambda (m.yaml:5).",
        id="a parameter of all at one model",
    ),
    pytest.param(
        HEAD + "  - {model: base, parameters: {weight: 1}}\n",
        "models.2.parameters: this is base_model, which has none: differences are taken to it (m.yaml:6).",
        id="parameters of the base",
    ),
    pytest.param(
        HEAD + "parameters: {normalize: true, merge: sum}\n",
        "parameters.merge: is the same as normalize, which is given too. Keep one (m.yaml:6).",
        id="twice by two names",
    ),
    pytest.param(
        HEAD.replace("ties", "linear").replace("base_model: base\n", "base_model:\n") + "parameters: {weight: 0}\n",
        (
            "linear: the weights add up to 0, so their sum cannot divide: change one, or set normalize: false (m.yaml:1)."
        ),
        id="weights that add up to 0",
    ),
    pytest.param(
        HEAD.replace("base_model: base\n", ""),
        "ties: needs a base_model: it merges differences to a base (m.yaml:1).",
        id="no base",
    ),
    pytest.param(
        HEAD.replace("ties", "slerp").replace("base_model: base\n", "") + "  - model: c\n",
        "slerp: needs exactly 2 models to merge, got 3 (m.yaml:1).",
        id="too many models",
    ),
    pytest.param(
        HEAD.replace("ties", "della") + "parameters: {density: 0.95, epsilon: 0.1}\n",
        (
            "della: density 0.95 and epsilon 0.1: density - epsilon must be above 0 and density + epsilon below 1 (density 1 "
            "drops nothing). (m.yaml:1)."
        ),
        id="parameters that do not go together",
    ),
    pytest.param(
        HEAD + "tokenizer_source: union\n",
        (
            'tokenizer_source = "union": vocabularies are not joined: a row that only one model has would meet no row of the '
            "others (m.yaml:6). Use base or one of the models, with vocabulary: common_rows if they differ."
        ),
        id="union",
    ),
    pytest.param(
        HEAD + "tokenizer_source: basis\n",
        'tokenizer_source = "basis": must be one of: base, a, b (m.yaml:6). Did you mean base?',
        id="tokenizer of a stranger",
    ),
    pytest.param(
        HEAD + "dtype: bf16\n",
        'dtype = "bf16": must be one of: float32, bfloat16, float16 (m.yaml:6). Did you mean bfloat16?',
        id="dtype",
    ),
    pytest.param(
        HEAD + "shard_size: big\n",
        'shard_size = "big": must be a size, such as 5GB or 500MB (m.yaml:6).',
        id="shard size",
    ),
    pytest.param(HEAD + "seed: -1\n", "seed = -1: must be at least 0 (m.yaml:6).", id="seed"),
    pytest.param(
        HEAD + "reference: merge-kit\n",
        'reference = "merge-kit": must be one of: original, mergekit, fusion_bench (m.yaml:6). Did you mean mergekit?',
        id="reference",
    ),
    pytest.param(
        HEAD + "chat_template: auto\n",
        "chat_template: the tokenizer keeps its own; change it in the merged model (m.yaml:6).",
        id="chat template",
    ),
    pytest.param(
        HEAD + "slices:\n  - sources:\n    - {model: a, layer_range: [0, 2]}\n",
        "slices: give models or slices, not both (m.yaml:6).",
        id="models and slices",
    ),
    pytest.param(
        "merge_method: linear\nslices:\n" + "  - sources: [{model: a, layer_range: [0, 2]}]\n" * 2,
        "slices: only one slice of all layers is merged; give one, or models (m.yaml:2).",
        id="two slices",
    ),
    pytest.param(
        HEAD.replace("- model: a\n  - model: b", "- model: base"),
        ("models: holds nothing but base_model (m.yaml:3)."),
        id="the base alone",
    ),
]


@pytest.mark.promise("U1")
@pytest.mark.parametrize(("text", "message"), WRONG_FILES)
def test_a_wrong_file_is_explained_word_for_word(tmp_path, text, message):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_merge(tmp_path / "m.yaml")
    assert str(caught.value).replace(f"{tmp_path}/", "") == message


@pytest.mark.promise("U1")
def test_problems_of_all_kinds_come_at_once(tmp_path):
    text = HEAD + "parameters: {density: 7, scpe: global}\ntokenizer_source: union\nsed: 3\n"
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert [line.split(maxsplit=1)[0] for line in str(caught.value).splitlines()] == [
        "sed:",
        "parameters.density",
        "parameters.scpe:",
        "tokenizer_source",
    ]


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing.yaml: cannot be read: No such file or directory"):
        load_merge(tmp_path / "nothing.yaml")


def test_the_reference_page_is_current():
    written = (Path(__file__).parents[2] / "docs/reference/merge.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m direct_rlhf.recipe.merge_reference > docs/reference/merge.md"


# What a file means


def parameters(tmp_path, text, tensor="model.layers.0.mlp.up_proj.weight", depth=0.0):
    return load(tmp_path, text).parameters(tensor, depth)


def test_mergekits_names_mean_our_parameters(tmp_path):
    found = parameters(tmp_path, HEAD + "parameters: {lambda: 0.7, normalize: false, density: 0.4, weight: 2}\n")
    assert (found.scale, found.merge, found.density, found.weight) == (0.7, "sum", (0.4,), (2.0,))


def test_mergekits_method_names_mean_settings_of_ours(tmp_path):
    merge = load(tmp_path, HEAD.replace("ties", "della_linear"))
    assert merge.method == "della"
    assert (merge.parameters("x", 0).elect, merge.parameters("x", 0).merge) == (False, "sum")
    given = load(tmp_path, HEAD.replace("ties", "della_linear") + "parameters: {normalize: true}\n")
    assert given.parameters("x", 0).merge == "mean"


def test_a_models_own_value_wins_over_that_of_all_and_the_default_fills_in(tmp_path):
    models = "models:\n  - {model: a, parameters: {weight: 3}}\n  - {model: b, parameters: {density: 0.9}}\n"
    text = "merge_method: ties\nbase_model: base\n" + models
    found = parameters(tmp_path, text + "parameters: {density: 0.5}\n")
    assert (found.weight, found.density) == ((3.0, 1.0), (0.5, 0.9))


def test_a_parameter_without_default_is_given_to_all_models_or_to_none(tmp_path):
    models = "models:\n  - {model: a, parameters: {trim: 0.3}}\n  - model: b\n"
    with pytest.raises(ConfigError, match=r"trim: some models have it and others do not"):
        load(tmp_path, "merge_method: dare_ties\nbase_model: base\n" + models)


def test_seed_and_reference_reach_the_method(tmp_path):
    found = parameters(tmp_path, HEAD.replace("ties", "dare_ties") + "seed: 5\nreference: mergekit\n")
    assert (found.seed, found.rescale) == (5, "l1")


def test_a_list_goes_over_the_layers_and_what_is_in_none_lies_at_its_start(tmp_path):
    merge = load(tmp_path, HEAD + "parameters: {density: [0.2, 0.4, 0.8]}\n")
    names = ["model.embed_tokens.weight", *(f"model.layers.{n}.w" for n in range(5)), "lm_head.weight"]
    place = depths(names)
    found = [merge.parameters(name, place[name]).density[0] for name in names]
    assert found == pytest.approx([0.2, 0.2, 0.3, 0.4, 0.6, 0.8, 0.2])
    assert depths(["model.layers.0.w", "lm_head.weight"]) == {"model.layers.0.w": 1.0, "lm_head.weight": 0.0}


def test_the_first_filter_that_is_in_the_name_decides(tmp_path):
    text = HEAD + (
        "parameters:\n  density:\n    - {filter: mlp.down, value: 0.1}\n    - {filter: mlp, value: [0.2, 0.4]}\n"
        "    - {filter: '*', value: 0.9}\n    - {filter: norm, value: 0.8}\n"
    )
    merge = load(tmp_path, text)
    found = [
        merge.parameters(f"model.layers.1.{name}.weight", 0.5).density[0] for name in ("mlp.down", "mlp.up", "norm")
    ]
    assert found == pytest.approx([0.1, 0.3, 0.9])
    only = load(tmp_path, HEAD + "parameters: {density: {filter: mlp, value: 0.5}}\n")
    assert [only.parameters(name, 0).density[0] for name in ("mlp", "norm")] == [0.5, 0.2]


def test_equal_parameters_are_one_object(tmp_path):
    merge = load(tmp_path, HEAD)
    assert merge.parameters("a", 0.0) is merge.parameters("b", 1.0)


def test_the_base_is_no_expert_where_differences_to_it_are_merged(tmp_path):
    assert [e.ref for e in load(tmp_path, HEAD + "  - model: base\n").experts] == ["a", "b"]
    assert [e.ref for e in load(tmp_path, HEAD.replace("ties", "linear") + "  - model: base\n").experts] == [
        "a",
        "b",
        "base",
    ]


@pytest.mark.parametrize("models", [["b", "base"], ["base", "b"], ["b"]])
def test_slerp_starts_from_the_base_as_mergekits_does(tmp_path, models):
    listed = "".join(f"  - model: {name}\n" for name in models)
    merge = load(tmp_path, f"merge_method: slerp\nbase_model: base\nmodels:\n{listed}parameters: {{t: 0.25}}\n")
    assert [expert.ref for expert in merge.experts] == ["base", "b"]
    assert merge.parameters("x", 0).t == 0.25


def test_a_model_named_twice_draws_by_two_keys(tmp_path):
    assert [e.key for e in load(tmp_path, HEAD + "  - model: a\n").experts] == ["a", "b", "a#2"]


def test_one_slice_of_all_layers_is_the_models(tmp_path):
    text = """
merge_method: slerp
base_model: a
slices:
  - sources:
      - {model: a, layer_range: [0, 32]}
      - {model: b, layer_range: [0, 32]}
    parameters: {t: 0.75}
parameters: {t: 0.5}
"""
    merge = load(tmp_path, text)
    assert [expert.ref for expert in merge.experts] == ["a", "b"]
    assert merge.layer_ranges == ((0, 32), (0, 32))
    assert merge.parameters("x", 0).t == 0.75


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2 << 30), ("1.5K", 1500), ("700", 700)]
)
def test_a_shard_size_is_read(tmp_path, text, size):
    assert load(tmp_path, f"{HEAD}shard_size: '{text}'\n").shard_bytes == size


def test_a_file_made_in_python_is_the_file(tmp_path):
    values = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a"}],
        "parameters": {"density": [0, 1]},
    }
    merge = merge_of(values, tmp_path)
    assert yaml.safe_load(merge.yaml) == values
    assert load(tmp_path, merge.yaml).file == merge.file
    with pytest.raises(ConfigError, match=r"^parameters.density = 3: must be at most 1\."):
        merge_of(values | {"parameters": {"density": 3}}, tmp_path)


@given(
    values=st.lists(st.floats(-10, 10), min_size=1, max_size=6),
    depth=st.floats(0, 1),
)
def test_a_gradient_stays_between_its_values_and_meets_its_ends(values, depth):
    setting = read_setting(values, ()).setting
    assert setting.at("w", 0.0) == values[0]
    assert setting.at("w", 1.0) == values[-1]
    assert min(values) - 1e-9 <= setting.at("w", depth) <= max(values) + 1e-9


def test_null_is_a_value_where_a_parameter_may_have_none():
    models = [{"model": "a"}, {"model": "b"}]
    content = {"merge_method": "r_tsvm", "base_model": "base", "models": models}
    made = merge_of(content | {"parameters": {"norm_cap": None}}, Path())
    assert made.parameters("model.norm.weight", 0.0).norm_cap is None
    with pytest.raises(ConfigError, match=r"parameters\.scale = null: must be a number"):
        merge_of(content | {"parameters": {"scale": None}}, Path())
