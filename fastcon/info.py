"""A store or a run, described on one screen."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcon.distill import advice
from fastcon.errors import FastconError
from fastcon.run import RUN_WEIGHTS

if TYPE_CHECKING:
    from fastcon.store.format import Recipe, TeacherRecord

WAITS = ("pixels", "logits", "turns", "host")


def describe(path: str) -> tuple[dict[str, Any], str]:
    """Facts about a STORE or a RUN, and the same as text. Raises FastconError for anything else."""
    if (Path(path) / "config.json").is_file():
        return _run(Path(path))
    if (Path(path) / "parts.json").is_file():
        return _store_in_parts(path)
    if "://" in path or (Path(path) / "zarr.json").is_file():
        return _store(path)
    raise FastconError(f"{path} is neither a store (no zarr.json) nor a run (no config.json)")


def _store(path: str) -> tuple[dict[str, Any], str]:
    from fastcon.store.format import FORMAT
    from fastcon.store.reader import Store

    store = Store(path)
    record = store.record
    share = record.images.share
    lines = [
        f"{path}: store of format {FORMAT}, {store.rows:,} images x {store.views} views at {store.recipe.size} px",
        f"  images    digest {record.images.digest[:12]}, from {', '.join(record.images.sources)}"
        + (f", share {share.number} of {share.parts}" if share else ""),
        *_how(store.recipe, record.pipeline),
    ]
    if store.recipe.bake is not None:
        lines.append(f"  baked     JPEG quality {store.recipe.bake}, {store.baked().mean():.0%} done")
    done = {name: float(store.done(name).mean()) for name in store.teachers}
    lines += [_teacher(name, store.teachers[name], share) for name, share in done.items()]
    facts = {k: v for k, v in record.json().items() if k != "view_digests"}
    return {"kind": "store", "done": done, **facts}, "\n".join(lines)


def _store_in_parts(path: str) -> tuple[dict[str, Any], str]:
    from fastcon.store.format import FORMAT
    from fastcon.store.parts import read

    binding = read(path)
    bound = list(binding.bound.values())
    rows, views = sum(part.rows for part in bound), min((part.views for part in bound), default=0)
    made = "" if len(bound) == binding.count else f", {len(bound)} of them made"
    lines = [
        f"{path}: store of format {FORMAT} in {binding.count} parts{made}, {rows:,} images x {views} views at "
        f"{binding.recipe.size} px",
        *(f"  images    in {each.parts} parts, from {', '.join(each.sources)}" for each in binding.sets),
        *_how(binding.recipe, binding.pipeline),
    ]
    done = {name: sum(part.done.get(name, 0) >= views for part in bound) / binding.count for name in binding.teachers}
    lines += [_teacher(name, binding.teachers[name], share) for name, share in done.items()]
    facts = {"parts": binding.count, "parts_made": len(bound), "images": rows, "views": views, "done": done}
    teachers = {name: teacher.json() for name, teacher in binding.teachers.items()}
    about = {"recipe": binding.recipe.record(), "pipeline": binding.pipeline, "teachers": teachers}
    return {"kind": "store", **facts, **about}, "\n".join(lines)


def _how(recipe: Recipe, pipeline: dict[str, Any]) -> list[str]:
    low, high = recipe.scale
    return [
        f"  views     seed {recipe.seed}, crops of {low:g} to {high:g} of the area, chunks of {recipe.chunk_rows} rows",
        f"  pixels    {', '.join(f'{k} {v}' for k, v in pipeline.items() if v is not None)}",
    ]


def _teacher(name: str, teacher: TeacherRecord, done: float) -> str:
    from fastcon.models.origin import is_random

    weights = " with random weights" if teacher.spec and is_random(teacher.spec) else ""
    return (
        f"  {teacher.role:11}{name}: {len(teacher.classes)} classes, {teacher.architecture}{weights}, "
        f"{teacher.size} px, {teacher.logits} logits, {teacher.precision}, {done:.0%} done"
    )


def _run(path: Path) -> tuple[dict[str, Any], str]:
    config = json.loads((path / "config.json").read_text())
    if not isinstance(config, dict) or "command" not in config:
        raise FastconError(f"{path} is no run of fastcon's: its config.json names no command")
    finished = any((path / name).exists() for name in RUN_WEIGHTS)
    files = [path / name for name in ("metrics.jsonl", "metrics-final.jsonl") if (path / name).exists()]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    lines = [f"{path}: {config['command']} run, {'finished' if finished else 'not finished: run its command again'}"]
    shown = (
        "method",
        "init",
        "student",
        "recipe",
        "epochs",
        "batch_size",
        "lr_backbone",
        "lr_heads",
        "lr_grid",
        "temperature",
        "balance",
        "weight",
        "precision",
        "batch_norm",
        "threads",
        "seed",
    )
    values = {key: config[key] for key in shown if config.get(key) is not None}
    if "weight" in values:
        pairs = [pair if isinstance(pair, str) else f"{pair[0]}={pair[1]:g}" for pair in values["weight"]]
        values["weight"] = " ".join(pairs)
    lines.append("  " + ", ".join(f"{key} {value}" for key, value in values.items()))
    if rows and rows[0].get("step") == 0:
        [(name, head)] = rows[0]["heads"].items()
        lines.append(
            f"  start: the student agrees with {name} on {head['agreement']:.1%} of {rows[0]['images']} images "
            f"(KL {head['kl']:.2g})"
        )
    if rows:
        last = rows[-1]
        lines.append(f"  last row of metrics: epoch {last['epoch']}, loss {last['loss']:.4f}")
        lines += [
            f"    {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in head.items())
            for name, head in last.get("heads", {}).items()
        ]
    waits = _waits(path)
    if waits:
        lines += [f"  {line}" for line in diagnosis(waits, config)]
    result = path / "result.json"
    if result.exists():
        lines.append(f"  accuracy {json.loads(result.read_text())['accuracy']:.2%} on its test images")
    facts = {"kind": "run", "finished": finished, "config": config, "last": rows[-1] if rows else None, "waits": waits}
    return facts, "\n".join(lines)


def _waits(path: Path) -> dict[str, Any] | None:
    """Shares of a run's time: pixels, logits, turns, host, step, and what was tried to shorten it; None where nothing was measured."""
    from fastcon.run import Waits

    file = path / Waits.FILE
    if not file.exists():
        return None
    spans = []
    for line in file.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a run that was killed may leave half a line
            spans.append(json.loads(line))
    seconds = sum(span["seconds"] for span in spans)
    if not seconds:
        return None
    shares = {part: sum(span.get(part, 0.0) for span in spans) / seconds for part in WAITS}
    step = {"step": 1 - sum(shares.values()), "seconds": seconds}
    tried = [span["tried"] for span in spans if "tried" in span]
    return {**shares, **step, **({"tried": tried[-1]} if tried else {})}


def diagnosis_of(run: str) -> list[str]:
    """Where the time of a finished run went, and what to change."""
    waits = _waits(Path(run))
    return diagnosis(waits, json.loads(Path(run, "config.json").read_text())) if waits else []


def diagnosis(waits: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Where a run's time went, and what to change: the largest wait above a tenth, else the step itself."""
    remedies = {
        "pixels": "`threads` for as many decoding threads as there are cores"
        + ("" if config["store"]["recipe"].get("bake") else "; precompute with `bake`, to decode small views"),
        "logits": "a faster disk, or precompute with `logits` uint8, which is half of float16",
        "host": "a larger `log_every` or `checkpoint_minutes`",
        "turns": "other fastcon processes compute here, too: let them end first",
        "step": advice.say(waits["tried"]) if "tried" in waits else "a faster device: the step itself takes the time",
    }
    worst = max(WAITS, key=lambda part: waits[part])
    worst = worst if waits[worst] > 0.1 else "step"
    shares = ", ".join(f"{waits[part]:.0%} {part}" for part in (*WAITS, "step"))
    return [f"time: {shares} of {waits['seconds']:.0f} s", f"to be faster: {remedies[worst]}"]
