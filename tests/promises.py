"""The reliability promises, and which tests hold them: `python tests/promises.py > docs/promises.md`.

A test says what it holds with `@pytest.mark.promise("K1")`. The page is made from these marks, read from the source of
the tests and not by running them, and from the list below.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "promises.md"


@dataclass(frozen=True)
class Promise:
    """One promise. ``missing``: what of it nothing holds yet, in words; empty if a test of it holds all."""

    id: str
    sentence: str
    missing: str = ""


@dataclass(frozen=True, order=True)
class Test:
    """A test function, or a whole file where the mark stands on the module."""

    __test__ = False  # pytest need not look for tests in here

    file: str  # below tests/, with slashes
    name: str  # empty: the whole file


GROUPS = {
    "K": "Checkpoint and resume",
    "S": "Signals and processes",
    "N": "Numbers",
    "D": "Determinism",
    "T": "Data",
    "R": "Resources",
    "J": "Judge and evaluation",
    "H": "Generated code",
    "X": "Security and privacy",
    "M": "Merging",
    "U": "Interface",
}

PROMISES = [
    Promise("K1", "Only a complete checkpoint is visible; after a crash at any write the one before still loads."),
    Promise(
        "K2", "The marker is written last, holds size and SHA-256 of every file, and never follows a failed write."
    ),
    Promise(
        "K3", "A damaged checkpoint is refused by name, and a resume goes back to the newest good one and says so."
    ),
    Promise("K4", "Saving a step again never destroys the only good copy."),
    Promise("K5", "An old checkpoint goes only after a newer one is complete; a delete that fails stops nothing."),
    Promise("K6", "On a CPU a stopped and resumed run equals one that never stopped, to the last bit."),
    Promise("K7", "A PPO iteration that is cut off at any of its borders is never resumed as a mixture."),
    Promise("K8", "A resumed run draws the random numbers that the whole run would have drawn."),
    Promise(
        "K9", "A resume with a changed recipe is refused, with the differences, unless the keys are safe to change."
    ),
    Promise(
        "K10", "A checkpoint of another number of processes is resharded, with the same batches, and the run says so."
    ),
    Promise("K11", "A checkpoint holds the state of its own step, whatever changes afterwards."),
    Promise("K12", "Reference and reward model do not move during PPO, on a shared trunk neither."),
    Promise("K13", "A checkpoint of an older release loads, or the message says which release can read it."),
    Promise("S1", "SIGTERM in any phase ends the run soon, resumable, with exit code 75."),
    Promise("S2", "The first Ctrl+C saves and stops, the second stops at once; neither leaves half a file."),
    Promise("S3", "A signal to one process stops all at the same step."),
    Promise("S4", "A dead or stopped process ends the run within a stated time, with the cause on screen."),
    Promise("S5", "No child process outlives the run."),
    Promise("S6", "torchrun is given our grace time before it kills."),
    Promise("S7", "Two processes cannot write one run directory; the lock of a dead one is recognised."),
    Promise("N1", "No optimiser step is made with a loss or gradient that is not finite; the run says which batch."),
    Promise(
        "N2", "A reward, log-probability or value that is not finite is caught where it arises, with the prompt id."
    ),
    Promise("N3", "No checkpoint holds NaN."),
    Promise(
        "N4", "Micro-batches and padding do not change the gradient: the loss is a mean over the whole batch's tokens."
    ),
    Promise(
        "N5", "On the first minibatch of an iteration the ratio is 1, or the run stops: sampler and trainer disagree."
    ),
    Promise("N6", "A rollout carries its policy version, and stale weights are noticed."),
    Promise("N7", "Empty, one-token, EOS-only and full-length answers and rows of padding give finite losses."),
    Promise("N8", "The score lands on the last token of the answer, and KL covers neither prompt nor padding."),
    Promise("N9", "A six-sigma gradient norm is logged with its batch, and skipped if the recipe says so."),
    Promise("N10", "The KL alarm, the KL stop and the capability guard act at their limits."),
    Promise(
        "N11",
        "bfloat16 stays within a stated bound of float32 on the toy task.",
        "needs a GPU, which the tests do not have",
    ),
    Promise("D1", "Same recipe, code and device: the same metrics, times aside."),
    Promise("D2", "Another seed gives other samples and the same split of the data."),
    Promise("D3", "A sample depends on seed, prompt, iteration and index, and not on its batch."),
    Promise("D4", "Hash seed, locale, time zone and file order change nothing (data are read by one process)."),
    Promise("D5", "Golden toy runs per platform; a difference is named with its first step."),
    Promise("D6", "Scores can be computed again, offline, from the recorded answers alone."),
    Promise(
        "T1", "A bad row never crashes and never vanishes: it is counted, listed with its line, and limited in share."
    ),
    Promise(
        "T2", "A cut or corrupt Parquet or gzip file is named with its offset, as far as its format has checksums."
    ),
    Promise("T3", "Truncation never removes what differs between the two answers without counting the pair."),
    Promise("T4", "Training rows that equal an evaluation question are found by a normalised hash and reported."),
    Promise("T5", "Every input form of one dialogue gives the same ids; an implicit prompt is cut at a turn."),
    Promise(
        "T6",
        "Content cannot forge a turn: special tokens and markers inside a turn stay content. (Rendered as plain text, a "
        "marker looks to the model like a turn, whoever wrote it.)",
    ),
    Promise("T7", "Sources are fingerprinted; a change between start and resume is refused."),
    Promise("R1", "A full disk leaves the earlier state intact, and the message has needed and free bytes."),
    Promise("R2", "An output folder that cannot be written is said before a model is loaded."),
    Promise(
        "R3",
        "Out of memory halves the chunk with the same result, is logged, and has a floor (a step of several processes "
        "ends the run with code 4).",
    ),
    Promise(
        "R4",
        "`plan` is within 15 % of the measured peak and refuses what cannot fit.",
        "held on a CPU only, and the evaluation suites are not planned",
    ),
    Promise("R5", "A batch of the worst case runs before the first step."),
    Promise("R6", "Memory does not grow with the number of iterations."),
    Promise(
        "R7", "A log adapter that raises or blocks changes nothing; one that is not installed is said before the start."
    ),
    Promise("R8", "Everything local works without a network."),
    Promise("J1", "What a judge's server may get over is tried again with back-off; what it will not, is not."),
    Promise("J2", "An error is never a score: the item is missing, and below a stated coverage there is no headline."),
    Promise("J3", "Finished items are kept one by one and never paid for twice."),
    Promise("J4", "The judge's cache knows judge, prompt, decoding, question, answers and order."),
    Promise("J5", "Text in an answer cannot change the verdict that is read from the judge."),
    Promise("J6", "Pairs are judged in both orders, and the rate of disagreement is reported."),
    Promise("J7", "A cap on calls or money stops cleanly and resumably."),
    Promise("J8", "Differences are paired and have an interval; nothing is better when it covers zero."),
    Promise("J9", "How an answer ended is recorded, and graded by a documented rule."),
    Promise("J10", "Multiple-choice scores do not depend on batch, padding side or shared prefixes."),
    Promise("H", "Code that a model writes is never run."),
    Promise(
        "X1",
        "Only safetensors and JSON are loaded; nothing of ours is a pickle.",
        "an adapter, or an index of weights, that names a .bin file is read by torch.load(weights_only=True)",
    ),
    Promise("X2", "Code that comes with a model or data set is not run unless the recipe says so."),
    Promise(
        "X3",
        "Hub models and data resolve to a commit that is recorded.",
        "held for the models of a merge; no test moves the branch of a run's model or data",
    ),
    Promise("X4", "Secrets reach no log, recipe, report, traceback or child process."),
    Promise("X5", "Reports are inert: text is escaped, and no script runs."),
    Promise("X6", "Names cannot leave the run's folder."),
    Promise("X7", "A server of ours listens on 127.0.0.1; anything else needs a token.", "there is no server yet"),
    Promise("X8", "No network call that the recipe does not name, and no telemetry."),
    Promise("X9", "Harmful samples in reports are folded behind a warning and can be left out."),
    Promise("X10", "Dependencies are locked with hashes and a cooldown for new releases."),
    Promise("M1", "What does not fit together is refused before one weight is read."),
    Promise("M2", "The result of a merge appears whole or not at all."),
    Promise("M3", "A merged model holds no NaN, keeps its ties, and loads in plain transformers."),
    Promise("M4", "The laws that each merge method obeys hold."),
    Promise("M5", "Random methods repeat with the seed, whatever the shards and threads."),
    Promise("M6", "Peak memory of a merge is bounded by a stated number of tensors."),
    Promise("M7", "The card shows the normalisation that was applied."),
    Promise(
        "U1", "A recipe error names file, line, path, value, reason and the nearest legal choice; several at once."
    ),
    Promise("U2", "The commands in README and docs run as they are written."),
    Promise(
        "U3",
        "`--help` imports no torch and is quick; the light verbs work without extras.",
        "no test installs the wheel and tries it from another folder",
    ),
    Promise("U4", "A missing extra is answered with the exact command that installs it."),
    Promise("U5", "A missing result is shown as missing and never as 0."),
    Promise("U6", "Exit codes mean what the documentation says."),
]

# The promises without any test. Take an ID away once a test of it is there. To put one in is to give a promise up.
NOT_YET = frozenset(
    {
        "D6", "N11", "U2", "X7", "X10",
    }
)  # fmt: skip


def marks(source: str) -> Iterator[tuple[str, str]]:
    """(ID, test name) of every promise mark in a test file; the name is empty for a mark on the whole module.

    Errors: ValueError, with the line, for a mark that stands on no test or is not given as plain text.
    """
    tree = ast.parse(source)
    placed: set[ast.Call] = set()

    def in_expression(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.promise":
                placed.add(call)
                for argument in call.args:
                    if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
                        raise ValueError(f"line {argument.lineno}: name the promise as plain text")
                    yield argument.value, name

    def in_body(body: list[ast.stmt], inherited: list[str]) -> Iterator[tuple[str, str]]:
        for node in body:
            if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                on_class = [
                    found
                    for part in [*node.decorator_list, *_pytestmarks(node.body)]
                    for found, _ in in_expression(part, "")
                ]
                yield from in_body(node.body, inherited + on_class)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
                yield from ((promise, node.name) for promise in inherited)
                for decorator in node.decorator_list:
                    yield from in_expression(decorator, node.name)

    for value in _pytestmarks(tree.body):
        yield from in_expression(value, "")
    yield from in_body(tree.body, [])
    everywhere = {
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.promise"
    }
    if stray := everywhere - {call.lineno for call in placed}:
        raise ValueError(f"line {min(stray)}: a promise mark that stands on no test")


def _pytestmarks(body: list[ast.stmt]) -> list[ast.expr]:
    return [
        node.value
        for node in body
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "pytestmark" for target in node.targets)
    ]


def collected(folder: Path = TESTS) -> dict[str, list[Test]]:
    """Promise ID to the tests that are marked with it, in the order of their files."""
    found: dict[str, list[Test]] = {}
    for path in sorted(folder.rglob("test_*.py")):
        file = path.relative_to(folder).as_posix()
        try:
            for promise, name in marks(path.read_text(encoding="utf-8")):
                found.setdefault(promise, []).append(Test(file, name))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return {promise: list(dict.fromkeys(tests)) for promise, tests in found.items()}


def state(promise: Promise, tests: list[Test]) -> str:
    """`held`, `partly: ...` or `not yet: ...`."""
    if not tests:
        return f"not yet: {promise.missing or 'no test tries to break it'}"
    return f"partly: {promise.missing}" if promise.missing else "held"


def page(found: dict[str, list[Test]]) -> str:
    """docs/promises.md."""
    count = {
        word: sum(state(promise, found.get(promise.id, [])).startswith(word) for promise in PROMISES)
        for word in ("held", "partly", "not yet")
    }
    lines = [
        "# Promises and the tests that hold them",
        "",
        "What a user may rely on. Each promise has an ID, which its tests carry as `@pytest.mark.promise(ID)`. `held`: a",
        "test tries to break all of it and fails to; `partly`: something of it has no test; `not yet`: nothing holds it.",
        "",
        f"Of {len(PROMISES)} promises {count['held']} are held, {count['partly']} partly, {count['not yet']} not yet.",
        "",
        "Made by `python tests/promises.py > docs/promises.md`; do not edit it by hand.",
    ]
    for letter, title in GROUPS.items():
        lines += ["", f"## {letter} {title}", "", "| ID | promise | state | tests |", "|---|---|---|---|"]
        lines += [
            f"| {promise.id} | {promise.sentence} | {state(promise, found.get(promise.id, []))} | "
            f"{_links(found.get(promise.id, []))} |"
            for promise in PROMISES
            if promise.id.rstrip("0123456789") == letter
        ]
    return "\n".join(lines) + "\n"


def _links(tests: list[Test]) -> str:
    by_file: dict[str, list[str]] = {}
    for test in tests:
        by_file.setdefault(test.file, []).append(f"`{test.name}`" if test.name else "the whole file")
    return "<br>".join(f"[{file}](../tests/{file}): {', '.join(names)}" for file, names in by_file.items())


if __name__ == "__main__":
    print(page(collected()), end="")
