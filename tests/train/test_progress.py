"""What a PPO run remembers comes back from its checkpoint as it was (K6, K7)."""

import math
from dataclasses import MISSING, asdict, fields
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from direct_rlhf.errors import CheckpointError
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.models.roles import COST_CRITIC, CRITIC, POLICY
from direct_rlhf.rollout.types import FinishReason, Rollout, SampleKey
from direct_rlhf.run.checkpoints import CheckpointStore
from direct_rlhf.train.experience import Scored
from direct_rlhf.train.progress import Progress, Work, restore, save
from direct_rlhf.train.update import Position, update
from toys import toy_folder
from train.ppo_parts import everything, experience_of, learner_of, roles_of, sampled, section_of, unequal

numbers = st.floats(allow_nan=False)
words = st.text(st.characters(codec="utf-8"), max_size=12)
named = st.dictionaries(words, numbers, max_size=3)

PROGRESS = st.builds(
    Progress,
    iteration=st.integers(0, 10**6),
    kl_coefficient=numbers,
    kl_floor=numbers,
    multiplier=numbers,
    costs=st.lists(numbers, max_size=4),
    history=st.lists(named, max_size=3),
    alerts=st.lists(words, max_size=3),
    best=st.none() | named,
    stopped=words,
    probe_start=st.none() | st.dictionaries(words, st.lists(numbers, max_size=3), max_size=3),
    probes=st.integers(0, 99),
    raises=st.integers(0, 9),
    worst=st.none() | numbers,
)
POSITIONS = st.builds(
    Position,
    epoch=st.integers(0, 9),
    start=st.integers(0, 10**4),
    totals=st.dictionaries(words, st.lists(numbers, max_size=3), max_size=3),
    answer_tokens=numbers,
    left_early=st.booleans(),
)

FULL_PROGRESS = Progress(
    iteration=7,
    kl_coefficient=0.1 + 0.2,
    kl_floor=1e-300,
    multiplier=2.0,
    costs=[-0.5, 0.0, math.inf],
    history=[{"kl_sequence": 1 / 3}, {"kl_sequence": 5.0, "alert_kl_high": 1.0}],
    alerts=["kl_high", "one_answer"],
    best={"iteration": 5.0, "held_out_reward": 0.25, "held_out_kl": 3.5, "merit": -1.0},
    stopped="the mean KL of 5 iterations is 30.1 nats",
    probe_start={"arithmetic": [1.0, 0.0], "facts": [0.5]},
    probes=3,
    raises=2,
    worst=-0.01,
)
ALERTS = [{"name": "gradient_spike", "seen": "norm 8", "cause": "", "remedy": "look", "batch": ["p1", "p2"]}]


def a_rollout():
    """Three answers, one of each ending, with texts and ids that are hard to store."""
    draw = torch.Generator().manual_seed(0)
    prompt_mask = torch.tensor([[False, True], [True, True], [True, True]])
    response_mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    action_mask = response_mask & torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    return Rollout(
        prompt_ids_BP=torch.randint(0, 2**40, (3, 2), generator=draw) * prompt_mask,
        prompt_mask_BP=prompt_mask,
        response_ids_BT=torch.randint(0, 99, (3, 3), generator=draw) * response_mask,
        response_mask_BT=response_mask,
        action_mask_BT=action_mask,
        logprob_BT=torch.where(action_mask, torch.randn(3, 3, generator=draw), 0.0),
        finish=(FinishReason.EOS, FinishReason.STOP, FinishReason.LENGTH),
        texts=("", "\n\nHuman: \u2028 é 🌍 \x00", "$tensor"),
        keys=(SampleKey(0, "p1", 3, 0), SampleKey(2**63, "p/2", -1, 1), SampleKey(5, "", 0, 7)),
        policy_version=12,
    )


def a_score(rollout, *, with_cost):
    draw = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(*shape, generator=draw)

    cost = (noise(3), noise(3), noise(3, 3)) if with_cost else ()
    return Scored(rollout, noise(3), 4, noise(3), torch.tensor([True, False, True]), noise(3, 3), noise(3, 3), *cost)


def full_work(*, scored=True, with_cost=True):
    rollout = a_rollout()
    return Work(
        rollout=rollout,
        scored=a_score(rollout, with_cost=with_cost) if scored else None,
        warmed=True,
        position=Position(1, 4, {"policy_loss": [0.1, -0.0], "steps_skipped": [1.0]}, 33.0, True),
        values={"reward_mean": 1 / 3, "kl_sequence": 2.0},
        alerts=ALERTS,
    )


