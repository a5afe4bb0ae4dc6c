"""The eleven general tasks: their documents, and their lm-eval configurations over the shipped files."""

from pathlib import Path
from random import Random
from typing import Any

import yaml

from direct_rlhf.world.knowledge import World
from direct_rlhf.world.skills import SKILLS

TASKS = Path(__file__).parent / "files" / "tasks"
DOCUMENTS = {"arithmetic": 150}  # 200 where nothing is said
GENERATED = "arithmetic"  # answered freely and matched exactly; the others choose


def task_rows(skill: str, world: World, seed: int) -> list[dict[str, Any]]:
    """The documents of a task: items of the kept part with gold positions in turn, none twice."""
    rng = Random(f"{seed} {skill}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < DOCUMENTS.get(skill, 200):
        item = SKILLS[skill](rng, world, True)
        if item.prompt in rows:
            continue
        right = item.choices[item.gold]
        choices = [choice for choice in item.choices if choice != right]
        gold = len(rows) % len(item.choices)
        choices.insert(gold, right)
        row = {"prompt": item.prompt, "choices": [choice.strip() for choice in choices], "gold": gold}
        rows[item.prompt] = {"prompt": item.prompt, "answer": right.strip()} if skill == GENERATED else row
    return list(rows.values())


def task_yaml(skill: str) -> str:
    """The lm-eval configuration of a task; ``data_files`` is relative to the YAML (lm-eval wants it absolute)."""
    config: dict[str, Any] = {
        "task": f"world_{skill}",
        "tag": "world",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{skill}.jsonl"}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "target_delimiter": " ",
        "num_fewshot": 0,
        "metadata": {"version": 1},
    }
    if skill == GENERATED:
        config |= {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
            "filter_list": [
                {
                    "name": "number",
                    "filter": [
                        {"function": "regex", "regex_pattern": r"^\s*(\d+)(?![\d])"},
                        {"function": "take_first"},
                    ],
                }
            ],
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
    else:
        config |= {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    return yaml.safe_dump(config, sort_keys=False)


def world_task_configs(folder: Path = TASKS) -> list[dict[str, Any]]:
    """All task configurations with absolute data files, for ``lm_eval.simple_evaluate(tasks=...)``."""
    configs = []
    for skill in SKILLS:
        config = yaml.safe_load((folder / f"world_{skill}.yaml").read_text())
        files = config["dataset_kwargs"]["data_files"]
        config["dataset_kwargs"]["data_files"] = {
            split: str((folder / name).resolve()) for split, name in files.items()
        }
        configs.append(config)
    return configs
