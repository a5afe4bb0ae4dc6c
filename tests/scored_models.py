"""Tiny random models of several architectures, and the definition of a score."""

import torch
import transformers as tf

from direct_rlhf.evaluate.scoring import Score

VOCABULARY = 61
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ROTARY = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
CONFIGS = {
    "mistral": (tf.MistralConfig, ROTARY),
    "mistral with a window": (tf.MistralConfig, ROTARY | {"sliding_window": 10}),
    "gemma2": (tf.Gemma2Config, ROTARY | {"head_dim": 8, "sliding_window": 10, "final_logit_softcapping": 2.0}),
    "gpt2": (tf.GPT2Config, {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "bloom": (tf.BloomConfig, {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
}


def build(name):
    torch.manual_seed(0)
    config, fields = CONFIGS[name]
    model = tf.AutoModelForCausalLM.from_config(config(**fields, bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


def slowly(model, context, continuation):
    """One request, one sequence, no batch: the definition."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1].float()
    target = torch.tensor(continuation)
    logprob = logits.log_softmax(-1).gather(-1, target[:, None]).sum().item()
    return Score(logprob, bool((logits.argmax(-1) == target).all()))
