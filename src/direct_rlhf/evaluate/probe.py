"""The capability probe: a few documents of every general task, always the same ones, scored while PPO runs."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from direct_rlhf.data.tokens import Tokens
from direct_rlhf.errors import ConfigError, Interrupted
from direct_rlhf.evaluate.general import GeneralTasks
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.recipe.schema import GeneralSection

log = logging.getLogger(__name__)


class CapabilityProbe:
    """Scores the first ``items`` documents of each general task, whatever ``section.limit`` says.

    The tasks are loaded here, once, so that a faulty one is found before training starts and a probe costs little more
    than its forward passes. ``failed`` counts the documents of the last call that could not be scored. ``seed`` draws
    the few-shot examples, ``folder`` is where relative YAML paths start from, ``data`` the folder of test sets,
    ``report`` is told when a batch of ``batch_size`` did not fit into memory (smaller ones are used from then on, to
    the same scores).
    Errors: ConfigError for an unknown task, or one whose metric is better when lower, which no mean drop can hold.
    """

    def __init__(
        self,
        tokens: Tokens,
        section: GeneralSection,
        *,
        items: int,
        seed: int,
        batch_size: int,
        folder: Path | None,
        data: Path | None = None,
        report: Callable[[str], None] = log.warning,
    ) -> None:
        self.failed = 0
        self._tokens = tokens
        self._items = items
        self._tasks = GeneralTasks(section, seed=seed, folder=folder, data=data)
        self._batch = ChunkSize("capability probe", batch_size, report)
        for name, test in self._tasks.tests.items():
            if not test.higher_is_better:
                raise ConfigError(
                    f"ppo.guard: {name} is measured by {test.metric}, which is better when lower, and "
                    "the guard bounds a drop. Leave the task out of evaluation.general.tasks, or set "
                    "ppo.guard.action=off."
                )

    def __call__(self, model: Any, *, should_stop: Callable[[], bool]) -> dict[str, list[float]]:
        """Task -> the value of its metric for each document, 0 where a document could not be scored.

        The same model gives the same scores: no gradient, no global random state, and the model's mode, adapters and
        gradients stay as they are. It runs under the caller's autocast.
        Errors: Interrupted when asked to stop; OutOfMemoryError where one document does not fit.
        """

        def on_done(done: int) -> None:
            if should_stop():
                raise Interrupted("the capability probe was stopped on request; it starts again on resume")

        on_done(0)
        with _as_it_was(model):
            measured = self._tasks.measure(model, self._tokens, limit=self._items, batch=self._batch, on_done=on_done)
        headline = {name: next(iter(found.by_filter.values())) for name, found in measured.items()}
        self.failed = sum(item.value is None for items in headline.values() for item in items)
        return {task: [item.value or 0.0 for item in items] for task, items in headline.items()}


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """The model in eval mode, and afterwards each of its modules in its own mode again."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True
