"""Figures as SVG: accuracy against the generalist, learning curves, cost against accuracy.

Colours are two of Okabe and Ito's, which colour-blind readers tell apart; in grey related tasks are told by filled
marks. Text and lines take the page's colour, so that a figure is legible in light and in dark.
"""

from __future__ import annotations

import io
import re
from typing import Any

from fastcon.report.cells import Representation, Table
from fastcon.report.reference import Comparison
from fastcon.report.results import Results, Trained

RELATED, UNRELATED = "#d55e00", "#0072b2"
LONGEST = 48
_MARKS = "os^Dv<>P*Xdp"
_DASHES = ("-", "--", "-.", ":")


def gains(table: Table, aliases: dict[str, set[str]]) -> Any | None:
    """One row per representation, a mark per task: points above the generalist, with the 95 % interval where draws are paired."""
    rows = [row for row in table.rows.values() if any(table.difference(row.label, task) for task in table.tasks)]
    if not rows:
        return None
    figure, axes = _rows_of_marks([row.label for row in rows], table.tasks)
    for y, row in enumerate(rows):
        _marks(axes, table, row, y, aliases)
    _legend(axes, table.tasks)
    return figure


def beside(comparison: Comparison, aliases: dict[str, set[str]]) -> Any | None:
    """The published rows: our points above our generalist as in `gains`, and in grey theirs above theirs."""
    published, ours = comparison.published, comparison.ours
    labels = [label for label in published.rows if any(published.difference(label, task) for task in published.tasks)]
    if not labels or not comparison.labels:
        return None
    figure, axes = _rows_of_marks(labels, published.tasks)
    for y, label in enumerate(labels):
        for k, task in enumerate(published.tasks):
            theirs = published.difference(label, task)
            if theirs is not None:
                axes.plot(theirs[0], y + _offset(k, published.tasks), _MARKS[k % len(_MARKS)], color="0.6", ms=5, mew=0)
        _marks(axes, ours, published.rows[label], y, aliases)
    axes.plot([], [], "o", color="0.6", ls="", label="grey: published")
    _legend(axes, published.tasks)
    return figure


def _rows_of_marks(labels: list[str], tasks: list[str]) -> tuple[Any, Any]:
    figure, axes = _axes(10, 1.2 + max(0.42 * len(labels), 0.22 * len(tasks)))
    axes.axvline(0, color="0.5", lw=1)
    axes.set_yticks(range(len(labels)), [_text(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("accuracy against the generalist (points)")
    return figure, axes


def _offset(k: int, tasks: list[str]) -> float:
    return 0.5 * ((k + 0.5) / len(tasks) - 0.5)


def _marks(axes: Any, table: Table, row: Representation, y: int, aliases: dict[str, set[str]]) -> None:
    """A row's marks, one per task that it differs from the generalist on."""
    for k, task in enumerate(table.tasks):
        gain = table.difference(row.label, task)
        if gain is None:
            continue
        related = row.related(task, aliases)
        colour = RELATED if related else UNRELATED
        axes.errorbar(
            gain[0], y + _offset(k, table.tasks), xerr=gain[1], marker=_MARKS[k % len(_MARKS)], ms=6, mec=colour,
            mfc=colour if related else "none", ecolor=colour, elinewidth=1, mew=1.3, ls="",
        )  # fmt: skip


def _legend(axes: Any, tasks: list[str]) -> None:
    for k, task in enumerate(tasks):
        axes.plot([], [], _MARKS[k % len(_MARKS)], mec="0.5", mfc="none", ls="", label=_text(task))
    axes.plot([], [], "o", color=RELATED, ls="", label="filled: related")
    axes.plot([], [], "o", mec=UNRELATED, mfc="none", ls="", label="hollow: unrelated")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def curves(runs: list[Trained]) -> Any | None:
    """KL(teacher || student) of each head over the steps, a panel a run; of an embedding 1 - R^2."""
    shown = [run for run in runs if any(map(_apart, (h for row in run.metrics for h in row["heads"].values())))]
    if not shown:
        return None
    figure, axes = _axes(8.5, 2.6 * -(-len(shown) // 2), rows=-(-len(shown) // 2), columns=min(2, len(shown)))
    panels = [axes] if len(shown) == 1 else list(axes.flat)
    for panel, run in zip(panels, shown, strict=False):
        last = run.metrics[-1]["heads"]
        heads = [name for name, head in last.items() if _apart(head) is not None]
        for k, name in enumerate(heads):
            label = _text(name) + (" (1 − R²)" if "r2" in last[name] else "")
            points = [(row["step"], _apart(row["heads"][name])) for row in run.metrics if name in row["heads"]]
            panel.plot(*zip(*points, strict=True), _DASHES[k % 4], color=(UNRELATED, RELATED)[k % 2], label=label)
        panel.set_title(_text(run.label), fontsize=10)
        panel.set_xlabel("step")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylabel("KL at T (nats)")
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
        panel.legend(frameon=False)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    return figure


def _apart(head: dict[str, float]) -> float | None:
    """How far a student's head is from its teacher; None of a head for labels."""
    return 1 - head["r2"] if "r2" in head else head.get("kl")


def costs(results: Results) -> Any | None:
    """Training time of each run against the mean accuracy of its representation, a panel for all protocols."""
    points = []
    for table in results.tables.values():
        for run in results.runs:
            values = [cell.value for (label, _), cell in table.cells.items() if label == run.label]
            if values and run.seconds:
                points.append((run.seconds / 60, sum(values) / len(values), f"{run.label}, {table.title}"))
    if not points:
        return None
    figure, axes = _axes(8.5, 3)
    for k, (minutes, accuracy, label) in enumerate(points):
        axes.plot(
            minutes, accuracy, _MARKS[k % len(_MARKS)], mec=UNRELATED, mfc="none", ms=8, mew=1.5, label=_text(label)
        )
    axes.set_xlim(0, 1.08 * max(minutes for minutes, *_ in points))
    axes.set_xlabel("training time (minutes)")
    axes.set_ylabel("mean accuracy (%)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def svg(figure: Any) -> str:
    """A figure as an <svg> element for a page, in the colour of its text."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"#000000|stroke: *black", lambda found: "currentColor" if found[0][0] == "#" else "stroke: currentColor", text
    )
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img" fill="currentColor">', text, count=1
    )


def _axes(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(
        {"svg.fonttype": "path", "svg.hashsalt": "fastcon", "text.parse_math": False, "font.size": 9}
    )
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns)
    for panel in [axes] if rows * columns == 1 else axes.flat:
        panel.grid(axis="both", color="0.5", alpha=0.25)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _text(name: str) -> str:
    """A name on one line, not too long for a figure."""
    line = " ".join(name.split())
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
