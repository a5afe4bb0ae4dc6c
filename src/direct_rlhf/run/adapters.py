"""Where metrics go beside metrics.jsonl: TensorBoard, W&B, MLflow, Trackio.

Training never waits for them and never fails because of them: each runs in a thread of its own behind a bounded queue,
and one that raises is dropped with one warning.
"""

import importlib.util
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe.schema import Recipe

log = logging.getLogger(__name__)

QUEUE_SIZE = 1000  # steps that a slow adapter may lag behind before it misses some
CLOSE_SECONDS = 10.0  # how long the end of a run waits for slow adapters, all of them together
MODULES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}


class Adapter(Protocol):
    """One logging service, used from one thread."""

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of one step."""

    def close(self) -> None:
        """Sends what is left."""


def check_extras(names: Sequence[str]) -> None:
    """ConfigError, with the command that helps, if the library of a named adapter is not installed."""
    for name in names:
        if importlib.util.find_spec(MODULES[name]) is None:
            raise ConfigError(f'logging.adapters: {name} is not installed. Run: pip install "direct-rlhf[{name}]"')


class Adapters:
    """All adapters of one attempt."""

    def __init__(self, path: Path, recipe: Recipe, *, run_id: str) -> None:
        names = recipe.logging.adapters
        check_extras(names)
        self._workers = [_Worker(name, partial(FACTORIES[name], path, recipe, run_id)) for name in names]

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        for worker in self._workers:
            worker.log(stage, step, numbers)

    def close(self) -> None:
        deadline = time.monotonic() + CLOSE_SECONDS
        for worker in self._workers:
            worker.finish()
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))


class _Worker:
    """Starts and feeds one adapter in a daemon thread, which cannot keep the process alive."""

    def __init__(self, name: str, make: Callable[[], Adapter]) -> None:
        self._name = name
        self._make = make
        self._queue: queue.Queue[tuple[str, int, Mapping[str, float]] | None] = queue.Queue(QUEUE_SIZE)
        self._missed = 0
        self._thread = threading.Thread(target=self._work, name=f"log-{name}", daemon=True)
        self._thread.start()

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if not self._thread.is_alive():  # it was dropped
            return
        try:
            self._queue.put_nowait((stage, step, values))
        except queue.Full:
            if self._missed == 0:
                log.warning("%s: cannot keep up; steps are left out there (metrics.jsonl has all of them)", self._name)
            self._missed += 1

    def finish(self) -> None:
        with suppress(queue.Full):  # then it hangs, and is left behind
            self._queue.put_nowait(None)

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("%s: does not answer and is left behind; metrics.jsonl has everything", self._name)

    def _work(self) -> None:
        try:
            adapter = self._make()
            while (item := self._queue.get()) is not None:
                adapter.log(*item)
            adapter.close()
        except (Exception, SystemExit) as error:  # whatever a logging library raises, the run is worth more
            log.warning(
                "%s: failed and is dropped; metrics.jsonl goes on (%s: %s)", self._name, type(error).__name__, error
            )


class TensorBoardAdapter:
    """Event files in ``RUN/tensorboard``."""

    def __init__(self, path: Path, recipe: Recipe, run_id: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(path / "tensorboard"))

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(f"{stage}/{key}", value, step)

    def close(self) -> None:
        self._writer.close()


class WandbAdapter:
    """Weights & Biases; a resumed run goes on in the same W&B run."""

    def __init__(self, path: Path, recipe: Recipe, run_id: str) -> None:
        import wandb

        self._stages: set[str] = set()
        self._run = wandb.init(
            project=recipe.logging.project,
            name=recipe.name,
            id=run_id,
            resume="allow",
            dir=str(path),
            config=recipe.model_dump(mode="json"),
        )

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage not in self._stages:  # every stage counts its own steps
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({f"{stage}/step": step, **{f"{stage}/{key}": value for key, value in values.items()}})

    def close(self) -> None:
        self._run.finish()


class MlflowAdapter:
    """MLflow at MLFLOW_TRACKING_URI, else in ``RUN/mlruns``; a resumed run goes on in the same MLflow run."""

    def __init__(self, path: Path, recipe: Recipe, run_id: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or (path / "mlruns").resolve().as_uri())
        project = recipe.logging.project
        experiment = self._client.get_experiment_by_name(project)
        where = experiment.experiment_id if experiment else self._client.create_experiment(project)
        found = self._client.search_runs([where], f"tags.direct_rlhf_id = '{run_id}'")
        tags = {"direct_rlhf_id": run_id}
        run = found[0] if found else self._client.create_run(where, run_name=recipe.name, tags=tags)
        self._run = run.info.run_id

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [Metric(f"{stage}/{key}", value, now, step) for key, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)


class TrackioAdapter:
    """Trackio, in its own local database; a resumed run goes on in the same Trackio run."""

    def __init__(self, path: Path, recipe: Recipe, run_id: str) -> None:
        import trackio

        self._run = trackio.init(
            project=recipe.logging.project,
            name=f"{recipe.name}-{run_id}",
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
            config=recipe.model_dump(mode="json"),
        )

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"{stage}/step": step, **{f"{stage}/{key}": value for key, value in values.items()}})

    def close(self) -> None:
        self._run.finish()


FACTORIES: dict[str, Callable[[Path, Recipe, str], Adapter]] = {
    "tensorboard": TensorBoardAdapter,
    "wandb": WandbAdapter,
    "mlflow": MlflowAdapter,
    "trackio": TrackioAdapter,
}
