"""The records of results/ → gains.png: points above the generalist of teachers and students, a panel per study."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).parent
PANELS = {
    "resnet18": "ResNet18 of Tiny-ImageNet, 64 px\nbalance 1:1, 2 epochs",
    "three": "ResNet18 of Tiny-ImageNet, 64 px\nbalance 1:3, 4 epochs",
    "lite0": "EfficientNet-Lite0 of ImageNet, 96 px\nbalance 1:1, 2 epochs",
    "lite0-balance": "EfficientNet-Lite0 of ImageNet, 96 px\nbalance 1:3, 4 epochs",
}
METHODS = ("teacher", "traditional", "consolidated")
RELATED, UNRELATED = "#d55e00", "#0072b2"
"""Two of Okabe and Ito's colours."""


def draw(axes: matplotlib.axes.Axes, record: dict) -> None:
    """A mark per pair of a teacher and a task, with the 95 % interval over its paired draws; a bar at their mean."""
    rows = record["rows"]
    general = {row["task"]: np.array(row["accuracies"]) for row in rows if row["method"] == "generalist"}
    for y, method in enumerate(METHODS):
        chosen = [row for row in rows if row["method"] == method and len(row["teachers"]) == 1]
        for related, colour, side in ((True, RELATED, -0.16), (False, UNRELATED, 0.16)):
            gains = [
                np.array(row["accuracies"]) - general[row["task"]]
                for row in chosen
                if (row["task"] == row["teachers"][0]) == related
            ]
            for k, gain in enumerate(gains):
                place = y + side + 0.2 * ((k + 0.5) / len(gains) - 0.5)
                half = 1.96 * gain.std(ddof=1) / len(gain) ** 0.5
                fill = colour if related else "none"
                axes.errorbar(gain.mean(), place, xerr=half, marker="o", ms=5, mfc=fill, color=colour, elinewidth=1)
            if gains:
                mean = np.mean([gain.mean() for gain in gains])
                axes.plot([mean, mean], [y + side - 0.14, y + side + 0.14], color=colour, lw=2)
    axes.axvline(0, color="0.5", lw=1)
    axes.set_yticks(range(len(METHODS)), METHODS)
    axes.set_ylim(len(METHODS) - 0.5, -0.5)
    axes.set_xlabel("points above the generalist (5-shot)")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw the panels side by side."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 2, sharex=True).flat, PANELS.items(), strict=True):
        draw(axes, json.loads((HERE / "results" / f"{name}.json").read_text()))
        axes.set_title(title, fontsize=9)
    last = figure.axes[-1]
    last.plot([], [], "o", color=RELATED, label="the teacher's own task")
    last.plot([], [], "o", mec=UNRELATED, mfc="none", label="another task")
    last.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(0, 0.5))
    figure.savefig(HERE / "gains.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
