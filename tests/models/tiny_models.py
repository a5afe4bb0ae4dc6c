"""Tiny random models of several architectures, a tiny tokenizer, checkpoints of both, and a stage context."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers as tf
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from direct_rlhf.data.types import PreferencePair, Turn
from direct_rlhf.recipe.schema import Recipe
from direct_rlhf.run.context import StageContext
from direct_rlhf.run.directory import RunDirectory

tf.utils.logging.disable_progress_bar()

VOCABULARY = 320
SPECIAL = ["<pad>", "<s>", "</s>"]
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GROUPED = _SHAPE | {"num_key_value_heads": 2}
_SHORT = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 4}

CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "mistral": (tf.MistralConfig, _GROUPED | {"sliding_window": 8}),
    "llama": (tf.LlamaConfig, _GROUPED | {"attention_dropout": 0.3, "tie_word_embeddings": True}),
    "qwen2": (tf.Qwen2Config, _GROUPED),
    "gemma": (tf.GemmaConfig, _GROUPED | {"head_dim": 8}),
    "gemma2": (tf.Gemma2Config, _GROUPED | {"head_dim": 8, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "phi": (tf.PhiConfig, _GROUPED | {"resid_pdrop": 0.3, "embd_pdrop": 0.3}),
    "granite": (tf.GraniteConfig, _GROUPED | {"logits_scaling": 4.0}),
    "cohere": (tf.CohereConfig, _GROUPED | {"logit_scale": 0.25}),
    "gpt2": (tf.GPT2Config, _SHORT | {"n_embd": 32, "n_positions": 256}),
    "bloom": (tf.BloomConfig, _SHORT | {"hidden_size": 32, "hidden_dropout": 0.3}),
    "opt": (tf.OPTConfig, _SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}


def tiny_lm(name: str = "mistral", seed: int = 0, scale: float = 5.0) -> Any:
    """A random causal LM in train mode, its dropout as configured; ``scale`` makes its logits far from uniform."""
    config_class, fields = CONFIGS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = tf.AutoModelForCausalLM.from_config(config_class(**_ENDS, **fields))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(scale)
    return model


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of at most VOCABULARY ids that puts no BOS first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["\n\nHuman: tell me one\n\nAssistant: good bad yes no " * 20], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(named | {"add_bos_token": False}))


def write_checkpoint(folder: Path, name: str = "mistral", seed: int = 0, scale: float = 1.0) -> Path:
    """A model folder as a user would have it."""
    tiny_lm(name, seed, scale).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def random_batch(seed: int = 0, rows: int = 4, slots: int = 14) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, mask, target mask) [rows, slots], padded on the left, on the right, on both sides and not at all."""
    generator = torch.Generator().manual_seed(seed)
    ids_BL = torch.randint(3, VOCABULARY, (rows, slots), generator=generator)
    mask_BL = torch.ones(rows, slots, dtype=torch.bool)
    for row in range(rows):
        mask_BL[row, : (0, 5, 0, 3)[row % 4]] = False
        mask_BL[row, slots - (0, 0, 6, 2)[row % 4] :] = False
    target_BL = mask_BL & (mask_BL.long().cumsum(1) > 2)
    return ids_BL, mask_BL, target_BL


def make_context(root: Path, base: Path, **fields: Any) -> StageContext:
    """A context on a fresh run under ``root``; ``fields`` go to the recipe. No bars, no signals."""
    recipe = Recipe.model_validate({"model": {"base": str(base)}} | fields)
    text = yaml.safe_dump(recipe.model_dump(mode="json"))
    loaded: Any = SimpleNamespace(recipe=recipe, sha256="0" * 64, yaml=text)
    run = RunDirectory.open(root, loaded, resume=False, overwrite=False)
    return StageContext(recipe, run)


def pair(number: int, chosen: str, rejected: str, kind: str = "helpful") -> PreferencePair:
    """One preference pair with a short prompt of its own."""
    prompt = (Turn("human", f"tell me {number}"),)
    return PreferencePair(f"p{number}", prompt, chosen, rejected, kind, f"toy.jsonl:{number}")
