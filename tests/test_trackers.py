"""Trackers: each holds what metrics.jsonl holds, also over an interruption; none needs a network."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys

import pytest
from click.testing import CliRunner
from conftest import MACHINE

import fastcon
from fastcon import trackers
from fastcon.cli.main import main
from fastcon.distill import options
from fastcon.distill.options import TrainOptions, Upkeep
from fastcon.distill.train import train
from fastcon.errors import FastconError, Interrupted
from fastcon.run import Run

QUICK = TrainOptions(epochs=2, batch_size=32)


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: trackers.numbers(row) for row in rows}


def interrupted(store_path, out, name):
    """A run that is stopped in its second epoch, and goes on."""
    upkeep = Upkeep(log_every=2, track=(name,))

    def stop(step, total):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(str(store_path), str(out), QUICK, MACHINE, upkeep, progress=stop)
    train(str(store_path), str(out), QUICK, MACHINE, upkeep)
    return rows_of(out)


def test_tensorboard(store_path, tmp_path):
    pytest.importorskip("tensorboard")
    expected = interrupted(store_path, tmp_path / "run", "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    seen.Reload()
    found = {key: {event.step: event.value for event in seen.Scalars(key)} for key in seen.Tags()["scalars"]}
    for step, values in expected.items():
        assert {key: found[key][step] for key in values} == pytest.approx(values, rel=1e-5)


def test_what_a_killed_run_wrote_after_its_checkpoint_is_dropped(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (tmp_path / "run").mkdir()
    run = Run(str(tmp_path / "run"), {"command": "train"}, 1)
    for begin, steps in ((0, (2, 4, 6)), (4, (5,))):
        board = trackers.tracker("tensorboard", run, begin)
        for step in steps:
            board.write({"step": step, "loss": 1.0, "heads": {}})
        board.close(True)
    seen = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    seen.Reload()
    assert [event.step for event in seen.Scalars("loss")] == [2, 5]


def test_mlflow(store_path, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    expected = interrupted(store_path, tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("fastcon")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["epochs"] == "2"
    history = client.get_metric_history(run.info.run_id, "letters/kl")
    assert [metric.step for metric in history] == sorted(step for step in expected if step)  # none twice
    for step, values in expected.items():
        for key, value in values.items():
            (same,) = {m.value for m in client.get_metric_history(run.info.run_id, key) if m.step == step}
            assert same == pytest.approx(value)


def test_mlflow_after_a_kill(tmp_path):
    """What was sent before comes once; until the end the run counts as killed."""
    mlflow = pytest.importorskip("mlflow")
    (tmp_path / "run").mkdir()
    run = Run(str(tmp_path / "run"), {"command": "train"}, 1)
    for steps, ended in (((2, 4, 6), False), ((6, 8), True)):
        board = trackers.tracker("mlflow", run, steps[0])
        for step in steps:
            board.write({"step": step, "loss": float(step), "heads": {"a": {"kl": 1.0}}})
        board.close(ended)
        known = (tmp_path / "run" / "mlflow.id").read_text()
        assert mlflow.MlflowClient().get_run(known).info.status == ("FINISHED" if ended else "KILLED")
    history = mlflow.MlflowClient().get_metric_history(known, "a/kl")
    assert [metric.step for metric in history] == [2, 4, 6, 8]


def test_a_tracker_that_fails_does_not_end_the_run(store_path, tmp_path, monkeypatch):
    asked = []

    class Failing(trackers.Tracker):
        def __init__(self, *_):
            self.rows = 0

        def write(self, row):
            self.rows += 1
            asked.append(row["step"])
            if self.rows >= 2:
                raise ConnectionError("nobody listens")

        def close(self, ended):
            raise AssertionError("it was given up")

    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Failing)
    with pytest.warns(
        UserWarning, match="mlflow gets no more metrics .nobody listens.: metrics.jsonl has them all"
    ) as seen:
        train(str(store_path), str(tmp_path / "run"), QUICK, MACHINE, Upkeep(log_every=2, track=("mlflow",)))
    assert len(seen) == 1
    assert asked == [0, 2]  # and no more
    assert len(rows_of(tmp_path / "run")) == 5


def records(data):
    """The records of a LevelDB log after W&B's 7 bytes: blocks of 32 KiB, pieces of (CRC, length, kind, bytes)."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # nothing begins at the very end of a block
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole one, or the last piece
            yield whole
            whole = b""


def test_wandb(store_path, tmp_path):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    expected = interrupted(store_path, tmp_path / "run", "wandb")
    seen, names = {}, set()
    for file in sorted((tmp_path / "run" / "wandb").glob("*/*.wandb")):
        for record in records(file.read_bytes()):
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            if message.HasField("run"):
                names.add((message.run.project, message.run.display_name, message.run.run_id))
            if message.HasField("history"):
                row = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in message.history.item
                }
                step = row.pop("_step", None)
                seen[message.history.step.num if step is None else step] = row
    ((project, name, known),) = names
    assert (project, name, known) == ("fastcon", "run", (tmp_path / "run" / "wandb.id").read_text())
    for step, values in expected.items():
        assert {key: seen[step][key] for key in values} == pytest.approx(values)


def test_several_by_the_command_line(store_path, tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("mlflow")
    out = tmp_path / "run"
    told = CliRunner().invoke(
        main,
        [
            "train",
            "--store",
            str(store_path),
            "--out",
            str(out),
            "--epochs",
            "1",
            "--device",
            "cpu",
            "--track",
            "tensorboard,mlflow",
        ],
    )
    assert told.exit_code == 0, told.output
    assert (out / "tensorboard").is_dir()
    assert (out / "mlflow.id").exists()


def test_what_it_cannot_be(store_path, tmp_path, monkeypatch):
    assert tuple(trackers.TRACKERS) == options.TRACKERS
    with pytest.raises(FastconError, match="`track` 'comet' is none of tensorboard, wandb, mlflow"):
        Upkeep(track="comet")
    assert Upkeep(track="wandb,wandb,mlflow").track == ("wandb", "mlflow")
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with pytest.raises(FastconError, match="`track` mlflow does not start"):
        trackers.tracker("mlflow", Run(str(tmp_path / "run"), {"command": "train"}, 1), 0)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(FastconError, match=r"fastcon\[mlflow\]"):
        trackers.tracker("mlflow", Run(str(tmp_path / "run"), {"command": "train"}, 1), 0)


def test_a_step_between_rows_is_not_shown(store_path, tmp_path):
    """Python callers, too; without trackers nothing is imported or written."""
    out = tmp_path / "run"
    fastcon.train(str(store_path), str(out), epochs=1, device="cpu")
    assert not {"tensorboard", "wandb", "mlflow.id"} & {path.name for path in out.iterdir()}
    assert dataclasses.asdict(Upkeep())["track"] == ()
