"""The mixture stage: margins of reward models, what a stop costs, and the stages that train on what was chosen."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import make_context, pair, write_checkpoint

from direct_rlhf import stages
from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.mixture import mix, objective_name, read_times
from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.data.types import PreferenceData
from direct_rlhf.errors import ConfigError, DivergenceError, Interrupted
from direct_rlhf.models.reward_model import RewardModel
from direct_rlhf.recipe.load import load_recipe
from direct_rlhf.run.directory import RunDirectory
from direct_rlhf.train import mixture
from direct_rlhf.train.mixture import CHUNK, SCORES, Objective, make_mixture
from direct_rlhf.train.prompts import sampling_settings
from toys import toy_folder
from train.ppo_parts import write_reward_model

KINDS = ("harmless", "helpful")
PPO = {"sampling": {"max_new_tokens": 6}}
WORDS = ("yes", "no", "one", "tell me", "good", "bad")


def some_pairs(numbers):
    """Pairs of both kinds with answers of unlike length."""
    draw = random.Random(7)
    return tuple(
        replace(
            pair(
                i, " ".join(draw.choices(WORDS, k=1 + i % 5)), " ".join(draw.choices(WORDS, k=1 + i % 3)), KINDS[i % 2]
            ),
            id=f"{i:04}",
        )
        for i in numbers
    )


DATA = PreferenceData(some_pairs(range(2 * CHUNK + 20)), some_pairs(range(1000, 1080)), ())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def models(base, tmp_path_factory):
    """Two random reward models for the base and the sampling settings of these tests, and a third of another seed."""
    root = tmp_path_factory.mktemp("models")
    recipe = make_context(root / "runs", base, ppo=PPO).recipe
    settings = sampling_settings(recipe.ppo, DialogueFormat(recipe.dialogue, load_tokens(str(base))))
    names = (*KINDS, "second")
    return {
        name: write_reward_model(root / name, str(base), seed=seed, settings=settings)
        for seed, name in enumerate(names, start=1)
    }


def context(root, base, **section):
    return make_context(root, base, data={"mixture": section}, ppo=PPO)


def objectives(models):
    return [Objective(kind, models[kind], given=True) for kind in KINDS]


def lines(ctx):
    return [json.loads(line) for line in (ctx.run.path / "mixture.jsonl").read_text().splitlines()]


def facts(ctx):
    ctx.run.finish_stage("mixture", "", 0.0, {})
    return ctx.run.stage_record("mixture")["facts"]


def test_margins_are_the_models_scores_of_chosen_minus_rejected_and_choose_the_pairs(tmp_path, base, models):
    ctx = context(tmp_path, base, type="low_conflict", delta=0.0)
    path = make_mixture(ctx, DATA, objectives(models), tokens=load_tokens(str(base)))
    pairs = sorted(DATA.train, key=lambda one: one.id)
    margin_nK = np.stack(
        [
            (
                model.score([(one.prompt, one.chosen, True) for one in pairs]).double()
                - model.score([(one.prompt, one.rejected, True) for one in pairs]).double()
            ).numpy()
            for model in (RewardModel.load(models[kind]) for kind in KINDS)
        ],
        axis=1,
    )
    found = lines(ctx)
    assert [line["id"] for line in found] == [one.id for one in pairs]
    for line, row in zip(found, margin_nK, strict=True):
        assert list(line["margins"].values()) == pytest.approx(row.tolist(), abs=1e-4)
    expected = mix(ctx.recipe.data.mixture, pairs, ctx.recipe.seed, margin_nK=margin_nK)
    assert read_times(path) == {one.id: int(times) for one, times in zip(pairs, expected.times_n, strict=True)}
    assert {line["reason"] for line in found} == {None, "conflict"}
    assert not (ctx.run.path / SCORES).exists()
    recorded = facts(ctx)
    assert recorded["pairs"]["before"] == len(pairs)
    assert np.array(recorded["conflicts"]["before"]).max() > 0
    assert not np.array(recorded["conflicts"]["after"]).any()
    assert recorded["objectives"]["helpful"]["given"] is True
    assert recorded["lengths"]["kept"]["chosen"] > 0


def test_a_heuristic_mixture_needs_no_model_and_leaves_the_held_out_pairs_alone(tmp_path, base):
    ctx = context(tmp_path, base, type="heuristic", shares={"helpful": 3, "harmless": 1}, pairs=100)
    make_mixture(ctx, DATA)
    assert [sum(line["times"] for line in lines(ctx) if line["kind"] == kind) for kind in KINDS] == [25, 75]
    assert "margins" not in lines(ctx)[0]
    assert {line["id"] for line in lines(ctx)} == {one.id for one in DATA.train}


@pytest.mark.promise("D4")
def test_the_order_of_the_pairs_changes_no_byte(tmp_path, base, models):
    written = []
    for name, data in (("one", DATA), ("other", replace(DATA, train=DATA.train[::-1]))):
        ctx = context(tmp_path / name, base, type="reward_selected")
        written.append(make_mixture(ctx, data, objectives(models)).read_bytes())
    assert written[0] == written[1]


@pytest.mark.promise("K6")
def test_a_stop_at_every_chunk_and_a_resume_end_with_the_same_bytes_and_score_nothing_twice(
    tmp_path, base, models, monkeypatch
):
    section = {"type": "reward_selected", "gate": "learnt", "second_seed": True}
    made = [replace(one, given=False, second=models["second"]) for one in objectives(models)]
    whole, broken = (context(tmp_path / name, base, **section) for name in ("whole", "broken"))
    make_mixture(whole, DATA, made, key="a")

    scored = []
    score = RewardModel.score

    def counted(self, items):
        scored.append(len(items))
        return score(self, items)

    monkeypatch.setattr(RewardModel, "score", counted)
    stops = 0
    while True:
        asked = iter(range(10**6))
        try:
            make_mixture(replace(broken, should_stop=lambda asked=asked: next(asked) >= 1), DATA, made, key="a")
            break
        except Interrupted:
            stops += 1
            assert not (broken.run.path / "mixture.jsonl").exists()
    chunks = -(-len(DATA.train) // CHUNK)
    assert stops == 2 * chunks + 2 * 2 + chunks - 1  # two models, held-out pairs of both, and the second seed's
    assert sum(scored) == 2 * (3 * len(DATA.train) + 2 * len(DATA.held_out))
    assert (whole.run.path / "mixture.jsonl").read_bytes() == (broken.run.path / "mixture.jsonl").read_bytes()
    assert facts(whole) == facts(broken)


def test_scores_of_another_key_and_a_torn_line_are_not_used_again(tmp_path, base, models):
    ctx = context(tmp_path, base, type="low_conflict")
    name = {"model": str(models["helpful"]), "pairs": "train", "start": 0, "margins": [1e6] * CHUNK}
    (ctx.run.path / SCORES).write_text(
        json.dumps({"key": "old", **name}) + "\n" + json.dumps({"key": "new", **name})[:60]
    )
    make_mixture(ctx, DATA, objectives(models), key="new")
    assert max(abs(line["margins"]["helpful"]) for line in lines(ctx)) < 1e5


def test_a_learnt_gate_is_recorded_and_looks_at_held_out_pairs_only(tmp_path, base, models):
    gates = []
    for name, data in (("one", DATA), ("other", replace(DATA, train=DATA.train[:60]))):
        ctx = context(tmp_path / name, base, type="reward_selected", gate="learnt")
        make_mixture(ctx, data, objectives(models))
        gates.append(facts(ctx)["gates"])
    assert gates[0] == gates[1]
    for gate in gates[0].values():
        assert sum(gate.values()) == pytest.approx(1)


def test_a_second_seed_shows_how_far_the_choice_depends_on_the_models(tmp_path, base, models):
    recorded = {}
    for name, second in (("same", None), ("other", models["second"])):
        ctx = context(tmp_path / name, base, type="reward_selected", second_seed=True)
        made = [Objective("harmless", models["harmless"], second=second), Objective("helpful", models["helpful"])]
        make_mixture(ctx, DATA, made)
        recorded[name] = facts(ctx)["agreement"]
    assert recorded["same"] == {"decision": 1.0, "side": {"harmless": 1.0, "helpful": 1.0}}
    assert recorded["other"]["side"]["helpful"] == 1.0
    assert recorded["other"]["side"]["harmless"] < 1
    assert recorded["other"]["decision"] < 1


def test_a_model_of_another_base_is_refused(tmp_path, base, models):
    other = write_checkpoint(tmp_path / "other", seed=9)
    ctx = context(tmp_path / "runs", other, type="low_conflict")
    with pytest.raises(ConfigError, match="normalised on samples of another base"):
        make_mixture(ctx, DATA, objectives(models))


def test_a_model_that_is_not_fit_chooses_no_pairs_unless_the_recipe_says_so(tmp_path, base, models):
    ctx = context(tmp_path, base, type="low_conflict")
    card = ctx.run.path / f"{objective_name('helpful')}_model" / "fitness.json"
    card.parent.mkdir()
    card.write_text(json.dumps({"verdict": "fail", "reasons": ["a coin"], "accuracy": 0.5, "ci": [0.4, 0.6], "n": 90}))
    with pytest.raises(
        ConfigError,
        match=r"the reward model of helpful pairs is not fit to choose pairs by: a coin\. Train a better one, or set "
        r"reward\.fitness\.on_fail=continue",
    ):
        make_mixture(ctx, DATA, objectives(models))
    reward = ctx.recipe.reward
    lenient = reward.model_copy(update={"fitness": reward.fitness.model_copy(update={"on_fail": "continue"})})
    make_mixture(replace(ctx, recipe=ctx.recipe.model_copy(update={"reward": lenient})), DATA, objectives(models))
    assert facts(ctx)["objectives"]["helpful"]["verdict"] == "fail"


@pytest.mark.promise("N2")
def test_a_score_that_is_not_finite_is_named_with_its_pair_and_kept_out_of_the_file(
    tmp_path, base, models, monkeypatch
):
    ctx = context(tmp_path, base, type="low_conflict")
    monkeypatch.setattr(
        RewardModel, "score", lambda self, items: torch.tensor([0.0, float("nan"), *[0.0] * (len(items) - 2)])
    )
    with pytest.raises(DivergenceError, match=r"harmless: reward nan for prompt of pair 0000, answer '"):
        make_mixture(ctx, DATA, objectives(models))
    assert not (ctx.run.path / SCORES).exists()


# The whole path

SMALL = [
    "data.preferences=[{path: helpful.jsonl, kind: helpful}, {path: harmless.jsonl, kind: harmless}]",
    "data.prompts=[]",
    "reward.max_steps=2",
    "reward.batch_size=4",
    "reward.normalisation_prompts=16",
    "reward.fitness.on_fail=continue",
    "sft.max_steps=1",
    "dpo.max_steps=1",
    "ppo.iterations=1",
    "ppo.rollouts=8",
    "ppo.minibatch_size=4",
    "ppo.epochs=1",
    "ppo.evaluate_every=1",
    "ppo.evaluate_prompts=4",
    "ppo.critic.warmup=0",
    "ppo.sampling.max_new_tokens=6",
    "ppo.guard.action=off",
    "ppo.ptx.weight=0",
    "evaluation.suites=[conversation]",
    "evaluation.conversation.limit=1",
    "evaluation.max_new_tokens=6",
    "evaluation.bootstrap_draws=100",
    "threads=1",
]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A toy base and two files of unlike size."""
    root = tmp_path_factory.mktemp("study")
    toy_folder(root / "base")
    draw = random.Random(0)
    for kind, size in (("helpful", 60), ("harmless", 30)):
        with (root / f"{kind}.jsonl").open("w") as out:
            for i in range(size):
                row = {"prompt": f"Thing {i} of {kind}?", "chosen": f"It is {draw.choice(['red', 'blue'])}."}
                out.write(json.dumps(row | {"rejected": f"No idea {draw.randint(0, 99)}."}) + "\n")
    return root


