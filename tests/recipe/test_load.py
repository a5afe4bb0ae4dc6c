"""Loading: overrides, `extends`, shipped recipes, the resolved recipe and its hash."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from direct_rlhf.recipe.fields import leaves, locate, section_of, union_sections
from direct_rlhf.recipe.load import LoadedRecipe, load_recipe, shipped_recipes
from direct_rlhf.recipe.reference import page
from direct_rlhf.recipe.schema import Recipe
from direct_rlhf.recipe.source import RecipeDumper, parse_yaml


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "my.yaml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def at(recipe: Recipe, path: str) -> Any:
    here: Any = recipe
    for part in path.split("."):
        here = here[int(part)] if part.isdecimal() else getattr(here, part)
    return here


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_loads_and_its_resolved_text_is_the_same_recipe(name: str) -> None:
    loaded = load_recipe(name)
    again = load_recipe(write(loaded.yaml, "again.yaml"))
    assert (loaded.name, loaded.folder) == (name, Path.cwd())
    assert loaded.recipe.description
    assert again.recipe == loaded.recipe
    assert again.sha256 == loaded.sha256


def test_the_shipped_recipes_have_the_arms_they_promise() -> None:
    assert {name: load_recipe(name).recipe.arms for name in shipped_recipes()} == {
        "hh-small": ["base", "direct_ppo"],
        "llama-3-8b-lora": ["base", "direct_ppo"],
        "mistral-7b-full": ["base", "direct_ppo"],
        "mistral-7b-lora": ["base", "direct_ppo"],
        "quickstart": ["base", "sft", "direct_ppo"],
        "qwen-2.5-7b-lora": ["base", "direct_ppo"],
        "standard": ["base"],
        "world-study": ["base", "sft", "sft_ppo", "dpo", "direct_ppo"],
        "world-3h": ["base"],
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mistral-7b-lora", ("lora", 1e-5, 5e-5, 256, 64, 2, 256, 0.05, 20)),
        ("mistral-7b-full", ("full", 1e-6, 5e-6, 512, 128, 2, 256, 0.02, 20)),
    ],
)
def test_mistral_recipes_hold_the_starting_values(name: str, expected: tuple[Any, ...]) -> None:
    recipe, ppo = load_recipe(name).recipe, load_recipe(name).recipe.ppo
    assert (
        recipe.model.tuning,
        ppo.optimiser.learning_rate,
        ppo.critic.optimiser.learning_rate,
        ppo.rollouts,
        ppo.minibatch_size,
        ppo.epochs,
        ppo.sampling.max_new_tokens,
        ppo.kl.coefficient,
        ppo.critic.warmup,
    ) == expected
    assert recipe.model.base == "mistralai/Mistral-7B-v0.1"
    assert recipe.model.dtype == "bfloat16"
    assert (ppo.kl.target, ppo.kl.horizon) == (6.0, 10_000.0)


@pytest.mark.parametrize(
    ("name", "base"), [("llama-3-8b-lora", "meta-llama/Meta-Llama-3-8B"), ("qwen-2.5-7b-lora", "Qwen/Qwen2.5-7B")]
)
def test_the_recipes_of_other_bases_differ_from_mistrals_in_the_base_alone(name: str, base: str) -> None:
    found, usual = load_recipe(name).recipe, load_recipe("mistral-7b-lora", [f"model.base={base}"]).recipe
    same = {"name": found.name, "description": found.description}
    assert found.model_dump() == usual.model_dump() | same
    assert "nstruct" not in found.model.base


def test_name_defaults_to_that_of_the_file() -> None:
    assert load_recipe(write("seed: 1\n", "my study (2).yaml")).name == "my-study-2"
    assert load_recipe(write("name: other\n")).name == "other"


def test_folder_is_that_of_the_file() -> None:
    Path("below").mkdir()
    write("seed: 1\n", "below/my.yaml")
    assert load_recipe("below/my.yaml").folder == Path("below")


def test_part_of_a_section_keeps_what_its_place_sets_for_the_rest() -> None:
    """OptimiserSection's own schedule is constant, the reward model's is linear."""
    recipe = load_recipe(write("reward: {optimiser: {learning_rate: 1e-4}}\n")).recipe
    assert recipe.reward.optimiser.schedule == "linear"
    assert recipe.ppo.optimiser.schedule == "constant"


def test_section_with_all_lines_commented_out_is_its_defaults() -> None:
    assert load_recipe(write("name: run\nppo:\n  # clip: 0.1\n")).recipe == Recipe()


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-5", 1e-5), ("1E-5", 1e-5), ("1.e-5", 1e-5), (".00001", 1e-5), ("0.1e-4", 1e-5), ('"1e-5"', 1e-5)],
)
def test_number_in_any_spelling_is_the_number(written: str, value: float) -> None:
    recipe = load_recipe(write(f"ppo:\n  optimiser:\n    learning_rate: {written}\n"), ["ppo.clip=" + written]).recipe
    assert recipe.ppo.optimiser.learning_rate == value
    assert recipe.ppo.clip == value


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "12:30", "010", "2026-01-01", "1_0x", "="])
def test_text_that_older_yaml_takes_for_something_else_stays_text(text: str) -> None:
    assert load_recipe(write(f"description: {text}\n")).recipe.description == text


def test_yes_and_no_are_true_and_false_where_that_is_wanted() -> None:
    assert load_recipe(write("reward: {margin: yes}\n")).recipe.reward.margin is True


def test_whole_numbers_may_be_written_with_an_exponent_or_underscores() -> None:
    recipe = load_recipe(write("reward: {max_steps: 1e3}\nevaluation: {bootstrap_draws: 20_000}\n")).recipe
    assert (recipe.reward.max_steps, recipe.evaluation.bootstrap_draws) == (1000, 20_000)


def test_anchors_and_merge_keys_work() -> None:
    recipe = load_recipe(write("sft: &shared\n  batch_size: 8\n  epochs: 2\ndpo:\n  <<: *shared\n  epochs: 3\n")).recipe
    assert (recipe.dpo.batch_size, recipe.dpo.epochs) == (8, 3.0)


def test_extends_merges_sections_and_replaces_lists() -> None:
    write("extends: quickstart\nname: base-study\ndescription: of the base\nppo: {clip: 0.1}\n", "middle.yaml")
    loaded = load_recipe(write("extends: middle.yaml\narms: [base]\nppo: {lam: 0.9}\ndata:\n"))
    quickstart = load_recipe("quickstart").recipe
    assert (loaded.name, loaded.recipe.description) == ("my", "")
    assert loaded.recipe.arms == ["base"]
    assert (loaded.recipe.ppo.clip, loaded.recipe.ppo.lam) == (0.1, 0.9)
    assert loaded.recipe.ppo.rollouts == quickstart.ppo.rollouts
    assert loaded.recipe.data == quickstart.data


def test_extending_with_another_reward_type_drops_the_keys_of_the_old_one() -> None:
    write("ppo: {reward: {type: model, path: my/model}}\n", "base.yaml")
    recipe = load_recipe(write("extends: base.yaml\nppo: {reward: {type: http, url: http://127.0.0.1}}\n")).recipe
    assert recipe.ppo.reward.model_dump() == {"type": "http", "url": "http://127.0.0.1", "timeout": 30.0}


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=7", "seed", 7),
        ("ppo.kl.target=3", "ppo.kl.target", 3.0),
        ("data.path=../shared/data", "data.path", "../shared/data"),
        ("arms=[base, dpo]", "arms", ["base", "dpo"]),
        ("arms.1=sft", "arms", ["base", "sft"]),
        ("data.preferences.0.weight=2", "data.preferences.0.weight", 2.0),
        ("data.preferences=[{path: x}]", "data.preferences.0.path", "x"),
        ("ppo.reward={type: http, url: 'http://127.0.0.1'}", "ppo.reward.url", "http://127.0.0.1"),
        ("ppo.dual_clip=null", "ppo.dual_clip", None),
        ("description=a=b", "description", "a=b"),
    ],
)
def test_override_sets_that_value(override: str, path: str, value: Any) -> None:
    file = write("arms: [base]\ndata: {preferences: [{path: mine.jsonl}]}\n") if "0" in override else write("seed: 1\n")
    assert at(load_recipe(file, [override]).recipe, path) == value


def test_later_override_wins() -> None:
    assert load_recipe(write("seed: 1\n"), ["seed=2", "seed=3"]).recipe.seed == 3


SET_AND_READ = {
    "seed": st.integers(0, 2**32 - 1),
    "description": st.text(),
    "dialogue.human": st.text(min_size=1),
    "dialogue.stop_strings": st.lists(st.text(), max_size=3),
    "ppo.optimiser.learning_rate": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "ppo.entropy": st.floats(0, 1e300),
    "model.trust_remote_code": st.booleans(),
    "threads": st.none() | st.integers(1, 1000),
}


@settings(max_examples=50, deadline=None)
@given(data=st.data(), path=st.sampled_from(sorted(SET_AND_READ)))
def test_what_an_override_sets_is_read_back_and_survives_the_resolved_recipe(data: st.DataObject, path: str) -> None:
    value = data.draw(SET_AND_READ[path])
    written = yaml.dump(value, Dumper=RecipeDumper, default_flow_style=True, allow_unicode=True, width=10**6)
    loaded = load_recipe("quickstart", [f"{path}={written}"])
    assert at(loaded.recipe, path) == value
    assert Recipe.model_validate(parse_yaml(loaded.yaml, "recipe.yaml").data) == loaded.recipe
    assert Recipe.model_validate(yaml.safe_load(loaded.yaml)) == loaded.recipe  # other readers agree


def test_hash_depends_on_values_and_not_on_how_they_are_written() -> None:
    plain = load_recipe(write("name: a\nppo:\n  clip: 0.2\n  lam: 0.5\n")).sha256
    other = load_recipe(write("# a remark\nppo: {lam: 5e-1}\n"), ["name=a"]).sha256
    changed = load_recipe(write("name: a\nppo: {lam: 0.51}\n")).sha256
    assert plain == other != changed
    assert LoadedRecipe.of(Recipe(), Path()).sha256 == LoadedRecipe.of(Recipe(seed=0), Path("x")).sha256


def test_recipe_never_changes_after_loading() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe("quickstart").recipe.seed = 1  # type: ignore[misc]


def test_every_key_has_help_and_every_default_is_finite() -> None:
    without = [path for path, field, _ in leaves() if not field.description]
    infinite = [
        path for path, field, _ in leaves() if isinstance(field.default, float) and not math.isfinite(field.default)
    ]
    assert (without, infinite) == ([], [])


def test_every_key_of_the_schema_can_be_located() -> None:
    for path, field, owner in leaves():
        loc = tuple(0 if part == "N" else part for part in path.split("."))
        if union_sections(locate(loc[:-1]).annotation) or section_of(owner) is None:
            continue  # below a union a path of pydantic's carries the tag
        assert locate(loc).field is field, path


def test_reference_page_is_current() -> None:
    written = (Path(__file__).parents[2] / "docs/reference/recipe.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m direct_rlhf.recipe.reference > docs/reference/recipe.md"
