"""The curves, and what training takes of the machine, written for TensorBoard or MLflow where the recipe asks for it.

Guarantees: only files in the tracking folder are written (``tensorboard/`` with event files; ``mlflow.db`` and
``mlflow-artifacts/``): no server, and telemetry is off. A run that goes on after a kill continues the same curves:
points after the checkpoint are written again at the same steps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from slmops.errors import MissingExtraError
from slmops.train.usage import ResourceUse

_MODULES = {"tensorboard": "tensorboard", "mlflow": "mlflow"}
_NAMES = {"eval_loss": "validation_loss", "eval_accuracy": "validation_accuracy"}


def check_trackers(names: Sequence[str]) -> None:
    """Raises :class:`MissingExtraError` for the first whose library is not installed."""
    for name in names:
        if find_spec(_MODULES[name]) is None:
            raise MissingExtraError(f"train.trackers: {name}", name)


def open_trackers(
    names: Sequence[str], folder: Path, run: str, settings: Mapping[str, Any], work: Path
) -> list[TrainerCallback]:
    """One callback a name. ``settings`` go along as the run's parameters; ``work`` remembers the run over a kill."""
    made: list[TrainerCallback] = []
    for name in names:
        match name:
            case "tensorboard":
                made.append(_TensorBoard(folder / "tensorboard" / run))
            case "mlflow":
                made.append(_MLflow(folder, run, settings, work / "mlflow-run.json"))
    return made


class _TensorBoard(TrainerCallback):  # type: ignore[misc]
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.usage = ResourceUse()
        self.writer: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=state.global_step + 1 if state.global_step else None)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        for name, value in _figures(logs, self.usage):
            self.writer.add_scalar(name, value, state.global_step)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.writer.close()


class _MLflow(TrainerCallback):  # type: ignore[misc]
    def __init__(self, folder: Path, run: str, settings: Mapping[str, Any], remembered: Path) -> None:
        self.folder, self.run, self.settings, self.remembered = folder, run, settings, remembered
        self.usage = ResourceUse()
        self.client: Any = None
        self.run_id = ""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        os.environ.setdefault("DO_NOT_TRACK", "true")
        from mlflow import MlflowClient

        self.folder.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(tracking_uri=f"sqlite:///{self.folder.resolve() / 'mlflow.db'}")
        if self.remembered.exists():
            self.run_id = json.loads(self.remembered.read_text("utf-8"))["run_id"]
            return
        found = self.client.get_experiment_by_name(self.run)
        experiment = (
            found.experiment_id
            if found is not None
            else self.client.create_experiment(self.run, (self.folder / "mlflow-artifacts").resolve().as_uri())
        )
        self.run_id = self.client.create_run(experiment, run_name=self.run).info.run_id
        for name, value in self.settings.items():
            self.client.log_param(self.run_id, name, value)
        self.remembered.write_text(json.dumps({"run_id": self.run_id}), "utf-8")

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        for name, value in _figures(logs, self.usage):
            self.client.log_metric(self.run_id, name, value, step=state.global_step)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.client.set_terminated(self.run_id)


def _figures(logs: Mapping[str, Any] | None, usage: ResourceUse) -> list[tuple[str, float]]:
    """What was logged; beside a loss in training also the use of the machine (``machine/memory_mb`` …)."""
    used = [(f"machine/{name}", value) for name, value in usage.figures().items()] if "loss" in (logs or {}) else []
    return used + [
        (_NAMES.get(name, name), float(value))
        for name, value in (logs or {}).items()
        if isinstance(value, int | float) and name not in {"epoch", "total_flos"} and not name.startswith("train_")
    ]
