"""What surrounds a process changes nothing of the data it reads. Reading uses one process, so there are no workers."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.pair_files import jsonl, pair_row

RECIPE = """\
description: größer 漢字
data:
  preferences: [{path: folder, weight: 1.5}, {path: b.jsonl.gz, kind: harmless}]
  prompts: [{path: p.jsonl}]
  text: [{path: t.jsonl, weight: 0.5}]
  max_bad_rows: 0.5
  held_out: 0.2
"""

READ = """
import hashlib, json, pathlib, sys
from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.load import fingerprint, fingerprints, fits, load_preferences, load_prompts, load_text_data
from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.recipe.load import load_recipe

if "reversed" in sys.argv:  # the order in which the disk lists a folder
    rglob = pathlib.Path.rglob
    pathlib.Path.rglob = lambda self, pattern: reversed(list(rglob(self, pattern)))
loaded = load_recipe(sys.argv[1])
section, dialogue = loaded.recipe.data, loaded.recipe.dialogue
pairs = load_preferences(section, folder=loaded.folder, seed=3, dialogue=dialogue)
prompts = load_prompts(section, folder=loaded.folder, seed=3, dialogue=dialogue)
texts = load_text_data(section, folder=loaded.folder)
form = DialogueFormat(dialogue, load_tokens(sys.argv[2]))
assert len(fits(pairs.train, form, section)[0]) > 60 < len(prompts.train)
parts = {
    "recipe": [loaded.sha256, loaded.recipe.description],
    "sources": [fingerprint(section, loaded.folder), fingerprints(section, loaded.folder)],
    "train": [[p.id, p.source, p.chosen, p.rejected, p.kind, [t.text for t in p.prompt]] for p in pairs.train],
    "held out": [p.id for p in pairs.held_out],
    "prompts": [[p.id for p in side] for side in (prompts.train, prompts.held_out)],
    "texts": texts.texts,
    "rejected": [[row.source, row.reason, row.detail] for found in (pairs, prompts, texts) for row in found.rejected],
    "counts": [dict(found.counts) for found in (pairs, prompts, texts)],
    "ids": [form.encode_prompt(p.turns, 500) for p in prompts.train],
}
for name, part in parts.items():
    print(name, hashlib.sha256(json.dumps(part).encode()).hexdigest())
"""

NARROW = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # a locale that is ASCII only
SURROUNDINGS = {
    "another hash seed": ({"PYTHONHASHSEED": "1"}, []),
    "a third hash seed": ({"PYTHONHASHSEED": "4000000000"}, []),
    "an ASCII locale": (NARROW, []),
    "another time zone": ({"TZ": "Asia/Kathmandu"}, []),
    "files listed in another order": ({}, ["reversed"]),
    "no assertions, other warnings": ({"PYTHONOPTIMIZE": "1", "PYTHONWARNINGS": "ignore"}, []),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "folder" / "é").mkdir(parents=True)
    rows = [pair_row(at, note="ü漢") for at in range(90)]
    for name, part in {"z": rows[:30], "é/1": rows[30:60], "漢": rows[60:80], "ü": rows[70:]}.items():
        (folder / "folder" / f"{name}.jsonl").write_bytes(jsonl(*part, b"{", {**part[0], "chosen": "größer 漢字"}))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(*[pair_row(at, chosen="Ä") for at in range(20)])))
    (folder / "p.jsonl").write_bytes(jsonl(*[{"prompt": f"Frage {at}: größer?"} for at in range(90)]))
    (folder / "t.jsonl").write_bytes(jsonl(*[{"text": f"Text {at} 漢"} for at in range(50)]))
    (folder / "study.yaml").write_text(RECIPE, encoding="utf-8")
    return folder / "study.yaml"


def read(recipe: Path, tokenizer: Path, variables: dict[str, str], words: list[str]) -> dict[str, str]:
    """Part of the data -> digest, as a new process reads it."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(recipe), str(tokenizer), *words],
        env={**os.environ, "PYTHONHASHSEED": "0", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def plain(recipe, model_folders):
    return read(recipe, model_folders["llama"], {}, [])


@pytest.mark.promise("D4")
@pytest.mark.parametrize("what", SURROUNDINGS)
def test_rows_split_and_ids_do_not_depend_on(recipe, model_folders, plain, what):
    assert len(plain) == 9
    assert read(recipe, model_folders["llama"], *SURROUNDINGS[what]) == plain
