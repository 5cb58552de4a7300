"""A table as Markdown, CSV and LaTeX: best of a column marked, beside it the difference to the generalist."""

from __future__ import annotations

import csv
import io
import re

from fastcon.report.cells import Table
from fastcon.report.reference import Comparison

_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}


def best(table: Table, task: str) -> float | None:
    """The highest accuracy of a column."""
    return max((cell.value for (_, name), cell in table.cells.items() if name == task), default=None)


def difference(table: Table, label: str, task: str) -> str:
    """Points above the generalist with their 95 % interval: "+1.2 ± 0.3"; "" where there is nothing to compare."""
    gain = table.difference(label, task)
    if gain is None:
        return ""
    return f"{gain[0]:+.1f}" + ("" if gain[1] is None else f" ± {gain[1]:.1f}")


def markdown(table: Table) -> str:
    """A Markdown table, accuracies in percent."""
    lines = ["| representation | " + " | ".join(map(_md, table.tasks)) + " |", "|---" * (len(table.tasks) + 1) + "|"]
    for label in table.rows:
        lines.append(
            f"| {_md(label)} | " + " | ".join(_cell(table, label, task, "**{}**") for task in table.tasks) + " |"
        )
    return "\n".join(lines) + "\n"


def latex(table: Table) -> str:
    """A LaTeX tabular for booktabs, accuracies in percent."""
    lines = [rf"\begin{{tabular}}{{l{'r' * len(table.tasks)}}}", r"\toprule"]
    lines += [" & ".join(["representation", *map(_tex, table.tasks)]) + r" \\", r"\midrule"]
    for label in table.rows:
        cells = [_cell(table, label, task, r"\textbf{{{}}}").replace("±", r"$\pm$") for task in table.tasks]
        lines.append(" & ".join([_tex(label), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def comma_separated(table: Table) -> str:
    """CSV: representation, method, task, accuracy, ci95, difference, difference_ci95; one cell a line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["representation", "method", "task", "accuracy", "ci95", "difference", "difference_ci95"])
    for label, row in table.rows.items():
        for task in table.tasks:
            cell = table.cells.get((label, task))
            if cell is not None:
                gain = table.difference(label, task) or (None, None)
                writer.writerow([label, row.method, task, *(_number(v) for v in (cell.value, cell.ci95, *gain))])
    return out.getvalue()


def compared_markdown(comparison: Comparison) -> str:
    """A Markdown table in the published order: ours / theirs (difference); a dash where we have no counterpart."""
    tasks = comparison.published.tasks
    lines = ["| ours / published | " + " | ".join(map(_md, tasks)) + " |", "|---" * (len(tasks) + 1) + "|"]
    for label in comparison.published.rows:
        cells = []
        for task in tasks:
            theirs, ours = comparison.published.cells.get((label, task)), comparison.ours.cells.get((label, task))
            gain = comparison.difference(label, task)
            text = f"{ours.value:.1f}" if ours else "–"
            cells.append(
                f"{text} / {theirs.value:.1f}" + (f" ({gain:+.1f})" if gain is not None else "") if theirs else ""
            )
        lines.append(f"| {_md(label)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def compared_csv(comparison: Comparison) -> str:
    """CSV, one published accuracy per line: published row, our row, task, ours, its ci95, theirs, difference."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["published", "ours", "task", "accuracy", "ci95", "published_accuracy", "difference"])
    for (label, task), theirs in comparison.published.cells.items():
        ours = comparison.ours.cells.get((label, task))
        values = (ours.value, ours.ci95) if ours else (None, None)
        numbers = (*values, theirs.value, comparison.difference(label, task))
        writer.writerow([label, comparison.labels.get(label, ""), task, *map(_number, numbers)])
    return out.getvalue()


def _cell(table: Table, label: str, task: str, strong: str) -> str:
    cell = table.cells.get((label, task))
    if cell is None:
        return ""
    value = f"{cell.value:.1f}"
    gain = difference(table, label, task)
    return (strong.format(value) if cell.value == best(table, task) else value) + (f" ({gain})" if gain else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _md(text: str) -> str:
    return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", " ".join(text.split()))


def _tex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
