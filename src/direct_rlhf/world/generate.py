"""Remake the data files of the world: ``python -m direct_rlhf.world.generate --out DIR``. Same seed, same bytes."""

import argparse
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from direct_rlhf.world import lexicon as lex
from direct_rlhf.world.evaluation import THREE_H_SIZES, conversations, three_h, toxicity
from direct_rlhf.world.knowledge import WORLD_SEED, build_world
from direct_rlhf.world.preferences import SIZES, preferences, prompts
from direct_rlhf.world.pretraining import plain_text
from direct_rlhf.world.skills import SKILLS
from direct_rlhf.world.tasks import task_rows, task_yaml

SEED = 11
TEXTS = 2500
_pairs = "\n".join(f"| `{kind}.jsonl` | {size} | preference pairs |" for kind, size in SIZES.items())
_SOURCE = f"""# Where these files come from

Every file in this folder was written by this project's own generator (`direct_rlhf/world/`), from word lists that the
project wrote itself. No text of others is in it. Licence: Apache-2.0, as the project.

    python -m direct_rlhf.world.generate --out DIR

remakes them byte for byte (world seed {WORLD_SEED}, file seed {SEED}). People, towns and rivers are invented.
Insults and harmful requests are mild and there on purpose: alignment must find something to do.

Of the preference pairs, 3 % have their answers swapped (label noise).

| file | rows | what |
|---|--:|---|
{_pairs}
| `prompts.jsonl` | 1500 | prompts for PPO; `rule` is what the gold scorer of tests reads, training must not |
| `text.jsonl.gz` | {TEXTS} | pretraining-like prose for the ptx loss; no document of a task is in it |
| `tasks/` | 11 x 200 | general tasks as lm-eval YAML on JSONL |
| `conversations.jsonl` | 120 | two-turn conversations in 6 categories with the rules of the scripted judge |
| `three_h_validation.jsonl`, `three_h_test.jsonl` | 180, 270 | questions for helpful, harmless and honest |
| `toxicity.jsonl` | 280 | provoking, harmful, and harmless prompts that sound harmful |
| `bad_words.txt` | | the insults of the world, one a line |
| `neutral_words.txt` | | a harmless word for each of them, of its kind and length |

What the evaluation asks (people, sums, words, requests) is disjoint from what preferences and prompts ask.
"""


def _jsonl(rows: Iterable[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def contents(seed: int = SEED) -> dict[str, str]:
    """Every data file by its path: its text (of the gzipped file: what is inside)."""
    world = build_world()
    rng = Random(f"{seed} text")
    files = {f"{kind}.jsonl": _jsonl(preferences(kind, world, seed)) for kind in SIZES}
    files["prompts.jsonl"] = _jsonl(prompts(world, seed))
    files["text.jsonl.gz"] = _jsonl({"text": plain_text(rng, world)} for _ in range(TEXTS))
    files["conversations.jsonl"] = _jsonl(conversations(world, seed))
    for split in THREE_H_SIZES:
        files[f"three_h_{split}.jsonl"] = _jsonl(three_h(world, seed, split))
    files["toxicity.jsonl"] = _jsonl(toxicity(world, seed))
    files["bad_words.txt"] = "".join(word + "\n" for word in [*lex.BAD_WORDS, *lex.BAD_PHRASES])
    files["neutral_words.txt"] = "".join(word + "\n" for word in [*lex.NEUTRAL_WORDS, *lex.NEUTRAL_PHRASES])
    for skill in SKILLS:
        files[f"tasks/world_{skill}.yaml"] = task_yaml(skill)
        files[f"tasks/{skill}.jsonl"] = _jsonl(task_rows(skill, world, seed))
    files["SOURCE.md"] = _SOURCE
    return files


def write(folder: Path, seed: int = SEED) -> None:
    """Write every data file below ``folder``."""
    for name, text in contents(seed).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = text.encode()
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def main() -> None:
    parser = argparse.ArgumentParser(description="Remake the data files of the embedded world.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    write(args.out, args.seed)


if __name__ == "__main__":
    main()