def run(study, root, mixture, *more, only=None, resume=False):
    overrides = [*SMALL, f"model.base={study / 'base'}", f"data.path={study}", f"data.mixture={mixture}", *more]
    loaded = load_recipe("quickstart", overrides)
    return stages.run(loaded, root=root, resume=resume, overwrite=False, only=only)


def record(path, stage):
    return RunDirectory(path).stage_record(stage)


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    section = "{type: reward_selected, rule: gated, fraction: 0.8, pairs: 24}"
    return run(study, root, section, "arms=[base, sft, dpo, direct_ppo]")


def test_every_arm_is_trained_on_what_the_models_chose(finished):
    chosen = record(finished, "mixture")["facts"]
    assert chosen["pairs"]["after"] == 24
    last = {line["stage"]: line for line in map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())}
    assert {stage: last[stage]["epoch"] for stage in ("reward", "sft", "dpo")} == pytest.approx(
        {"reward": 2 * 4 / 24, "sft": 32 / 24, "dpo": 32 / 24}  # steps of the batch size, over the mixture's pairs
    )
    assert record(finished, "direct_ppo")["facts"]["prompts"] == 24
    for kind in KINDS:
        card = json.loads((finished / f"objective_{kind}_model" / "fitness.json").read_text())
        assert set(card["by_kind"]) == {kind}
        assert chosen["objectives"][kind]["accuracy"] == card["accuracy"]
    normalised = {
        json.loads((finished / f"objective_{kind}_model" / "reward.json").read_text())["normalisation"][
            "prompts_sha256"
        ]
        for kind in KINDS
    }
    assert len(normalised) == 1  # on the base's answers to the same prompts
    page = (finished / "report.html").read_text()
    assert "Mixture selected by reward models" in page
    assert "objective_helpful_model/fitness.json" in page