def assert_equal(one, other):
    """Equal in type and value, tensors to the last bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif hasattr(one, "__dataclass_fields__"):
        for field in fields(one):
            assert_equal(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key, value in one.items():
            assert_equal(value, other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for part, same in zip(one, other, strict=True):
            assert_equal(part, same)
    else:
        assert one == other
        assert repr(one) == repr(other)  # -0.0 too


NO_ROLES = SimpleNamespace(trained=())


def there_and_back(folder, progress, work):
    store = CheckpointStore(folder, keep=1)
    save(store, progress, work, NO_ROLES, {}, {})
    again = Progress()
    return again, restore(CheckpointStore(folder, keep=1).latest(), again, NO_ROLES, {}, {})


def test_the_example_fills_every_field():
    for example in (FULL_PROGRESS, full_work(), full_work().position):
        for field in fields(example):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            assert getattr(example, field.name) != default, f"{type(example).__name__}.{field.name}"
    assert all(getattr(full_work().scored, field.name) is not None for field in fields(Scored))


@pytest.mark.promise("K6")
@pytest.mark.promise("K7")
@pytest.mark.parametrize("with_cost", [True, False])
def test_every_field_of_progress_and_work_comes_back_from_the_disk(tmp_path, with_cost):
    work = full_work(with_cost=with_cost)
    progress, again = there_and_back(tmp_path, FULL_PROGRESS, work)
    assert_equal(progress, FULL_PROGRESS)
    assert_equal(again, work)
    assert again.rollout is again.scored.rollout
    assert {type(finish) for finish in again.rollout.finish} == {FinishReason}


@pytest.mark.promise("K7")
def test_a_rollout_that_is_not_scored_yet_comes_back_and_so_does_an_iteration_that_has_not_begun(tmp_path):
    for name, work in (("rollout", full_work(scored=False)), ("nothing", Work())):
        _, again = there_and_back(tmp_path / name, Progress(), work)
        assert_equal(again, work)


@pytest.mark.promise("K6")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(progress=PROGRESS, position=POSITIONS, values=named, warmed=st.booleans())
def test_whatever_a_run_remembers_comes_back(tmp_path, progress, position, values, warmed):
    work = Work(warmed=warmed, position=position, values=values)
    again, rest = there_and_back(tmp_path, progress, work)
    assert_equal(again, progress)
    assert_equal(rest, work)


@pytest.mark.promise("N3")
@pytest.mark.parametrize("place", ["progress", "values", "scores"])
def test_a_number_that_is_none_is_not_saved_and_the_checkpoint_before_stays(tmp_path, place):
    store = CheckpointStore(tmp_path, keep=1)
    save(store, Progress(iteration=1), Work(), NO_ROLES, {}, {})
    progress, work = Progress(iteration=2), full_work()
    if place == "progress":
        progress.worst = math.nan
    elif place == "values":
        work.values["reward_mean"] = math.nan
    else:
        work.scored.value_BT[0, 0] = math.nan
    with pytest.raises(CheckpointError, match=r"NaN|not finite"):
        save(store, progress, work, NO_ROLES, {}, {})
    assert store.latest().step == 1


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(toy_folder(tmp_path_factory.mktemp("base")))


def chunks(*sizes):
    return {name: ChunkSize(name, size) for name, size in zip(("sample", "score", "update"), sizes, strict=True)}


@pytest.mark.promise("K6")
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_weights_moments_guards_and_chunks_come_back_and_nothing_of_the_fresh_run_is_left(base, tmp_path, tuning):
    roles = roles_of(base, tuning, with_cost=True)
    section = section_of()
    learner = learner_of(roles, section)
    experience = experience_of(sampled(roles, base), with_cost=True)
    update(experience, learner, iteration=0, position=Position(), check_stop=lambda: None)
    work = Work(rollout=experience.scored.rollout, scored=experience.scored)
    store = CheckpointStore(tmp_path, keep=1)
    save(store, FULL_PROGRESS, work, roles, learner.optimisers, chunks(16, 8, 2))

    fresh = roles_of(base, tuning, with_cost=True)
    other, again, sizes = learner_of(fresh, section), Progress(kl_coefficient=9.0), chunks(64, 32, 32)
    assert unequal(everything(fresh), everything(roles))
    rest = restore(store.latest(), again, fresh, other.optimisers, sizes)
    assert unequal(everything(fresh), everything(roles)) == []
    assert asdict(again) == asdict(FULL_PROGRESS)
    assert [chunk.size for chunk in sizes.values()] == [16, 8, 2]
    assert_equal(rest, work)
    for role in (POLICY, CRITIC, COST_CRITIC):
        assert_equal(other.optimisers[role].state(), learner.optimisers[role].state())
        assert other.optimisers[role].steps == 4


def test_without_a_checkpoint_everything_stays_as_it_is(base, tmp_path):
    roles = roles_of(base)
    learner, before = learner_of(roles, section_of()), everything(roles)
    progress, sizes = Progress(kl_coefficient=0.3), chunks(4, 3, 2)
    work = restore(CheckpointStore(tmp_path, keep=1).latest(), progress, roles, learner.optimisers, sizes)
    assert_equal(work, Work())
    assert progress == Progress(kl_coefficient=0.3)
    assert unequal(everything(roles), before) == []
    assert [chunk.size for chunk in sizes.values()] == [4, 3, 2]


def test_a_saved_state_is_of_its_moment_and_does_not_follow_the_run(tmp_path):
    store, work = CheckpointStore(tmp_path, keep=1), full_work()
    progress = Progress(iteration=1, costs=[1.0])
    save(store, progress, work, NO_ROLES, {}, {})
    progress.costs.append(2.0)
    work.position.totals["policy_loss"].append(9.0)
    work.scored.score_B.add_(1.0)
    again = Progress()
    rest = restore(store.latest(), again, NO_ROLES, {}, {})
    assert again.costs == [1.0]
    assert rest.position.totals["policy_loss"] == [0.1, -0.0]
    assert torch.equal(rest.scored.score_B, full_work().scored.score_B)
