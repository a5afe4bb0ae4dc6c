import math
from functools import lru_cache

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.errors import DataError
from direct_rlhf.evaluate.wordlist import Trie, read_words, whole_word_pattern
from direct_rlhf.evaluate.words import WordMeter, token_texts
from direct_rlhf.models.memory import ChunkSize

# a toy whose every text can be written down; "s." ends a word within a token, "Ġa" begins one behind a space
VOCABULARY = ["<eos>", "a", "s", "d", "Ġ", ".", "as", "ss", "Ġa", "s.", "A"]
WORDS = ["ass", "das", "as d"]
EOS = 0


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    merges = [("a", "s"), ("s", "s"), ("Ġ", "a"), ("s", ".")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(VOCABULARY)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    wrapped.save_pretrained(folder)
    return load_tokens(str(folder))


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=EOS, pad_token_id=None,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(15.0)
    return model


class BruteForce:
    """The definitions, by writing out every token sequence; knows no trie, no state and no batch."""

    def __init__(self, model, words, temperature=1.0):
        self.texts = [token.replace("Ġ", " ") for token in VOCABULARY]
        self.variants = [variant for word in words for variant in (word, word.capitalize(), word.upper())]
        self.next = lru_cache(None)(lambda ids: self._next(model, ids, temperature))

    @staticmethod
    def _next(model, ids, temperature):
        with torch.no_grad():
            return (model(input_ids=torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1).tolist()

    def decide(self, text, ended, start):
        """Whether a listed word stands at ``start``: True, False, or None while more text could make it so."""
        open_ = False
        for variant in self.variants:
            if text.startswith(variant, start):
                after = text[start + len(variant) : start + len(variant) + 1]
                if (after and not after.isalnum()) or (not after and ended):
                    return True
                open_ |= not after and not ended
            open_ |= not ended and variant.startswith(text[start:])
        return None if open_ else False

    @staticmethod
    def begins(text, before=" "):
        """Places where a word begins."""
        return [i for i, char in enumerate(text) if char.isalnum() and not (text[i - 1] if i else before).isalnum()]

    def next_word(self, prompt):
        return self._next_word(prompt, ()) + self._after_space(prompt)

    def _after_space(self, prompt):
        space = VOCABULARY.index("Ġ")
        return self.next(prompt)[space] * self._next_word((*prompt, space), ())

    def _next_word(self, prompt, ids):
        """Mass of sequences whose first token holds the beginning of a word that turns out to be listed."""
        total = 0.0
        for token, p in enumerate(self.next(prompt + ids)):
            if token == EOS and not ids:
                continue
            text = "".join(self.texts[i] for i in ids) + ("" if token == EOS else self.texts[token])
            first = self.texts[ids[0] if ids else token]
            verdicts = [self.decide(text, token == EOS, i) for i in self.begins(first, self.texts[prompt[-1]][-1])]
            if any(verdicts):
                total += p
            elif None in verdicts:
                total += p * self._next_word(prompt, (*ids, token))
        return total

    def within(self, prompt, ids, n_tokens, n_words):
        """P(the first listed word begins in one of the first ``n_tokens`` tokens and is one of the first n words)."""
        total = 0.0
        for token, p in enumerate(self.next(prompt + ids)):
            path = (*ids, token)
            pieces = ["" if i == EOS else self.texts[i] for i in path]
            text = "".join(pieces)
            begins = self.begins(text, self.texts[prompt[-1]][-1])
            verdicts = {i: self.decide(text, token == EOS, i) for i in begins}
            # a beginning counts if fewer than n_words words had begun before its token
            edge = [sum(map(len, pieces[:t])) for t in range(len(pieces) + 1)]
            token_of = {i: max(t for t in range(len(pieces)) if edge[t] <= i) for i in begins}
            early = {
                i for i in begins if token_of[i] < n_tokens and sum(j < edge[token_of[i]] for j in begins) < n_words
            }
            hits = [i for i in begins if verdicts[i]]
            if hits:  # the earliest to begin is the first to come true: no entry holds another
                total += p * (min(hits) in early)
            elif token != EOS and (len(path) < n_tokens or any(verdicts[i] is None for i in early)):
                total += p * self.within(prompt, path, n_tokens, n_words)
        return total


PROMPTS = [(5,), (1,), (4, 3), (6, 5)]  # ".", "a", " d", "as."


@pytest.mark.parametrize("prompt", PROMPTS)
def test_next_word_mass_equals_brute_force_over_all_segmentations(toy, tiny, prompt):
    (found,) = WordMeter(tiny, toy, WORDS, tolerance=0.0).next_word([prompt])
    assert found.mass == pytest.approx(BruteForce(tiny, WORDS).next_word(prompt), rel=1e-4)
    assert found.missed == 0
    assert 0 < found.mass < 1


def test_the_batch_measures_each_prompt_as_if_alone_with_trees_and_without(toy, tiny):
    meter = WordMeter(tiny, toy, WORDS, tolerance=0.0, batch=ChunkSize("test", 2))
    alone = [meter.next_word([prompt])[0].mass for prompt in PROMPTS]
    together = [found.mass for found in meter.next_word(PROMPTS)]
    meter._packed = False
    plain = [found.mass for found in meter.next_word(PROMPTS)]
    assert together == pytest.approx(alone, rel=1e-4)
    assert plain == pytest.approx(alone, rel=1e-4)


def test_mass_along_sampled_paths_is_on_average_the_probability_within_n_words(toy, tiny):
    n_tokens, n_words, temperature, prompt = 3, 2, 0.7, (5,)
    truth = BruteForce(tiny, WORDS, temperature)
    paths = {(): 1.0}
    for _ in range(n_tokens):
        ended = {path: p for path, p in paths.items() if path and path[-1] == EOS}
        going = {path: p for path, p in paths.items() if path not in ended}
        paths = ended | {
            (*path, v): p * q for path, p in going.items() for v, q in enumerate(truth.next(prompt + path))
        }
    meter = WordMeter(tiny, toy, WORDS, temperature=temperature, tolerance=0.0, batch=ChunkSize("test", 512))
    found = meter.along([prompt] * len(paths), list(paths), n_words=n_words)
    expectation = sum(p * mass.mass for p, mass in zip(paths.values(), found, strict=True))
    assert sum(paths.values()) == pytest.approx(1.0)
    assert expectation == pytest.approx(truth.within(prompt, (), n_tokens, n_words), rel=1e-4)
    assert expectation > 0.01


def test_tolerance_gives_a_lower_bound_and_says_how_much_may_be_missing(toy, tiny):
    exact = WordMeter(tiny, toy, WORDS, tolerance=0.0).next_word(PROMPTS)
    rough = WordMeter(tiny, toy, WORDS, tolerance=0.02).next_word(PROMPTS)
    assert any(found.missed > 0 for found in rough)
    for a, b in zip(exact, rough, strict=True):
        assert b.mass <= a.mass + 1e-6 <= b.mass + b.missed + 2e-6


@given(
    st.sets(st.sampled_from(["ass", "das", "dad", "sad", "a", "as d", "d a"]), min_size=1),
    st.sampled_from(["add", "sass", "ad"]),
)
@settings(max_examples=10, deadline=None)
def test_a_larger_list_never_lowers_the_mass_and_never_passes_one(words, more):
    toy, tiny = SHARED["toy"], SHARED["tiny"]
    small = WordMeter(tiny, toy, sorted(words), tolerance=0.0).next_word(PROMPTS)
    large = WordMeter(tiny, toy, sorted({*words, more}), tolerance=0.0).next_word(PROMPTS)
    for a, b in zip(small, large, strict=True):
        assert a.mass <= b.mass + 1e-6
        assert b.mass <= 1 + 1e-6


SHARED = {}


@pytest.fixture(autouse=True)
def _share(toy, tiny):
    SHARED.update(toy=toy, tiny=tiny)


def test_a_word_that_only_begins_like_a_listed_one_adds_nothing(toy, tiny):
    """The word-end condition: of "as", "ass" takes only what does not go on."""
    bias = torch.full((len(VOCABULARY),), -30.0)
    sure = {"a": VOCABULARY.index("a"), "s": VOCABULARY.index("s")}
    model = FixedNext({(): sure["a"], (sure["a"],): sure["s"], (sure["a"], sure["s"]): sure["s"]}, bias)
    meter = WordMeter(model, toy, ["as"], tolerance=0.0)
    meter_longer = WordMeter(model, toy, ["ass"], tolerance=0.0)
    assert meter.next_word([(5,)])[0].mass < 1e-6
    assert meter_longer.next_word([(5,)])[0].mass == pytest.approx(1.0, abs=1e-3)


class FixedNext(tf.PreTrainedModel):
    """Writes one given continuation, then ".", with near certainty."""

    config_class = tf.GPT2Config
    base_model_prefix = "model"

    def __init__(self, path, bias):
        super().__init__(tf.GPT2Config(vocab_size=len(VOCABULARY), n_embd=len(VOCABULARY), n_head=1, n_positions=64))
        self.path, self.bias = path, bias
        self.model = self
        self.head = torch.nn.Linear(len(VOCABULARY), len(VOCABULARY), bias=False)
        self.head.weight.data = torch.eye(len(VOCABULARY))

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False):
        states = self.bias.repeat(*input_ids.shape, 1)
        for b, row in enumerate(input_ids.tolist()):
            for t in range(len(row)):
                states[b, t, self.path.get(tuple(row[1 : t + 1]), VOCABULARY.index("."))] = 0.0
        return tf.modeling_outputs.BaseModelOutput(last_hidden_state=states)


def test_a_model_of_nans_measures_nan(tokens, nan_model):
    meter = WordMeter(nan_model, tokens, ["idiot"])
    (found,) = meter.next_word([tokens.encode("Who are you")])
    assert math.isnan(found.mass)


def test_every_answer_of_a_real_tokenizer_can_be_measured(tokens, model):
    """Byte-level pieces of broken characters, padding ids and ids beyond the tokenizer do no harm."""
    prompt = tokens.encode("What colour is the sky? You")
    answers = [list(range(0, 300, 7)), [tokens.eos_id], tokens.encode(" idiot, you moron")]
    found = WordMeter(model, tokens, ["idiot", "moron", "shut up"]).along([prompt] * 3, answers)
    assert all(mass.mass >= 0 and mass.missed < 0.2 for mass in found)


def test_token_texts_join_to_the_text(tokens):
    text = "You idiot, you are a moron. Déjà vu!"
    ids = tokens.encode(text)
    texts = token_texts(tokens, tokens.vocab_size + 5)
    assert len(texts) == tokens.vocab_size + 5
    assert "".join(texts[i] for i in ids).replace("\ufffd", "").startswith("You idiot, you are a moron. D")
    assert texts[tokens.eos_id] == ""


def test_the_list_keeps_no_phrase_that_holds_another_entry():
    assert Trie(["shut up", "up", "Fool", "fools", "you fool"]).words == ["fool", "fools", "up"]


def test_whole_words_are_found_in_any_case_and_parts_of_words_are_not():
    pattern = whole_word_pattern(["ass", "shut up"])
    assert pattern.search("You ASS!")
    assert pattern.search("now Shut up.")
    assert not pattern.search("assist, class, shut upstairs")


def test_a_word_file_skips_comments_and_must_hold_a_word(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("# insults\nfool\n\n shut up \n")
    assert read_words(path) == ["fool", "shut up"]
    path.write_text("# none\n")
    with pytest.raises(DataError, match=r"words.txt: holds no words"):
        read_words(path)
