"""Rows of metrics for who watches a run elsewhere: TensorBoard, Weights & Biases, MLflow.

They get what metrics.jsonl gets, row by row, and no more; a run that resumes goes on under the same name there. Where they
write and under which account is their own configuration: WANDB_MODE, MLFLOW_TRACKING_URI and the like.
"""

from __future__ import annotations

import abc
import json
import os
import secrets
import time
from collections.abc import Callable
from typing import Any

from fastcon.errors import FastconError, one_line, optional_import
from fastcon.files import write_atomically
from fastcon.run import Run

PROJECT = "fastcon"


class Tracker(abc.ABC):
    """Where rows of metrics go besides metrics.jsonl."""

    @abc.abstractmethod
    def write(self, row: dict[str, Any]) -> None:
        """One row, at its step."""

    @abc.abstractmethod
    def close(self, ended: bool) -> None:
        """Hand over what is left; ended: whether the run came to its end."""


def tracker(name: str, run: Run, step: int) -> Tracker:
    """The tracker of a run that goes on from a step. Raises FastconError where it is not installed or does not start."""
    try:
        return TRACKERS[name](run, step)
    except FastconError:
        raise
    except Exception as error:
        raise FastconError(f"`track` {name} does not start ({one_line(error)})") from error


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """A row's values by name, those of heads as HEAD/VALUE."""
    flat = {key: value for key, value in row.items() if key not in ("step", "heads")}
    return flat | {f"{head}/{key}": value for head, values in row["heads"].items() for key, value in values.items()}


class _TensorBoard(Tracker):
    """Events in RUN/tensorboard; those after the step are dropped."""

    def __init__(self, run: Run, step: int) -> None:
        optional_import("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=step)

    def write(self, row: dict[str, Any]) -> None:
        for key, value in numbers(row).items():
            self._writer.add_scalar(key, value, row["step"])

    def close(self, ended: bool) -> None:
        self._writer.close()


class _WandB(Tracker):
    """A run of the project "fastcon", named after the folder; rows that were sent before are left out."""

    def __init__(self, run: Run, step: int) -> None:
        wandb = optional_import("wandb", "wandb")
        known = _kept(run, "wandb.id", lambda: secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=run.path.name, id=known, resume="allow",
            dir=str(run.path), config=run.config, settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip

    def write(self, row: dict[str, Any]) -> None:
        if row["step"] >= self._run.step:
            self._run.log(numbers(row), step=row["step"])

    def close(self, ended: bool) -> None:
        self._run.finish(0 if ended else 1)


class _MLflow(Tracker):
    """A run of the experiment "fastcon", or of MLFLOW_EXPERIMENT_NAME; rows that were sent before are left out."""

    def __init__(self, run: Run, step: int) -> None:
        mlflow = optional_import("mlflow", "mlflow")
        self._client = mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)

        def begin() -> str:
            found = self._client.get_experiment_by_name(name)
            where = found.experiment_id if found else self._client.create_experiment(name)
            begun = self._client.create_run(where, run_name=run.path.name).info.run_id
            for key, value in run.config.items():
                self._client.log_param(begun, key, json.dumps(value)[:6000])
            return begun

        self._id = _kept(run, "mlflow.id", begin)
        self._metric = mlflow.entities.Metric
        self._last = max((metric.step for metric in self._client.get_metric_history(self._id, "loss")), default=-1)

    def write(self, row: dict[str, Any]) -> None:
        if row["step"] > self._last:
            now, step = int(1000 * time.time()), row["step"]
            self._client.log_batch(
                self._id, [self._metric(key, value, now, step) for key, value in numbers(row).items()]
            )

    def close(self, ended: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if ended else "KILLED")


TRACKERS: dict[str, Callable[[Run, int], Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB, "mlflow": _MLflow}


def _kept(run: Run, file: str, make: Callable[[], str]) -> str:
    """What a run is called there: made once, then kept in its folder."""
    path = run.path / file
    if not path.exists():
        write_atomically(path, make().encode())
    return path.read_text()