def test_a_resume_of_a_finished_mixture_trains_and_scores_nothing(finished, study, monkeypatch):
    monkeypatch.setattr(mixture, "make_mixture", None)
    files = {file: file.stat().st_mtime_ns for file in finished.glob("*_model/*.safetensors")}
    section = "{type: reward_selected, rule: gated, fraction: 0.8, pairs: 24}"
    run(study, finished.parent, section, "arms=[base, sft, dpo, direct_ppo]", resume=True)
    assert files == {file: file.stat().st_mtime_ns for file in finished.glob("*_model/*.safetensors")}


def test_models_of_an_earlier_run_are_taken_as_they_are(finished, study, tmp_path):
    given = ", ".join(f"{kind}: {finished / f'objective_{kind}_model'}" for kind in KINDS)
    section = f"{{type: reward_selected, rule: gated, fraction: 0.8, pairs: 24, models: {{{given}}}}}"
    path = run(study, tmp_path, section, "arms=[base, dpo]", only="mixture")
    assert (path / "mixture.jsonl").read_bytes() == (finished / "mixture.jsonl").read_bytes()
    assert not list(path.glob("objective_*_model/*.safetensors"))
    assert (path / "objective_helpful_model" / "fitness.json").is_file()
    assert record(path, "mixture")["facts"]["objectives"]["helpful"]["given"] is True


