"""Scoring of multiple-choice tests against lm-eval's own Hugging Face backend: time, peak memory, equal numbers.

Both sides are given the same lm-eval tasks, prompts and random Mistral (26 M parameters: hidden 512, 6 layers,
vocabulary 8,192, its tokenizer trained on the tests' own questions when the benchmark starts), in float32. A side is a
process of its own; timed is lm-eval's `evaluate` from documents to metrics: building prompts, tokenising and scoring,
but not loading.

per document   ARC-Challenge with 5 examples drawn for each document, as lm-eval does. The goal is what the token saving
               allows: the choices of a document share its context, and nothing more is shared.
fixed block    ARC-Challenge 25-shot, HellaSwag 10-shot and two subjects of MMLU 5-shot, the same examples for all.

lm-eval's backend runs with a batch size of 1, its default, and of 8; the goals are compared with the faster of the two.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, finish
from peers.measuring import memory_mb
from peers.side_by_side import OURS, run_side, verdict

DATA = Path(__file__).parents[2] / "shared" / "data"
THEIRS = "lm-eval"
PEERS = {"lm-eval, batch 1": 1, "lm-eval, batch 8": 8}  # 1 is its default
CASES: dict[str, dict[str, Any]] = {
    "ARC-Challenge 5-shot, per document": {"test": "arc_challenge", "shots": 5, "fewshot": "per-document", "docs": 100},
    "ARC-Challenge 25-shot, fixed": {"test": "arc_challenge", "shots": 25, "fewshot": "fixed", "docs": 24},
    "HellaSwag 10-shot, fixed": {"test": "hellaswag", "shots": 10, "fewshot": "fixed", "docs": 60},
    "MMLU 5-shot, fixed": {
        "test": "mmlu",
        "shots": 5,
        "fewshot": "fixed",
        "docs": 160,
        "tasks": ["anatomy", "astronomy"],
    },
}
LEAST = {"per-document": 3.8, "fixed": 15.0}
MOST_MEMORY = 0.5
CLOSE = 1e-4  # nats, of a log-probability
GOALS = {
    "per document": ">= 3.8x",
    "fixed block": ">= 15x",
    "memory": "<= 0.5x",
    "numbers": "equal to 1e-4, same answers",
}
NOTE = """\
Ratios: lm-eval over ours for time, ours over lm-eval for memory; median of {rounds} rounds, and the lowest and highest.
MB: what the whole process held at most; in brackets what it held before the model was loaded (Python, the same packages
on both sides, the documents). The goal is compared with the ratio of what came on top of that; the ratio of whole
processes stands beside it."""


def model(folder: Path, texts: list[str]) -> None:
    """A random Mistral with a tokenizer of its own, saved to ``folder``."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        sliding_window=None,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=1,
    )
    MistralForCausalLM(config).save_pretrained(folder)


def tests(job: dict[str, Any]) -> Any:
    """Our general tasks with the one test of a job, cut to some of its parts if it says so."""
    from dataclasses import replace

    from direct_rlhf.evaluate.general import GeneralTasks
    from direct_rlhf.recipe.schema import GeneralSection

    section = GeneralSection(tasks=[f"standard:{job['test']}"], num_fewshot=job["shots"], fewshot=job["fewshot"])
    found = GeneralTasks(section, seed=0, folder=None, data=Path(job["data"]))
    if "tasks" in job:
        test = found.tests[job["test"]]
        chosen = {name: task for name, task in test.tasks.items() if test.part(name) in job["tasks"]}
        found.tests = {job["test"]: replace(test, tasks=chosen)}
    return found


def everything_imported() -> None:
    """What either side imports sooner or later, so that both start from the same memory."""
    import lm_eval.evaluator
    import lm_eval.models.huggingface
    from transformers import MistralForCausalLM, PreTrainedTokenizerFast

    _ = lm_eval.evaluator, lm_eval.models.huggingface, MistralForCausalLM, PreTrainedTokenizerFast


def ours(job: dict[str, Any]) -> None:
    everything_imported()
    from direct_rlhf.data.tokens import load_tokens
    from direct_rlhf.models.loading import load_causal_lm
    from direct_rlhf.models.memory import ChunkSize

    found, before = tests(job), memory_mb("VmRSS")
    lm, tokens = load_causal_lm(job["model"]), load_tokens(job["model"])
    start = time.perf_counter()
    measured = found.measure(
        lm, tokens, limit=job["docs"], batch=ChunkSize("scoring", job["batch"]), on_done=lambda done: None
    )[job["test"]]
    seconds = time.perf_counter() - start
    items = next(iter(measured.by_filter.values()))
    report(seconds, before, [item.extra["logprobs"] for item in items], [item.value for item in items])


def theirs(job: dict[str, Any]) -> None:
    everything_imported()
    import contextlib

    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    found, before = tests(job), memory_mb("VmRSS")
    test = found.tests[job["test"]]
    asked = {name: n for name, n in test.documents(job["docs"]).items() if n}
    with contextlib.redirect_stdout(sys.stderr):
        lm = HFLM(
            pretrained=job["model"], device="cpu", dtype="float32", batch_size=job["peer_batch"], add_bos_token=False
        )
        for name in asked:
            test.tasks[name].set_fewshot_seed(seed=0)
        start = time.perf_counter()
        output = evaluate(
            lm,
            {"tasks": {name: test.tasks[name] for name in asked}},
            samples={name: list(range(n)) for name, n in asked.items()},
            bootstrap_iters=0,
        )
        seconds = time.perf_counter() - start
    rows = [row for name in asked for row in sorted(output["samples"][name], key=lambda row: row["doc_id"])]
    logprobs = [[float(response[0][0]) for response in row["resps"]] for row in rows]
    report(seconds, before, logprobs, [float(row[test.metric]) for row in rows])


