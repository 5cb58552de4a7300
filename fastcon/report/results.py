"""RESULTS → tables of representations by tasks, and runs with their curves and costs."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastcon.data.splits import MULTI_LABEL_SHOTS, SHOTS
from fastcon.errors import FastconError
from fastcon.models.origin import origin
from fastcon.report.cells import Lineage, Part, Representation, Table, Taught
from fastcon.run import Waits

METHODS = ("generalist", "soft-label", "teacher", "traditional", "consolidated")
UPSTREAM = "upstream accuracy"
ABOUT = ("representation", "protocol", "method", "teachers", "network", "choice", "proxy", "balance", "labels")
"""Columns of a CSV table that are no tasks."""
PRINTED = Path(__file__).parent / "paper"
"""The paper's tables: Li et al., arXiv 2107.08039, Tables 2 to 6, accuracies in percent."""


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


def printed_tables() -> list[str]:
    """Names of the paper's tables of accuracies: table4 …"""
    return sorted(path.stem for path in PRINTED.glob("*.csv") if path.stem != "table3")


def read(paths: Sequence[str], generalist: str | None = None) -> Results:
    """Read RESULTS: .csv, .json of probe, finetune or evaluate, RUN folders, or the name of one of the paper's tables.

    generalist: the label that is the generalist.

    Raises FastconError for what is none of these, and for results that contradict each other.
    """
    results = Results({}, [], [])
    for path in paths:
        if path in printed_tables() and not Path(path).exists():
            _read_csv(PRINTED / f"{path}.csv", results)
        elif Path(path).is_dir():
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
        table.merge_repetitions()
    return results


def _choose_generalist(results: Results, label: str) -> None:
    tables = [table for table in results.tables.values() if label in table.rows]
    if not tables:
        names = sorted({name for table in results.tables.values() for name in table.rows})
        raise FastconError(f"no result has a representation {label!r}; there are {', '.join(names) or 'none'}")
    for table in tables:
        for name, row in table.rows.items():
            if row.method == "generalist" or name == label:
                if name == label:
                    row = dataclasses.replace(row, method="generalist", teachers=(), lineage=Lineage("generalist"))
                else:
                    row = dataclasses.replace(row, method="teacher")
                table.rows[name] = row


def _table(results: Results, title: str) -> Table:
    return results.tables.setdefault(title, Table(title))


