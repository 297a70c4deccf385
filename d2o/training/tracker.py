"""The log of a run at a tracker (wandb, MLflow), beside metrics.jsonl and TensorBoard. `tracker.json` in the run folder
names the run there, so that a resumed run goes on with it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.interop.safetensors_io import atomic_write
from d2o.training.logging import scalars_in

if TYPE_CHECKING:
    from d2o.recipes.schema import Recipe
    from d2o.training.tracker_section import TrackerSection

FILE = "tracker.json"
_NEEDED = {"wandb": "init", "mlflow": "MlflowClient"}
"""What a package must have: Python takes any folder of its name for a package, and wandb leaves one where it ran."""


class Log(Protocol):
    """What a run writes its numbers to, see `logging.RunLog`."""

    def write(self, iteration: int, images: int, **values: object) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class Service(Protocol):
    """A run at a tracker: `id` is its name there; steps are images."""

    id: str

    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def check_tracker(recipe: Recipe) -> None:
    """UserError where the recipe's tracker is not installed."""
    if recipe.tracker is not None:
        _package(recipe.tracker.name)


def tracked(log: Log, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> Log:
    """The log, which also goes to the recipe's tracker if it names one. UserError: not installed, or it cannot be
    reached."""
    if recipe.tracker is None:
        return log
    asked, path = recipe.tracker, folder / FILE
    name = asked.name
    known = _recorded(path).get(name)
    try:
        service = SERVICES[name](_package(name), recipe, asked, folder, known)
    except UserError:
        raise
    except Exception as error:  # whatever these packages raise: no account, no server, a run that was deleted there
        ways = {
            "wandb": "`wandb login`, or WANDB_MODE=offline",
            "mlflow": "tracker.uri names the server, or sqlite:///FILE.db",
        }[name]
        what = f"tracker {name}: {' '.join(str(error).split())[:300] or type(error).__name__}"
        raise UserError(what, f"{ways}; --set tracker=null trains without it") from error
    if service.id != known:
        atomic_write(path, json.dumps({**_recorded(path), name: service.id}) + "\n")
    return _Tracked(log, service, name, say)


class _Tracked:
    """Writes to both. A tracker that fails in the middle of a run is given up, and said; the run goes on."""

    def __init__(self, log: Log, service: Service, name: str, say: Callable[[str], None]):
        self._log, self._service, self._name, self._say = log, service, name, say
        self._alive = True

    def sync(self) -> None:
        self._log.sync()

    def write(self, iteration: int, images: int, **values: object) -> None:
        self._log.write(iteration, images, **values)
        numbers = {name: float(number) for name, number in scalars_in(values)}
        self._attempt(lambda: self._service.log(numbers, images))

    def close(self) -> None:
        self._log.close()
        self._attempt(self._service.close)

    def _attempt(self, call: Callable[[], None]) -> None:
        if not self._alive:
            return
        try:
            call()
        except Exception as error:
            self._alive = False
            self._say(
                f"tracker {self._name} is given up ({' '.join(str(error).split())[:200]}); metrics.jsonl holds"
                " everything"
            )


class _Wandb:
    def __init__(self, wandb: ModuleType, recipe: Recipe, asked: TrackerSection, folder: Path, known: str | None):
        settings = wandb.Settings(base_url=asked.uri) if asked.uri else None
        self.run = wandb.init(
            project=asked.project,
            name=asked.run or recipe.name,
            id=known,
            resume="allow",
            dir=str(folder),
            config=recipe.resolved(),
            settings=settings,
        )
        self.id: str = self.run.id

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)  # wandb itself leaves out steps that it has

    def close(self) -> None:
        self.run.finish()


class _Mlflow:
    def __init__(self, mlflow: ModuleType, recipe: Recipe, asked: TrackerSection, folder: Path, known: str | None):
        self.metric, self.client = mlflow.entities.Metric, mlflow.MlflowClient(tracking_uri=asked.uri)
        self.sent: dict[str, int] = {}
        if known is None:
            found = self.client.get_experiment_by_name(asked.project)
            experiment = found.experiment_id if found is not None else self.client.create_experiment(asked.project)
            run = self.client.create_run(experiment, run_name=asked.run or recipe.name)
            for key, value in _flat(recipe.resolved()).items():
                self.client.log_param(run.info.run_id, key, value)
        else:
            run = self.client.get_run(known)
            self.client.update_run(known, status="RUNNING")
            for key in run.data.metrics:  # a killed run may have logged more than its last checkpoint knows
                self.sent[key] = max(point.step for point in self.client.get_metric_history(known, key))
        self.id: str = run.info.run_id

    def log(self, values: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        new = [self.metric(key, value, now, step) for key, value in values.items() if step > self.sent.get(key, -1)]
        if new:
            self.client.log_batch(self.id, metrics=new)

    def close(self) -> None:
        self.client.set_terminated(self.id)


SERVICES: dict[str, Callable[[ModuleType, Recipe, TrackerSection, Path, str | None], Service]] = {
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}


def _package(name: str) -> ModuleType:
    try:
        module = import_module(name)
    except ImportError as error:
        raise UserError(
            f"tracker {name} needs the package {name!r}, which is not there ({error})", f"pip install 'd2o[{name}]'"
        ) from error
    if not hasattr(module, _NEEDED[name]):
        raise UserError(
            f"tracker {name} needs the package {name!r}; there is only a folder of that name",
            f"pip install 'd2o[{name}]'",
        )
    return module


def _recorded(path: Path) -> dict[str, str]:
    """Tracker -> id of the run there."""
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot read {path}: {error}", "remove it: the log goes on as a new run of the tracker"
        ) from error
    if not isinstance(record, dict) or not all(isinstance(value, str) for value in record.values()):
        raise UserError(
            f"{path} is not a record of tracked runs", "remove it: the log goes on as a new run of the tracker"
        )
    return record


def _flat(settings: JsonObject, before: str = "") -> dict[str, str]:
    """Nested settings as `a.b`: text, of at most the length that MLflow keeps."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        flat |= (
            _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": json.dumps(value)[:500]}
        )
    return flat
