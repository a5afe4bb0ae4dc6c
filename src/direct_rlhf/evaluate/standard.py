"""The field's 11 tests (standard.yaml) as lm-eval task specifications, with documents from the hub or a local folder.

Local documents are given the shape that lm-eval's own task expects, so that its prompts, choices and answer filters
apply unchanged. Where a folder holds one split only, its first documents are the worked examples and are not asked:
nothing is asked whose answer stands in its own prompt.
"""

import csv
import gzip
import io
import json
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from direct_rlhf.errors import DataError

STANDARD = Path(__file__).with_name("standard.yaml")
Rows = list[dict[str, Any]]
Splits = dict[str, Rows]


@dataclass(frozen=True)
class StandardTest:
    """One test of the list."""

    name: str
    tasks: tuple[str, ...]  # lm-eval's names: tasks or groups
    configs: tuple[str, ...]  # folders of task files, below lm_eval/tasks
    num_fewshot: int
    metric: str
    folder: str
    cluster: str | None = None  # a field of the documents that repeats: the unit of resampling

    def specification(self, data: Path | None) -> list[dict[str, Any]]:
        """Members for a group that lm-eval loads. DataError where ``data`` lacks the test or one of its files."""
        settings: dict[str, Any] = {"num_fewshot": self.num_fewshot}
        if self.cluster:
            settings["metadata"] = {"cluster_field": self.cluster}
        if data is None:
            # a group is named by its own key, with a task's settings
            return [{"group" if name in GROUPS else "task": name, **settings} for name in self.tasks]
        read, changes = _LOCAL[self.name]
        return [
            {"task": task, **settings, **changes, "custom_dataset": _dataset(splits)}
            for task, splits in read(_folder(data, self.folder)).items()
        ]


GROUPS = ("mmlu", "bbh_cot_fewshot")


def standard_tests(path: Path = STANDARD) -> list[StandardTest]:
    """The list, in its order."""
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [StandardTest(**{**e, "tasks": tuple(e["tasks"]), "configs": tuple(e["configs"])}) for e in entries]


def local_files(data: Path) -> list[Path]:
    """The files that the tests are read from, as far as they are there."""
    folders = [data / test.folder for test in standard_tests()]
    return [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if path.suffix != ".txt"]


def _folder(data: Path, name: str) -> Path:
    place = data / name
    if not place.is_dir():
        raise DataError(
            f"{place}: this test's folder is not there. Put it there, leave the test out of evaluation.general.tasks "
            "(its entries may be names of single tests), or leave evaluation.data unset to read from the hub."
        )
    return place


def _dataset(splits: Splits) -> Callable[..., Any]:
    """What lm-eval calls for a task's documents."""

    def load(**_: Any) -> Any:
        from datasets import Dataset

        return {name: Dataset.from_list(rows) for name, rows in splits.items()}

    return load


def _lines(folder: Path, *names: str) -> Rows:
    """The rows of the first of these JSONL files that is there, plain or gzipped."""
    for path in (folder / f"{name}{ending}" for name in names for ending in (".gz", "")):
        if path.exists():
            raw = path.read_bytes()
            text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
            # not splitlines(): a text may hold other line separators, which JSON leaves unescaped
            return [json.loads(line) for line in text.split("\n") if line.strip()]
    raise DataError(f"{folder}: holds none of {', '.join(names)} (or with .gz). Put the test's file there.")


def _mmlu(folder: Path) -> dict[str, Splits]:
    """A zip of CSV files without header: question, A, B, C, D, answer."""
    path = folder / "mmlu.zip"
    if not path.exists():
        raise DataError(f"{path}: not there. MMLU is read from its zip of CSV files (data/test/SUBJECT_test.csv ...).")
    found: dict[str, Splits] = defaultdict(dict)
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            stem, _, split = Path(name).stem.rpartition("_")
            if split not in ("test", "dev") or Path(name).suffix != ".csv":
                continue
            text = io.TextIOWrapper(archive.open(name), encoding="utf-8", newline="")
            found[f"mmlu_{stem}"][split] = [
                {"question": question, "choices": choices, "answer": "ABCD".index(answer)}
                for question, *choices, answer in csv.reader(text)
            ]
    return dict(found)


def _agieval(folder: Path) -> dict[str, Splits]:
    """Source of the prompt: AGIEval's zero-shot form of its English sets, as lm-eval's copies of them hold it."""
    found: dict[str, Splits] = {}
    for row in _lines(folder, "agieval_en.jsonl"):
        passage, options = row["passage"] or "", row["options"]
        last = "ABCDEFG"[len(options) - 1]
        asked = f"{passage}Q: {row['question']} Answer Choices: {' '.join(options)}"
        query = f"{asked}\nA: Among A through {last}, the answer is"
        doc = {"query": query, "choices": options, "gold": ["ABCDEFG".index(row["label"])], "passage": passage}
        name = "agieval_" + row["task"].replace("-", "_")
        found.setdefault(name, {"test": []})["test"].append(doc)
    return dict(sorted(found.items()))


