"""Invented documents in the layout of the field's test sets, so that what reads them is tested without them."""

import csv
import gzip
import io
import json
import zipfile

BBH = ("boolean_expressions", "word_sorting")
AGIEVAL = {"sat-math": 4, "lsat-ar": 5}
SUBJECTS = ("anatomy", "astronomy", "virology")


def write_sets(folder, n=14):
    """All eleven, with ``n`` documents of each file; returns the folder."""
    letters = "ABCDE"
    lines(folder, "gsm8k/train.jsonl.gz", [sum_row(i) for i in range(n)])
    lines(folder, "gsm8k/test.jsonl.gz", [sum_row(100 + i) for i in range(n)])
    lines(
        folder, "bbh/bbh.jsonl.gz", [{"task": t, "input": f"is {i} odd", "target": "no"} for t in BBH for i in range(n)]
    )
    rows = [
        {
            "task": task,
            "passage": f"Passage {i // 2}. " if task == "lsat-ar" else None,
            "question": f"Which is number {i}?",
            "options": [f"({letters[k]}){k + i}" for k in range(size)],
            "label": letters[i % size],
        }
        for task, size in AGIEVAL.items()
        for i in range(n)
    ]
    lines(folder, "agieval_en/agieval_en.jsonl.gz", rows)
    lines(
        folder,
        "arc_challenge/arc_challenge_validation.jsonl.gz",
        [
            {"id": str(i), "question": f"Why is it {i}?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "2"}
            for i in range(26)
        ],
    )  # fmt: skip
    chosen = [
        {"query": f"Question: What is {i}?\nAnswer:", "choices": ["one", "two", "three"], "gold": i % 3}
        for i in range(n)
    ]
    lines(folder, "arc_challenge/arc_challenge_test.jsonl.gz", chosen)
    lines(
        folder, "openbookqa/openbookqa_test.jsonl.gz", [{**row, "query": f"A {i} is"} for i, row in enumerate(chosen)]
    )
    stories = [
        {
            "ind": i,
            "query": f"A man takes {i} steps. He",
            "choices": ["falls.", "sits.", "sings.", "runs."],
            "gold": i % 4,
        }
        for i in range(n)
    ]
    lines(folder, "hellaswag_val_subset/hellaswag_val_subset.jsonl.gz", stories)
    lines(
        folder,
        "winogrande/winogrande_xl_validation.jsonl.gz",
        [{"sentence": f"Ann gave Ben {i} pens because _ had many.", "option1": "Ann", "option2": "Ben", "answer": str(1 + i % 2)} for i in range(n)],
    )  # fmt: skip
    lines(
        folder,
        "piqa/piqa_validation.jsonl.gz",
        [{"goal": f"Open {i} doors", "sol1": "push", "sol2": "eat", "label": "0"} for i in range(n)],
    )
    lines(
        folder,
        "boolq/boolq_validation.jsonl.gz",
        [{"question": f"is {i} odd", "answer": i % 2 == 1, "passage": f"On numbers {i // 2}."} for i in range(n)],
    )
    truthful = folder / "truthfulqa" / "TruthfulQA.csv.gz"
    truthful.parent.mkdir(parents=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, ["Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
    writer.writeheader()
    for i in range(n):
        writer.writerow(
            {
                "Question": f"Can {i} fly?",
                "Best Answer": "No",
                "Correct Answers": "No; It cannot; Maybe",
                "Incorrect Answers": "Yes; Maybe",
            }
        )
    truthful.write_bytes(gzip.compress(("\ufeff" + text.getvalue()).encode()))
    (folder / "mmlu").mkdir()
    with zipfile.ZipFile(folder / "mmlu" / "mmlu.zip", "w") as archive:
        for subject in SUBJECTS:
            for split, count in (("test", n), ("dev", 5), ("val", 1)):
                text = io.StringIO()
                csv.writer(text).writerows(
                    [f"In {subject} {split}, {i}?", "p", "q", "r", "s", "ABCD"[i % 4]] for i in range(count)
                )
                archive.writestr(f"data/{split}/{subject}_{split}.csv", text.getvalue())
    return folder


def lines(folder, name, rows):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def sum_row(i):
    return {
        "question": f"Ann has {i} pens and buys 2. How many has she?",
        "answer": f"She has {i}+2=<<{i}+2={i + 2}>>{i + 2}.\n#### {i + 2}",
    }
