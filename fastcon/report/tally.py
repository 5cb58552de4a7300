"""The tally of the paper's Table 3: over scenarios of one teacher, how often a method is better, about equal, worse."""

from __future__ import annotations

import collections
import csv
import dataclasses
import itertools

from fastcon.report.cells import Representation, Table
from fastcon.report.results import PRINTED

PAIRS = (("consolidated", "generalist"), ("consolidated", "traditional"), ("traditional", "generalist"))
Counts = tuple[int, int, int]
"""Scenarios that are better, about equal and worse."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One comparison: (scenario, mean difference in points) of every scenario, related or unrelated tasks."""

    ours: str
    theirs: str
    related: bool
    differences: list[tuple[str, float]]

    def counts(self, threshold: float) -> Counts:
        """How many scenarios are better, within `threshold` points, and worse."""
        better = sum(value > threshold for _, value in self.differences)
        worse = sum(value < -threshold for _, value in self.differences)
        return better, len(self.differences) - better - worse, worse

    def thresholds(self, counts: Counts) -> tuple[float, float] | None:
        """From which threshold (included) to which (not included) these are the counts; None: at no threshold."""
        ends = [0.0, *sorted({abs(value) for _, value in self.differences}), float("inf")]
        holding = [(a, b) for a, b in itertools.pairwise(ends) if a < b and self.counts(a) == counts]
        return (holding[0][0], holding[-1][1]) if holding else None


def printed() -> dict[tuple[str, str, bool], Counts]:
    """(ours, theirs, related) → the counts of the paper's Table 3."""
    with open(PRINTED / "table3.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        (row["ours"], row["theirs"], row["tasks"] == "related"): (
            int(row["better"]),
            int(row["equal"]),
            int(row["worse"]),
        )
        for row in rows
    }


def tally(table: Table, aliases: dict[str, set[str]]) -> list[Line]:
    """Mean differences over a scenario's related and over its unrelated tasks, for each pair of methods."""
    chosen = scenarios(table)
    lines = []
    for ours, theirs in PAIRS:
        for related in (True, False):
            differences = []
            for scenario, labels in chosen.items():
                base = table.generalist if theirs == "generalist" else labels.get(theirs)
                label = labels.get(ours)
                if label is None or base is None:
                    continue
                tasks = [task for task in table.tasks if table.rows[label].related(task, aliases) == related]
                differences_of_tasks = [table.difference(label, task, base) for task in tasks]
                values = [value[0] for value in differences_of_tasks if value is not None]
                if values:
                    differences.append((scenario, sum(values) / len(values)))
            if differences:
                lines.append(Line(ours, theirs, related, differences))
    return lines


def scenarios(table: Table) -> dict[str, dict[str, str | None]]:
    """Teacher → method → the row that stands for it: of its only teacher, of one proxy, without extras.

    Where several rows do, none does (None), unless their lineage says that they are the same.
    """
    candidates = [row for row in table.rows.values() if len(row.teachers) == 1 and _plain(row, table.network)]
    proxies = collections.Counter(row.lineage.proxy for row in candidates if row.lineage and row.lineage.proxy)
    proxy = proxies.most_common(1)[0][0] if proxies else None
    chosen: dict[str, dict[str, str | None]] = {}
    kinds: dict[tuple[str, str], object] = {}
    for row in candidates:
        if row.lineage and row.lineage.proxy not in (None, proxy):
            continue
        scenario, kind = row.teachers[0], row.lineage.key(table.network) if row.lineage else row.label
        twice = kinds.setdefault((scenario, row.method), kind) != kind
        rows_of_scenario = chosen.setdefault(scenario, {})
        rows_of_scenario[row.method] = None if twice else rows_of_scenario.get(row.method, row.label)
    return chosen


def _plain(row: Representation, network: str | None) -> bool:
    if row.lineage is None:
        return True
    whole = all("/" not in t.split and t.architecture in (None, network) for t in row.lineage.teachers)
    return whole and row.lineage.plain and not row.best_of