def test_a_later_stage_alone_makes_the_mixture_that_it_needs(study, tmp_path):
    path = run(study, tmp_path, "{type: heuristic, temperature: null, pairs: 40}", "arms=[base, dpo]", only="dpo")
    kinds = record(path, "mixture")["facts"]["kinds"]
    assert {kind: one["total"] for kind, one in kinds.items()} == {"harmless": 20, "helpful": 20}
    assert "on 40 pairs" in (path / "models/dpo/README.md").read_text()
    assert not list(path.glob("objective_*"))


def test_what_a_mixture_would_be_trained_on_depends_on_its_fingerprint(study, tmp_path):
    prints = {}
    for name, section in (
        ("none", "{type: none}"),
        ("few", "{type: heuristic, pairs: 40}"),
        ("more", "{type: heuristic, pairs: 41}"),
    ):
        path = run(study, tmp_path, section, "arms=[base, dpo]", f"name={name}", only="dpo")
        prints[name] = record(path, "dpo")["fingerprint"]
    assert len(set(prints.values())) == 3


def test_the_stages_of_a_mixture_can_be_asked_for_only_where_there_is_one(study, tmp_path):
    with pytest.raises(ConfigError, match=r"--only mixture: this recipe's arms \(base, dpo\) do not need that stage"):
        run(study, tmp_path, "{type: none}", "arms=[base, dpo]", only="mixture")


def test_kinds_that_the_data_do_not_have_stop_a_run_before_anything_is_trained(study, tmp_path):
    with pytest.raises(
        ConfigError, match=r"data\.mixture\.models\.honest: no training pair is of this kind\. The data have:"
    ):
        run(study, tmp_path, "{type: low_conflict, models: {honest: base}}", "arms=[base, dpo]")
    assert not list((tmp_path / "quickstart").glob("*_model"))


DATA_DIGESTS = {  # of the data section, which every stage's fingerprint holds, from before there were mixtures
    "hh-small": "706816e82b587ad9fb828cbbd5a2dc29641b4ada89c402dc8b3dd8abc77708b4",
    "mistral-7b-full": "fe799a1e9d66d77ed0793d5e28250f9021d8588dde780c1cf200cfc0725fcf02",
    "quickstart": "98083330c8cdda771358510b7b94e76d14e3853a311dd31d42c8d3e8b0ea7554",
}


@pytest.mark.parametrize("name", DATA_DIGESTS)
def test_a_recipe_without_a_mixture_keeps_its_fingerprints_and_its_text(name):
    loaded = load_recipe(name)
    assert stages._digest(loaded.recipe.data) == DATA_DIGESTS[name]
    assert "mixture" not in loaded.yaml
    said = load_recipe(name, ["data.mixture={type: none}"])
    assert (said.sha256, said.yaml) == (loaded.sha256, loaded.yaml)


def test_without_a_mixture_no_stage_is_added_and_nothing_enters_a_fingerprint(study):
    loaded = load_recipe("quickstart", [*SMALL, f"data.path={study}", "data.mixture={type: none}"])
    one = stages.Study(loaded, SimpleNamespace(stage_record=lambda name: None), lambda: False)
    assert one._mixing() == []
    assert one.training is one.preferences
    assert one.asked is one.prompts
    assert one._mixed == []
