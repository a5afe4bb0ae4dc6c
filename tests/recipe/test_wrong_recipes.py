"""U1: what a user gets for a wrong recipe, word for word."""

from pathlib import Path

import pytest

from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe.load import load_recipe

# my.yaml, overrides, the whole message
WRONG_RECIPES = [
    pytest.param(
        "ppo:\n  clp: 0.1\n",
        (),
        "ppo.clp: unknown key (my.yaml:2). Did you mean ppo.clip?",
        id="unknown key, nearest name",
    ),
    pytest.param(
        "pppo:\n  clip: 0.1\n",
        (),
        "pppo: unknown key (my.yaml:1). Did you mean ppo?",
        id="unknown section, nearest name",
    ),
    pytest.param(
        "ppo:\n  learning_rate: 1e-5\n",
        (),
        "ppo.learning_rate: unknown key (my.yaml:2). Did you mean ppo.optimiser.learning_rate?",
        id="unknown key that lives in a section below",
    ),
    pytest.param(
        "model:\n  max_new_tokens: 8\n",
        (),
        "model.max_new_tokens: unknown key (my.yaml:2). Did you mean ppo.sampling.max_new_tokens?",
        id="unknown key that lives in another section",
    ),
    pytest.param(
        "model:\n  colour: red\n",
        (),
        "model.colour: unknown key (my.yaml:2). Known here: base, revision, dtype, tuning, lora, quantise, trust_remote_code.",
        id="unknown key like no other",
    ),
    pytest.param(
        "reward:\n  optimiser:\n    learning_rate: 3\n  epochs: many\n",
        (),
        (
            'reward.epochs = "many": must be a number (my.yaml:4).\n'
            "reward.optimiser.learning_rate = 3: must be below 1 (my.yaml:3). Did you mean 3e-6?"
        ),
        id="two errors at once",
    ),
    pytest.param(
        "ppo:\n  optimiser:\n    learning_rate: 1\n",
        (),
        "ppo.optimiser.learning_rate = 1: must be below 1 (my.yaml:3). Did you mean 1e-6?",
        id="learning rate without its exponent",
    ),
    pytest.param(
        "data:\n  held_out: 10\n",
        (),
        "data.held_out = 10: must be below 1 (my.yaml:2). Did you mean 0.1?",
        id="percentage for a share",
    ),
    pytest.param(
        "ppo:\n  iterations: 0\n",
        (),
        "ppo.iterations = 0: must be at least 1 (my.yaml:2).",
        id="out of range below",
    ),
    pytest.param(
        "ppo:\n  clip: 0.0\n",
        (),
        "ppo.clip = 0: must be above 0 (my.yaml:2).",
        id="not above zero",
    ),
    pytest.param(
        "ppo:\n  optimiser:\n    betas: [0.9, 1.0]\n",
        (),
        "ppo.optimiser.betas.1 = 1: must be below 1 (my.yaml:3).",
        id="out of range in a list",
    ),
    pytest.param(
        "ppo:\n  rollouts: lots\n",
        (),
        'ppo.rollouts = "lots": must be a whole number (my.yaml:2).',
        id="text for a number",
    ),
    pytest.param(
        "ppo:\n  rollouts: 6.5\n",
        (),
        "ppo.rollouts = 6.5: must be a whole number (my.yaml:2).",
        id="fraction for a whole number",
    ),
    pytest.param(
        "ppo:\n  epochs: true\n",
        (),
        "ppo.epochs = true: must be a whole number (my.yaml:2).",
        id="true for a number",
    ),
    pytest.param(
        "name: 12\n",
        (),
        'name = 12: must be text (my.yaml:1). In quotes it is: "12".',
        id="number for text",
    ),
    pytest.param(
        "reward:\n  margin: perhaps\n",
        (),
        'reward.margin = "perhaps": must be true or false (my.yaml:2).',
        id="text for true or false",
    ),
    pytest.param(
        "logging:\n  project: null\n",
        (),
        "logging.project = null: must be text (my.yaml:2).",
        id="null for text",
    ),
    pytest.param(
        "ppo:\n  kl:\n    target: .inf\n",
        (),
        "ppo.kl.target = inf: must be a finite number (my.yaml:3).",
        id="infinity",
    ),
    pytest.param(
        "ppo:\n  kl:\n    target: .nan\n",
        (),
        "ppo.kl.target = nan: must be a finite number (my.yaml:3).",
        id="not a number",
    ),
    pytest.param(
        "model:\n  tuning: lorra\n",
        (),
        'model.tuning = "lorra": must be one of: full, lora (my.yaml:2). Did you mean lora?',
        id="a choice with a typing error",
    ),
    pytest.param(
        "arms: [base, spo]\n",
        (),
        'arms.1 = "spo": must be one of: base, sft, sft_ppo, dpo, direct_ppo (my.yaml:1). Did you mean dpo?',
        id="a choice in a list",
    ),
    pytest.param(
        "model: [world:base]\n",
        (),
        'model = ["world:base"]: must be a section, with keys below it: base, revision, dtype, tuning, lora, quantise, trust_remote_code (my.yaml:1).',
        id="list where a mapping is wanted",
    ),
    pytest.param(
        "model: world:base\n",
        (),
        'model = "world:base": must be a section, with keys below it: base, revision, dtype, tuning, lora, quantise, trust_remote_code (my.yaml:1).',
        id="text where a mapping is wanted",
    ),
    pytest.param(
        "data:\n  preferences:\n    path: my.jsonl\n",
        (),
        "data.preferences: must be a list, each item a section with keys: path, kind, weight, format, limit (my.yaml:2).",
        id="mapping where a list is wanted",
    ),
    pytest.param(
        "logging:\n  adapters: tensorboard\n",
        (),
        'logging.adapters = "tensorboard": must be a list of one of: tensorboard, wandb, mlflow, trackio (my.yaml:2).',
        id="text where a list is wanted",
    ),
    pytest.param(
        "data:\n  preferences: [my.jsonl]\n",
        (),
        'data.preferences.0 = "my.jsonl": must be a section, with keys below it: path, kind, weight, format, limit (my.yaml:2).',
        id="text where a source is wanted",
    ),
    pytest.param(
        "data:\n  preferences:\n    - kind: helpful\n",
        (),
        "data.preferences.0.path: is required (my.yaml:3).",
        id="a source without a path",
    ),
    pytest.param(
        "ppo:\n  optimiser:\n    betas: [0.9]\n",
        (),
        "ppo.optimiser.betas = [0.9]: must be [number, number] (my.yaml:3).",
        id="a pair with one item",
    ),
    pytest.param(
        "ppo:\n  length:\n    cap_schedule: [[1, 24, 48]]\n",
        (),
        "ppo.length.cap_schedule.0 = [1, 24, 48]: must be [whole number, whole number] (my.yaml:3).",
        id="a pair with three items",
    ),
    pytest.param(
        "model:\n  lora:\n    target_modules: 3\n",
        (),
        "model.lora.target_modules = 3: must be text or list of text (my.yaml:3).",
        id="neither text nor list",
    ),
    pytest.param(
        "ppo:\n  reward:\n    path: my/model\n",
        (),
        "ppo.reward.type: is required, one of: trained, model, python, http (my.yaml:2).",
        id="reward without its type",
    ),
    pytest.param(
        "ppo:\n  reward:\n    type: pyton\n    target: my:f\n",
        (),
        'ppo.reward.type = "pyton": must be one of: trained, model, python, http (my.yaml:3). Did you mean python?',
        id="reward of an unknown type",
    ),
    pytest.param(
        "ppo:\n  reward:\n    type: http\n    url: http://127.0.0.1\n    target: my:f\n",
        (),
        "ppo.reward.target: unknown key (my.yaml:5). Known here: type, url, timeout.",
        id="key of another reward type",
    ),
    pytest.param(
        "ppo:\n  reward: my/model\n",
        (),
        'ppo.reward = "my/model": must be a section, with keys below it: type (trained, model, python, http) and its own (my.yaml:2).',
        id="reward as text",
    ),
    pytest.param(
        "ppo:\n  reward: {type: python, target: my_function}\n",
        (),
        'ppo.reward.target = "my_function": must look like package.module:function (my.yaml:2).',
        id="malformed target",
    ),
    pytest.param(
        "ppo:\n  reward: {type: http, url: localhost}\n",
        (),
        'ppo.reward.url = "localhost": must start with http:// or https:// (my.yaml:2).',
        id="malformed address",
    ),
    pytest.param(
        "ppo:\n  rollouts: 48\n  minibatch_size: 36\n",
        (),
        "ppo: rollouts (48) must be a multiple of minibatch_size (36) (my.yaml:3).",
        id="rollouts that are no multiple of the minibatch",
    ),
    pytest.param(
        "ppo:\n  sampling: {max_new_tokens: 32}\n  length: {cap_schedule: [[0, 64]]}\n",
        (),
        "ppo: length.cap_schedule: cap 64 must be between 1 and sampling.max_new_tokens (32) (my.yaml:3).",
        id="cap above the cap",
    ),
    pytest.param(
        "arms: [sft]\n",
        (),
        "arms: base must be among them, it is what every arm is compared with (my.yaml:1).",
        id="arms without the base",
    ),
    pytest.param(
        "arms: [base, sft, sft]\n",
        (),
        "arms: each arm may be named once (my.yaml:1).",
        id="an arm twice",
    ),
    pytest.param(
        "seed: 1\nppo:\n  clip: 0.1\n  clip: 0.2\nseed: 2\n",
        (),
        (
            "seed: set twice (my.yaml:1 and my.yaml:5). Keep one.\n"
            "ppo.clip: set twice (my.yaml:3 and my.yaml:4). Keep one."
        ),
        id="duplicate key",
    ),
    pytest.param(
        "name: ../../etc\n",
        (),
        "name = \"../../etc\": must be 1 to 100 letters, digits, '.', '_' or '-', the first a letter or digit (my.yaml:1).",
        id="name that leaves the folder",
    ),
    pytest.param(
        "name: ''\n",
        (),
        "name = \"\": must be 1 to 100 letters, digits, '.', '_' or '-', the first a letter or digit (my.yaml:1).",
        id="empty name",
    ),
    pytest.param(
        "",
        (),
        "my.yaml: the file is empty. A start: direct-rlhf init quickstart",
        id="empty file",
    ),
    pytest.param(
        "# nothing yet\n",
        (),
        "my.yaml: the file is empty. A start: direct-rlhf init quickstart",
        id="only comments",
    ),
    pytest.param(
        "- seed\n- 1\n",
        (),
        "my.yaml:1: a recipe is a mapping (lines of `key: value`), not a list.",
        id="a list as the whole recipe",
    ),
    pytest.param(
        "quickstart\n",
        (),
        "my.yaml:1: a recipe is a mapping (lines of `key: value`), not a single value.",
        id="text as the whole recipe",
    ),
    pytest.param(
        "ppo:\n\tclip: 0.1\n",
        (),
        "my.yaml:2: not valid YAML: a tab in the indentation. Indent with spaces.",
        id="tab in the indentation",
    ),
    pytest.param(
        "seed: 1\ndescription: two: three\n",
        (),
        "my.yaml:2: not valid YAML: a second colon in one line, or wrong indentation. Put text with a colon in quotes.",
        id="a colon too many",
    ),
    pytest.param(
        "arms: [base, sft\nseed: 1\n",
        (),
        "my.yaml:2: not valid YAML: expected ',' or ']', but got ':'.",
        id="bracket left open",
    ),
    pytest.param(
        "name: !!python/object/apply:os.getcwd []\n",
        (),
        "my.yaml:1: not valid YAML: a tag (!) has no place in a recipe. Remove it.",
        id="a tag that makes Python objects",
    ),
    pytest.param(
        "data: &data\n  text: *data\n",
        (),
        "my.yaml: not valid YAML: nested too deeply, or an alias that holds itself.",
        id="an alias that holds itself",
    ),
    pytest.param(
        "seed: 1\n---\nseed: 2\n",
        (),
        "my.yaml:2: not valid YAML: a second document starts here (---). Keep one.",
        id="two documents",
    ),
    pytest.param(
        "seed: 1\nname: a\x01b\n",
        (),
        "my.yaml:2: not valid YAML: control character U+0001. Remove it.",
        id="control character",
    ),
    pytest.param(
        b"seed: 1\nname: caf\xe9\n",
        (),
        "my.yaml:2: not UTF-8 text (byte 0xe9). Save it as UTF-8.",
        id="not UTF-8",
    ),
    pytest.param(
        "extends: quikstart\n",
        (),
        "extends (my.yaml:1): quikstart: no such recipe file, and no shipped recipe of that name. Did you mean quickstart? Shipped: hh-small, llama-3-8b-lora, mistral-7b-full, mistral-7b-lora, quickstart, qwen-2.5-7b-lora, standard, world-3h, world-study.",
        id="extends an unknown recipe",
    ),
    pytest.param(
        "extends: my.yaml\n",
        (),
        "extends (my.yaml:1): my.yaml is this recipe, or extends it: a circle.",
        id="extends itself",
    ),
    pytest.param(
        "extends: [quickstart]\n",
        (),
        "extends (my.yaml:1): must be text, the name or file of one recipe.",
        id="extends a list",
    ),
    pytest.param(
        "seed: 1\n",
        ("ppo.clip",),
        "override ppo.clip: write it as key=value, for example ppo.clip=0.1.",
        id="override without a value",
    ),
    pytest.param(
        "seed: 1\n",
        ("ppo..clip=1",),
        "override ppo..clip=1: write it as key=value, for example ppo.clip=0.1.",
        id="override with an empty part",
    ),
    pytest.param(
        "seed: 1\n",
        ("ppo.clp=0.1",),
        "ppo.clp: unknown key (override ppo.clp=0.1). Did you mean ppo.clip?",
        id="override of an unknown key",
    ),
    pytest.param(
        "seed: 1\n",
        ("poo.clip=0.1",),
        "poo: unknown key (override poo.clip=0.1). Did you mean ppo?",
        id="override of an unknown section",
    ),
    pytest.param(
        "seed: 1\n",
        ("ppo.clip=-1",),
        "ppo.clip = -1: must be above 0 (override ppo.clip=-1).",
        id="override out of range",
    ),
    pytest.param(
        "seed: 1\n",
        ("arms=[base",),
        "override arms=[base: the value is not valid YAML: expected ',' or ']', but it ends here.",
        id="override that is no YAML",
    ),
    pytest.param(
        "data:\n  preferences:\n    - path: my.jsonl\n",
        ("data.preferences.1.weight=2",),
        "override data.preferences.1.weight=2: data.preferences is a list of 1 (counted from 0) and has no item 1.",
        id="override past the end of a list",
    ),
    pytest.param(
        "seed: 1\n",
        ("arms.sft=true",),
        "override arms.sft=true: arms is a list of 2 (counted from 0) and has no item sft.",
        id="override of a list by name",
    ),
    pytest.param(
        "seed: 1\n",
        ("seed.x=1",),
        "seed: must be a whole number (override seed.x=1).",
        id="override below a value",
    ),
    pytest.param(
        "seed: 1\n",
        ("ppo.reward={type: trained, type: model}",),
        "override ppo.reward={type: trained, type: model}: the value is not valid YAML: type: set twice.",
        id="override with a key twice",
    ),
    pytest.param(
        "seed: -1\n",
        ("ppo.lam=2",),
        ("seed = -1: must be at least 0 (my.yaml:1).\nppo.lam = 2: must be at most 1 (override ppo.lam=2)."),
        id="an error in the file and one in an override",
    ),
    pytest.param(
        "data:\n  mixture: {type: heuristc}\n",
        (),
        'data.mixture.type = "heuristc": must be one of: none, heuristic, reward_selected, low_conflict (my.yaml:2). '
        "Did you mean heuristic?",
        id="a mixture of no known type",
    ),
    pytest.param(
        "data:\n  mixture:\n    type: low_conflict\n    fraction: 0.5\n",
        (),
        "data.mixture.fraction: unknown key (my.yaml:4). Known here: type, models, second_seed, delta, pairs.",
        id="a key of another mixture",
    ),
    pytest.param(
        "data:\n  mixture:\n    type: heuristic\n    shares:\n      helpful: many\n      honest: true\n      harmless: -1\n",
        (),
        (
            "data.mixture.shares.honest = true: must be a number (my.yaml:6).\n"
            'data.mixture.shares.helpful = "many": must be a number (my.yaml:5).\n'
            "data.mixture.shares.harmless = -1: must be at least 0 (my.yaml:7)."
        ),
        id="names with values that are no numbers",
    ),
    pytest.param(
        "data:\n  mixture:\n    type: heuristic\n    shares: 3\n",
        (),
        "data.mixture.shares = 3: must be a section: names, each with its number (my.yaml:4).",
        id="one number for a number each",
    ),
    pytest.param(
        "data:\n  mixture:\n    type: heuristic\n    shares: {helpful: 0}\n",
        (),
        "data.mixture: shares: all of them are 0; give at least one kind a share (my.yaml:4).",
        id="no share at all",
    ),
    pytest.param(
        "data:\n  mixture: {type: reward_selected, gate: fixed}\n",
        (),
        "data.mixture: gate = fixed needs weights, one for every kind of pair and not all of them 0 (my.yaml:2).",
        id="a fixed gate without weights",
    ),
    pytest.param(
        "data:\n  mixture:\n    type: reward_selected\n    weights: {helpful: 1}\n",
        (),
        "data.mixture: weights: the gate is own, which has no use for them; set gate: fixed (my.yaml:4).",
        id="weights without a fixed gate",
    ),
    pytest.param(
        "data:\n  preferences:\n    - path: a.jsonl\n      weight: 2\n  mixture: {type: heuristic}\n",
        (),
        "data: preferences.0.weight = 2: with a mixture, data.mixture decides how often pairs are used; leave the weight "
        "at 1 (my.yaml:5).",
        id="a mixture of weighted sources",
    ),
    pytest.param(
        "ppo:\n  reward: {type: http, url: 'http://x', timeout: true}\n",
        (),
        "ppo.reward.timeout = true: must be a number (my.yaml:2).",
        id="true for a number of a variant",
    ),
]