def _read_csv(path: Path, results: Results) -> None:
    """representation, method and, where there are any, the other columns of ABOUT; then a task per column: NAME or NAME:SPLIT.

    teachers: TASK:SPLIT joined by "+" (a name without a split: all its classes); network: theirs, if it is not the
    generalist's; choice: "best" of those teachers. The column `upstream` is a head's accuracy on its own task.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            rows, columns = list(reader), list(reader.fieldnames or [])
    except (OSError, ValueError, csv.Error) as error:
        raise FastconError(f"{path} cannot be read as CSV ({error})") from error
    if not {"representation", "method"} <= set(columns):
        raise FastconError(f"{path}: a table of results has the columns representation, method and one per task")
    for number, row in enumerate(rows, 2):
        where = f"{path}, line {number}"
        if row["method"] not in METHODS:
            raise FastconError(f"{where}: method {row['method']!r} is none of {', '.join(METHODS)}")
        representation = _printed(row)
        table = _table(results, row.get("protocol") or path.stem)
        for name in columns:
            if name in ABOUT or not row[name]:
                continue
            if name == "upstream" and len(representation.lineage.teachers) != 1:  # type: ignore[union-attr]
                raise FastconError(f"{where}: upstream accuracy is of a row with one teacher")
            part = Part(_percent(row[name], path, number))
            if name == "upstream":
                [teacher] = representation.lineage.teachers  # type: ignore[union-attr]
                _table(results, UPSTREAM).add(representation, teacher.task, part, where, teacher.split)
            else:
                table.add(representation, name, part, where, name.partition(":")[2] or "none")
    results.sources.append((str(path), {"rows": len(rows)}))


def _printed(row: dict[str, str]) -> Representation:
    """A row of a CSV table."""
    teachers = [name.partition(":")[::2] for name in (row.get("teachers") or "").split("+") if name]
    lineage = Lineage(
        row["method"],
        frozenset(Taught(task, split or "none", row.get("network") or None) for task, split in teachers),
        row.get("proxy") or None,
        row.get("balance") or None,
        row.get("labels") == "yes",
    )
    names = tuple(dict.fromkeys(task for task, _ in teachers))
    best_of = tuple(f"{task}:{split}" for task, split in teachers) if row.get("choice") == "best" else ()
    return Representation(row["representation"], row["method"], names, lineage, best_of=best_of)


def _percent(text: str, path: Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise FastconError(f"{path}, line {line}: {text!r} is no accuracy in percent")
    return value


def _read_json(path: Path, results: Results) -> None:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FastconError(f"{path} is no JSON result of fastcon ({error})") from error
    kind = result.get("command") if isinstance(result, dict) else None
    try:
        if kind == "probe":
            protocol = _protocol(result, "linear SVM on all images", "-shot linear SVM")
            for row in result["results"]:
                _add_trials(path, result, row, protocol, results)
        elif kind == "finetune":
            protocol = _protocol(result, "fine-tuning on all images", "-shot fine-tuning")
            _add_trials(path, result, result, protocol, results)
        elif kind == "evaluate":
            _add_upstream(path, result["model"], result, results)
        else:
            raise FastconError(f"{path} is no result of probe, finetune or evaluate")
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise FastconError(f"{path} is no whole result of {kind} ({error!r})") from error
    results.sources.append((str(path), {k: v for k, v in result.items() if k != "results"}))


def _protocol(result: dict[str, Any], full: str, few: str) -> str:
    """What the table is called. A multi-label task of the usual 1,000 images stands among those of 5 shots."""
    shots = result["shots"]
    if shots is None:
        return full
    return f"{SHOTS if result.get('multi_label') and shots == MULTI_LABEL_SHOTS else shots}{few}"


def _add_trials(path: Path, result: dict[str, Any], row: dict[str, Any], protocol: str, results: Results) -> None:
    how = ("train", "test", "holdout", "split", "split_seed", "seed", "shots", "trials", "train_images", "test_images")
    draws = json.dumps([result.get(key) for key in how])
    trials = tuple(100 * float(value) for value in row["accuracies"])
    representation = _representation(row["backbone"], row)
    split, seed = _seeds(row, result)
    part = Part(100 * float(row["accuracy"]), trials, 100 * float(row["ci95"]), draws, split, seed)
    _table(results, protocol).add(representation, result["task"], part, str(path), result.get("split", "none"))


def _add_upstream(path: Path, spec: str, result: dict[str, Any], results: Results) -> None:
    """Accuracy of a head on its own task."""
    row = _representation(spec, result)
    task = result["task"] if "task" in result else row.teachers[0]
    part = Part(100 * float(result["accuracy"]), (), None, "", *_seeds(row_facts(spec, result), result))
    _table(results, UPSTREAM).add(row, task, part, str(path), result.get("split", "none"))


def row_facts(spec: str, facts: dict[str, Any]) -> dict[str, Any]:
    """What a result says of its MODEL, or what the MODEL itself says."""
    return facts if "method" in facts else origin(spec)


def _seeds(row: dict[str, Any], result: dict[str, Any]) -> tuple[int, int]:
    """Seeds of the class split and of the training behind a result: its teachers' split, else the task's."""
    lineage = row.get("lineage") or {}
    drawn = [teacher["split_seed"] for teacher in lineage.get("teachers", ()) if teacher.get("split", "none") != "none"]
    split = drawn[0] if drawn else result.get("split_seed", 0) if result.get("split", "none") != "none" else 0
    return split or 0, lineage.get("seed", 0)


def _representation(spec: str, facts: dict[str, Any]) -> Representation:
    origin_facts = row_facts(spec, facts)
    own = facts.get("architecture") if origin_facts["method"] == "teacher" else None
    lineage = _lineage(origin_facts["method"], origin_facts["lineage"], own) if origin_facts.get("lineage") else None
    if origin_facts["method"] == "generalist":
        lineage = Lineage("generalist")
    return Representation(
        origin_facts["name"],
        origin_facts["method"],
        tuple(origin_facts["teachers"]),
        lineage,
        facts.get("architecture"),
    )


def _lineage(method: str, facts: dict[str, Any], own: str | None) -> Lineage:
    """own: the architecture of a teacher that is itself the representation."""
    teachers = [
        Taught(str(t["task"]), str(t["split"]), t.get("architecture", own)) for t in facts["teachers"] if t.get("task")
    ]
    return Lineage(
        method,
        frozenset(teachers),
        facts.get("proxy"),
        facts.get("balance"),
        bool(facts.get("labels", False)),
        facts.get("recipe"),
    )


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
            result = json.loads((path / "result.json").read_text()) | config["data"] | config
            result |= {"backbone": config["init"], "train_images": None, "test_images": None}
            protocol = _protocol(result, "fine-tuning on all images", "-shot fine-tuning")
            _add_trials(path, result, result, protocol, results)
        else:
            result = json.loads((path / "result.json").read_text())
            _add_upstream(path, str(path), {"accuracy": result["accuracy"]}, results)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FastconError(f"{path} is no finished run of train, teach or finetune ({error})") from error
    results.sources.append((str(path), config))


def _seconds(path: Path) -> float | None:
    try:
        return sum(json.loads(line)["seconds"] for line in (path / Waits.FILE).read_text().splitlines())
    except (OSError, ValueError, KeyError):
        return None
