"""Tiny random models of several architectures, and a tokenizer whose pieces are plain byte strings."""

import pytest
import torch
import transformers
from hypothesis import settings

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ARCHITECTURES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED, sliding_window=None)),
    "mistral-window": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED, sliding_window=6)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED)),
    "qwen2-window": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, head_dim=16)),
    "llama3": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, rope_parameters=LLAMA3)),
    "llama-dynamic": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **GROUPED, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        )
    ),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**GROUPED, head_dim=8)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=6, query_pre_attn_scalar=8)
    ),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
            ffn_dim=48,
            word_embed_proj_dim=32,
            init_std=0.3,
        )
    ),
    "mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3
        )
    ),
}


class Pieces:
    """Stands in for ``Tokens``: id i is the byte string ``pieces[i]``; control ids are left out of the text."""

    def __init__(self, pieces, eos_ids=(2,)):
        self.pieces = pieces
        self.pad_id, self.bos_id, self.eos_id, self.eos_ids = 0, 1, eos_ids[0], frozenset(eos_ids)

    def decode(self, ids):
        control = {self.pad_id, self.bos_id, *self.eos_ids}
        return b"".join(self.pieces[i] for i in ids if i not in control).decode(errors="replace")


settings.register_profile("rollout", deadline=None)  # the first torch call of a process takes longer than a deadline
settings.load_profile("rollout")


@pytest.fixture(scope="session")
def build():
    """``build(name, seed=0)``: a random model in eval mode."""

    def of(name, seed=0):
        torch.manual_seed(seed)
        return ARCHITECTURES[name]().eval()

    return of


@pytest.fixture(scope="session")
def tokens():
    """One printable character for each id from 3 on."""
    return Pieces([b"", b"", b"", *(bytes([33 + i]) for i in range(VOCAB - 3))])


@pytest.fixture(scope="session")
def pieces():
    return Pieces
