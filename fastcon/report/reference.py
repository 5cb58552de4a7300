"""Our accuracies beside those of a published table, matched by what was trained and measured and not by what it is called."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastcon.errors import FastconError
from fastcon.report.cells import Cell, Representation, Table
from fastcon.report.results import Results, read


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One published table: its rows and columns, and the rows and columns of ours that are their counterparts."""

    name: str
    published: Table
    ours: Table
    """Our accuracies under the published rows' and columns' names."""
    labels: dict[str, str]
    """Published row → our row."""
    missing: list[str]
    """Published rows and tasks without a counterpart, and our rows that were not published."""

    @property
    def counted(self) -> int:
        """How many published accuracies have a counterpart."""
        return len(self.ours.cells)

    def difference(self, label: str, task: str) -> float | None:
        """Points of ours above theirs."""
        ours, theirs = self.ours.cells.get((label, task)), self.published.cells.get((label, task))
        return None if ours is None or theirs is None else ours.value - theirs.value


def compare(results: Results, reference: str, aliases: dict[str, set[str]]) -> list[Comparison]:
    """A comparison for each protocol of a published table, its upstream accuracies among them.

    reference: a CSV file as RESULTS take it, or the name of one of the paper's tables. Raises FastconError where it holds no
    accuracies, or nothing that was measured by the same protocol.
    """
    if reference.endswith(".json"):
        raise FastconError(f"{reference}: a reference is a CSV table, or a table of the paper")
    published = read([reference]).tables
    comparisons = [
        _comparison(reference, table, results.tables[title], aliases)
        for title, table in published.items()
        if title in results.tables
    ]
    if not comparisons:
        raise FastconError(
            f"{reference} has accuracies of {' and '.join(published) or 'nothing'}; the results have "
            f"{' and '.join(results.tables) or 'none'}: nothing can be compared"
        )
    return comparisons


def _comparison(reference: str, published: Table, table: Table, aliases: dict[str, set[str]]) -> Comparison:
    tasks = {table.task_key(task): task for task in table.tasks}
    ours = Table(f"{published.title}: ours beside {reference}")
    labels: dict[str, str] = {}
    columns = {task: tasks.get(published.task_key(task)) for task in published.tasks}
    for label, row in published.rows.items():
        counterpart = _counterpart(row, published, table, aliases)
        if counterpart is None:
            continue
        labels[label] = counterpart
        ours.rows[label] = dataclasses.replace(table.rows[counterpart], label=label, teachers=row.teachers)
        for task, column in columns.items():
            cell: Cell | None = table.cells.get((counterpart, column or ""))
            if cell is not None and (label, task) in published.cells:
                ours.cells[label, task] = cell
    ours.tasks = list(published.tasks)
    missing = [f"no counterpart of ours: {label}" for label in published.rows if label not in labels]
    missing += [f"not measured by us: {task}" for task, column in columns.items() if column is None]
    keys = {_key(table, label) for label in labels.values()}
    missing += [
        f"not in {reference}: {label}"
        for label, row in table.rows.items()
        if _key(table, label) not in keys and not row.best_of
    ]
    return Comparison(reference, published, ours, labels, missing)


def _counterpart(row: Representation, published: Table, table: Table, aliases: dict[str, set[str]]) -> str | None:
    """Our row of the same lineage; of a best one, the best of ours among the same."""
    assert row.lineage is not None
    lineage = row.lineage.key(published.network)
    same = [
        label
        for label, r in table.rows.items()
        if _key(table, label) == lineage and bool(r.best_of) == bool(row.best_of)
    ]
    if same or not row.best_of:
        return same[0] if same else None
    keys = {label: _key(table, label) for label, r in table.rows.items() if r.lineage and not r.best_of}
    among = [label for label, key in keys.items() if key[0] == lineage[0] and len(key[1]) == 1 and key[1] <= lineage[1]]
    if len(among) < len(lineage[1]):
        return None
    return table.best(row.label, among, aliases)


def _key(table: Table, label: str) -> tuple[Any, ...]:
    """The lineage's, or of a row without one its label."""
    lineage = table.rows[label].lineage
    return (label,) if lineage is None else lineage.key(table.network)
