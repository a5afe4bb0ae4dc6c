"""A tiny random model with a real byte-level tokenizer, and a small lm-eval task on a local file."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from direct_rlhf.data.tokens import load_tokens

CORPUS = [
    "What colour is the sky? The sky is blue. The grass is green, and the snow is white.",
    "Who has the ball? Ann has the ball. Ben has the book. You idiot, you are a moron and a damn fool.",
    "Human: hello there Assistant: I am sorry, but I cannot help with that.",
] * 4


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved Llama (2 layers, width 32) with a byte-level BPE of 300 ids and logits far from uniform."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    wrapped = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def model(tiny_folder):
    return tf.LlamaForCausalLM.from_pretrained(tiny_folder).eval()


@pytest.fixture(scope="session")
def tokens(tiny_folder):
    return load_tokens(str(tiny_folder))


@pytest.fixture
def nan_model(model):
    """All its numbers are NaN, as after a diverged run."""
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    return model


@pytest.fixture
def task_yaml(tmp_path):
    """A multiple-choice task with 12 documents that share passages in pairs, on a local JSONL file."""
    colours = ["blue", "green", "white", "a rather long and winding answer"]
    rows = [
        {
            "passage": f"passage {i // 2}",
            "question": f"What colour is thing {i}?",
            "choices": (colours[i % 3 :] + colours)[: 2 + i % 3],
            "label": i % 2,
        }
        for i in range(12)
    ]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "colours.yaml"
    path.write_text(
        f"""
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {tmp_path}/docs.jsonl}}, cache_dir: {tmp_path}/cache}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{passage}}}}\\n{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1, cluster_field: passage}}
"""
    )
    return path


@pytest.fixture
def generation_yaml(task_yaml):
    """Generation with an answer pattern: the last letter before a full stop, which a random model rarely writes."""
    text = task_yaml.read_text().replace("task: colours", "task: free").replace("multiple_choice", "generate_until")
    text = text.replace('doc_to_choice: "{{choices}}"\n', "").replace(
        "doc_to_target: label", 'doc_to_target: "{{choices[label]}}"'
    )
    text = text.replace("metric: acc", "metric: exact_match") + (
        'generation_kwargs: {until: ["\\n", "q"], max_gen_toks: 12, do_sample: false}\n'
        "filter_list:\n"
        "  - {name: strict, filter: [{function: regex, regex_pattern: 'The answer is (.+)\\.'}, {function: take_first}]}\n"
        "  - {name: loose, filter: [{function: regex, regex_pattern: '(.)'}, {function: take_first}]}\n"
    )
    path = task_yaml.with_name("free.yaml")
    path.write_text(text)
    return path


@pytest.fixture
def bars():
    """A stand-in for the progress display that remembers what it was told."""

    class Bars:
        done = 0

        @contextlib.contextmanager
        def __call__(self, description, total=None):
            yield SimpleNamespace(advance=self.advance)

        def advance(self, amount=1, **fields):
            self.done += amount

    return Bars()
