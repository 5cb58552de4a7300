"""The tally of the paper's Table 3: over scenarios of one teacher, how often a method is better, about equal, worse."""

from __future__ import annotations

import dataclasses

from fastcon.report.results import Table

PAIRS = (("consolidated", "generalist"), ("consolidated", "traditional"), ("traditional", "generalist"))


@dataclasses.dataclass(frozen=True)
class Line:
    """One comparison: (scenario, mean difference in points) of every scenario, related or unrelated tasks."""

    ours: str
    theirs: str
    related: bool
    differences: list[tuple[str, float]]

    def counts(self, threshold: float) -> tuple[int, int, int]:
        """How many scenarios are better, within `threshold` points, and worse."""
        better = sum(value > threshold for _, value in self.differences)
        worse = sum(value < -threshold for _, value in self.differences)
        return better, len(self.differences) - better - worse, worse


def tally(table: Table, aliases: dict[str, set[str]]) -> list[Line]:
    """Mean differences over a scenario's related and over its unrelated tasks, for each pair of methods."""
    scenarios: dict[str, dict[str, str | None]] = {}
    for row in table.rows.values():
        if row.scenario is not None:
            known = scenarios.setdefault(row.scenario, {})
            twice = row.method in known  # of variants of one method none stands for all
            known[row.method] = None if twice else row.label
    lines = []
    for ours, theirs in PAIRS:
        for related in (True, False):
            differences = []
            for scenario, labels in scenarios.items():
                base = table.generalist if theirs == "generalist" else labels.get(theirs)
                label = labels.get(ours)
                if label is None or base is None:
                    continue
                tasks = [task for task in table.tasks if table.rows[label].related(task, aliases) == related]
                found = [table.difference(label, task, base) for task in tasks]
                values = [value[0] for value in found if value is not None]
                if values:
                    differences.append((scenario, sum(values) / len(values)))
            if differences:
                lines.append(Line(ours, theirs, related, differences))
    return lines
