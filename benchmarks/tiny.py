"""The 5 M-parameter Mistral of the speed benchmarks, with random weights, and prompts for it.

Hidden 256, 4 layers, 8 heads on 4 key-value heads, vocabulary 4,096. Where answers shall end by themselves, one hidden
channel is held constant by the weights and EOS reads it, so that every token is EOS with the probability asked for:
answers then have geometric lengths, whoever samples them.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCABULARY, PAD, BOS, EOS, UNKNOWN = 4096, 0, 1, 2, 3
HUMAN, ASSISTANT = "Human:", "Assistant:"
CHANNEL = 16.0  # the constant channel of the embeddings, against a spread of 0.2 of the others


def build(mean_length: float | None = None, *, seed: int = 0) -> Any:
    """The model in float32; ``mean_length`` tokens an answer (EOS included) in the mean, None: EOS hardly ever."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        sliding_window=None,
        initializer_range=0.05,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    torch.manual_seed(seed)
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        head = model.lm_head.weight
        if mean_length is None:
            head[EOS] = 0.0
            return model
        _hold_channel(model)
        head[:, 0] = 0.0
        head[EOS] = 0.0
        head[EOS, 0] = _eos_weight(model, 1 / mean_length)
    return model


def _hold_channel(model: Any) -> None:
    """Channel 0 of every hidden state becomes a constant that no layer reads or writes."""
    inner = model.model
    inner.embed_tokens.weight[:, 0] = CHANNEL
    for layer in inner.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
        layer.input_layernorm.weight[0] = 0.0
        layer.post_attention_layernorm.weight[0] = 0.0


def _eos_weight(model: Any, probability: float) -> float:
    """The head's weight on the constant channel that gives EOS this probability on random text."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(UNKNOWN + 1, VOCABULARY, size=(64, 32)))
    hidden = model.model(input_ids=ids).last_hidden_state.flatten(0, 1)
    logits = model.lm_head(hidden)
    logits[:, EOS] = -math.inf
    rest, channel = logits.logsumexp(-1), hidden[:, 0]

    def share(weight: float) -> float:
        return float(torch.sigmoid(channel * weight - rest).mean())

    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < probability else (low, middle)
    return (low + high) / 2


def save(folder: Path, mean_length: float | None = None, *, seed: int = 0) -> Path:
    """Model and a tokenizer of whole words (``w4`` ... ``w4095``) as a checkpoint in ``folder``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", HUMAN, ASSISTANT]
    words += [f"w{index}" for index in range(len(words), VOCABULARY)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    build(mean_length, seed=seed).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def prompts(count: int, longest: int = 32, *, shortest: int | None = None, seed: int = 0) -> list[list[int]]:
    """Random prompts, each begun by BOS, of ``shortest`` (default: half the longest) to ``longest`` tokens."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(shortest or longest // 2, longest, size=count, endpoint=True)
    return [[BOS, *generator.integers(6, VOCABULARY, size=length - 1).tolist()] for length in lengths]


def questions(folder: Path, count: int, longest: int = 32, *, shortest: int | None = None, seed: int = 0) -> Path:
    """The same as a JSONL file of prompts whose rendered dialogues (BOS and markers included) have those lengths."""
    drawn = prompts(count, longest - 2, shortest=None if shortest is None else shortest - 2, seed=seed)
    rows = [json.dumps({"prompt": " ".join(f"w{index}" for index in ids[1:])}) for ids in drawn]
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path
