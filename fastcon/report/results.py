"""RESULTS → tables of representations by tasks, and runs with their curves and costs."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastcon.data.splits import MULTI_LABEL_SHOTS, SHOTS
from fastcon.errors import FastconError
from fastcon.models.origin import origin
from fastcon.run import Waits

METHODS = ("generalist", "soft-label", "teacher", "traditional", "consolidated")
UPSTREAM = "upstream accuracy"
_PAPER = re.compile(r"(?P<teachers>.+?)(?P<rest> \(t-split\)| category task| 10%).*")
_SCENARIO = re.compile(r"[^+]+? (\(t-split\)|category task) (repr\. consolid\.|trad\. distill)")


@dataclasses.dataclass(frozen=True)
class Representation:
    """A row: what it is called, how it came about, and the task-specific teachers it learned from."""

    label: str
    method: str
    teachers: tuple[str, ...] = ()
    scenario: str | None = None
    """The one teacher, where this row counts in the tally."""

    def related(self, task: str, aliases: dict[str, set[str]]) -> bool:
        """Whether a task is one of its teachers' own, or counted as related to it."""
        return any(task == teacher or task in aliases.get(teacher, ()) for teacher in self.teachers)


@dataclasses.dataclass(frozen=True)
class Cell:
    """An accuracy in percent: the mean over trials, the trials where they are known, half its 95 % interval."""

    value: float
    trials: tuple[float, ...] = ()
    ci95: float | None = None
    draws: str = ""
    """What the trials were drawn from and how: those of equal draws are paired."""


@dataclasses.dataclass
class Table:
    """Accuracies of one protocol: rows in order, tasks in order, what is known of them."""

    title: str
    rows: dict[str, Representation] = dataclasses.field(default_factory=dict)
    tasks: list[str] = dataclasses.field(default_factory=list)
    cells: dict[tuple[str, str], Cell] = dataclasses.field(default_factory=dict)

    def add(self, row: Representation, task: str, cell: Cell, source: str) -> None:
        """Put a cell; raises FastconError where it is taken by another value, or by a row of another kind."""
        known = self.rows.setdefault(row.label, row)
        if known != row:
            raise FastconError(
                f"{source}: {row.label!r} is {row.method}, another result says {known.method}: name them apart"
            )
        if self.cells.setdefault((row.label, task), cell) != cell:
            raise FastconError(
                f"{source}: {row.label!r} on {task!r} has another accuracy in another result of this protocol"
            )
        if task not in self.tasks:
            self.tasks.append(task)

    @property
    def generalist(self) -> str | None:
        """The row that others are compared with."""
        return next((label for label, row in self.rows.items() if row.method == "generalist"), None)

    def difference(self, label: str, task: str, base: str | None = None) -> tuple[float, float | None] | None:
        """Points above another row (default: the generalist), and half the 95 % interval where draws are paired."""
        base = base or self.generalist
        ours, theirs = self.cells.get((label, task)), self.cells.get((base or "", task))
        if ours is None or theirs is None or label == base:
            return None
        if len(ours.trials) < 2 or len(ours.trials) != len(theirs.trials) or ours.draws != theirs.draws:
            return ours.value - theirs.value, None
        paired = np.subtract(ours.trials, theirs.trials)
        return float(paired.mean()), float(1.96 * paired.std(ddof=1) / math.sqrt(len(paired)))


@dataclasses.dataclass(frozen=True)
class Trained:
    """A `train` run: its metrics, its configuration and the seconds it took (None where no log says)."""

    label: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    seconds: float | None


@dataclasses.dataclass
class Results:
    """All that was given."""

    tables: dict[str, Table]
    runs: list[Trained]
    sources: list[tuple[str, Any]]
    """Each RESULT and its configuration."""


def read(paths: Sequence[str], generalist: str | None = None) -> Results:
    """Read RESULTS: .csv, .json of probe, finetune or evaluate, RUN folders. generalist: the label that is the generalist.

    Raises FastconError for what is none of these, and for results that contradict each other.
    """
    results = Results({}, [], [])
    for path in paths:
        if Path(path).is_dir():
            _read_run(Path(path), results)
        elif path.endswith(".csv"):
            _read_csv(Path(path), results)
        else:
            _read_json(Path(path), results)
    if generalist is not None:
        _choose_generalist(results, generalist)
    for table in results.tables.values():
        order = sorted(table.rows.values(), key=lambda row: row.method != "generalist")
        table.rows = {row.label: row for row in order}
    return results


def _choose_generalist(results: Results, label: str) -> None:
    found = [table for table in results.tables.values() if label in table.rows]
    if not found:
        names = sorted({name for table in results.tables.values() for name in table.rows})
        raise FastconError(f"no result has a representation {label!r}; there are {', '.join(names) or 'none'}")
    for table in found:
        for name, row in table.rows.items():
            if row.method == "generalist" or name == label:
                method = "generalist" if name == label else "teacher"
                table.rows[name] = dataclasses.replace(
                    row, method=method, teachers=() if name == label else row.teachers
                )


def _table(results: Results, title: str) -> Table:
    return results.tables.setdefault(title, Table(title))


