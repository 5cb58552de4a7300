"""The whole pipeline on images that fastcon renders itself, through the ordinary commands.

A generalist learns a broad mix, a teacher learns the t-split of the glyphs; their logits over an unlabelled proxy go into a
store, three students come out of it, and 5-shot probes on classes that nobody was trained on say whose features
transfer. No figure is fixed in advance.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastcon.data import rendered
from fastcon.files import write_atomically, write_json

SIZE = 48
TASKS = {"glyphs": "related", "shapes": "unrelated", "textures": "unrelated", "digits": "unrelated"}
Command = Callable[[list[str]], dict[str, Any]]
"""Runs a fastcon command given as arguments and returns what it reports as JSON."""


METHODS = ("traditional", "soft-label", "consolidate")
TEACH = (
    "teach --train {images} --holdout {share} --split {split} --init {init} --lr-grid {rate} --scale 0.35 1 --out {out}"
)
PRECOMPUTE = (
    "precompute {images} --store {store} --views 2 --size {size} --scale 0.2 1 --generalist broad={generalist} "
    "--teacher glyphs={teacher}"
)
TRAIN = "train --store {store} --method {method} --epochs 5 --lr-backbone 0.01 --lr-heads 0.05 --out {out}"


def run(out: str, command: Command, say: Callable[[str], None]) -> dict[str, Any]:
    """Make everything in the folder `out` and return the table, the speeds and where the files are."""
    root, started = Path(out), time.monotonic()
    say(f"== images, rendered into {root}/images")
    _render(root / "images")
    images, store = root / "images", str(root / "store")
    backbones = {name: str(root / name) for name in ("generalist", "teacher", *METHODS)}

    def call(title: str, text: str, *more: str, **values: Any) -> dict[str, Any]:
        words = [*(word.format(**values) for word in text.split()), *more]
        say(f"\n== {title}\n$ fastcon {shlex.join(words)}")
        return command(words)

    call(
        "a generalist, trained from scratch on 36 classes of all domains",
        TEACH + " --epochs 14",
        images=images / "broad", share=0.2, split="none", init=f"torchvision:resnet18?size={SIZE}", rate=0.02,
        out=backbones["generalist"],
    )  # fmt: skip
    call(
        "a teacher: the generalist fine-tuned on the t-split of the glyphs",
        TEACH + " --epochs 20",
        images=images / "glyphs", share=0.5, split="t", init=backbones["generalist"], rate=0.01, out=backbones["teacher"],
    )  # fmt: skip
    stored = call(
        "every teacher once over two views of every proxy image",
        PRECOMPUTE,
        images=images / "proxy", store=store, size=SIZE, **backbones,
    )  # fmt: skip
    call("is the store whole and true?", "verify {store}", store=store)
    trained = [
        call(f"a student: {method}", TRAIN, store=store, method=method, out=backbones[method]) for method in METHODS
    ]
    accuracy: dict[str, dict[str, float]] = {name: {} for name in backbones}
    for task in TASKS:
        probe = call(
            f"5-shot probes on {task}, 10 draws of training images",
            "probe --train {images} --holdout 0.5 --split {split} --trials 10",
            *backbones.values(),
            images=images / task, split="d" if task == "glyphs" else "none",
        )  # fmt: skip
        for name, row in zip(backbones, probe["results"], strict=True):
            accuracy[name][task] = row["accuracy"]
        write_json(root / f"probe-{task}.json", probe)
    _contact_sheet(root / "samples.png")
    probes = [str(root / f"probe-{task}.json") for task in TASKS]
    runs = [backbones[method] for method in METHODS]
    call(
        "all of it on one page",
        "report --generalist generalist --views {store} --relate {store} --out {out}",
        *probes,
        *runs,
        store=store,
        out=root / "report",
    )
    result: dict[str, Any] = {
        "accuracy": accuracy,
        "seconds": time.monotonic() - started,
        "precompute_rows_per_second": _rate(stored, "rows_computed"),
        "train_images_per_second": _rate(trained[-1], "step", 32),
    }
    write_atomically(root / "table.md", table(accuracy).encode())
    write_json(root / "result.json", result)
    _summarise(root, result, say)
    return result


def _summarise(root: Path, result: dict[str, Any], say: Callable[[str], None]) -> None:
    accuracy = result["accuracy"]
    say(f"\n== 5-shot accuracy in percent: whose frozen features transfer?\n\n{table(accuracy)}")
    say(_answer(accuracy))
    say(
        f"\nprecompute {_speed(result['precompute_rows_per_second'])} rows/s, "
        f"train {_speed(result['train_images_per_second'])} img/s, everything {result['seconds']:.0f} s"
    )
    say(
        f"page {root}/report/index.html · table {root}/table.md · images {root}/samples.png · store {root}/store · "
        f"student {root}/consolidate/student.safetensors"
    )


def table(accuracy: dict[str, dict[str, float]]) -> str:
    """The accuracies as a Markdown table: one row per representation, related and unrelated tasks apart."""
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
