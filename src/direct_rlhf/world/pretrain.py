"""Pretrain the base: ``python -m direct_rlhf.world.pretrain --out DIR``.

A MistralForCausalLM is trained on the endless document stream of pretraining.py: batches by token budget,
AdamW, cosine schedule, bf16 autocast over fp32 weights. No document is seen twice except by chance. One process, CPU.
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from direct_rlhf.data.tokens import Tokens, load_tokens
from direct_rlhf.world.knowledge import build_world
from direct_rlhf.world.pretraining import documents
from direct_rlhf.world.tokenizer import CONTEXT, VOCAB_SIZE, train_tokenizer

IGNORED = -100  # target of slots that carry no loss


@dataclass(frozen=True)
class Settings:
    """What decides the shipped base; the README of the base lists it."""

    seed: int = 7
    steps: int = 3600
    tokens_per_step: int = 5000
    groups: int = 3  # a step's documents are run in so many groups of like length
    learning_rate: float = 3e-3
    warmup: float = 0.04
    weight_decay: float = 0.05
    max_tokens: int = 256  # longer documents are cut
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    intermediate: int = 640


def new_model(settings: Settings, tokens: Tokens) -> MistralForCausalLM:
    """The untrained base."""
    torch.manual_seed(settings.seed)
    config = MistralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=CONTEXT,
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=tokens.bos_id,
        eos_token_id=tokens.eos_id,
        pad_token_id=tokens.pad_id,
        attn_implementation="eager",  # half as fast again as the fused CPU kernel's backward at these lengths
    )
    return MistralForCausalLM(config)


def batches(settings: Settings, tokens: Tokens, seed: int) -> Iterator[list[list[list[int]]]]:
    """One step after the other: documents of ``tokens_per_step`` in all, in groups of like length and equal size."""
    stream = documents(seed, build_world())
    while True:
        rows: list[list[int]] = []
        while sum(map(len, rows)) < settings.tokens_per_step:
            text, ends = next(stream)
            ids = tokens.encode(text, bos=True) + ([tokens.eos_id] if ends else [])
            rows.append(ids[: settings.max_tokens])
        rows.sort(key=len)
        groups: list[list[list[int]]] = [[]]
        for row in rows:
            if sum(map(len, groups[-1])) * settings.groups > settings.tokens_per_step:
                groups.append([])
            groups[-1].append(row)
        yield groups


def loss_sum(model: MistralForCausalLM, rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, int]:
    """Summed negative log-likelihood (nats) of all tokens after the first, and how many there are."""
    longest = max(len(row) for row in rows)
    ids_BL = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])
    target_BL = torch.tensor([[*row[1:], *[IGNORED] * (longest - len(row) + 1)] for row in rows])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden_BLH = model.model(input_ids=ids_BL, use_cache=False).last_hidden_state
        wanted_BL = target_BL != IGNORED
        logits_NV = model.lm_head(hidden_BLH[wanted_BL])
    return F.cross_entropy(logits_NV.float(), target_BL[wanted_BL], reduction="sum"), int(wanted_BL.sum())


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    progress = (step - warm) / max(1, settings.steps - warm)
    return settings.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(settings: Settings, tokens: Tokens) -> tuple[MistralForCausalLM, dict[str, float]]:
    """Train a base; returns it with loss, tokens and seconds."""
    model = new_model(settings, tokens)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    stream, started, seen = batches(settings, tokens, settings.seed), time.monotonic(), 0
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, settings)
        micro = next(stream)
        count, total = sum(len(row) - 1 for rows in micro for row in rows), 0.0
        for rows in micro:
            loss, _ = loss_sum(model, rows, tokens.pad_id)
            (loss / count).backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        seen += count
        if step % 50 == 0 or step == settings.steps - 1:
            print(
                f"step {step:5d}  loss {total / count:.3f}  tokens {seen}  {time.monotonic() - started:.0f} s",
                flush=True,
            )
    model.eval()
    held = islice(batches(settings, tokens, settings.seed + 1), 10)
    with torch.no_grad():
        sums = [loss_sum(model, rows, tokens.pad_id) for groups in held for rows in groups]
    held_loss = sum(float(loss) for loss, _ in sums) / sum(count for _, count in sums)
    return model, {"held_out_loss": held_loss, "tokens": seen, "seconds": time.monotonic() - started}


def write_base(folder: Path, settings: Settings) -> dict[str, float]:
    """Train and write the base; the folder appears whole or not at all."""
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    train_tokenizer(draft)
    tokens = load_tokens(str(draft))
    model, facts = train(settings, tokens)
    model.to(torch.bfloat16).save_pretrained(draft)
    (draft / "model.safetensors").chmod(0o644)
    (draft / "training.json").write_text(json.dumps({**asdict(settings), **facts}, indent=2) + "\n")
    if folder.exists():
        for name in ("README.md",):  # the card is written by hand
            if (folder / name).exists():
                shutil.copy(folder / name, draft / name)
        shutil.rmtree(folder)
    draft.rename(folder)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the base model of the embedded world.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; replaced if it exists")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(write_base(args.out, Settings(seed=args.seed, steps=args.steps)))


if __name__ == "__main__":
    main()