def report(seconds: float, before: float, logprobs: list[list[float]], values: list[float]) -> None:
    print(
        json.dumps(
            {
                "seconds": seconds,
                "peak_mb": memory_mb("VmHWM"),
                "before_model_mb": before,
                "logprobs": logprobs,
                "values": values,
            }
        )
    )


def median(values: list[float]) -> float:
    from statistics import median as middle

    return float(middle(values))


def own(side: dict[str, Any]) -> float:
    """MB beyond what the process held before the model was loaded."""
    return float(side["peak_mb"] - side["before_model_mb"])


def summary(rounds: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Of one case: (ours, theirs) by round."""
    faster = [their["seconds"] / our["seconds"] for our, their in rounds]
    memory = [own(our) / own(their) for our, their in rounds]
    our, their = rounds[0]
    pairs = [(a, b) for x, y in zip(our["logprobs"], their["logprobs"], strict=True) for a, b in zip(x, y, strict=True)]
    return {
        "faster": median(faster),
        "faster_range": [min(faster), max(faster)],
        "memory": median(memory),
        "memory_range": [min(memory), max(memory)],
        "whole_process": median([our["peak_mb"] / their["peak_mb"] for our, their in rounds]),
        "requests_per_second": [len(pairs) / median([side[i]["seconds"] for side in rounds]) for i in (0, 1)],
        "before_model_mb": [median([side[i]["before_model_mb"] for side in rounds]) for i in (0, 1)],
        "peak_mb": [median([side[i]["peak_mb"] for side in rounds]) for i in (0, 1)],
        "requests": len(pairs),
        "largest_difference": max(abs(a - b) for a, b in pairs),
        "answers_differ": sum(a != b for a, b in zip(our["values"], their["values"], strict=True)),
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    from direct_rlhf.evaluate.standard import standard_tests

    texts = [
        str(document)
        for test in standard_tests()
        if test.name in {job["test"] for job in CASES.values()}
        for member in test.specification(options.data)
        for split in member["custom_dataset"]().values()
        for document in split
    ]
    model(folder, texts)
    found: dict[str, dict[str, Any]] = {}
    for case, job in CASES.items():
        if options.only and options.only not in case:
            continue
        job = job | {"model": str(folder), "data": str(options.data), "batch": options.batch}
        if options.quick:
            job |= {"docs": 8, "shots": 2}
        rounds: list[tuple[dict[str, Any], dict[str, Any]]] = []
        peers = list(PEERS)
        others: dict[str, list[float]] = {}  # seconds and MB of the slower one, of one round
        for number in range(1 if options.quick else options.rounds):
            order = [OURS, *peers] if number % 2 == 0 else [*peers, OURS]
            sides = {}
            for side in order:
                which = OURS if side == OURS else THEIRS
                command = [sys.executable, __file__, which]
                sides[side] = run_side(command, job | {"peer_batch": PEERS.get(side, 0)})
                shown = f"{sides[side]['seconds']:.2f} s, {own(sides[side]):.0f} MB of its own"
                print(f"round {number + 1}, {case}, {side}: {shown}", file=sys.stderr, flush=True)
            # the first round says which of the two is faster; it alone goes on
            faster = min(peers, key=lambda side: float(sides[side]["seconds"]))
            others |= {side: [sides[side]["seconds"], own(sides[side])] for side in peers if side != faster}
            peers = [faster]
            rounds.append((sides[OURS], sides[peers[0]]))
        found[case] = {"compared with": peers[0], "others_seconds_mb": others, **summary(rounds)}
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64, help="contexts in a forward of ours, at most")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of test sets")
    parser.add_argument("--only", help="cases whose name holds this")
    options = parser.parse_args()
    if not options.data.is_dir():
        raise SystemExit(f"{options.data}: the folder of test sets is not there. Give it with --data.")
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(options, Path(folder))
    table = [
        [
            "test",
            "requests",
            "ours, requests/s",
            "lm-eval",
            "its batch",
            "faster by",
            "goal",
            "ours, MB",
            "lm-eval, MB",
            "memory",
            "goal",
            "whole process",
        ]
    ]
    table[0] += ["largest difference, nats", "answers that differ"]
    held = True
    for case, figures in measured.items():
        least = LEAST[CASES[case]["fewshot"]]
        equal = figures["largest_difference"] <= CLOSE and not figures["answers_differ"]
        held = held and figures["faster"] >= least and figures["memory"] <= MOST_MEMORY and equal
        table.append(
            [
                case,
                str(figures["requests"]),
                *(f"{x:.1f}" for x in figures["requests_per_second"]),
                str(PEERS[figures["compared with"]]),
                "{:.1f} [{:.1f}, {:.1f}]".format(figures["faster"], *figures["faster_range"]),
                verdict(figures["faster"] >= least, f">= {least:g}"),
                *(
                    f"{peak:.0f} ({early:.0f})"
                    for peak, early in zip(figures["peak_mb"], figures["before_model_mb"], strict=True)
                ),
                "{:.2f} [{:.2f}, {:.2f}]".format(figures["memory"], *figures["memory_range"]),
                verdict(figures["memory"] <= MOST_MEMORY, f"<= {MOST_MEMORY:g}"),
                f"{figures['whole_process']:.2f}",
                f"{figures['largest_difference']:.1e}",
                str(figures["answers_differ"]),
            ]
        )
    note = NOTE.format(rounds=options.rounds)
    finish("scoring", measured, GOALS, held=held, options=options, table=table, note=note)


if __name__ == "__main__":
    if sys.argv[1:2] == [OURS]:
        ours(json.loads(sys.argv[2]))
    elif sys.argv[1:2] == [THEIRS]:
        theirs(json.loads(sys.argv[2]))
    else:
        main()
