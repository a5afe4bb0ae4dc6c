"""Whether training rows ask what the recipe's evaluation asks. A report, never a stop.

Compared are first turns and whole task questions, each with and without its "Question:" and "Answer:". Nothing is
fetched for this: tasks whose documents are not in local files are named as not compared.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.overlap import human_turns, overlaps
from direct_rlhf.data.types import PreferencePair, Prompt
from direct_rlhf.errors import ConfigError
from direct_rlhf.evaluate.conversation import TASK, read_questions
from direct_rlhf.evaluate.general import GeneralTasks
from direct_rlhf.evaluate.tasks import LOCAL_BUILDERS
from direct_rlhf.evaluate.toxicity import read_prompts
from direct_rlhf.recipe.references import HubReference, resolve_test_data, test_data_folder
from direct_rlhf.recipe.schema import GeneralSection, Recipe
from direct_rlhf.run.atomic import write_jsonl

FILE = "overlap.jsonl"
_FRAME = re.compile(r"(?:^|(?<=\s))(?:question|answer|q|a)\s*:", re.IGNORECASE)


@dataclass(frozen=True)
class EvaluationTexts:
    """(id, text) of every evaluation prompt, and the names of what could not be read here.

    An id is `conversation:QUESTION`, `toxicity:PROMPT` or `TASK:DOCUMENT` (documents counted from 0, as in the items of
    general.jsonl). One id may have several texts.
    """

    texts: tuple[tuple[str, str], ...]
    not_compared: tuple[str, ...]


def write_overlap(folder: Path, rows: Iterable[PreferencePair | Prompt], evaluation: EvaluationTexts) -> dict[str, Any]:
    """Lists what both hold as `overlap.jsonl` in ``folder`` (no file if that is nothing) and returns the counts.

    Counts: ``rows`` of training that equal an evaluation prompt, the ``items`` they equal, of ``compared`` items; and
    the names of what was ``not_compared``.
    """
    found = overlaps(_variants(human_turns(rows)), evaluation.texts)
    path = folder / FILE
    if found:
        write_jsonl(path, ({"train": source, "evaluation": item} for source, item in found))
    else:
        path.unlink(missing_ok=True)  # of an attempt with another evaluation
    return {
        "rows": len({source for source, _ in found}),
        "items": len({item for _, item in found}),
        "compared": len({item for item, _ in evaluation.texts}),
        "not_compared": list(evaluation.not_compared),
    }


def evaluation_texts(recipe: Recipe, form: DialogueFormat, folder: Path | None) -> EvaluationTexts:
    """What the recipe's suites ask, under their limits; ``folder`` is where relative paths start from.

    Errors: ConfigError and DataError for a faulty evaluation file, which the evaluation would meet after training.
    """
    evaluation = recipe.evaluation
    texts: list[tuple[str, str]] = []
    not_compared: list[str] = []
    if "conversation" in evaluation.suites:
        section = evaluation.conversation
        place = resolve_test_data(section.questions, evaluation.data, folder)
        if isinstance(place, HubReference):
            not_compared.append(section.questions)
        else:
            questions = read_questions(place, section.limit)
            texts += [(f"{TASK}:{question['id']}", question["turns"][0]["prompt"]) for question in questions]
    if "toxicity" in evaluation.suites:
        places = {ref: resolve_test_data(ref, evaluation.data, folder) for ref in evaluation.toxicity.prompt_files}
        not_compared += [ref for ref, place in places.items() if isinstance(place, HubReference)]
        files = [place for place in places.values() if not isinstance(place, HubReference)]
        for prompt in read_prompts(files, form, evaluation.toxicity.limit):
            first = next(turn.text for turn in prompt.turns if turn.role == "human")
            texts.append((f"toxicity:{prompt.id}", first))
    if "general" in evaluation.suites:
        local = _local_entries(evaluation.general, folder, has_data=evaluation.data is not None)
        not_compared += [entry for entry in evaluation.general.tasks if entry not in local]
        texts += _task_texts(recipe, local, folder)
    return EvaluationTexts(tuple(_variants(texts)), tuple(not_compared))


def _variants(texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Each text, and the same without the frame of a question where it has one."""
    for name, text in texts:
        yield name, text
        if (bare := _FRAME.sub(" ", text)) != text:
            yield name, bare


def _task_texts(recipe: Recipe, entries: list[str], folder: Path | None) -> Iterator[tuple[str, str]]:
    """(TASK:DOCUMENT, text): the question as the model sees it, and the field that the task names for this purpose."""
    section = recipe.evaluation.general
    if not entries:
        return
    chosen = section.model_copy(update={"tasks": entries})
    data = test_data_folder(recipe.evaluation.data, folder)
    tests = GeneralTasks(chosen, seed=recipe.seed, folder=folder, data=data).tests
    asked_of = {
        name: (test.tasks[name], n) for test in tests.values() for name, n in test.documents(section.limit).items()
    }
    for name, (task, n) in asked_of.items():
        field = task.config.doc_to_decontamination_query
        for number, doc in enumerate(islice(task.task_docs, n)):
            # with several inputs (one for each choice) doc_to_text gives the gold one's number
            asked = task.doc_to_choice(doc) if task.multiple_input else [task.doc_to_text(doc)]
            if isinstance(field, str) and field in doc:
                asked = [*asked, doc[field]]
            yield from ((f"{name}:{number}", text) for text in asked if isinstance(text, str) and text.strip())


def _local_entries(section: GeneralSection, folder: Path | None, *, has_data: bool) -> list[str]:
    """The entries whose loading reads local files only; also a YAML that is missing, as loading it says so."""
    index: Mapping[str, Any] = {}
    if section.include_path:
        from lm_eval.tasks import TaskManager

        index = TaskManager(include_path=section.include_path, include_defaults=False).task_index

    def is_local(entry: str) -> bool:
        if entry == "world":
            return True
        if entry.partition(":")[0] == "standard":
            return has_data
        if entry.endswith((".yaml", ".yml")):
            path = (folder or Path()) / entry
            return not path.is_file() or _reads_local_files(path)
        if entry not in index:
            return False  # one of lm-eval's own, whose documents lie on the hub
        is_tag = index[entry].yaml_path is None
        return all(_reads_local_files(index[name].yaml_path) for name in (index[entry].tags if is_tag else [entry]))

    return [entry for entry in section.tasks if is_local(entry)]


def _reads_local_files(path: Path) -> bool:
    """Whether the task of a YAML file has its documents in local files. A group counts as not, whatever it holds."""
    config = _read_yaml(path)
    if isinstance(config.get("task"), list) or {"group", "class", "custom_dataset"} & config.keys():
        return False  # a task's own code may fetch anything
    place, files = str(config.get("dataset_path")), str(config.get("dataset_kwargs"))
    return (place in LOCAL_BUILDERS and "://" not in files) or Path(place).is_dir()


class _TaskLoader(yaml.SafeLoader):
    """YAML of lm-eval's tasks. `!function` stays a name, so that reading it runs nothing."""


_TaskLoader.add_constructor("!function", lambda loader, node: str(node.value))


def _read_yaml(path: Path) -> dict[str, Any]:
    """A task file with what it includes; its own keys win. ConfigError if it cannot be read."""
    try:
        with path.open("rb") as file:
            config = _TaskLoader(file).get_single_data()
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"evaluation.general.tasks: {path} cannot be read ({reason}). Give a YAML file of an lm-eval task."
        ) from error
    if not isinstance(config, dict):
        return {}
    included = config.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        merged |= _read_yaml(path.parent / name)
    return merged | config
