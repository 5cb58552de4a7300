"""One self-contained HTML page of results, and beside it every table and figure as a file."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastcon.data.published import RELATED
from fastcon.distill.relate import relate as compare_teachers
from fastcon.errors import FastconError
from fastcon.files import write_atomically
from fastcon.report import figures, sheet, tables
from fastcon.report.cells import Table
from fastcon.report.reference import Comparison, compare
from fastcon.report.relations import heat_map
from fastcon.report.relations import section as about_relations
from fastcon.report.results import Results, read
from fastcon.report.tally import Counts, Line, printed, tally

THRESHOLD = 1.5
"""Points within which the tally calls two means about equal."""

_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --faint: #8884; --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #16181b; --mark: #56b4e9; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 84rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--faint); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 11rem; }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid var(--mark); }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
td small { opacity: .75; } td.best { font-weight: 700; } td.related { border-left: 3px solid #d55e00; }
svg { width: 100%; min-width: 38rem; max-width: 62rem; height: auto; } pre { overflow-x: auto; background: var(--faint); padding: .7rem; font-size: .85rem; }
.views { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem; }
.views figure { margin: 0; font-size: .8rem; } .views img { width: 100%; image-rendering: auto; }
@media print { body { max-width: none; margin: 0; } h2 { break-after: avoid; } .wide { overflow: visible; }
  th, td { white-space: normal; padding: .2rem .35rem; } }
"""
_SCRIPT = """
for (const button of document.querySelectorAll('th button')) button.addEventListener('click', () => {
  const head = button.parentElement, body = head.closest('table').tBodies[0], column = head.cellIndex;
  const down = head.getAttribute('aria-sort') !== 'descending';
  for (const other of head.parentElement.children) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const key = row => { const v = row.cells[column].dataset.v; return v === undefined || v === '' ? null : v; };
  const order = (a, b) => { const x = key(a), y = key(b);
    if (x === null || y === null) return (x === null) - (y === null);
    const d = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return down ? -d : d; };
  body.append(...[...body.rows].sort(order));
});
"""
_SCRIPT_HASH = f"sha256-{base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()}"
"""What lets this script run, and no other that a name might smuggle in."""


