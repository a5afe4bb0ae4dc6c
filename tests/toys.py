"""Toy models as folders: a byte-level tokenizer without merges, and two-layer random models of several architectures."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL = ["<pad>", "<s>", "</s>"]
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES = ("llama", "qwen2", "gemma", "gpt2", "mistral")


def byte_tokenizer() -> Tokenizer:
    """One token a byte, ids 3 to 258, BOS in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def toy_folder(folder: Path, architecture: str = "llama", seed: int = 0) -> Path:
    """A checkpoint that `load_causal_lm` and `load_tokens` read."""
    import torch
    import transformers

    sizes = {
        "vocab_size": len(SPECIAL) + 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
        **ENDS,
    }
    grouped = {**sizes, "num_key_value_heads": 2}
    config = {
        "llama": lambda: transformers.LlamaConfig(**grouped),
        "mistral": lambda: transformers.MistralConfig(**grouped),
        "qwen2": lambda: transformers.Qwen2Config(**grouped),
        "gemma": lambda: transformers.GemmaConfig(**grouped, head_dim=8),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=sizes["vocab_size"], n_embd=32, n_layer=2, n_head=4, n_positions=1024, **ENDS
        ),
    }[architecture]()
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
