"""The study of helpful, honest and harmless, on a toy model: all routes, one table, resumed like any run."""

import json
import shutil
from types import SimpleNamespace

import pytest

from direct_rlhf import stages
from direct_rlhf.errors import ConfigError, Interrupted
from direct_rlhf.recipe.load import load_recipe
from direct_rlhf.report.read import read_run
from direct_rlhf.report.three_h import claims, read_study
from direct_rlhf.study import three_h
from toys import toy_folder

KINDS = ("helpful", "honest", "harmless")
MERGES = {
    "average": {"method": "linear"},
    "slerp": {"method": "slerp"},
    "task_arithmetic": {"method": "task_arithmetic", "grid": {"scale": [0.5, 1.0]}},
    "dare": {"method": "dare_linear"},
    "r_tsvm": {"method": "r_tsvm"},
    "tsv_m": {"method": "tsv_m"},
}
ABLATION = {
    "both": {"method": "r_tsvm"},
    "neither": {"method": "r_tsvm", "settings": {"weighting": False, "rank": "equal"}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    toy_folder(root / "base")
    for kind in KINDS:
        rows = [
            {"prompt": f"Tell me about {kind} thing {i}.", "chosen": f" It is {i % 7}.", "rejected": f" No {i}."}
            for i in range(24)
        ]
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("validation", "test"):
        rule = {"type": "answer", "accept": ["a", "e"], "reject": [], "max_words": 20}
        rows = [
            {"id": f"{kind}-{i}", "category": kind, "turns": [{"prompt": f"{name} {i}?", "rule": rule}]}
            for kind in KINDS
            for i in range(3)
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def recipe(data, **three_h_section):
    section = {
        "kinds": list(KINDS),
        "paradigms": ["dpo", "direct_ppo"],
        "mixtures": {"heuristic": {"type": "heuristic"}, "low_conflict": {"type": "low_conflict"}},
        "merges": MERGES,
        "ablation": ABLATION,
        "validation": str(data / "validation.jsonl"),
    } | three_h_section
    values = {
        "name": "toy",
        "threads": 1,
        "model": {"base": str(data / "base")},
        "data": {
            "preferences": [{"path": str(data / f"{kind}.jsonl"), "kind": kind} for kind in KINDS],
            "held_out": 0.3,
        },
        "reward": {
            "max_steps": 2, "batch_size": 4, "normalisation_prompts": 8, "fitness": {"on_fail": "continue"},
        },
        "dpo": {"max_steps": 2, "batch_size": 4},
        "ppo": {
            "iterations": 2, "rollouts": 8, "minibatch_size": 4, "epochs": 1, "evaluate_every": 2, "evaluate_prompts": 4,
            "critic": {"warmup": 1}, "sampling": {"max_new_tokens": 6},
        },
        "evaluation": {
            "suites": ["general", "conversation"],
            "general": {"limit": 2},
            "conversation": {"questions": str(data / "test.jsonl")},
            "max_new_tokens": 6,
            "bootstrap_draws": 200,
        },
        "three_h": section,
    }  # fmt: skip
    file = data / "toy.yaml"
    file.write_text(json.dumps(values))
    return load_recipe(str(file))


def run(data, root, **flags):
    return stages.run(recipe(data), root=root, **({"resume": False, "overwrite": False} | flags))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    return run(data, tmp_path_factory.mktemp("runs"))


def table(path):
    return json.loads((path / "three_h.json").read_text())


@pytest.mark.slow
def test_every_route_is_made_measured_and_compared(finished):
    found = table(finished)
    routes = {}
    for one in found["models"]:
        routes.setdefault((one["paradigm"], one["route"]), []).append(one["title"])
        assert set(one["by_kind"]) == set(KINDS)
        assert all(shown["n_scored"] + shown["n_failed"] == 3 for shown in one["by_kind"].values())
        assert (one["general"] is None) == (one["route"] == "ablation")
    for paradigm in ("dpo", "direct_ppo"):
        assert routes[paradigm, "expert"] == list(KINDS)
        assert routes[paradigm, "mixture"] == ["heuristic", "low_conflict"]
        assert list(dict.fromkeys(routes[paradigm, "merge"])) == list(MERGES)
        assert routes[paradigm, "merge"].count("dare") == three_h.MASK_SEEDS
        assert routes[paradigm, "ablation"] == list(ABLATION)
    compared = {(row["arm"], row["against"]) for row in found["differences"]}
    for paradigm in ("dpo", "direct_ppo"):
        assert (f"{paradigm}-helpful", "base") in compared
        assert (f"{paradigm}-merge-r_tsvm", f"{paradigm}-merge-tsv_m") in compared
        assert (f"{paradigm}-merge-r_tsvm", f"{paradigm}-mix-heuristic") in compared
        assert len(found["conflicts"][paradigm]["pairs"]) == 3
    assert {row["metric"] for row in found["differences"]} == {*KINDS, "mean", "worst", "general"}


@pytest.mark.slow
def test_all_routes_train_on_equally_many_pairs_and_rollouts(finished):
    parts = finished / "parts"
    facts = {part.name: json.loads((part / "stages/mixture.json").read_text())["facts"] for part in parts.glob("d*-*")}
    for paradigm in ("dpo", "direct_ppo"):
        experts = [facts[f"{paradigm}-{kind}"]["pairs"]["after"] for kind in KINDS]
        for mixture in ("heuristic", "low_conflict"):
            assert facts[f"{paradigm}-mix-{mixture}"]["pairs"]["after"] == sum(experts)
    for kind in KINDS:
        one = facts[f"dpo-{kind}"]["kinds"]
        assert {other: found["total"] for other, found in one.items() if found["total"]}.keys() == {kind}


@pytest.mark.slow
def test_the_settings_of_a_merge_are_those_that_did_best_on_the_validation_questions(finished):
    tries = [json.loads(line) for line in (finished / "search/dpo-merge-task_arithmetic/tries.jsonl").open()]
    assert [line["settings"]["scale"] for line in tries] == [0.5, 1.0]
    (merged,) = [one for one in table(finished)["models"] if one["name"] == "dpo-merge-task_arithmetic"]
    best = max(tries, key=lambda line: line["score"])
    assert merged["settings"]["scale"] == best["settings"]["scale"]
    assert merged["validation"] == best["score"]


@pytest.mark.slow
def test_slerp_of_three_gives_every_expert_the_same_share(finished, data):
    from safetensors.torch import load_file

    def weights(folder):
        return load_file(folder / "model.safetensors")["model.norm.weight"]

    experts = [weights(finished / f"parts/dpo-{kind}/models/dpo") for kind in KINDS]
    merged = weights(finished / "models/dpo-merge-slerp")
    assert (merged - sum(experts) / 3).abs().max() < 1e-4 * experts[0].abs().max()  # nearly equal ones: the mean


@pytest.mark.slow
def test_a_finished_study_does_nothing_again_and_ends_with_the_same_table(finished, data, monkeypatch):
    before = table(finished)
    made = {path: path.stat().st_mtime_ns for path in finished.rglob("model.safetensors")}
    monkeypatch.setattr("direct_rlhf.merge.executor.merge_models", lambda *args, **more: pytest.fail("merged again"))
    run(data, finished.parent, resume=True)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    after = table(finished)
    assert {k: v for k, v in after.items() if k != "costs"} == {k: v for k, v in before.items() if k != "costs"}


@pytest.mark.slow
def test_a_stop_in_the_search_loses_no_try_and_the_table_is_the_same(data, finished, tmp_path, monkeypatch):
    real, asked = three_h.ThreeH.validate, []

    def stopping(self, model, name="candidate"):
        asked.append(name)
        if len(asked) == 3:
            raise Interrupted("stop")
        return real(self, model, name)

    monkeypatch.setattr(three_h.ThreeH, "validate", stopping)
    with pytest.raises(Interrupted):
        run(data, tmp_path)
    path = tmp_path / "toy"
    assert len((path / "search/dpo-merge-average/tries.jsonl").read_text().splitlines()) == 1
    run(data, tmp_path, resume=True)
    assert table(path)["models"] == table(finished)["models"]


@pytest.mark.slow
def test_a_merge_that_was_made_from_other_settings_is_made_again(data, finished):
    before = table(finished)
    merged, other = (finished / "models" / f"dpo-merge-{name}" for name in ("task_arithmetic", "r_tsvm"))
    weights = (merged / "model.safetensors").read_bytes()
    shutil.copytree(other, merged, dirs_exist_ok=True)
    record = finished / "search/dpo-merge-task_arithmetic/chosen.json"
    chosen = json.loads(record.read_text())
    record.write_text(json.dumps(chosen | {"parameters": {"scale": 9.0}}))
    run(data, finished.parent, resume=True)
    assert (merged / "model.safetensors").read_bytes() == weights
    assert json.loads(record.read_text()) == chosen
    assert table(finished)["models"] == before["models"]


@pytest.mark.slow
def test_masks_do_not_depend_on_where_the_run_lies(data, finished, tmp_path):
    from safetensors.torch import load_file

    shutil.copytree(finished, tmp_path / "toy")
    for name in ("search/dpo-merge-dare", "models/dpo-merge-dare", "models/dpo-merge-dare-masks-1"):
        shutil.rmtree(tmp_path / "toy" / name)
    run(data, tmp_path, resume=True, only="merge")
    before, after = (
        load_file(root / "models/dpo-merge-dare/model.safetensors") for root in (finished, tmp_path / "toy")
    )
    assert all(before[name].equal(after[name]) for name in before)


def test_a_base_on_the_hub_is_merged_at_the_revision_of_the_recipe(data):
    loaded = recipe(data)
    model = loaded.recipe.model.model_copy(update={"base": "some/base", "revision": "abc"})
    loaded = loaded.with_recipe(loaded.recipe.model_copy(update={"model": model}))
    assert three_h.ThreeH(loaded, SimpleNamespace(path=data), None)._base == "some/base@abc"


@pytest.mark.slow
def test_the_page_and_the_terminal_show_the_study(finished):
    html = (finished / "report.html").read_text()
    for text in (
        "Mixing the data, or merging the models?",
        "Trade-offs",
        "this project&#39;s own reading",
        "task arithmetic",
    ):
        assert text in html
    from io import StringIO

    from rich.console import Console

    from direct_rlhf.report.table import print_results

    out = StringIO()
    print_results(finished, Console(file=out, width=220))
    assert "Does merging balance better than mixing?" in out.getvalue()
    assert "Worst H" in out.getvalue()


@pytest.mark.slow
def test_several_runs_give_means_over_runs_with_students_interval(finished, tmp_path):
    from shutil import copytree

    other = copytree(finished, tmp_path / "other")
    moved = table(other)
    for one in moved["models"]:
        one["mean"]["value"] += 1.0 + (one["name"] == "dpo-merge-average")
    moved["differences"] = []  # a run may have chosen, and compared, other models
    (other / "three_h.json").write_text(json.dumps(moved))
    study = read_study([read_run(finished), read_run(other)])
    own = next(one for one in table(finished)["models"] if one["name"] == "dpo-merge-average")["mean"]["value"]
    found = study.value("dpo-merge-average", "mean")
    assert found.value == pytest.approx(own + 1.0)
    assert found.high - found.value == pytest.approx(12.706205 * 1.0)  # two runs: t of one degree, standard error 1
    base = next(one for one in table(finished)["models"] if one["name"] == "base")["mean"]["value"]
    between = study.difference("dpo-merge-average", "base", "mean")
    assert between.n == 2
    assert between.difference == pytest.approx(own - base + 0.5)
    assert between.high - between.difference == pytest.approx(12.706205 * 0.5)
    assert claims(study, "dpo")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"merges": {"x": {"method": "tiess"}}}, "three_h.merges.x.method = tiess: no such method"),
        ({"merges": {"x": {"method": "ties", "grid": {"densty": [0.2]}}}}, "densty"),
        ({"merges": {"x": {"method": "ties", "grid": {"density": [2.0]}}}}, "density"),
        (
            {"ablation": {"x": {"method": "linear", "grid": {"weights": [[1, 2]]}}}},
            "one number for each of the 3 models",
        ),
    ],
)
def test_a_merge_that_cannot_be_is_refused_before_anything_is_trained(data, section, said):
    study = three_h.ThreeH(recipe(data, **section), SimpleNamespace(), lambda: False)
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        study.check()


def test_an_unknown_stage_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="--only dpo: no such stage; choose one of train, merge, evaluation, report"):
        run(data, tmp_path, only="dpo")
