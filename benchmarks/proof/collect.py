"""Probes of a proof study → one record in results/ and its tables. Run: python collect.py OUT NAME COMMIT.

OUT is the folder of `fastcon study`, COMMIT what it ran. The record keeps every accuracy of every draw, hardware and versions.
Without OUT, `python collect.py` prints the tables of all records.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OVERLAYS = {
    "resnet18": (),
    "lite0": ("lite0",),
    "lite0-balance": ("lite0", "balance"),
    "lite0-traditional": ("lite0", "traditional"),
    "lite0-again": ("lite0", "three", "again", "lite0-again"),
    "views": ("views",),
    "three": ("three",),
    "five": ("five",),
    "even": ("three", "even"),
    "again": ("three", "again"),
    "codecs": ("codecs",),
    "eight": ("views", "eight"),
    "across": ("lite0", "five", "across"),
}
"""Record → what is laid over headline.toml."""
METHODS = ("teacher", "traditional", "consolidated")


def collect(out: Path, name: str, commit: str) -> dict[str, Any]:
    """The record of a study: its probes' accuracies in percent, draw by draw."""
    from fastcon.bench import record

    rows = []
    for file in sorted(out.glob("jobs/probe-*.json")):
        probe = json.loads(file.read_text())
        for row in probe["results"]:
            rows.append(
                {
                    "task": probe["task"] + (f"-split{probe['split_seed']}" if probe["split_seed"] else ""),
                    "backbone": row["name"],
                    "method": row["method"],
                    "teachers": row["teachers"],
                    "accuracies": [round(100 * value, 3) for value in row["accuracies"]],
                }
            )
    overlays = "".join(f" --overlay benchmarks/proof/{overlay}.toml" for overlay in OVERLAYS[name])
    command = f"fastcon study benchmarks/proof/headline.toml{overlays} --out {name}"
    made = record(rows) | {"command": command, "commit": commit}
    seconds = [json.loads(file.read_text()).get("seconds", 0) for file in out.glob("jobs/*.json")]
    return {key: made[key] for key in ("command", "commit", "hardware", "versions")} | {
        "seconds_of_commands": round(sum(seconds)),
        "rows": rows,
        "fine_tuned": _others(
            out, "finetune", ("shots", "epochs", "lr_grid", "train_images", "accuracies", "accuracy")
        ),
        "heads": _others(out, "evaluate", ("head", "accuracy", "test_images")),
    }


def _others(out: Path, command: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """The results of a study's other evaluations, accuracies as fractions."""
    found = [json.loads(file.read_text()) for file in sorted(out.glob(f"jobs/{command}-*.json"))]
    return [
        {"task": row["task"], "backbone": row["name"]} | {key: row[key] for key in keys if key in row} for row in found
    ]


def tables(record: dict[str, Any]) -> str:
    """Every teacher's task and the others: accuracies, and differences to the generalist, paired over the draws."""
    rows = record["rows"]
    general = {row["task"]: row for row in rows if row["method"] == "generalist"}
    cells: dict[str, dict[str, list[list[float]]]] = {}
    lines = ["| task | representation | accuracy | against the generalist |", "|---|---|---|---|"]
    for task in sorted(general):
        base = general[task]["accuracies"]
        lines.append(f"| {task} | generalist | {_mean(base)} | |")
        for row in sorted((r for r in rows if r["task"] == task), key=lambda r: (r["teachers"], r["backbone"])):
            if row["method"] not in METHODS:
                continue
            related = _data(task) in map(_data, row["teachers"])
            difference = [a - b for a, b in zip(row["accuracies"], base, strict=True)]
            kind = row["method"] + (f", {len(row['teachers'])} teachers" if len(row["teachers"]) > 1 else "")
            kinds = cells.setdefault(kind, {"related": [], "unrelated": []})
            kinds["related" if related else "unrelated"].append(difference)
            mark = "**" if related else ""
            lines.append(
                f"| {task} | {mark}{row['backbone']}{mark} | {_mean(row['accuracies'])} | {_mean(difference, '+')} |"
            )
    head = ["", "| mean difference to the generalist, points | related | unrelated |", "|---|---|---|"]
    for method in sorted(cells, key=lambda kind: (METHODS.index(kind.partition(",")[0]), kind)):
        both = [_over(cells[method][kind]) for kind in ("related", "unrelated")]
        head.append(f"| {method} | {both[0]} | {both[1]} |")
    return "\n".join([*head[1:], "", *lines])


def _data(task: str) -> str:
    """The data set of a task or a teacher, without its split and part: "aid" of "aid:d-split1", "aid-2of5"."""
    return re.split(r":|-split|-\d+of\d+", task)[0]


def _over(cells: list[list[float]]) -> str:
    """Mean over teachers, splits and seeds; the interval is over these, each the mean of its draws."""
    means = [statistics.fmean(cell) for cell in cells]
    if not means:
        return "–"
    spread = 1.96 * statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0
    return f"{statistics.fmean(means):+.2f} ± {spread:.2f} ({len(means)} cells, {min(means):+.1f} to {max(means):+.1f})"


def _mean(values: list[float], sign: str = "") -> str:
    half = 1.96 * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):{sign}.2f} ± {half:.2f}"


if __name__ == "__main__":
    if len(sys.argv) > 3:
        result = HERE / "results" / f"{sys.argv[2]}.json"
        result.parent.mkdir(exist_ok=True)
        result.write_text(json.dumps(collect(Path(sys.argv[1]), *sys.argv[2:4]), indent=1) + "\n")
        print(tables(json.loads(result.read_text())))
    else:
        for result in sorted((HERE / "results").glob("*.json")):
            print(f"## {result.stem}\n\n{tables(json.loads(result.read_text()))}\n")
