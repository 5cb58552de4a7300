"""Writes the speed table of README.md from the records in benchmarks/results/. Run from anywhere: python table.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
START, END = "<!-- speed table: made by benchmarks/table.py -->", "<!-- end of the speed table -->"
ROWS = [  # name of the row, what it says, target on 2 cores, target on a GPU
    ("loader", "loader against torchvision's DataLoader", 1.5, None),
    ("loader_vs_ffcv", "loader against FFCV, photos at full size", 1.0, None),
    ("loader_baked", "loader from baked views against the same from photos", 5.0, None),
    ("loader_baked_vs_ffcv", "loader from baked views against FFCV, photos of 256 px", 1.1, None),
    ("store_read", "reading the store, checked, against the bare bytes", 0.5, None),
    ("precompute", "precompute against its teachers on a batch in memory", 1.15, 1.4),
    ("precompute_vs_best", "… run as PyTorch runs them best", 0.9, 0.9),
    ("train_step", "training steps against the same on a batch in memory", 0.95, 0.97),
    ("train_vs_online", "training against such teachers in the loop, share of the bound", 0.95, 0.95),
    ("side_by_side", "two trainings on the same cores against one alone", 0.8, None),
    ("loss_vs_eager", "fused loss against eager PyTorch", 1.0, 5.0),
    ("loss_vs_compile", "fused loss against torch.compile", None, 1.5),
    ("loss_bandwidth", "fused loss, share of the bandwidth of a copy", None, 0.85),
    ("probe_vs_sklearn", "few-shot probes against GridSearchCV(LinearSVC)", 30.0, None),
    ("probe_full", "full-size probe against LinearSVC(dual=False)", None, None),
]


def table(results: Path) -> str:
    """The Markdown table of all records of a folder; what no machine has measured yet is left out."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    machines = {}
    for file in sorted(results.glob("*.json")):
        record = json.loads(file.read_text())
        for row in record["rows"]:
            rows.setdefault((row["name"], row["device"]), []).append(row)
            hardware = record["hardware"]
            machines[row["device"]] = (
                hardware.get("gpu") if row["device"] == "cuda" else f"{hardware['cores']} CPU cores"
            )
    head = [machines.get(device, f"{name}, not measured") for device, name in (("cpu", "CPU"), ("cuda", "GPU"))]
    lines = [f"| ratio, larger is better | {head[0]} | aim | {head[1]} | aim |", "|---|---|---|---|---|"]
    for name, says, cpu, gpu in ROWS:
        cells = []
        for device, aim in (("cpu", cpu), ("cuda", gpu)):
            cells += [_cell(rows.get((name, device))) if device in machines else "", _aim(aim)]
        if (name, "cpu") not in rows and (name, "cuda") not in rows:
            continue
        lines.append(f"| {says} (`{name}`) | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: list[dict[str, Any]] | None) -> str:
    if not found:
        return "not measured"
    ratios = sorted(row["ratio"] for row in found)
    if len(found) > 1:
        return f"{ratios[0]:.2f} to {ratios[-1]:.2f} ({len(found)} cases)"
    row = found[0]
    return f"{row['ratio']:.2f} ({_figure(row['ours'])} against {_figure(row['theirs'])} {row['unit']})"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _aim(value: float | None) -> str:
    return "" if value is None else f"≥ {value:g}"


def main() -> None:
    readme = HERE.parent / "README.md"
    text = readme.read_text()
    before, rest = text.split(START)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{START}\n\n{table(HERE / 'results')}\n\n{END}{after}")


if __name__ == "__main__":
    main()
