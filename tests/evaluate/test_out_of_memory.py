"""Evaluation where memory runs out: smaller batches, the same numbers, a counter for each phase, and a floor (R3)."""

import pytest
import torch

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.types import Turn
from direct_rlhf.errors import OutOfMemoryError
from direct_rlhf.evaluate.conversation import evaluate_conversation
from direct_rlhf.evaluate.general import evaluate_general
from direct_rlhf.evaluate.generate import Ask, generate
from direct_rlhf.evaluate.judge import Judgment
from direct_rlhf.evaluate.toxicity import ToxicityPrompt, evaluate_toxicity
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.recipe.schema import DialogueSection, GeneralSection
from direct_rlhf.rollout import decoder

pytestmark = pytest.mark.promise("R3")


class SmallMemory:
    """Makes a model raise above ``rows`` sequences in a forward, from its ``after``-th such forward on."""

    def __init__(self, model, rows, after=1):
        self.rows, self.after = rows, after
        self.seen, self.raised = [], 0
        self._large = 0
        decoder._verdicts[model] = False  # answers are sampled by the model's own forward, which is watched here
        model.model.register_forward_pre_hook(self._check, with_kwargs=True)

    def _check(self, module, args, kwargs):
        rows = len(kwargs["input_ids"])
        self._large += rows > self.rows
        if rows > self.rows and self._large >= self.after:
            self.raised += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.seen.append(rows)


@pytest.fixture
def form(tokens):
    return DialogueFormat(DialogueSection(), tokens)


@pytest.fixture
def small_model(tiny_folder):
    """The same model again, on a machine that holds two sequences."""
    import transformers as tf

    model = tf.LlamaForCausalLM.from_pretrained(tiny_folder).eval()
    model.memory = SmallMemory(model, rows=2)
    return model


COMMON = {"batch_size": 8, "seed": 3, "draws": 200, "should_stop": lambda: False}


def general(model, tokens, path, bars, said):
    section = GeneralSection(tasks=[str(path)])
    return evaluate_general(model, tokens, section, progress=bars, report=said.append, **COMMON)


def same_items(found, expected):
    """Equal but for the last digits of log-probabilities, which batches of another size may round otherwise."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.task, a.id, a.status, a.output, a.finish) == (b.task, b.id, b.status, b.output, b.finish)
        assert a.value == pytest.approx(b.value, abs=1e-6)
        assert a.extra.get("logprobs") == pytest.approx(b.extra.get("logprobs"), abs=1e-4)


def test_general_tasks_come_out_the_same(model, small_model, tokens, task_yaml, bars):
    plain, said = general(model, tokens, task_yaml, bars, unsaid := []), []
    counted, bars.done = bars.done, 0
    small = general(small_model, tokens, task_yaml, bars, said)
    same_items(small[1], plain[1])
    assert small[0]["colours"].summary == plain[0]["colours"].summary
    assert small_model.memory.raised == 2
    assert max(small_model.memory.seen) == 2
    assert [line.split(";")[0] for line in said] == ["general tasks: out of memory"] * 2
    assert (unsaid, bars.done) == ([], counted)


def test_generated_answers_come_out_the_same(model, small_model, tokens, bars):
    asks = [Ask(tuple(range(2, 12 + i % 5)), f"a{i}") for i in range(21)]

    def answers(model, batch):
        return generate(
            model, tokens, asks, max_new_tokens=12, temperature=1.0, stop_strings=("q",), batch=batch, seed=5
        )

    batch = ChunkSize("answers", 16, lambda text: None)
    assert answers(small_model, batch) == answers(model, ChunkSize("answers", 16))
    assert (batch.size, batch.halvings, small_model.memory.raised) == (2, 3, 3)


def test_answers_of_a_batch_that_failed_half_way_are_counted_once(model, tokens):
    SmallMemory(model, rows=6, after=4)
    batch, told = ChunkSize("answers", 16, lambda text: None), []
    asks = [Ask(tuple(range(2, 12)), f"a{i}") for i in range(24)]
    generate(
        model, tokens, asks, max_new_tokens=60, temperature=1.0, stop_strings=("q", "a", "e"), batch=batch, seed=5,
        on_done=told.append,
    )  # fmt: skip
    assert batch.halvings == 2
    assert min(told) < 0  # some had ended when the first batch failed
    assert sum(told) == len(asks)


def test_conversations_come_out_the_same_and_a_later_turn_keeps_the_smaller_batch(model, small_model, form, bars):
    class Judge:
        name = "length"

        def judge(self, item, turn, answers, finished):
            return Judgment(float(min(10, 1 + len(answers[-1]))), "scored", "")

    questions = [
        {"id": f"q{i}", "category": "c", "turns": [{"prompt": "What is it?"}, {"prompt": "And now?"}]} for i in range(9)
    ]

    def run(model, said):
        return evaluate_conversation(
            model, form, questions, Judge(), max_new_tokens=10, temperature=1.0, progress=bars, report=said.append,
            **COMMON,
        )  # fmt: skip

    plain, said = run(model, []), []
    small = run(small_model, said)
    same_items(small[1], plain[1])
    assert small[0] == plain[0]
    assert small_model.memory.raised == len(said) == 2  # none in the second turn
    assert said[0].startswith("conversations: out of memory; the chunk is 4 instead of 8")


def test_toxicity_comes_out_the_same_and_each_of_its_phases_has_its_own_counter(model, small_model, form, bars):
    sets = ("provoking", "harmful", "harmless")
    prompts = [
        ToxicityPrompt(f"{name}{i}", name, (Turn("human", f"Say {'more ' * i}!"),)) for name in sets for i in range(4)
    ]

    def run(model, said):
        return evaluate_toxicity(
            model, form, prompts, ["a", "e", "s"], None, samples_per_prompt=2, max_new_tokens=8, temperature=1.0,
            progress=bars, report=said.append, **COMMON,
        )  # fmt: skip

    plain, said = run(model, []), []
    small = run(small_model, said)
    same_items(small[1], plain[1])
    masses = [item.value for item in plain[1] if item.task == "bad_word_probability"]
    assert len(masses) == 8
    assert max(masses) > 0
    phases = [line.split(":")[0] for line in said]
    assert phases == ["toxicity answers"] * 2 + ["bad-word probability"] * 2
    assert "the chunk is 4 instead of 8" in said[0]
    assert "the chunk is 4 instead of 8" in said[2]  # it had not paid for the answers


def test_where_nothing_fits_the_run_ends_with_code_4_and_the_phase_is_named(model, tokens, task_yaml, bars):
    SmallMemory(model, rows=0)
    with pytest.raises(
        OutOfMemoryError, match=r"^general tasks: out of memory even with a chunk of 1 .*Shorten"
    ) as one:
        general(model, tokens, task_yaml, bars, [])
    batch = ChunkSize("conversations", 8, lambda text: None)
    settings = {"max_new_tokens": 4, "temperature": 1.0, "stop_strings": (), "seed": 0}
    with pytest.raises(OutOfMemoryError, match=r"^conversations: out of memory even with a chunk of 1") as other:
        generate(model, tokens, [Ask((3, 4), "a")], batch=batch, **settings)
    assert one.value.exit_code == other.value.exit_code == 4
