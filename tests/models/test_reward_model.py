import json
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import write_checkpoint

from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.data.types import Turn
from direct_rlhf.errors import CheckpointError, ConfigError, DataError
from direct_rlhf.models.forward import states
from direct_rlhf.models.loading import add_lora, base_sha256, load_causal_lm, parameters_sha256
from direct_rlhf.models.reward_model import Facts, Normalisation, RewardModel
from direct_rlhf.models.scalar import ScalarModel
from direct_rlhf.recipe.schema import DialogueSection, LoraSection
from direct_rlhf.rollout.types import SamplingSettings

SETTINGS = SamplingSettings(max_new_tokens=8, stop_strings=("\n\nHuman:",))
ITEMS = [
    ((Turn("human", "tell me one"),), "good", True),
    ((Turn("human", "one"), Turn("assistant", "yes"), Turn("human", "tell me")), "bad bad bad", True),
    ((Turn("human", "tell me one"),), "good", False),
    ((Turn("human", "tell me one"),), "", True),
]


def make(folder, name="mistral", tuning="full"):
    base = write_checkpoint(folder / "base", name, scale=3.0)
    tokens = load_tokens(str(base))
    model = load_causal_lm(base)
    identity = base_sha256(model)
    if tuning == "lora":
        model = add_lora(model, LoraSection(rank=2), "reward")
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(std=0.2)
    facts = Facts(DialogueSection(), 40, 24, str(base), None, identity, tokens.sha256, tuning)
    normalisation = Normalisation(
        0.5, 0.25, {"0.01": -0.1, "0.05": 0.0, "0.1": 0.1, "0.5": 0.5}, 100, True, identity, asdict(SETTINGS), "00"
    )
    return RewardModel(ScalarModel.from_base(model, seed=1), tokens, facts, normalisation, "cpu", "float32")


@pytest.mark.parametrize(
    ("name", "tuning"), [(n, "full") for n in ("mistral", "llama", "gpt2", "gemma2", "granite")] + [("mistral", "lora")]
)
def test_a_saved_reward_model_scores_exactly_as_before(tmp_path, name, tuning):
    model = make(tmp_path, name, tuning)
    model.save(tmp_path / "reward_model")
    again = RewardModel.load(tmp_path / "reward_model")
    assert torch.equal(again.score(ITEMS), model.score(ITEMS))
    assert again.facts == model.facts
    assert again.normalisation.low_quantile == pytest.approx(-2.0)
    assert not any(parameter.requires_grad for parameter in again.scalar.parameters())
    again.check_fits(model.facts.base_sha256, SETTINGS)
    assert (again.score(ITEMS)[0] - again.score(ITEMS)[1]).abs() > 1e-3  # the scores say something


def test_other_tools_load_it_as_a_sequence_classifier(tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = make(tmp_path)
    model.save(tmp_path / "reward_model")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward_model").eval()
    with torch.no_grad():
        theirs = [classifier(input_ids=torch.tensor([model.encode(item)])).logits[0, 0] for item in ITEMS]
    torch.testing.assert_close(torch.stack(theirs), model.raw(ITEMS), atol=1e-5, rtol=1e-5)


def test_an_architecture_without_such_a_class_is_saved_as_backbone_and_head(tmp_path):
    model = make(tmp_path, "granite")
    model.save(tmp_path / "reward_model")
    config = json.loads((tmp_path / "reward_model" / "config.json").read_text())
    assert config["architectures"] == ["GraniteModel"]
    assert (tmp_path / "reward_model" / "head.safetensors").exists()


def test_a_lora_reward_model_shares_a_trunk_and_gives_the_adapter_back(tmp_path):
    model = make(tmp_path, tuning="lora")
    model.save(tmp_path / "reward_model")
    trunk = add_lora(load_causal_lm(model.facts.base), LoraSection(rank=2), "policy")
    again = RewardModel.load(tmp_path / "reward_model", trunk=trunk)
    assert again.scalar.trunk is trunk
    ids_BL, mask_BL = torch.tensor([[5, 6, 7]]), torch.ones(1, 3)
    before = states(trunk, ids_BL, mask_BL).hidden_NH
    state = parameters_sha256(trunk)
    torch.testing.assert_close(again.score(ITEMS), model.score(ITEMS), atol=1e-6, rtol=0)
    assert trunk.active_adapter == "policy"
    assert torch.equal(states(trunk, ids_BL, mask_BL).hidden_NH, before)
    assert parameters_sha256(trunk) == state
    trainable = {name for name, parameter in trunk.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".policy." in name for name in trainable)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answers=st.lists(st.text(alphabet="godbaey ", max_size=12), min_size=1, max_size=7))