@pytest.mark.promise("U1")
@pytest.mark.parametrize(("text", "overrides", "message"), WRONG_RECIPES)
def test_wrong_recipe_says_what_is_wrong_where_and_what_to_do(
    text: str | bytes, overrides: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_recipe("my.yaml", overrides)
    assert str(caught.value) == message


@pytest.mark.promise("U1")
def test_error_in_an_extended_file_names_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("seed: 1\nppo:\n  clip: -1\n  lam: 0.9\n")
    Path("my.yaml").write_text("extends: base.yaml\n\nppo:\n  lam: 7\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe("my.yaml")
    assert str(caught.value) == (
        "ppo.lam = 7: must be at most 1 (my.yaml:4).\nppo.clip = -1: must be above 0 (base.yaml:3)."
    )


def test_recipes_that_extend_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("extends: b.yaml\n")
    Path("b.yaml").write_text("seed: 1\nextends: a.yaml\n")
    with pytest.raises(ConfigError, match=r"^extends \(b.yaml:2\): a.yaml is this recipe, or extends it: a circle\.$"):
        load_recipe("a.yaml")


def test_unknown_recipe_name_gets_a_suggestion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_recipe("hh-smal")
    assert str(caught.value) == (
        "hh-smal: no such recipe file, and no shipped recipe of that name. Did you mean hh-small? "
        "Shipped: hh-small, llama-3-8b-lora, mistral-7b-full, mistral-7b-lora, quickstart, qwen-2.5-7b-lora, standard, world-3h, world-study."
    )


def test_unreadable_file_is_a_config_error(tmp_path: Path) -> None:
    folder = tmp_path / "my.yaml"
    folder.mkdir()
    with pytest.raises(ConfigError, match="no such recipe file"):
        load_recipe(str(folder))
