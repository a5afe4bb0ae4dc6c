"""The tests of general skill: lm-eval's task objects by name, with their worked examples settled."""

import contextlib
import io
import logging
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe.schema import GeneralSection

LOCAL_BUILDERS = ("json", "csv", "text", "parquet", "arrow")  # of the datasets library, for data_files


@dataclass(frozen=True)
class GeneralTest:
    """What has one number: an lm-eval task, or several whose documents count alike."""

    name: str
    tasks: Mapping[str, Any]  # lm-eval's Task objects by name
    metric: str
    higher_is_better: bool

    @property
    def first(self) -> Any:
        return next(iter(self.tasks.values()))

    def documents(self, limit: int | None) -> dict[str, int]:
        """How many documents of each task are asked: all, or ``limit`` in all, from the tasks in turn."""
        sizes = {name: len(task.eval_docs) for name, task in self.tasks.items()}
        if limit is None:
            return sizes
        counts = dict.fromkeys(sizes, 0)
        while limit > sum(counts.values()) < sum(sizes.values()):
            for name in [name for name in sizes if counts[name] < sizes[name]][: limit - sum(counts.values())]:
                counts[name] += 1
        return counts

    def part(self, task: str) -> str:
        """The task's name without what all names of this test begin with; empty for a test of one task."""
        common = "".join(
            chars[0] for chars in takewhile(lambda chars: len(set(chars)) == 1, zip(*self.tasks, strict=False))
        )
        return task[common.rfind("_") + 1 :] if len(self.tasks) > 1 else ""


def load_tests(section: GeneralSection, folder: Path | None, data: Path | None, cache: str) -> list[GeneralTest]:
    """The tests of the section's entries, each once and in their order."""
    tests: dict[str, GeneralTest] = {}
    for entry in section.tasks:
        if entry == "world":
            from direct_rlhf.world.tasks import world_task_configs

            loaded = _loaded(entry, [_with_cache(config, cache) for config in world_task_configs()], section)
        elif entry.partition(":")[0] == "standard":
            tests |= {test.name: test for test in _standard(entry, section, data)}
            continue
        else:
            is_file = entry.endswith((".yaml", ".yml"))
            loaded = _loaded(entry, [str((folder or Path()) / entry) if is_file else entry], section)
        tests |= {
            name: GeneralTest(name, {name: task}, metric_name(task), higher_is_better(task))
            for name, task in loaded.items()
        }
    return list(tests.values())


def _standard(entry: str, section: GeneralSection, data: Path | None) -> list[GeneralTest]:
    from direct_rlhf.evaluate.standard import standard_tests

    listed = {test.name: test for test in standard_tests()}
    name = entry.partition(":")[2]
    if name and name not in listed:
        raise ConfigError(f"evaluation.general.tasks: {entry}: no such test. The list has: {', '.join(listed)}.")
    tests = []
    for standard in [listed[name]] if name else listed.values():
        group = {"group": f"standard_{standard.name}", "task": standard.specification(data)}
        tasks = _loaded(f"standard:{standard.name}", [group], section, standard.configs)
        tests.append(GeneralTest(standard.name, tasks, standard.metric, higher_is_better=True))
    return tests


def _loaded(
    entry: str, specs: Sequence[str | dict[str, Any]], section: GeneralSection, configs: Sequence[str] | None = None
) -> dict[str, Any]:
    """lm-eval's Task objects by name. ``configs``: the folders of its own task files to read, if these are known."""
    import lm_eval.tasks

    if configs is not None:
        shipped = Path(lm_eval.tasks.__file__).parent
        manager = _manager(tuple(str(shipped / name) for name in configs), include_defaults=False)
    else:
        manager = _manager(section.include_path, include_defaults=False)
        names = [spec for spec in specs if isinstance(spec, str) and not spec.endswith((".yaml", ".yml"))]
        if any(name not in manager.task_index for name in names):  # indexing all that lm-eval ships takes seconds
            manager = _manager(section.include_path, include_defaults=True)
    try:
        tasks: dict[str, Any] = manager.load(list(specs))["tasks"]
    except (KeyError, ValueError, OSError) as error:  # unknown name, faulty config, missing data
        raise ConfigError(
            f"evaluation.general.tasks: {entry} cannot be loaded ({error}). Give `world`, `standard`, an lm-eval task "
            "name, or the path of a task YAML; `lm-eval ls tasks` lists the names."
        ) from error
    return tasks


@cache
def _manager(include_path: Any, *, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    paths = list(include_path) if isinstance(include_path, tuple) else include_path
    return TaskManager(include_path=paths, include_defaults=include_defaults)


def draws_per_document(task: Any) -> bool:
    """Whether worked examples are drawn anew for each document."""
    from lm_eval.api.samplers import ContextSampler

    return type(getattr(task, "sampler", None)) is ContextSampler


def set_shots(task: Any, num_fewshot: int | None, fewshot: str) -> None:
    """lm-eval's rule: the recipe's number of shots wins, but not over a task that says 0 itself.

    Where examples would be drawn anew for each document, ``fixed`` takes the first ones for all.
    """
    own = task.config.num_fewshot
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    shots = int(task.config.num_fewshot or 0)
    if not shots:
        return
    sampler = task.sampler
    if len(sampler.df) < shots:
        raise ConfigError(
            f"evaluation.general: {task.config.task} has {len(sampler.df)} worked examples here, and {shots} are asked "
            f"for. Set evaluation.general.num_fewshot to at most {len(sampler.df)}."
        )
    if fewshot == "fixed" and draws_per_document(task):
        from lm_eval.api.samplers import FirstNSampler

        task.sampler = FirstNSampler(sampler.df)
    config = task.config
    asked = config.test_split or config.validation_split
    shown = task.fewshot_cfg.split or config.training_split or config.validation_split or config.test_split
    if shown == asked and task.fewshot_cfg.samples is None:
        # lm-eval keeps a document out of its own examples only where these two are equal
        task.fewshot_cfg.split = config.test_split


def _with_cache(config: Mapping[str, Any], cache: str) -> dict[str, Any]:
    """The config with its local files prepared under ``cache``, not in the user's home, and not needed afterwards."""
    if config.get("dataset_path") not in LOCAL_BUILDERS:
        return dict(config)
    own = {"cache_dir": cache, "keep_in_memory": True}
    return {**config, "dataset_kwargs": {**config.get("dataset_kwargs", {}), **own}}


def metric_name(task: Any) -> str:
    """acc_norm where the task declares it, else its first metric."""
    declared = list(task.higher_is_better())
    return "acc_norm" if "acc_norm" in declared else str(declared[0])


def higher_is_better(task: Any) -> bool:
    """Which way that metric points."""
    return bool(task.higher_is_better().get(metric_name(task), True))


@contextlib.contextmanager
def own_random_states(seed: int) -> Iterator[None]:
    """Python's and NumPy's global random states as of ``seed``, and afterwards what they were before.

    lm-eval draws names from them, and code that comes with a task may draw more.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def quiet() -> Iterator[Callable[[], contextlib.AbstractContextManager[Any]]]:
    """Keeps lm-eval's and datasets' bars and logs off the terminal; ``with loud():`` gives it back, for our own bar."""
    terminal = sys.stderr
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield lambda: contextlib.redirect_stderr(terminal)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def templates_compiled_once() -> Iterator[None]:
    """lm-eval compiles a template anew for each example of each document, which takes longer than scoring them."""
    from lm_eval.utils import env

    compiled = lru_cache(maxsize=1024)(env.from_string)
    env.from_string = compiled
    try:
        yield
    finally:
        del env.from_string  # the class's own again
