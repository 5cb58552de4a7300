"""How the teachers of a store relate: as text, and as a heat map with its dendrogram on a page."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcon.distill.relate import NEAR_CONSTANT, REDUNDANT, Outputs, Relations, linkage
from fastcon.distill.reliability import NOTHING


def text(found: Relations) -> str:
    """A screen of it."""
    width = max(map(len, found.names))
    lines = [f"{found.store}: {len(found.names)} teachers compared on {found.rows:,} rows", ""]
    lines += ["CKA of outputs; in brackets what their predicted classes share (1: the same, 0: as by chance)"]
    for i, name in enumerate(found.names):
        cells = [f"{found.cka[i, j]:.2f} ({_two(found.shared[i, j])})" for j in range(i)]
        lines.append(f"  {name:{width}}  {'  '.join(cells)}".rstrip())
    lines += ["", f"  {'':{width}}  classes  used  information  confidence  consistency  steady"]
    for name, out in found.outputs.items():
        lines.append(
            f"  {name:{width}}  {out.classes:7}  {_whole(out.used):>4}  {_percent(out.information):>11}  "
            f"{_percent(out.confidence):>10}  {_percent(out.consistency):>11}  {_two(out.steady):>6}"
        )
    return "\n".join([*lines, "", *conclusions(found)])


def conclusions(found: Relations) -> list[str]:
    """What follows from it, a line each."""
    sure = "" if found.silhouette is None else f" (silhouette {found.silhouette:.2f})"
    lines = [f"domains{sure}: " + " | ".join(", ".join(domain) for domain in found.domains)]
    for a, b in found.redundant:
        lines.append(f"redundant: {a} and {b} say nearly the same (CKA from {REDUNDANT:g}): one of them adds little")
    for name, out in found.outputs.items():
        if out.near_constant:
            lines.append(
                f"not covered: {name} says nearly the same of every image (information below {NEAR_CONSTANT:.0%}): the proxy "
                "has little of what it was taught"
            )
    steady = {name: out.steady for name, out in found.outputs.items() if out.steady is not None}
    steady.pop(found.generalist or "", None)
    middle = float(np.median(list(steady.values()))) if steady else 0.0
    for name, value in steady.items():
        if value < NOTHING * middle:
            lines.append(
                f"unreliable: what {name} says of two views of an image shares {value:.2f} nats (the median: {middle:.2f}): "
                "--weight auto leaves it out"
            )
    if len(found.domains) > 1:
        for domain in found.domains:
            lines.append(
                f"a student of its own: fastcon train --store {found.store} --heads {','.join(domain)} --out …"
            )
    return lines


def section(found: Relations) -> str:
    """The same as HTML, but for the figure."""
    head = "<tr><th>teacher<th>classes<th>used<th>information<th>confidence<th>consistency<th>steady</tr>"
    rows = "".join(_row(name, out) for name, out in found.outputs.items())
    says = "".join(f"<li>{html.escape(line)}</li>" for line in conclusions(found))
    legend = (
        "CKA: 1 for outputs that are equal up to a rotation and a scale, 0 for unrelated ones. Distance in the tree: 1 less "
        "the correlation of two rows. Used: classes that a teacher "
        "effectively predicts. Information: of its prediction about the image, as a share of what its classes could carry. "
        "Consistency: of two views of an image. Steady: nats that predictions of two views share. Embeddings predict no class; "
        "their consistency is a cosine."
    )
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table><p>{legend}</p><ul>{says}</ul>"


def heat_map(found: Relations) -> Any:
    """CKA of all pairs, in the order of the dendrogram above it; the generalist comes last."""
    from matplotlib.figure import Figure
    from scipy.cluster.hierarchy import dendrogram

    experts = [k for k, name in enumerate(found.names) if name != found.generalist]
    side = 2.2 + 0.45 * len(found.names)
    figure = Figure(figsize=(side + 1.2, side + 1.2), layout="constrained")
    tree, axes = figure.subplots(2, 1, height_ratios=[1, 4])
    order, ends = experts, len(experts)
    if len(experts) > 1:
        drawn = dendrogram(
            linkage(found.cka[np.ix_(experts, experts)]), ax=tree, no_labels=True, color_threshold=0,
            above_threshold_color="0.5",
        )  # fmt: skip
        order = [experts[k] for k in drawn["leaves"]]
    order = order + [k for k in range(len(found.names)) if k not in experts]
    tree.set_xlim(0, 10 * len(order))
    tree.set_ylabel("distance")
    tree.spines[["top", "right", "bottom"]].set_visible(False)
    matrix = found.cka[np.ix_(order, order)]
    axes.imshow(matrix, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    labels = [found.names[k].replace("$", r"\$") for k in order]
    axes.set_xticks(range(len(order)), labels, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(order)), labels)
    _write(axes, matrix)
    if 0 < ends < len(order):
        for line in (axes.axhline, axes.axvline):
            line(ends - 0.5, color="white", lw=2)
    return figure


def _write(axes: Any, matrix: NDArray[np.float64]) -> None:
    for (i, j), value in np.ndenumerate(matrix):
        axes.text(
            j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="black" if value > 0.55 else "white"
        )


def _row(name: str, out: Outputs) -> str:
    cells = (
        html.escape(name),
        str(out.classes),
        _whole(out.used),
        _percent(out.information),
        _percent(out.confidence),
        _percent(out.consistency),
        _two(out.steady),
    )
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _two(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.2f}"


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
