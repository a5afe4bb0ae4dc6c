"""Traffic and time: small sums done by hand, and laws that hold whatever the numbers are."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis.strategies import integers, sampled_from

from direct_rlhf.recipe.load import load_recipe
from direct_rlhf.scale.hardware import PROFILES, Hardware
from direct_rlhf.scale.limits import _smaller, limits
from direct_rlhf.scale.setting import Setting
from direct_rlhf.scale.shapes import SHAPES, Shape
from direct_rlhf.scale.speed import (
    decode_step,
    efficiency,
    forward_flops,
    iteration,
    pair_step,
    pair_steps,
    trained,
    update_step,
)
from direct_rlhf.scale.traffic import Collective, of_pass, of_rollout, seconds
from direct_rlhf.scale.words import duration, size

H100 = PROFILES["h100"]
ROUND = Hardware(  # numbers for sums in the head
    name="round",
    memory=1e12,
    bfloat16=1e12,
    float32=1e12,
    bandwidth=1e9,
    link=1e9,
    network=1e8,
    host_memory=1e12,
    compute_use=1,
    bandwidth_use=1,
    traffic_use=1,
    link_latency=1e-3,
    network_latency=1e-2,
    layer_latency=1e-9,
)
TINY = Shape("tiny", layers=2, hidden=4, inner=8, heads=2, key_heads=1, vocabulary=10, head_size=2)


def setting(recipe, gpus, *overrides, shape="mistral-7b", per_node=8):
    return Setting(load_recipe(recipe, list(overrides)).recipe, SHAPES[shape], gpus, per_node)


# Collectives


def test_in_a_collective_each_process_sends_all_but_its_own_share_and_in_an_all_reduce_twice():
    assert Collective("", 800.0, 1, over=8, nodes=1).sent == 700.0
    assert Collective("", 800.0, 1, over=8, nodes=1, reduced=True).sent == 1400.0
    assert Collective("", 800.0, 1, over=1, nodes=1).seconds(ROUND) == 0.0


def test_time_is_bytes_over_the_slowest_link_and_a_latency_for_each_step_of_the_ring():
    inside = Collective("", 8e9, 3, over=8, nodes=1)
    assert inside.seconds(ROUND) == pytest.approx(7e9 / 1e9 + 3 * 7 * 1e-3)
    between = Collective("", 16e9, 1, over=16, nodes=2)
    assert between.seconds(ROUND) == pytest.approx(15e9 / 1e8 + 14 * 1e-3 + 2 * 1e-2)
    side_by_side = Collective("", 8e9, 1, over=2, nodes=2, groups=8, reduced=True)
    assert side_by_side.seconds(ROUND) == pytest.approx(8e9 / (1e8 / 8) + 2 * 2 * 1e-2)


def test_links_and_network_work_side_by_side():
    inside, between = Collective("", 8e9, 1, over=8, nodes=1), Collective("", 1e9, 1, over=2, nodes=2)
    assert seconds([inside, inside], ROUND) == pytest.approx(2 * inside.seconds(ROUND))
    assert seconds([inside, between], ROUND) == max(inside.seconds(ROUND), between.seconds(ROUND))


def test_a_pass_moves_the_weights_twice_and_the_gradients_once():
    one = setting("mistral-7b-full", 8)
    whole = SHAPES["mistral-7b"]
    forward, backward, gradients = of_pass(one, trained(one, "ppo")[0])
    assert (forward.bytes, gradients.bytes) == (2 * whole.whole, 4 * whole.whole)
    assert backward.bytes == 2 * whole.layers * whole.layer
    kept = setting("mistral-7b-full", 8, "parallel.reshard_after_forward=false")
    assert [found.what for found in of_pass(kept, trained(kept, "ppo")[0])] == [forward.what, gradients.what]


def test_of_a_lora_model_the_adapters_gradients_travel_alone():
    one = setting("mistral-7b-lora", 8)
    policy = trained(one, "ppo")[0]
    assert of_pass(one, policy)[-1].bytes == policy.gradients < 2e8


def test_copies_inside_of_nodes_send_gradients_alone_between_them():
    one = setting("mistral-7b-full", 64, "parallel.shard_size=8")
    *within, between = of_pass(one, trained(one, "ppo")[0])
    assert {found.nodes for found in within} == {1}
    assert (between.over, between.nodes, between.groups, between.reduced) == (8, 8, 8, True)
    assert between.bytes == 4 * SHAPES["mistral-7b"].whole / 8
    all_share = setting("mistral-7b-full", 64)
    assert {found.nodes for found in of_pass(all_share, trained(all_share, "ppo")[0])} == {8}


def test_one_process_sends_nothing():
    one = setting("mistral-7b-full", 1)
    assert sum(found.sent for found in [*of_pass(one, trained(one, "ppo")[0]), *of_rollout(one)]) == 0
    assert all(span.waiting == pytest.approx(0) for span in iteration(one, H100))


# Time


def test_a_forward_counts_two_operations_a_weight_and_attention_to_what_came_before():
    one = replace(setting("mistral-7b-full", 1), shape=TINY)
    layer = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 8
    assert TINY.products == layer
    assert forward_flops(one, length=5, scored=3) == 2 * 5 * 2 * layer + 2 * 2 * 4 * 25 + 2 * 3 * 4 * 10


def test_decoding_reads_weights_and_cache_once_a_token():
    one = replace(setting("mistral-7b-full", 1), shape=TINY)
    weights = 2 * (2 * TINY.products + 10 * 4)
    cache = 3 * (512 + 128) * 2 * 2 * 2 * 2
    assert decode_step(one, replace(ROUND, bandwidth=1.0), rows=3) == weights + cache
    assert decode_step(one, replace(ROUND, layer_latency=5.0), rows=3) == 10.0
    assert decode_step(one, replace(ROUND, bandwidth=1e30, bfloat16=1.0), rows=3) == 3 * forward_flops(one, 1, 1)


def test_a_step_takes_the_longer_of_arithmetic_and_traffic():
    one = setting("mistral-7b-full", 64)
    step = update_step(one, H100)
    slow, fast = replace(H100, network=H100.network / 100), replace(H100, network=1e15, link=1e15)
    fast = replace(fast, link_latency=1e-12, network_latency=1e-12)
    assert update_step(one, fast).seconds == pytest.approx(step.busy)
    assert update_step(one, slow).busy == step.busy
    assert update_step(one, slow).seconds > 20 * step.seconds


def test_activation_checkpointing_costs_a_forward_more():
    usual, again = (setting("mistral-7b-full", 1, f"parallel.activation_checkpointing={x}") for x in ("false", "true"))
    assert 1.25 < update_step(again, H100).busy / update_step(usual, H100).busy < 4 / 3


def test_steps_of_pairs_follow_epochs_batches_and_the_cap():
    one = setting("mistral-7b-lora", 1, "reward.epochs=1.5")
    assert pair_steps(one, "reward", 1000) == 24  # 1500 pairs in batches of 64
    assert pair_steps(one, "reward", None) is None
    assert pair_steps(setting("mistral-7b-lora", 1, "reward.max_steps=10"), "reward", 1000) == 10
    assert pair_steps(setting("mistral-7b-lora", 1, "reward.max_steps=10"), "reward", None) == 10
    assert pair_step(one, H100, "sft").busy < pair_step(one, H100, "reward").busy < pair_step(one, H100, "dpo").busy


COUNTS = sampled_from([1, 2, 8, 16, 64, 512, 1024])


@settings(max_examples=40, deadline=None)
@given(gpus=COUNTS, recipe=sampled_from(["mistral-7b-full", "mistral-7b-lora"]), shape=sampled_from(sorted(SHAPES)))
def test_efficiency_is_at_most_one_and_no_time_is_negative(gpus, recipe, shape):
    one = setting(recipe, gpus, shape=shape)
    spans = iteration(one, H100)
    assert all(span.seconds >= span.busy >= 0 for span in spans)
    assert 0 < efficiency(one, H100) <= 1 + 1e-9
    assert efficiency(replace(one, gpus=1), H100) == pytest.approx(1)


@settings(max_examples=40, deadline=None)
@given(gpus=COUNTS, factor=integers(2, 10))
def test_better_hardware_is_never_slower(gpus, factor):
    one = setting("mistral-7b-full", gpus)
    total = sum(span.seconds for span in iteration(one, H100))
    for name in ("bfloat16", "bandwidth", "link", "network"):
        better = replace(H100, **{name: factor * getattr(H100, name)})
        assert sum(span.seconds for span in iteration(one, better)) <= total * (1 + 1e-9)


# Limits


def said(*arguments, profile=H100, **options):
    return "\n".join(limits(setting(*arguments, **options), profile))


def test_a_setting_without_a_limit_has_nothing_said_of_it():
    assert said("mistral-7b-lora", 1) == ""
    assert said("mistral-7b-full", 8) == ""


def test_a_model_that_no_gpu_holds_whole_is_named_as_the_end_of_the_design():
    found = said("mistral-7b-full", 512, shape="llama-3-70b")
    assert "The whole model in bfloat16, 141 GB, has no room on a GPU (72.0 GB usable)" in found
    assert "no number of GPUs helps" in found
    assert "Loading: the processes of a node hold 4.5 TB of whole models in CPU memory" in found


def test_a_phase_that_does_not_fit_is_named_with_what_to_change():
    found = said("mistral-7b-full", 1)
    assert "PPO, update: 263 GB and 72.0 GB usable. Change: more GPUs, or model.tuning=lora." in found


def test_what_is_named_to_change_is_enough_alone_or_said_to_be_one_of_several():
    one = setting("mistral-7b-lora", 1, shape="llama-2-13b")
    alone = dict(_smaller(one, "update"))["parallel.activation_checkpointing=true"]
    found = "\n".join(limits(one, H100))
    assert "PPO, sample: 194 GB and 72.0 GB usable." in found
    assert "nf4" not in found.splitlines()[0]  # the cache is what is large
    assert "parallel.activation_checkpointing=true" in found
    assert "PPO, update" not in "\n".join(limits(alone, H100))
    assert "Change several of these: model.quantise=nf4, ppo.rollouts=64" in said(
        "mistral-7b-lora", 1, shape="llama-3-70b"
    )
    copies = said("mistral-7b-full", 64, "parallel.shard_size=8", shape="llama-2-13b")
    assert "a larger parallel.shard_size (8 processes share a copy now)" in copies


def test_traffic_beyond_arithmetic_is_named_with_settings_that_were_tried_and_are_faster():
    found = said("mistral-7b-full", 64)
    assert "of a step waits for weights and gradients. Change: parallel.shard_size=8 (" in found
    assert " instead of " in found
    assert "shard_size=8" not in said("mistral-7b-full", 64, "parallel.shard_size=8")


def test_more_processes_than_rows_are_named():
    found = said("mistral-7b-lora", 512)
    assert "ppo.minibatch_size = 64: 448 of 512 processes idle in its steps." in found
    assert "ppo.rollouts: 256 prompts an iteration, so 256 of 512 processes idle while it samples." in found


# Words


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (141e9, "141 GB"), (14.46e9, "14.5 GB"), (2.5e12, "2.5 TB")],
)
def test_sizes_are_decimal_as_gpus_are_sold(value, text):
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "12.3 ms"), (8.21, "8.21 s"), (90, "90 s"), (840, "14 min"), (3.5 * 3600, "3.5 h"), (4e5, "111 h")],
)
def test_durations_are_in_the_unit_that_people_would_choose(value, text):
    assert duration(value) == text
