"""A run directory as values: what is there, what is missing, what cannot be read.

Tolerant by rule: a missing or damaged file, field or number becomes None and a sentence in ``problems``; never 0.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from direct_rlhf.errors import DataError

ARMS = ("base", "sft", "sft_ppo", "dpo", "direct_ppo")  # the order in every table and plot
SUITES = ("general", "conversation", "toxicity")
RATES = ("bad_word_probability", "toxic_rate", "refusal_rate", "over_refusal_rate")


@dataclass(frozen=True)
class Estimate:
    """A measured number, with its 95 % interval where one was written. A number that is missing has no Estimate."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class TaskResult:
    """One general task of one arm; ``value`` and ``stderr`` are shares (0 to 1)."""

    name: str
    metric: str
    value: float | None
    stderr: float | None
    n_scored: int | None
    n_failed: int | None
    higher_is_better: bool = True
    n_unparsed: int = 0
    shots: str = ""  # `5-shot, fixed`; empty for none
    limits: str = ""  # what the model's context length did to it, in words


@dataclass(frozen=True)
class ArmResults:
    """What was measured of one arm. ``files`` maps a suite to its JSON file, relative to the run directory."""

    name: str
    model: str | None
    general: Estimate | None = None
    tasks: tuple[TaskResult, ...] = ()
    conversation: Estimate | None = None
    by_turn: Mapping[str, float] = field(default_factory=dict)
    by_category: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, Estimate] = field(default_factory=dict)  # of RATES, those measured
    classifier: str | None = None
    counts: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)  # suite -> scored, failed
    files: Mapping[str, str] = field(default_factory=dict)

    def metric(self, key: str) -> Estimate | None:
        """The estimate behind a headline: `general`, `conversation` or one of RATES."""
        return self.general if key == "general" else self.conversation if key == "conversation" else self.rates.get(key)


@dataclass(frozen=True)
class Difference:
    """A paired difference, arm minus against, on ``n`` common items.

    ``decided`` is False where items failed and the sign depends on what they would have been; ``p_holm`` is the p value
    of one task among several, adjusted for their number.
    """

    arm: str
    against: str
    metric: str
    difference: float | None
    low: float | None
    high: float | None
    n: int | None
    n_dropped: int | None = None
    decided: bool = True
    p_holm: float | None = None


@dataclass(frozen=True)
class RunData:
    """One run directory."""

    path: Path
    name: str
    recipe: Mapping[str, Any]
    manifest: Mapping[str, Any]
    status: Mapping[str, Any]
    recipe_sha256: str | None
    seed: int | None
    arms: tuple[ArmResults, ...]  # the reference first
    reference: str  # the arm that the others are compared with
    comparisons: tuple[Difference, ...]
    fitness: Mapping[str, Any]
    cost_fitness: Mapping[str, Any]  # of a cost model, which PPO-Lagrangian has
    metrics: Mapping[str, Sequence[Mapping[str, Any]]]  # stage -> lines in the order of steps
    alerts: Sequence[Mapping[str, Any]]  # lines of alerts.jsonl
    stages: Mapping[str, Mapping[str, Any]]  # stage -> its record, in the order in which they ended
    seconds: Mapping[str, float]  # stage -> seconds, where written
    problems: tuple[str, ...]  # sentences

    def arm(self, name: str) -> ArmResults | None:
        return next((arm for arm in self.arms if arm.name == name), None)


def number(value: object) -> float | None:
    """``value`` if it is a finite number, else None (a bool, a text, NaN and infinity are no numbers)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def count(value: object) -> int | None:
    found = number(value)
    return None if found is None or found < 0 else int(found)


def mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def interval(value: object) -> tuple[float | None, float | None]:
    """``[low, high]`` as two numbers, or two Nones: half an interval is none."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        return None, None
    low, high = number(value[0]), number(value[1])
    return (low, high) if low is not None and high is not None else (None, None)


def estimate(value: object, ci: object = None) -> Estimate | None:
    found = number(value)
    return None if found is None else Estimate(found, *interval(ci))


def numbers(value: object) -> dict[str, float]:
    """The entries of a mapping that are numbers; a nested ``{"score"|"mean"|"value": x}`` counts as its number."""
    found = {}
    for key, entry in mapping(value).items():
        inner = mapping(entry)
        x = number(next((inner[name] for name in ("score", "mean", "value") if name in inner), entry))
        if x is not None:
            found[str(key)] = x
    return found