def _bbh(folder: Path) -> dict[str, Splits]:
    found: dict[str, Splits] = {}
    for row in _lines(folder, "bbh.jsonl"):
        name = f"bbh_cot_fewshot_{row['task']}"
        found.setdefault(name, {"test": []})["test"].append({"input": row["input"], "target": row["target"]})
    return dict(sorted(found.items()))


def _gsm8k(folder: Path) -> dict[str, Splits]:
    return {"gsm8k": {"train": _lines(folder, "train.jsonl"), "test": _lines(folder, "test.jsonl")}}


def _arc(folder: Path) -> dict[str, Splits]:
    test = [
        _lettered(row["query"].removeprefix("Question: ").removesuffix("\nAnswer:"), "question", row)
        for row in _lines(folder, "arc_challenge_test.jsonl")
    ]
    validation = _lines(folder, "arc_challenge_validation.jsonl")
    keys = ("question", "choices", "answerKey")
    return {"arc_challenge": {"test": test, "validation": [{key: row[key] for key in keys} for row in validation]}}


def _openbookqa(folder: Path) -> dict[str, Splits]:
    test = [_lettered(row["query"], "question_stem", row) for row in _lines(folder, "openbookqa_test.jsonl")]
    return {"openbookqa": {"test": test}}


def _lettered(question: str, field: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A {query, choices, gold} row in the lettered form of the original set."""
    letters = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    choices = {"text": row["choices"], "label": letters}
    return {field: question, "choices": choices, "answerKey": letters[row["gold"]]}


def _hellaswag(folder: Path) -> dict[str, Splits]:
    rows = _lines(folder, "hellaswag_val_subset.jsonl", "hellaswag_val.jsonl")
    docs = [{"query": row["query"], "choices": row["choices"], "label": str(row["gold"])} for row in rows]
    return {"hellaswag": _own_shots(docs, 10)}


def _winogrande(folder: Path) -> dict[str, Splits]:
    return {"winogrande": _own_shots(_lines(folder, "winogrande_xl_validation.jsonl"), 5)}


def _piqa(folder: Path) -> dict[str, Splits]:
    rows = _lines(folder, "piqa_validation.jsonl")
    return {"piqa": {"validation": [{**row, "label": int(row["label"])} for row in rows]}}


def _boolq(folder: Path) -> dict[str, Splits]:
    rows = _lines(folder, "boolq_validation.jsonl")
    docs = [{"passage": r["passage"], "question": r["question"], "label": int(r["answer"])} for r in rows]
    return {"boolq": {"validation": docs}}


def _truthfulqa(folder: Path) -> dict[str, Splits]:
    """The CSV with a byte-order mark; answers stand between semicolons. An answer on both sides is left out."""
    path = next((folder / name for name in ("TruthfulQA.csv.gz", "TruthfulQA.csv") if (folder / name).exists()), None)
    if path is None:
        raise DataError(f"{folder}: holds no TruthfulQA.csv (or .gz). Put the test's file there.")
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    docs = []
    for row in csv.DictReader(io.StringIO(text, newline="")):
        right, wrong = (_answers(row[f"{kind} Answers"]) for kind in ("Correct", "Incorrect"))
        both = set(right) & set(wrong)
        right, wrong = ([answer for answer in side if answer not in both] for side in (right, wrong))
        targets = {"choices": right + wrong, "labels": [1] * len(right) + [0] * len(wrong)}
        docs.append({"question": row["Question"], "mc1_targets": targets, "mc2_targets": targets})
    return {"truthfulqa_mc2": {"validation": docs}}


def _answers(cell: str) -> list[str]:
    return list(dict.fromkeys(answer.strip() for answer in cell.split(";") if answer.strip()))


def _own_shots(docs: Rows, count: int) -> Splits:
    """One split only: its first documents are the examples, the others are asked."""
    return {"shots": docs[:count], "validation": docs[count:]}


# test -> its reader, and what of lm-eval's task is otherwise for local documents
_LOCAL: dict[str, tuple[Callable[[Path], dict[str, Splits]], dict[str, Any]]] = {
    "mmlu": (_mmlu, {}),
    "agieval": (_agieval, {"metadata": {"cluster_field": "passage"}}),
    "bbh": (_bbh, {}),
    "gsm8k": (_gsm8k, {}),
    "arc_challenge": (_arc, {"training_split": None, "fewshot_split": "validation"}),
    "hellaswag": (_hellaswag, {"training_split": None, "fewshot_split": "shots", "process_docs": None}),
    "winogrande": (_winogrande, {"training_split": None, "fewshot_split": "shots"}),
    "piqa": (_piqa, {"training_split": None}),
    "boolq": (_boolq, {"training_split": None}),
    "openbookqa": (_openbookqa, {"training_split": None, "validation_split": None}),
    "truthfulqa_mc2": (_truthfulqa, {}),
}
