"""Data mixtures: which pairs are chosen, how often, and that nothing but their content and the seed decides."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.pair_files import jsonl, load, pair_row
from direct_rlhf.data.load import load_prompts
from direct_rlhf.data.mixture import (
    BELOW,
    CONFLICT,
    DISAGREES,
    FILE,
    MAX_REPEATS,
    MIN_GATE_PAIRS,
    NOT_BEST,
    NOT_DRAWN,
    agreement,
    apportion,
    best_rows,
    check_mixture,
    conflicts,
    draw,
    facts,
    fixed_gates,
    in_conflict,
    kinds_of,
    learn_gate,
    learn_gates,
    mix,
    mixed_data,
    objective_name,
    outlook,
    prompts_of,
    read_times,
    select,
    shares_by_size,
)
from direct_rlhf.data.types import PreferenceData, PreferencePair, Turn
from direct_rlhf.errors import ConfigError, DataError
from direct_rlhf.recipe.schema import (
    DataSection,
    DataSource,
    HeuristicMixture,
    LowConflictMixture,
    NoMixture,
    RewardSelectedMixture,
)
from direct_rlhf.run.atomic import safe_name, write_jsonl

KINDS = ("harmless", "helpful", "honest")
HEURISTIC = HeuristicMixture(type="heuristic")
SELECTED = RewardSelectedMixture(type="reward_selected")
CALM = LowConflictMixture(type="low_conflict")


def pair(number, kind, prompt=None):
    turns = (Turn("human", f"Question {number}?" if prompt is None else prompt),)
    return PreferencePair(f"{number:04}", turns, f"good {number}", f"bad {number}", kind, f"{kind}.jsonl:{number}")


def pairs_of(**sizes):
    """So many pairs of each kind, their ids apart."""
    kinds = [kind for kind, size in sizes.items() for _ in range(size)]
    return [pair(number, kind) for number, kind in enumerate(kinds)]


def totals(mixed):
    return Counter(one.kind for one in mixed.training)


# Six pairs and their margins under (harmless, helpful, honest), worked out by hand
TABLE = [pair(0, "harmless"), pair(1, "harmless"), pair(2, "helpful"), pair(3, "helpful"), pair(4, "honest"), pair(5, "honest")]  # fmt: skip
MARGINS = np.array(
    [
        [2.0, 0.0, 1.0],  # all agree
        [1.0, -1.0, 0.0],  # helpful against harmless
        [-0.5, 1.0, 0.1],  # harmless against helpful
        [0.1, 0.3, -0.2],  # within delta, or above it on one side only
        [0.0, 0.0, 0.2],  # within delta
        [0.4, -0.2, -1.0],  # its own model against the label
    ]
)


# Shares


@given(st.integers(0, 10_000), st.dictionaries(st.text(max_size=3), st.floats(0, 1e6), min_size=1).filter(lambda w: any(w.values())))  # fmt: skip
def test_shares_sum_exactly_to_the_target_and_are_less_than_one_pair_off(target, weights):
    counts = apportion(target, weights)
    assert sum(counts.values()) == target
    whole = sum(map(Fraction, weights.values()))
    for name, weight in weights.items():
        assert abs(counts[name] - target * Fraction(weight) / whole) < 1
        assert weight or not counts[name]


@pytest.mark.parametrize(
    ("target", "weights", "counts"),
    [
        (10, {"a": 1, "b": 1, "c": 1}, {"a": 4, "b": 3, "c": 3}),  # a tie goes to the first name
        (10, {"c": 1, "b": 1, "a": 1}, {"c": 3, "b": 3, "a": 4}),
        (7, {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 4, "b": 2, "c": 1}),  # quotas 3.5, 2.1, 1.4
        (100, {"a": 2, "b": 0, "c": 1}, {"a": 67, "b": 0, "c": 33}),
    ],
)
def test_the_largest_remainder_gets_what_is_left(target, weights, counts):
    assert apportion(target, weights) == counts


def test_a_temperature_of_1_keeps_the_sizes_and_higher_ones_level_them():
    sizes = {"a": 160, "b": 40, "c": 10}
    assert apportion(210, shares_by_size(sizes, 1.0)) == sizes
    assert apportion(70, shares_by_size(sizes, 2.0)) == {
        "a": 40,
        "b": 20,
        "c": 10,
    }  # roots of 160 : 40 : 10 are 4 : 2 : 1
    assert apportion(60, shares_by_size(sizes, None)) == {"a": 20, "b": 20, "c": 20}
    assert apportion(60, shares_by_size(sizes, 1e9)) == {"a": 20, "b": 20, "c": 20}
    spread = [
        max(shares.values()) / min(shares.values()) for shares in (shares_by_size(sizes, t) for t in (0.01, 1, 3, 9))
    ]
    assert all(one > other for one, other in pairwise(spread))


@given(st.sets(st.text("abcdef0123456789", min_size=4, max_size=4), max_size=30), st.integers(0, 90), st.integers(0, 9))
def test_a_draw_uses_all_pairs_nearly_equally_often_and_a_larger_one_only_adds(ids, count, seed):
    names = sorted(ids)
    times = draw(names, count, seed)
    if names:
        assert times.sum() == count
        assert times.max() - times.min() <= 1
        assert (draw(names, count + 1, seed) >= times).all()
    by_name = dict(zip(names, times, strict=True))
    assert by_name == dict(zip(names[::-1], draw(names[::-1], count, seed), strict=True))


def test_another_seed_draws_other_pairs():
    names = [f"{number:04}" for number in range(50)]
    assert (draw(names, 25, 0) != draw(names, 25, 1)).any()


# Heuristic mixtures


def test_a_mixture_by_hand_has_its_shares_and_repeats_what_is_scarce():
    section = HeuristicMixture(type="heuristic", shares={"helpful": 2, "harmless": 1, "honest": 1}, pairs=24)
    mixed = mix(section, pairs_of(helpful=30, harmless=6, honest=4), 0)
    assert totals(mixed) == {"helpful": 12, "harmless": 6, "honest": 6}
    found = facts(mixed, section, [(3, 5)] * 40)
    assert found["pairs"] == {"before": 40, "selected": 40, "after": 24}
    honest = found["kinds"]["honest"]  # 6 of 4: two of them twice, 36 / (4 + 4 + 1 + 1)
    assert honest == {"pairs": 4, "selected": 4, "used": 4, "total": 6, "share": 0.25, "most": 2, "effective": 3.6}
    assert found["reasons"] == {NOT_DRAWN: 18}
    assert found["answer_tokens"] == 24 * 8


def test_without_numbers_a_heuristic_mixture_is_every_pair_once():
    pairs = pairs_of(helpful=7, harmless=3)
    assert sorted(mix(HEURISTIC, pairs, 3).training, key=lambda one: one.id) == pairs


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 20), min_size=2),
    st.one_of(st.none(), st.floats(0.3, 20)),
    st.integers(1, 200),
    st.integers(0, 5),
)
def test_a_mixture_has_the_length_asked_for_and_no_pair_above_four_times_or_is_refused(
    sizes, temperature, target, seed
):
    section = HeuristicMixture(type="heuristic", temperature=temperature, pairs=target)
    pairs = pairs_of(**sizes)
    counts = apportion(target, shares_by_size(sizes, temperature))
    if any(count > MAX_REPEATS * sizes[kind] for kind, count in counts.items()):
        with pytest.raises(ConfigError, match="each used at most 4 times") as caught:
            mix(section, pairs, seed)
        most = int(re.search(r"to at most (\d+),", str(caught.value))[1])
        assert most < target
        assert not most or len(mix(section.model_copy(update={"pairs": most}), pairs, seed).training) == most
        return
    mixed = mix(section, pairs, seed)
    assert len(mixed.training) == target
    assert mixed.times_n.max() <= MAX_REPEATS
    assert totals(mixed) == {kind: count for kind, count in counts.items() if count}


def test_what_cannot_be_had_with_four_uses_a_pair_is_refused_with_the_most_there_can_be():
    section = HeuristicMixture(type="heuristic", shares={"helpful": 1, "honest": 1}, pairs=2000)
    words = (
        r"^data\.mixture: 1,000 of its 2,000 pairs would be of kind honest, and there are 200, each used at most 4 "
        r"times\. Set data\.mixture\.pairs to at most 1,600, change the shares, or give more such pairs\.$"
    )
    with pytest.raises(ConfigError, match=words):
        mix(section, pairs_of(helpful=600, honest=200), 0)


# Selection by margins


def test_low_conflict_drops_the_pairs_on_which_two_models_pull_apart():
    reasons = select(CALM, TABLE, KINDS, MARGINS).reasons  # delta 0.25
    assert reasons == ("", CONFLICT, CONFLICT, "", "", CONFLICT)
    assert select(CALM.model_copy(update={"delta": 0.5}), TABLE, KINDS, MARGINS).reasons == (
        "",
        CONFLICT,
        "",
        "",
        "",
        "",
    )


@given(st.lists(st.lists(st.floats(-3, 3), min_size=3, max_size=3), min_size=1, max_size=20))
def test_an_infinite_delta_drops_nothing_and_a_larger_one_never_drops_more(rows):
    margins = np.array(rows)
    assert not in_conflict(margins, math.inf).any()
    dropped = [in_conflict(margins, delta) for delta in (0.0, 0.25, 1.0, 3.0)]
    assert all((fewer <= more).all() for more, fewer in pairwise(dropped))


def test_a_gate_weighs_the_pairs_own_kind_half_and_the_rest_equally():
    gates = fixed_gates(SELECTED, KINDS)
    assert gates["helpful"] == {"harmless": 0.25, "helpful": 0.5, "honest": 0.25}
    totals_n = select(SELECTED, TABLE, KINDS, MARGINS).total_n
    assert totals_n.tolist() == pytest.approx([1.25, 0.25, 0.4, 0.125, 0.1, -0.45])


def test_gated_keeps_the_best_half_of_those_above_the_least_margin():
    # above 0 are 1.25, 0.4, 0.25, 0.125, 0.1 of pairs 0, 2, 1, 3, 4; half of five is two
    assert select(SELECTED, TABLE, KINDS, MARGINS).reasons == ("", NOT_BEST, "", NOT_BEST, NOT_BEST, BELOW)
    more = SELECTED.model_copy(update={"fraction": 1.0, "min_margin": 0.2})
    assert select(more, TABLE, KINDS, MARGINS).reasons == ("", "", "", BELOW, BELOW, BELOW)


def test_agree_keeps_what_no_model_opposes_by_more_than_delta():
    section = SELECTED.model_copy(update={"rule": "agree"})
    assert select(section, TABLE, KINDS, MARGINS).reasons == ("", DISAGREES, DISAGREES, "", "", DISAGREES)
    strict = section.model_copy(update={"delta": 0.0})
    assert select(strict, TABLE, KINDS, MARGINS).reasons == ("", DISAGREES, DISAGREES, DISAGREES, "", DISAGREES)


def test_a_fixed_gate_is_the_same_for_every_kind_of_pair():
    section = RewardSelectedMixture(
        type="reward_selected", gate="fixed", weights={"helpful": 3, "harmless": 1, "honest": 0}
    )
    gates = fixed_gates(section, KINDS)
    assert gates["honest"] == {"harmless": 0.25, "helpful": 0.75, "honest": 0.0}
    totals_n = select(section, TABLE, KINDS, MARGINS).total_n
    assert totals_n.tolist() == pytest.approx([0.5, -0.5, 0.625, 0.25, 0.0, -0.05])


@given(st.integers(2, 6), st.floats(0, 1))
def test_the_weights_of_a_gate_sum_to_1(count, own):
    kinds = [f"kind {number}" for number in range(count)]
    weights = {kind: float(number) for number, kind in enumerate(kinds)}
    for section in (
        SELECTED.model_copy(update={"own_weight": own}),
        SELECTED.model_copy(update={"gate": "fixed", "weights": weights}),
    ):
        for gate in fixed_gates(section, kinds).values():
            assert sum(gate.values()) == pytest.approx(1, abs=1e-12)
            assert min(gate.values()) >= 0


def test_ties_among_the_best_go_to_the_lower_id():
    totals_n = np.array([1.0, 2.0, 1.0, 1.0])
    assert sorted(best_rows(totals_n, ["d", "a", "c", "b"], 0.0, 0.5)) == [1, 3]
    assert best_rows(totals_n, ["d", "a", "c", "b"], 5.0, 0.5) == []
    assert best_rows(totals_n, ["d", "a", "c", "b"], 0.0, 0.01) == [1]  # never fewer than one


def loss(margins, gate):
    return float(np.log1p(np.exp(-margins @ np.array(gate))).mean())


@pytest.mark.parametrize("seed", range(4))
def test_a_learnt_gate_is_the_likeliest_one_on_the_simplex(seed):
    draws = np.random.default_rng(seed)
    margins = draws.normal(size=(80, 3)) * [1.0, 2.0, 0.5] + [0.2, 0.3 * seed, 0.4]
    gate = learn_gate(margins)
    assert gate.sum() == pytest.approx(1)
    assert gate.min() >= 0
    steps = np.linspace(0, 1, 101)
    grid = min(loss(margins, (a, b, 1 - a - b)) for a, b in product(steps, steps) if a + b <= 1 + 1e-9)
    assert loss(margins, gate) <= grid + 1e-6


def test_a_learnt_gate_goes_to_the_model_that_knows_and_stays_even_between_equals():
    knows, noise = np.full(60, 1.0), np.tile([3.0, -3.0], 30)
    assert learn_gate(np.stack([noise, knows], axis=1)) == pytest.approx([0, 1], abs=0.1)
    assert learn_gate(np.stack([knows, knows], axis=1)) == pytest.approx([0.5, 0.5])
    assert learn_gate(np.zeros((5, 2))) == pytest.approx([0.5, 0.5])


def test_a_gate_is_learnt_from_held_out_pairs_of_its_kind_or_refused():
    pairs = pairs_of(harmless=MIN_GATE_PAIRS, helpful=MIN_GATE_PAIRS)
    margins = np.array([[2.0, -2.0] if one.kind == "harmless" else [-2.0, 2.0] for one in pairs])
    gates = learn_gates(pairs, ("harmless", "helpful"), margins)
    assert gates["harmless"]["harmless"] > 0.99
    assert gates["helpful"]["helpful"] > 0.99
    with pytest.raises(
        ConfigError, match=r"at least 30 held-out pairs of each kind, and there are 29 of helpful\. Raise"
    ):
        learn_gates(pairs[:-1], ("harmless", "helpful"), margins[:-1])


# Conflict


def test_the_conflict_matrix_counts_each_two_kinds_that_pull_apart():
    # harmless-helpful: pairs 1, 2; helpful-honest: none; harmless-honest: pair 5; of six
    assert (conflicts(MARGINS, 0.25) * 6).round(9).tolist() == [[0, 2, 1], [2, 0, 0], [1, 0, 0]]


@given(
    st.lists(st.lists(st.floats(-2, 2), min_size=3, max_size=3), min_size=1, max_size=12),
    st.floats(0, 1),
    st.data(),
)
def test_the_conflict_matrix_equals_a_slow_loop_and_is_symmetric(rows, delta, data):
    times = data.draw(st.lists(st.integers(0, 4), min_size=len(rows), max_size=len(rows)))
    found = conflicts(np.array(rows), delta, np.array(times))
    assert (found == found.T).all()
    for k, l in product(range(3), range(3)):  # noqa: E741
        apart = [(d[k] > delta and d[l] < -delta) or (d[k] < -delta and d[l] > delta) for d in rows]
        expected = sum(t for t, flag in zip(times, apart, strict=True) if flag) / max(sum(times), 1)
        assert found[k, l] == pytest.approx(expected)


def test_after_a_low_conflict_mixture_no_conflict_is_left_and_it_is_recorded():
    mixed = mix(CALM, TABLE, 0, margin_nK=MARGINS)
    found = facts(mixed, CALM, [(1, 2)] * 6)
    assert np.array(found["conflicts"]["before"])[0, 1] == pytest.approx(2 / 6)
    assert not np.array(found["conflicts"]["after"]).any()
    assert found["conflicts"]["kinds"] == list(KINDS)
    assert found["reasons"] == {CONFLICT: 3}
    assert found["right"]["honest"] == {"harmless": 0.5, "helpful": 0.5, "honest": 0.5}


def test_two_seeds_of_the_models_agree_as_far_as_their_sides_and_decisions_do():
    mixed = mix(CALM, TABLE, 0, margin_nK=MARGINS)
    same = agreement(CALM, mixed, MARGINS, mixed.selection)
    assert same == {"decision": 1.0, "side": dict.fromkeys(KINDS, 1.0)}
    other = MARGINS.copy()
    other[1, 1] = -0.2  # inside delta: no conflict any more
    found = agreement(CALM, mixed, other, select(CALM, TABLE, KINDS, other))
    assert found["decision"] == pytest.approx(5 / 6)
    assert found["side"] == pytest.approx({"harmless": 1.0, "helpful": 5 / 6, "honest": 1.0})


# All of a mixture


SECTIONS = [
    HeuristicMixture(type="heuristic", temperature=None, pairs=9),
    SELECTED,
    SELECTED.model_copy(update={"pairs": 5}),
    SELECTED.model_copy(update={"rule": "agree"}),
    CALM,
    CALM.model_copy(update={"pairs": 2}),
]


@pytest.mark.promise("D4")
@pytest.mark.parametrize("section", SECTIONS)
@given(order=st.permutations(range(6)), seed=st.integers(0, 3))
def test_the_order_of_the_pairs_does_not_matter(section, order, seed):
    one = mix(section, TABLE, seed, margin_nK=MARGINS)
    other = mix(section, [TABLE[row] for row in order], seed, margin_nK=MARGINS)  # margins are in the order of the ids
    assert one.training == other.training
    assert list(one.lines()) == list(other.lines())


@pytest.mark.parametrize("section", SECTIONS)
def test_labels_are_never_flipped_and_no_pair_is_made_up(section):
    assert set(mix(section, TABLE, 0, margin_nK=MARGINS).training) <= set(TABLE)


def test_a_scored_mixture_is_drawn_from_what_is_selected_or_repeats_it():
    selected = {TABLE[row].id for row in (0, 3, 4)}
    for count, most in ((2, 1), (3, 1), (7, 3), (12, 4)):
        mixed = mix(CALM.model_copy(update={"pairs": count}), TABLE, 0, margin_nK=MARGINS)
        assert len(mixed.training) == count
        assert {one.id for one in mixed.training} <= selected
        assert mixed.times_n.max() == most
    with pytest.raises(ConfigError, match="each used at most 4 times"):
        mix(CALM.model_copy(update={"pairs": 13}), TABLE, 0, margin_nK=MARGINS)


def test_each_line_says_what_a_pair_was_given_for_and_what_became_of_it():
    lines = list(mix(SELECTED.model_copy(update={"pairs": 1}), TABLE, 0, margin_nK=MARGINS).lines())
    assert [line["id"] for line in lines] == [one.id for one in TABLE]
    assert lines[1] == {
        "id": "0001",
        "kind": "harmless",
        "source": "harmless.jsonl:1",
        "times": 0,
        "reason": NOT_BEST,
        "margins": {"harmless": 1.0, "helpful": -1.0, "honest": 0.0},
        "total": 0.25,
    }
    assert Counter(line["reason"] for line in lines) == {None: 1, NOT_DRAWN: 1, NOT_BEST: 3, BELOW: 1}


def test_nothing_left_is_an_error_that_names_the_cards():
    section = SELECTED.model_copy(update={"min_margin": 9.0})
    with pytest.raises(
        DataError, match=r"reward_selected: no pair is left of 6\. Look at the reward models' fitness cards"
    ):
        mix(section, TABLE, 0, margin_nK=MARGINS)


@pytest.mark.parametrize("section", [HEURISTIC, SELECTED, CALM])
def test_one_kind_is_no_mixture(section):
    with pytest.raises(
        ConfigError, match=r"the training pairs are all of one kind \(helpful\), and a mixture needs two"
    ):
        kinds_of(section, pairs_of(helpful=4))


@pytest.mark.promise("U1")
@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            HeuristicMixture(type="heuristic", shares={"helpfull": 1, "harmless": 1, "honest": 1}),
            "data.mixture.shares.helpfull: no training pair is of this kind. Did you mean helpful? The data have: "
            "harmless, helpful, honest.",
        ),
        (
            HeuristicMixture(type="heuristic", shares={"helpful": 1}),
            "data.mixture.shares: harmless, honest is not named, and the data have such pairs. Give every kind a number; "
            "0 leaves it out.",
        ),
        (
            LowConflictMixture(type="low_conflict", models={"toxicity": "x"}),
            "data.mixture.models.toxicity: no training pair is of this kind. The data have: harmless, helpful, honest.",
        ),
        (
            LowConflictMixture(type="low_conflict", models=dict.fromkeys(KINDS, "x"), second_seed=True),
            "data.mixture.second_seed: it has no effect, as data.mixture.models gives the models of all kinds and none is "
            "trained. Set it to false, or leave a kind out of the models.",
        ),
        (
            LowConflictMixture(type="low_conflict", pairs=25),
            "data.mixture.pairs = 25: there are 6 training pairs, each used at most 4 times, and only those that are "
            "selected. Lower it.",
        ),
        (
            RewardSelectedMixture(type="reward_selected", gate="learnt"),
            "data.mixture.gate = learnt: needs at least 30 held-out pairs of each kind, and there are 2 of harmless, 2 of "
            "helpful, 2 of honest. Raise data.held_out, or set data.mixture.gate=own.",
        ),
    ],
)
def test_what_the_data_do_not_allow_is_said_before_a_model_is_trained(section, words):
    with pytest.raises(ConfigError) as caught:
        check_mixture(section, TABLE, TABLE)
    assert str(caught.value) == words


def test_the_outlook_says_what_will_be_chosen_from_what():
    pairs = pairs_of(helpful=30, harmless=6)
    section = HeuristicMixture(type="heuristic", temperature=None, pairs=24)
    assert (
        outlook(section, pairs, [])
        == "heuristic, 24 pairs: harmless 12 from 6 (up to 2 times each), helpful 12 from 30"
    )
    scored = LowConflictMixture(type="low_conflict", models={"helpful": "x"}, second_seed=True, pairs=20)
    assert outlook(scored, pairs, []) == (
        "low_conflict among harmless 6, helpful 30, 20 of the selected ones; reward models trained, twice: harmless"
    )


@pytest.mark.parametrize("kind", ["helpful", "a kind / of ours", "../x", "héllo", "", "." * 40, "\ud800"])
def test_any_kind_has_a_stage_name_of_its_own(kind):
    names = [objective_name(word, second=second) for word in (kind, f"{kind} ", "a_kind_of_ours") for second in (0, 1)]
    assert len(set(names)) == 6
    for name in names:
        assert safe_name(f"{name}_fitness") == f"{name}_fitness"


# From files to what later stages are given


def test_later_stages_get_the_pairs_by_their_ids_and_the_held_out_ones_untouched(tmp_path):
    mixed = mix(HeuristicMixture(type="heuristic", pairs=9), TABLE, 0)
    write_jsonl(tmp_path / FILE, mixed.lines())
    data = PreferenceData(tuple(TABLE[::-1]), (pair(9, "honest"),), ())
    found = mixed_data(data, read_times(tmp_path / FILE))
    assert list(found.train) == mixed.training
    assert len(found.train) == 9
    assert found.held_out == data.held_out


def test_ppo_is_given_a_prompt_for_each_use_of_a_pair_and_no_two_with_one_id():
    twice, again = pair(0, "helpful", "Same?"), replace(pair(1, "honest", "Same?"), id="x")
    prompts = prompts_of([twice, twice, again])
    assert [prompt.kind for prompt in prompts] == ["helpful", "helpful", "honest"]
    assert len({prompt.id for prompt in prompts}) == 3
    assert {prompt.turns for prompt in prompts} == {twice.prompt}


MIXED = {"mixture": HeuristicMixture(type="heuristic"), "held_out": 0.2}


@pytest.fixture
def files(tmp_path):
    """Two kinds with three pairs in common; the second folder has the lines of the first backwards."""
    helpful = [pair_row(at) for at in range(20)]
    harmless = [pair_row(at) for at in range(17, 40)]
    for folder, step in ((tmp_path / "one", 1), (tmp_path / "other", -1)):
        folder.mkdir()
        (folder / "helpful.jsonl").write_bytes(jsonl(*helpful[::step]))
        (folder / "harmless.jsonl").write_bytes(jsonl(*harmless[::step]))
    return tmp_path


def section_of(*kinds, **settings):
    sources = [DataSource(path=f"{kind}.jsonl", kind=kind) for kind in kinds]
    return DataSection(preferences=sources, **settings)


def bare(rows):
    return [replace(row, source="") for row in rows]


@pytest.mark.promise("D4")
def test_neither_the_order_of_lines_nor_that_of_files_changes_what_a_mixture_is_made_of(files):
    one = load(files / "one", section_of("helpful", "harmless", **MIXED))
    for folder, kinds in (("other", ("helpful", "harmless")), ("one", ("harmless", "helpful"))):
        other = load(files / folder, section_of(*kinds, **MIXED))
        assert (bare(one.train), bare(one.held_out)) == (bare(other.train), bare(other.held_out))
    prompts = [
        load_prompts(section_of(*kinds, **MIXED), folder=files / folder, seed=0)
        for folder, kinds in (("one", ("helpful", "harmless")), ("other", ("harmless", "helpful")))
    ]
    assert bare(prompts[0].held_out) == bare(prompts[1].held_out)
    assert bare(prompts[0].train) == bare(prompts[1].train)


def test_a_pair_that_stands_in_two_kinds_is_used_once_and_listed(files):
    data = load(files / "one", section_of("helpful", "harmless", **MIXED))
    everything = [*data.train, *data.held_out]
    assert len(everything) == 40
    assert Counter(one.kind for one in everything) == {"harmless": 23, "helpful": 17}
    assert [row.reason for row in data.rejected] == ["duplicate"] * 3
    assert {row.source.split(":")[0] for row in data.rejected} == {"helpful.jsonl"}


def test_without_a_mixture_rows_keep_the_order_of_their_files(files):
    data = load(files / "one", section_of("helpful", "harmless", held_out=0.0))
    assert [one.source for one in data.train[:3]] == ["helpful.jsonl:1", "helpful.jsonl:2", "helpful.jsonl:3"]
    assert len(data.train) == 40
    assert isinstance(section_of("helpful").mixture, NoMixture)


def test_a_mixture_with_the_weights_of_sources_is_refused():
    with pytest.raises(
        ValueError, match=r"preferences\.1\.weight = 2: with a mixture, data\.mixture decides how often"
    ):
        DataSection(
            preferences=[DataSource(path="a"), DataSource(path="b", weight=2)],
            mixture=HeuristicMixture(type="heuristic"),
        )


def test_facts_are_plain_numbers_that_json_takes():
    mixed = mix(SELECTED, TABLE, 0, margin_nK=MARGINS)
    found = facts(mixed, SELECTED, [(row, 2 * row) for row in range(6)])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["lengths"]["kept"] == {"pairs": 2, "chosen": 1.0, "rejected": 2.0}  # pairs 0 and 2
    assert found["lengths"]["dropped"] == {"pairs": 4, "chosen": 3.25, "rejected": 6.5}
    assert found["gates"]["honest"]["honest"] == 0.5
