"""The capability probe: evaluate_general's own values for the first documents, and no trace left in the model."""

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.errors import ConfigError, Interrupted
from direct_rlhf.evaluate.general import evaluate_general
from direct_rlhf.evaluate.probe import CapabilityProbe
from direct_rlhf.models.loading import add_lora, autocast, load_causal_lm
from direct_rlhf.recipe.schema import GeneralSection, LoraSection
from direct_rlhf.rollout.native import sampler_path

GO_ON = {"should_stop": lambda: False}


def make(tokens, *tasks, items=5, batch_size=4, report=print, **fields):
    section = GeneralSection(tasks=[str(task) for task in tasks], **fields)
    return CapabilityProbe(tokens, section, items=items, seed=0, batch_size=batch_size, folder=None, report=report)


def values(model, tokens, bars, *tasks, limit=5, **fields):
    """Task -> value of each document, as the evaluation itself measures them."""
    section = GeneralSection(tasks=[str(task) for task in tasks], limit=limit, **fields)
    _, items = evaluate_general(
        model, tokens, section, batch_size=64, seed=0, draws=200, progress=bars, report=print, **GO_ON
    )
    found = {}
    for item in items:
        if "/" not in item.task:  # a further answer filter
            found.setdefault(item.task, []).append(item.value)
    return found


def random_states():
    numpy_state = np.random.get_state(legacy=False)
    return random.getstate(), repr(numpy_state), torch.get_rng_state().tolist()


def test_it_gives_evaluate_generals_own_values_document_by_document(bars):
    model, tokens = load_causal_lm("world:base"), load_tokens("world:base")
    probe = make(tokens, "world", items=6, batch_size=16)
    found = probe(model, **GO_ON)
    assert found == values(model, tokens, bars, "world", limit=6)
    assert len(found) == 11
    assert {len(scores) for scores in found.values()} == {6}
    assert {x for scores in found.values() for x in scores} == {0.0, 1.0}
    assert probe.failed == 0


def test_it_asks_the_same_documents_with_the_same_shots_every_time(model, tokens, task_yaml, generation_yaml, bars):
    probe = make(tokens, task_yaml, generation_yaml, num_fewshot=2, limit=1)
    asked = []
    sampler_path(model)  # our decoder is tried on each model once
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    first = probe(model, **GO_ON)
    halfway = len(asked)
    second = probe(model, **GO_ON)
    assert asked[:halfway] == asked[halfway:]
    assert first == second == values(model, tokens, bars, task_yaml, generation_yaml, num_fewshot=2)
    assert {task: len(scores) for task, scores in first.items()} == {"colours": 5, "free": 5}


def test_tasks_are_loaded_once(model, tokens, task_yaml, monkeypatch):
    from lm_eval.tasks import TaskManager

    probe = make(tokens, task_yaml)
    task_yaml.unlink()
    monkeypatch.setattr(TaskManager, "__init__", None)
    assert len(probe(model, **GO_ON)["colours"]) == 5


def test_a_policy_that_has_changed_is_measured_as_it_is_now(model, tokens, task_yaml, bars):
    probe = make(tokens, task_yaml, items=12)
    before = probe(model, **GO_ON)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1.0)
    after = probe(model, **GO_ON)
    assert after == values(model, tokens, bars, task_yaml, limit=12)
    assert before != after


@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_mode_gradients_weights_and_random_states_as_they_were(
    model, tokens, task_yaml, generation_yaml, training
):
    probe = make(tokens, task_yaml, generation_yaml)
    model.train(training)
    model.model.norm.train(not training)  # each module in its own mode
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    states = random_states()
    probe(model, **GO_ON)
    assert [module.training for module in model.modules()] == modes
    assert random_states() == states
    assert torch.is_grad_enabled()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert torch.equal(parameter.grad, torch.ones_like(parameter))
        assert parameter.requires_grad


def test_dropout_of_a_model_in_train_mode_changes_no_score(model, tokens, task_yaml):
    probe = make(tokens, task_yaml, items=12)
    expected = probe(model, **GO_ON)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.9
    model.train()
    assert probe(model, **GO_ON) == expected


def test_the_active_adapter_is_what_is_measured_and_stays_active(model, tokens, task_yaml, bars):
    plain = values(model, tokens, bars, task_yaml, limit=12)
    policy = add_lora(model, LoraSection(rank=2), "policy")
    policy = add_lora(policy, LoraSection(rank=2), "critic")
    policy.set_adapter("policy")
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".policy." in name:
                parameter.normal_(std=2.0, generator=torch.Generator().manual_seed(0))
    trainable = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    probe = make(tokens, task_yaml, items=12)
    found = probe(policy, **GO_ON)
    assert policy.active_adapter == "policy"
    assert [name for name, parameter in policy.named_parameters() if parameter.requires_grad] == trainable
    assert found != plain
    with policy.disable_adapter():
        assert probe(policy, **GO_ON) == plain
    assert probe(policy, **GO_ON) == found


def test_it_runs_under_the_callers_autocast_and_training_goes_on_in_it(model, tokens, task_yaml):
    probe, seen = make(tokens, task_yaml), []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    ids = torch.tensor([[5, 6, 7, 8]])
    with autocast("cpu", "bfloat16"):
        probe(model, **GO_ON)
        model(input_ids=ids, labels=ids).loss.backward()
    assert set(seen) == {torch.bfloat16}
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_documents_that_cannot_be_scored_count_0_and_are_counted(nan_model, tokens, task_yaml, generation_yaml):
    probe = make(tokens, task_yaml, generation_yaml)
    assert probe(nan_model, **GO_ON) == {"colours": [0.0] * 5, "free": [0.0] * 5}
    assert probe.failed == 10
    with torch.no_grad():
        nan_model.model.norm.weight.fill_(1.0)
    assert 1.0 in probe(nan_model, **GO_ON)["colours"]
    assert probe.failed == 0


@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(patience=st.integers(0, 2))
def test_a_request_to_stop_is_heard_and_the_mode_is_restored(model, tokens, task_yaml, patience):
    probe = make(tokens, task_yaml, items=12, batch_size=4)
    answers = iter([False] * patience + [True])
    model.train()
    with pytest.raises(Interrupted, match="capability probe was stopped on request"):
        probe(model, should_stop=lambda: next(answers))
    assert model.training
    assert next(answers, None) is None


@pytest.mark.promise("R3")
def test_out_of_memory_gives_smaller_batches_from_then_on_and_the_same_scores(model, tokens, task_yaml):
    expected = make(tokens, task_yaml, items=12)(model, **GO_ON)
    said, raised = [], []

    def small(module, args, kwargs):
        if len(kwargs["input_ids"]) > 3:
            raised.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.model.register_forward_pre_hook(small, with_kwargs=True)
    probe = make(tokens, task_yaml, items=12, batch_size=8, report=said.append)
    assert [probe(model, **GO_ON) for _ in range(2)] == [expected, expected]
    assert len(raised) == len(said) == 2
    assert said[0].startswith("capability probe: out of memory; the chunk is 4 instead of 8")


def test_a_metric_that_is_better_when_lower_is_refused(tokens, task_yaml):
    task_yaml.write_text(task_yaml.read_text().replace("higher_is_better: true", "higher_is_better: false"))
    with pytest.raises(ConfigError, match=r"ppo.guard: colours is measured by acc, which is better when lower.*=off"):
        make(tokens, task_yaml)


def test_a_faulty_task_is_found_before_training(tokens, tmp_path):
    with pytest.raises(ConfigError, match=r"absent.yaml cannot be loaded"):
        make(tokens, tmp_path / "absent.yaml")
