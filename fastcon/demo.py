"""The whole story on images that fastcon renders itself, through the ordinary commands.

A generalist learns a broad mix, a teacher the t-split of the glyphs; their logits over an unlabelled proxy go into a
store, three students come out of it, and 5-shot probes on classes that nobody was trained on say whose features
transfer. The result is what it is: no figure is fixed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastcon.data import rendered
from fastcon.files import write_atomically

SIZE = 48
TASKS = {"glyphs": "related", "shapes": "unrelated", "textures": "unrelated", "digits": "unrelated"}
Command = Callable[[list[str]], dict[str, Any]]
"""Runs a fastcon command given as arguments and returns what it reports as JSON."""


def run(out: str, command: Command, say: Callable[[str], None]) -> dict[str, Any]:
    """Make everything in the folder `out` and return the table, the speeds and where the files are."""
    root, started = Path(out), time.monotonic()
    say(f"== images, rendered into {root}/images")
    _render(root / "images")
    data = {name: str(root / "images" / name) for name in ("broad", "proxy", *TASKS)}
    generalist, teacher, store = str(root / "generalist"), str(root / "teacher"), str(root / "store")

    def call(title: str, *args: str) -> dict[str, Any]:
        say(f"\n== {title}\n$ fastcon {' '.join(args)}")
        return command(list(args))

    call(
        "a generalist, trained from scratch on 36 classes of all domains",
        "teach",
        "--train",
        data["broad"],
        "--holdout",
        "0.2",
        "--split",
        "none",
        "--init",
        f"torchvision:resnet18?size={SIZE}",
        "--lr-grid",
        "0.02",
        "--epochs",
        "14",
        "--scale",
        "0.35",
        "1",
        "--out",
        generalist,
    )
    call(
        "a teacher: the generalist fine-tuned on the t-split of the glyphs",
        "teach",
        "--train",
        data["glyphs"],
        "--holdout",
        "0.5",
        "--split",
        "t",
        "--init",
        generalist,
        "--lr-grid",
        "0.01",
        "--epochs",
        "20",
        "--scale",
        "0.35",
        "1",
        "--out",
        teacher,
    )
    stored = call(
        "every teacher once over two views of every proxy image",
        "precompute",
        data["proxy"],
        "--store",
        store,
        "--views",
        "2",
        "--size",
        str(SIZE),
        "--scale",
        "0.2",
        "1",
        "--generalist",
        f"broad={generalist}",
        "--teacher",
        f"glyphs={teacher}",
    )
    call("is the store whole and true?", "verify", store)
    methods = ("traditional", "soft-label", "consolidate")
    trained = [
        call(
            f"a student: {method}",
            "train",
            "--store",
            store,
            "--method",
            method,
            "--epochs",
            "5",
            "--lr-backbone",
            "0.01",
            "--lr-heads",
            "0.05",
            "--out",
            str(root / method),
        )
        for method in methods
    ]
    backbones = {"generalist": generalist, "teacher": teacher, **{method: str(root / method) for method in methods}}
    accuracy: dict[str, dict[str, float]] = {name: {} for name in backbones}
    for task in TASKS:
        probe = call(
            f"5-shot probes on {task}, 10 draws of training images",
            "probe",
            *backbones.values(),
            "--train",
            data[task],
            "--holdout",
            "0.5",
            "--split",
            "d" if task == "glyphs" else "none",
            "--trials",
            "10",
        )
        for name, row in zip(backbones, probe["results"], strict=True):
            accuracy[name][task] = row["accuracy"]
        write_atomically(root / f"probe-{task}.json", (json.dumps(probe, indent=2) + "\n").encode())
    _contact_sheet(root / "samples.png")
    probes = [str(root / f"probe-{task}.json") for task in TASKS]
    runs = [str(root / method) for method in methods]
    out = str(root / "report")
    call(
        "all of it on one page", "report", *probes, *runs, "--generalist", "generalist", "--views", store, "--out", out
    )
    result: dict[str, Any] = {
        "accuracy": accuracy,
        "seconds": time.monotonic() - started,
        "precompute_rows_per_second": _rate(stored, "rows_computed"),
        "train_images_per_second": _rate(trained[-1], "step", 32),
    }
    write_atomically(root / "table.md", table(accuracy).encode())
    write_atomically(root / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    say(f"\n== 5-shot accuracy in percent: whose frozen features transfer?\n\n{table(accuracy)}")
    say(_answer(accuracy))
    say(
        f"\nprecompute {_speed(result['precompute_rows_per_second'])} rows/s, "
        f"train {_speed(result['train_images_per_second'])} img/s, everything {result['seconds']:.0f} s"
    )
    say(
        f"page {root}/report/index.html · table {root}/table.md · images {root}/samples.png · store {store} · student "
        f"{root}/consolidate/student.safetensors"
    )
    return result


def table(accuracy: dict[str, dict[str, float]]) -> str:
    """The accuracies as a Markdown table: a row a representation, related and unrelated tasks apart."""
    tasks = list(TASKS)
    head = [f"{task} ({TASKS[task]})" for task in tasks] + ["unrelated, mean"]
    lines = ["| representation | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name, row in accuracy.items():
        values = [row[task] for task in tasks] + [_unrelated(row)]
        lines.append(f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |")
    return "\n".join(lines) + "\n"


def _unrelated(row: dict[str, float]) -> float:
    values = [row[task] for task, kind in TASKS.items() if kind == "unrelated"]
    return sum(values) / len(values)


def _answer(accuracy: dict[str, dict[str, float]]) -> str:
    ours, base = accuracy["consolidate"], accuracy["generalist"]
    old = accuracy["traditional"]
    return (
        f"Against the generalist, the consolidated student is {100 * (ours['glyphs'] - base['glyphs']):+.1f} points on "
        f"the related task and {100 * (_unrelated(ours) - _unrelated(base)):+.1f} on the unrelated ones; traditional "
        f"distillation is {100 * (old['glyphs'] - base['glyphs']):+.1f} and "
        f"{100 * (_unrelated(old) - _unrelated(base)):+.1f}."
    )


def _render(root: Path) -> None:
    if (root / "done").exists():
        return
    for domain in rendered.DOMAINS:
        rendered.write_classes(root / "broad", domain, range(100, 112), 60)
    for domain in rendered.DOMAINS:
        rendered.write_classes(root / domain, domain, range(24), 100 if domain == "glyphs" else 50)
    rendered.write_digits(root / "digits")
    rendered.write_proxy(root / "proxy", 3000)
    (root / "done").touch()


def _rate(result: dict[str, Any], key: str, times: int = 1) -> float | None:
    return times * result[key] / result["seconds"] if result.get(key) and result.get("seconds") else None


def _speed(rate: float | None) -> str:
    return "(done before)" if rate is None else f"{rate:.0f}"


def _contact_sheet(path: Path) -> None:
    from PIL import Image

    side, columns = rendered.SIDE, 16
    sheet = Image.new("RGB", (side * columns, side * 2 * len(rendered.DOMAINS)))
    for d, domain in enumerate(rendered.DOMAINS):
        for k in range(2 * columns):
            sheet.paste(rendered.make(domain, k // 4, k % 4), (k % columns * side, (2 * d + k // columns) * side))
    sheet.save(path)