def test_a_score_does_not_depend_on_its_neighbours(shared_model, answers):
    items = [((Turn("human", "tell me one"),), answer, True) for answer in answers]
    together = shared_model.score(ITEMS + items)[len(ITEMS) :]
    alone = torch.cat([shared_model.score([item]) for item in items])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def shared_model(tmp_path_factory):
    return make(tmp_path_factory.mktemp("shared"))


def test_the_end_of_an_answer_counts_and_its_white_space_does_not(shared_model):
    turns = ITEMS[0][0]
    finished, cut, spaced = shared_model.score(
        [(turns, "good", True), (turns, "good", False), (turns, " good \n", True)]
    )
    assert finished == spaced
    assert finished != cut
    encoded = shared_model.dialogue.encode_dialogue(turns, "good", max_prompt_tokens=40, max_answer_tokens=24)
    assert shared_model.encode((turns, "good", True)) == encoded.prompt_ids + encoded.answer_ids
    assert encoded.answer_ids[-1] == shared_model.tokens.eos_id


def test_a_long_prompt_loses_turns_and_a_long_answer_is_an_error(shared_model):
    last = Turn("human", "tell me one")
    long = (Turn("human", "yes " * 60), Turn("assistant", "no"), last)
    assert torch.equal(shared_model.score([(long, "good", True)]), shared_model.score([((last,), "good", True)]))
    with pytest.raises(
        DataError, match=r"does not fit into the reward model's 40 prompt and 24 answer tokens\. Cut it"
    ):
        shared_model.score([((last,), "zq" * 30, True)])


def test_another_base_other_settings_and_no_statistics_are_refused(shared_model):
    same = shared_model.facts.base_sha256
    shared_model.check_fits(same, SETTINGS)
    with pytest.raises(ConfigError, match="samples of another base"):
        shared_model.check_fits("f" * 64, SETTINGS)
    with pytest.raises(ConfigError, match=r"temperature 1.0 there, 0.7 here.*ppo.sampling"):
        shared_model.check_fits(same, replace(SETTINGS, temperature=0.7))
    with pytest.raises(ConfigError, match="stop_strings"):
        shared_model.check_fits(same, replace(SETTINGS, stop_strings=()))
    bare = replace(shared_model, normalisation=None)
    with pytest.raises(ConfigError, match="no normalisation"):
        bare.check_fits(same, SETTINGS)
    with pytest.raises(ConfigError, match="no normalisation"):
        bare.score(ITEMS)


def test_damaged_artefacts_are_refused_by_name(tmp_path, shared_model):
    folder = tmp_path / "reward_model"
    with pytest.raises(ConfigError, match=r"no reward model here.*direct-rlhf reward train"):
        RewardModel.load(tmp_path)
    shared_model.save(folder)
    described = json.loads((folder / "reward.json").read_text())
    for change, words in (
        ({"format": 99}, "format 99"),
        ({"facts": {}}, "damaged or of another release"),
        ({"facts": described["facts"] | {"tokenizer_sha256": "0"}}, "its tokenizer is not the one"),
    ):
        (folder / "reward.json").write_text(json.dumps(described | change))
        with pytest.raises(CheckpointError, match=words):
            RewardModel.load(folder)
    (folder / "reward.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        RewardModel.load(folder)