def read_json(path: Path, problems: list[str], root: Path) -> Any:
    """The file's content, or None with a sentence in ``problems``."""
    name = path.relative_to(root).as_posix()
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{name} is missing.")
    except (OSError, ValueError) as error:
        problems.append(f"{name} cannot be read: {error}")
    return None


def read_jsonl(path: Path, problems: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The good lines of a JSONL file; none if it is absent. Torn lines are passed over and counted in ``problems``."""
    if not path.is_file():
        return
    torn = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            else:
                torn += 1
    if torn and problems is not None:
        problems.append(f"{path.name}: {torn} line(s) cannot be read and were passed over.")


def read_run(path: Path) -> RunData:
    """Read a run directory. DataError if it is none (no recipe.yaml, no manifest, no results)."""
    if not any((path / name).exists() for name in ("recipe.yaml", "manifest.json", "evaluation", "metrics.jsonl")):
        raise DataError(
            f"{path}: no run directory (no recipe.yaml, manifest.json, metrics.jsonl or evaluation/ in it). "
            "Give the folder that `direct-rlhf run` printed, such as runs/NAME."
        )
    problems: list[str] = []
    recipe = _read_recipe(path, problems)
    arms = [_read_arm(path, name, recipe, problems) for name in _arm_names(path)]
    comparisons = _read_comparisons(path, problems)
    reference = _reference([arm.name for arm in arms], comparisons)
    manifest = mapping(read_json(path / "manifest.json", problems, path))
    seed = count(recipe.get("seed", manifest.get("seed")))
    metrics = _read_metrics(path, problems)
    files = sorted((path / "stages").glob("*.json"))
    cost_card = path / "cost_model" / "fitness.json"
    records = {file.stem: mapping(read_json(file, problems, path)) for file in files}
    stages = dict(sorted(records.items(), key=lambda one: str(one[1].get("finished", ""))))
    seconds = {name: x for name, record in stages.items() if (x := number(record.get("seconds"))) is not None}
    return RunData(
        path=path,
        name=str(recipe.get("name") or path.resolve().name),
        recipe=recipe,
        manifest=manifest,
        status=mapping(read_json(path / "status.json", problems, path)),
        recipe_sha256=str(manifest["recipe_sha256"]) if manifest.get("recipe_sha256") else None,
        seed=seed,
        arms=tuple(sorted(arms, key=lambda arm: arm.name != reference)),
        reference=reference,
        comparisons=comparisons,
        fitness=mapping(read_json(path / "reward_model" / "fitness.json", problems, path)),
        cost_fitness=mapping(read_json(cost_card, problems, path)) if cost_card.exists() else {},
        metrics=metrics,
        alerts=tuple(read_jsonl(path / "alerts.jsonl", problems)),
        stages=stages,
        seconds=seconds,
        problems=tuple(problems),
    )


def _read_recipe(path: Path, problems: list[str]) -> Mapping[str, Any]:
    try:
        return mapping(yaml.safe_load((path / "recipe.yaml").read_bytes()))
    except FileNotFoundError:
        problems.append("recipe.yaml is missing.")
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"recipe.yaml cannot be read: {error}")
    return {}


def _read_metrics(path: Path, problems: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Stage -> lines by step. A resumed run may hold a step twice; the later line wins."""
    if not (path / "metrics.jsonl").is_file():
        problems.append("metrics.jsonl is missing: there are no training curves.")
    by_stage: dict[str, dict[float, dict[str, Any]]] = {}
    for row in read_jsonl(path / "metrics.jsonl", problems):
        step = number(row.get("step"))
        if step is not None:
            by_stage.setdefault(str(row.get("stage")), {}).setdefault(step, {}).update(row)
    return {stage: [rows[step] for step in sorted(rows)] for stage, rows in by_stage.items()}


def _reference(names: Sequence[str], comparisons: Sequence[Difference]) -> str:
    """The base; in an evaluation of other models, what most comparisons are against, or the one model there is."""
    against = [row.against for row in comparisons] or (list(names) if len(names) == 1 else [])
    return "base" if "base" in names or not against else max(against, key=against.count)


def _arm_names(path: Path) -> list[str]:
    """Arms of which something exists: a result folder or a model. The known ones first, in their fixed order."""
    evaluated = {folder.parent.name for suite in SUITES for folder in path.glob(f"evaluation/*/{suite}.json")}
    made = {folder.name for folder in path.glob("models/*") if folder.is_dir() and not folder.name.startswith(".")}
    names = evaluated | (made & set(ARMS))
    return [name for name in ARMS if name in names] + sorted(names - set(ARMS))


def _read_arm(path: Path, name: str, recipe: Mapping[str, Any], problems: list[str]) -> ArmResults:
    wanted = mapping(recipe.get("evaluation")).get("suites", SUITES)
    contents: dict[str, Mapping[str, Any]] = {}
    files: dict[str, str] = {}
    for suite in SUITES:
        file = path / "evaluation" / name / f"{suite}.json"
        unasked = suite not in wanted and not file.exists()
        contents[suite] = {} if unasked else mapping(read_json(file, problems, path))
        if file.exists():
            files[suite] = file.relative_to(path).as_posix()
    general, conversation, toxicity = (contents[suite] for suite in SUITES)
    model = f"models/{name}" if (path / "models" / name).is_dir() else None
    if model is None and name == "base":
        model = mapping(recipe.get("model")).get("base")
    model = next((str(content["model"]) for content in contents.values() if content.get("model")), model)
    rates = {key: estimate(toxicity.get(key), toxicity.get(f"{key}_ci")) for key in RATES}
    return ArmResults(
        name=name,
        model=model,
        general=estimate(general.get("mean"), general.get("ci")),
        tasks=tuple(_read_task(task, mapping(x)) for task, x in mapping(general.get("tasks")).items()),
        conversation=estimate(conversation.get("score"), conversation.get("ci")),
        by_turn=numbers(conversation.get("by_turn")),
        by_category=numbers(conversation.get("by_category")),
        rates={key: x for key, x in rates.items() if x is not None},
        classifier=str(toxicity["classifier"]) if toxicity.get("classifier") else None,
        counts={suite: _counts(contents[suite]) for suite in SUITES},
        files=files,
    )


def _read_task(name: str, content: Mapping[str, Any]) -> TaskResult:
    return TaskResult(
        name=name,
        metric=str(content.get("metric") or "score"),
        value=number(content.get("value")),
        stderr=number(content.get("stderr")),
        n_scored=count(content.get("n_scored")),
        n_failed=count(content.get("n_failed")),
        higher_is_better=content.get("higher_is_better") is not False,
        n_unparsed=count(content.get("n_unparsed")) or 0,
        shots=f"{shots}-shot, {content.get('fewshot')}" if (shots := count(content.get("num_fewshot"))) else "",
        limits=_limits(content),
    )


def _limits(content: Mapping[str, Any]) -> str:
    said = {
        "truncated": "prompts cut on the left to fit the context",
        "capped": "answers with a lowered cap",
        "boundary_merges": "with a token across the border",
    }
    return ", ".join(f"{n} {words}" for key, words in said.items() if (n := count(content.get(key))))


def _counts(content: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Scored and failed items; of the general suite, the sums over its tasks."""
    tasks = [mapping(task) for task in mapping(content.get("tasks")).values()]
    totals = []
    for key in ("n_scored", "n_failed"):
        parts = [found for task in tasks if (found := count(task.get(key))) is not None]
        totals.append(count(content[key]) if key in content else sum(parts) if parts else None)
    return totals[0], totals[1]


def _read_comparisons(path: Path, problems: list[str]) -> tuple[Difference, ...]:
    rows = read_json(path / "evaluation" / "comparisons.json", problems, path)
    if isinstance(rows, Mapping):
        rows = rows.get("comparisons")
    found = []
    for row in rows if isinstance(rows, list) else []:
        row = mapping(row)
        low, high = interval(row.get("ci"))
        found.append(
            Difference(
                arm=str(row.get("arm")),
                against=str(row.get("against")),
                metric=str(row.get("metric")),
                difference=number(row.get("difference")),
                low=low,
                high=high,
                n=count(row.get("n")),
                n_dropped=count(row.get("n_dropped")),
                decided=row.get("verdict") != "not decided",
                p_holm=number(row.get("p_holm")),
            )
        )
    return tuple(found)