def _read_csv(path: Path, results: Results) -> None:
    """representation, method[, teacher], then a task a column; or teacher, representation, …, task1, acc1, …."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            rows, columns = list(reader), list(reader.fieldnames or [])
    except (OSError, ValueError, csv.Error) as error:
        raise FastconError(f"{path} cannot be read as CSV ({error})") from error
    if not {"representation", "method"} <= set(columns):
        raise FastconError(f"{path}: a table of results has the columns representation, method and one a task")
    if "task1" in columns and ("teacher" not in columns or "acc1" not in columns):
        raise FastconError(f"{path}: a table with task1 has the columns teacher and acc1 too")
    table = _table(results, path.stem)
    for number, row in enumerate(rows, 2):
        if row["method"] not in METHODS:
            raise FastconError(f"{path}, line {number}: method {row['method']!r} is none of {', '.join(METHODS)}")
        label = f"{row['teacher']}: {row['representation']}" if "task1" in columns else row["representation"]
        own = (row["teacher"],) if row.get("teacher") else _teachers(row["representation"], row["method"])
        scenario = own[0] if len(own) == 1 and ("teacher" in columns or _SCENARIO.fullmatch(label)) else None
        base = row["method"] in ("generalist", "soft-label")
        representation = Representation(label, row["method"], () if base else own, None if base else scenario)
        cells = (
            [(row[f"task{k}"], row[f"acc{k}"]) for k in range(1, 100) if f"task{k}" in columns and f"acc{k}" in columns]
            if "task1" in columns
            else [(name, row[name]) for name in columns if name not in ("representation", "method", "teacher")]
        )
        for task, value in cells:
            if value:
                table.add(representation, task, Cell(_percent(value, path, number)), f"{path}, line {number}")
    results.sources.append((str(path), {"rows": len(rows)}))


def _percent(text: str, path: Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise FastconError(f"{path}, line {line}: {text!r} is no accuracy in percent")
    return value


def _teachers(label: str, method: str) -> tuple[str, ...]:
    """The teachers that a row of the paper names before "(t-split)", "category task" or "10%"."""
    found = _PAPER.fullmatch(label)
    return tuple(found["teachers"].split(" + ")) if found else ()


def _read_json(path: Path, results: Results) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FastconError(f"{path} is no JSON result of fastcon ({error})") from error
    kind = found.get("command") if isinstance(found, dict) else None
    try:
        if kind == "probe":
            protocol = _protocol(found, "linear SVM on all images", "-shot linear SVM")
            for row in found["results"]:
                _add_trials(path, found, row, protocol, results)
        elif kind == "finetune":
            protocol = _protocol(found, "fine-tuning on all images", "-shot fine-tuning")
            _add_trials(path, found, found, protocol, results)
        elif kind == "evaluate":
            row = _representation(found["model"], found)
            _table(results, UPSTREAM).add(row, found["task"], Cell(100 * float(found["accuracy"])), str(path))
        else:
            raise FastconError(f"{path} is no result of probe, finetune or evaluate")
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise FastconError(f"{path} is no whole result of {kind} ({error!r})") from error
    results.sources.append((str(path), {k: v for k, v in found.items() if k != "results"}))


def _protocol(found: dict[str, Any], full: str, few: str) -> str:
    """What the table is called. A multi-label task of the usual 1,000 images stands among those of 5 shots."""
    shots = found["shots"]
    if shots is None:
        return full
    return f"{SHOTS if found.get('multi_label') and shots == MULTI_LABEL_SHOTS else shots}{few}"


def _add_trials(path: Path, found: dict[str, Any], row: dict[str, Any], protocol: str, results: Results) -> None:
    how = ("train", "test", "holdout", "split", "split_seed", "seed", "shots", "trials", "train_images", "test_images")
    draws = json.dumps([found.get(key) for key in how])
    trials = tuple(100 * float(value) for value in row["accuracies"])
    cell = Cell(100 * float(row["accuracy"]), trials, 100 * float(row["ci95"]), draws)
    representation = _representation(row["backbone"], row)
    _table(results, protocol).add(representation, found["task"], cell, str(path))


def _representation(spec: str, facts: dict[str, Any]) -> Representation:
    known = facts if "method" in facts else origin(spec)
    teachers = tuple(known["teachers"])
    return Representation(known["name"], known["method"], teachers, teachers[0] if len(teachers) == 1 else None)


def _read_run(path: Path, results: Results) -> None:
    try:
        config = json.loads((path / "config.json").read_text())
        if config["command"] == "train":
            lines = (path / "metrics.jsonl").read_text().splitlines()
            metrics = [json.loads(line) for line in lines]
            if not metrics or any("step" not in row or "heads" not in row for row in metrics):
                raise ValueError("it has no metrics yet")
            results.runs.append(Trained(path.name, config, metrics, _seconds(path)))
        elif config["command"] == "finetune":
            found = json.loads((path / "result.json").read_text()) | config["data"] | config
            found |= {"backbone": config["init"], "train_images": None, "test_images": None}
            protocol = _protocol(found, "fine-tuning on all images", "-shot fine-tuning")
            _add_trials(path, found, found, protocol, results)
        else:
            found = json.loads((path / "result.json").read_text())
            row, task = _representation(str(path), {}), origin(str(path))["teachers"][0]
            _table(results, UPSTREAM).add(row, task, Cell(100 * float(found["accuracy"])), str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FastconError(f"{path} is no finished run of train, teach or finetune ({error})") from error
    results.sources.append((str(path), config))


def _seconds(path: Path) -> float | None:
    try:
        return sum(json.loads(line)["seconds"] for line in (path / Waits.FILE).read_text().splitlines())
    except (OSError, ValueError, KeyError):
        return None