def write_report(
    paths: Sequence[str],
    out: str,
    generalist: str | None = None,
    related: Sequence[str] = (),
    best: Sequence[str] = (),
    references: Sequence[str] = (),
    threshold: float = THRESHOLD,
    views: str | None = None,
    relate: str | None = None,
    title: str = "fastcon report",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write OUT/index.html, and its tables (.md, .csv, .tex), figures (.svg, .png) and tally beside it; returns facts.

    paths: RESULTS. generalist: the label of the generalist. related: TEACHER=TASK of further related tasks. best:
    NAME=LABEL,LABEL,… a row more, the best of these on its related tasks. references: published tables, as CSV files or the
    names of the paper's, to stand beside ours. views: a STORE of which sample views are shown. relate: a STORE
    whose teachers are compared. title: the page's. Raises FastconError.
    """
    if not paths and views is None and relate is None:
        raise FastconError(
            "nothing to report: give RESULTS (JSON of probe, finetune or evaluate, RUN folders, CSV), `views` or `relate` STORE"
        )
    aliases = {teacher: set(tasks) for teacher, tasks in RELATED.items()}
    for pair in related:
        teacher, task = _named(pair, "`related`", "TEACHER=TASK")
        aliases.setdefault(teacher, set()).add(task)
    results = read(paths, generalist)
    _add_best(results, best, aliases)
    compared = [each for reference in references for each in compare(results, reference, aliases)]
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "index.html").exists())):
        raise FastconError(f"{out} holds other files: give an empty or a new folder as `out`")
    shown = sheet.views(views) if views is not None else ""
    related_teachers = compare_teachers(relate) if relate is not None else None
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "index.html", b"")  # so that a second try finds its own folder
    sections: list[str] = []
    tallies: dict[str, Any] = {}
    theirs = printed() if "table4" in (*paths, *references) else {}
    for table in results.tables.values():
        lines = tally(table, aliases)
        if lines:
            tallies[table.title] = [_tally_facts(line, threshold) for line in lines]
        sections.append(_of_table(table, lines, aliases, threshold, theirs, folder, say))
    sections += [_of_comparison(comparison, aliases, folder, say) for comparison in compared]
    sections += [
        _section(title, _figure(figure, folder / title.replace(" ", "-")))
        for title, figure in (
            ("learning curves", figures.curves(results.runs)),
            ("cost and accuracy", figures.costs(results)),
        )
        if figure is not None
    ]
    if related_teachers is not None:
        picture = _figure(heat_map(related_teachers), folder / "teachers")
        sections.append(_section(f"teachers of {relate}", picture, about_relations(related_teachers)))
    if views is not None:
        sections.append(_section(f"views of {views}", shown))
    sections.append(_section("configuration and cost", *_remake(results, paths, out)))
    write_atomically(folder / "index.html", _page(title, sections).encode(errors="replace"))
    return {
        "out": out,
        "tables": list(results.tables),
        "tally": tallies,
        "compared": [_compared_facts(comparison) for comparison in compared],
    }


def _named(text: str, option: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise FastconError(f"{option} {text!r} is not {form}")
    return name, value


def _add_best(results: Results, best: Sequence[str], aliases: dict[str, set[str]]) -> None:
    """The rows that `best` asks for, in every table that has those they are chosen from."""
    for text in best:
        name, value = _named(text, "`best`", "NAME=LABEL,LABEL,…")
        among = value.split(",")
        tables = [table for table in results.tables.values() if all(label in table.rows for label in among)]
        if not tables:
            raise FastconError(f"`best` {name!r}: no table has all of {', '.join(among)}")
        for table in tables:
            table.add_best(name, among, aliases)


def _of_table(
    table: Table,
    lines: list[Line],
    aliases: dict[str, set[str]],
    threshold: float,
    theirs: dict[tuple[str, str, bool], Counts],
    folder: Path,
    say: Callable[[str], None],
) -> str:
    """A table's section, and its files."""
    name = _file_name(table.title)
    for ending, text in (("md", tables.markdown), ("csv", tables.comma_separated), ("tex", tables.latex)):
        write_atomically(folder / f"{name}.{ending}", text(table).encode(errors="replace"))
    parts = [_table(table, aliases), _figure(figures.gains(table, aliases), folder / f"{name}-gains")]
    counts = ""
    if lines:
        counts = _tally_markdown(lines, threshold, theirs)
        write_atomically(folder / f"{name}-tally.md", counts.encode())
        parts.append(_tally(lines, threshold, theirs))
    notes = "".join(f"{note}\n" for note in table.notes)
    say(f"== {table.title}\n\n{tables.markdown(table)}" + (f"\n{counts}" if counts else "") + notes)
    return _section(table.title, *parts, *(f"<p>{html.escape(note)}</p>" for note in table.notes))


def _of_comparison(
    comparison: Comparison, aliases: dict[str, set[str]], folder: Path, say: Callable[[str], None]
) -> str:
    """The section of a published table beside ours, and its files."""
    title = comparison.ours.title
    name, total = _file_name(title), len(comparison.published.cells)
    markdown = tables.compared_markdown(comparison)
    write_atomically(folder / f"{name}.md", markdown.encode(errors="replace"))
    write_atomically(folder / f"{name}.csv", tables.compared_csv(comparison).encode(errors="replace"))
    counted = f"{comparison.counted} of {total} published accuracies have a counterpart."
    say(f"== {title}\n\n{markdown}\n{counted}\n" + "".join(f"{line}\n" for line in comparison.missing))
    rows = [_compared_row(comparison, label, aliases) for label in comparison.published.rows]
    legend = "Ours, in small the published accuracy and ours minus it. A bar on the left: a related task."
    listed = "".join(f"<li>{html.escape(line)}</li>" for line in comparison.missing)
    return _section(
        title,
        _html_table(["representation", *comparison.published.tasks], rows) + f"<p>{legend} {counted}</p>",
        _figure(figures.beside(comparison, aliases), folder / f"{name}-gains"),
        f"<details><summary>without a counterpart</summary><ul>{listed}</ul></details>" if listed else "",
    )


def _compared_row(comparison: Comparison, label: str, aliases: dict[str, set[str]]) -> str:
    ours = comparison.labels.get(label, "")
    cells = [
        f'<td data-v="{html.escape(label)}">{html.escape(label)}<br><small>{html.escape(ours or "–")}</small></td>'
    ]
    for task in comparison.published.tasks:
        theirs, mine = comparison.published.cells.get((label, task)), comparison.ours.cells.get((label, task))
        if theirs is None:
            cells.append("<td></td>")
            continue
        related = " ".join(["related"] * comparison.published.rows[label].related(task, aliases))
        gain = f" {comparison.difference(label, task):+.1f}" if mine else ""
        value = f"{mine.value:.1f}" if mine else "–"
        key = f"{mine.value:.4f}" if mine else ""
        cells.append(f'<td data-v="{key}" class="{related}">{value} <small>{theirs.value:.1f}{gain}</small></td>')
    return f"<tr>{''.join(cells)}</tr>"


def _compared_facts(comparison: Comparison) -> dict[str, Any]:
    return {
        "reference": comparison.name,
        "protocol": comparison.published.title,
        "published": len(comparison.published.cells),
        "compared": comparison.counted,
        "missing": comparison.missing,
        "cells": [
            {
                "published": label,
                "ours": comparison.labels[label],
                "task": task,
                "difference": comparison.difference(label, task),
            }
            for label, task in comparison.ours.cells
        ],
    }


def _page(title: str, sections: list[str]) -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src '{_SCRIPT_HASH}'\">"
        f"<style>{_STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n"
        + "\n".join(sections)
        + f"\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n" + "\n".join(part for part in parts if part) + "</section>"


def _table(table: Table, aliases: dict[str, set[str]]) -> str:
    """Accuracies in percent; a bar at the left of a cell: a related task; bold: the best of a column."""
    rows = []
    for label, row in table.rows.items():
        cells = [f'<td data-v="{html.escape(label)}">{html.escape(label)}</td>']
        for task in table.tasks:
            cell = table.cells.get((label, task))
            if cell is None:
                cells.append("<td></td>")
                continue
            kinds = ["best"] * (cell.value == tables.best(table, task)) + ["related"] * row.related(task, aliases)
            gain = tables.difference(table, label, task)
            cells.append(
                f'<td data-v="{cell.value:.4f}" class="{" ".join(kinds)}">{cell.value:.1f}'
                + (f" <small>{gain}</small>" if gain else "")
                + "</td>"
            )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    legend = "Accuracy in percent; bold: the best of its column; a bar on the left: a task related to a teacher."
    if table.generalist is not None:
        legend += " Small: points above the generalist, ± half the 95 % interval where draws are paired."
    legend += _intervals(table)
    return _html_table(["representation", *table.tasks], rows) + f"<p>{legend}</p>"


def _intervals(table: Table) -> str:
    """What intervals of several runs cover, and of how many."""
    several = {(cell.over, len(cell.parts)) for cell in table.cells.values() if len(cell.parts) > 1}
    texts = [f"{over} ({runs} runs)" for over, runs in sorted(several)]
    return (
        f" Means over runs that differ in seeds alone: intervals over {' and '.join(texts)}, by Student's t."
        if texts
        else ""
    )


def _html_table(heads: list[str], rows: list[str]) -> str:
    names = "".join(f"<th><button>{html.escape(name)}</button></th>" for name in heads)
    return (
        f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>\n'
        + "\n".join(rows)
        + "</tbody></table></div>"
    )


def _figure(figure: Any | None, path: Path) -> str:
    if figure is None:
        return ""
    text = figures.svg(figure)
    write_atomically(path.with_suffix(".svg"), text.replace("<svg ", f"<svg {_NAMESPACES} ", 1).encode())
    figure.savefig(path.with_suffix(".png"), dpi=130, metadata={"Software": None})
    return f'<div class="wide">{text}</div>'


def _kind(line: Line) -> str:
    return "related" if line.related else "unrelated"


def _tally_facts(line: Line, threshold: float) -> dict[str, Any]:
    return {
        "ours": line.ours,
        "theirs": line.theirs,
        "tasks": _kind(line),
        "counts": list(line.counts(threshold)),
        "differences": dict(line.differences),
    }


def _beside(line: Line, theirs: dict[tuple[str, str, bool], Counts]) -> list[str]:
    """The paper's counts of a line, and at which thresholds ours are the same."""
    counts = theirs.get((line.ours, line.theirs, line.related))
    if counts is None:
        return []
    holds = line.thresholds(counts)
    if holds is None:
        return ["/".join(map(str, counts)), "none"]
    low, high = (f"{end:.1f}" for end in holds)
    return ["/".join(map(str, counts)), f"from {low}" if high == "inf" else f"{low} to {high}"]


def _tally_heads(theirs: dict[tuple[str, str, bool], Counts]) -> list[str]:
    return ["the paper", "the same at thresholds"] if theirs else []


def _tally_markdown(lines: list[Line], threshold: float, theirs: dict[tuple[str, str, bool], Counts]) -> str:
    heads = [f"tally, ≈: within {threshold:g} points", "tasks", ">", "≈", "<", *_tally_heads(theirs)]
    text = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for line in lines:
        cells = [
            f"{line.ours} vs {line.theirs}",
            _kind(line),
            *map(str, line.counts(threshold)),
            *_beside(line, theirs),
        ]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def _tally(lines: list[Line], threshold: float, theirs: dict[tuple[str, str, bool], Counts]) -> str:
    rows = []
    for line in lines:
        name = f"{line.ours} vs {line.theirs}"
        cells = [name, _kind(line), *map(str, line.counts(threshold)), *_beside(line, theirs)]
        each = ", ".join(f"{scenario} {value:+.1f}" for scenario, value in line.differences)
        row = "".join(f'<td data-v="{cell}">{cell}</td>' for cell in cells)
        last = f'<td style="white-space:normal;text-align:left"><small>{html.escape(each)}</small></td>'
        rows.append(f"<tr>{row}{last}</tr>")
    heads = ["tally", "tasks", ">", "≈", "<", *_tally_heads(theirs), "mean difference of each scenario, points"]
    return _html_table(heads, rows) + (
        f"<p>Over the scenarios with one teacher; ≈: within {threshold:g} points, a threshold of ours: the paper names none.</p>"
    )


def _remake(results: Results, paths: Sequence[str], out: str) -> list[str]:
    rows = [
        f'<tr><td data-v="{html.escape(run.label)}">{html.escape(run.label)}</td>'
        f'<td data-v="{run.seconds or ""}">{"" if run.seconds is None else f"{run.seconds / 60:.1f} min"}</td>'
        f'<td data-v="{run.metrics[-1]["step"]}">{run.metrics[-1]["step"]:,}</td></tr>'
        for run in results.runs
    ]
    parts = [_html_table(["run", "training time", "steps"], rows)] if rows else []
    for source, config in results.sources:
        remake = _command(config)
        text = (f"{remake}\n\n" if remake else "") + json.dumps(config, indent=1, ensure_ascii=False)
        parts.append(f"<details><summary>{html.escape(source)}</summary><pre>{html.escape(text)}</pre></details>")
    command = shlex.join(["fastcon", "report", *paths, "--out", out])
    return [*parts, f"<p>This page: </p><pre>{html.escape(command)}</pre>"]


def _command(config: dict[str, Any]) -> str:
    """The command that made a result, as it says itself."""
    argv = config.get("argv")
    recorded = isinstance(argv, list) and all(isinstance(word, str) for word in argv)
    return shlex.join(["fastcon", *argv]) if recorded else ""  # type: ignore[misc]


def _file_name(title: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", title).strip("-.") or "table"
