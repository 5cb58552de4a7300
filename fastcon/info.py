"""What a store or a run is, in a screen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastcon.errors import FastconError


def describe(path: str) -> tuple[dict[str, Any], str]:
    """Facts and a text about a STORE or a RUN. Raises FastconError for anything else."""
    if (Path(path) / "config.json").is_file():
        return _run(Path(path))
    if "://" in path or (Path(path) / "zarr.json").is_file():
        return _store(path)
    raise FastconError(f"{path} is neither a store (no zarr.json) nor a run (no config.json)")


def _store(path: str) -> tuple[dict[str, Any], str]:
    from fastcon.store import Store

    store = Store(path)
    record, recipe = store.record, store.recipe
    low, high = recipe.scale
    lines = [
        f"{path}: store of format {record['format']}, {store.rows:,} images x {store.views} views at {recipe.size} px",
        f"  images    digest {record['images']['digest'][:12]}, from {', '.join(record['images']['sources'])}",
        f"  views     seed {recipe.seed}, crops of {low:g} to {high:g} of the area, chunks of {recipe.chunk_rows} rows",
        f"  pixels    {', '.join(f'{k} {v}' for k, v in record['pipeline'].items() if v is not None)}",
    ]
    done = {}
    for name, teacher in store.teachers.items():
        finished = store.done(name)
        done[name] = float(finished.mean())
        lines.append(
            f"  {teacher['role']:11}{name}: {len(teacher['classes'])} classes, {teacher['architecture']}, "
            f"{teacher['size']} px, {teacher['logits']} logits, {teacher['precision']}, {done[name]:.0%} done"
        )
    return {"kind": "store", "done": done, **{k: v for k, v in record.items() if k != "view_digests"}}, "\n".join(lines)


def _run(path: Path) -> tuple[dict[str, Any], str]:
    from fastcon.models import RUN_WEIGHTS

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
        "epochs",
        "batch_size",
        "lr_backbone",
        "lr_heads",
        "lr_grid",
        "temperature",
        "balance",
        "precision",
        "seed",
    )
    lines.append("  " + ", ".join(f"{key} {config[key]}" for key in shown if config.get(key) is not None))
    if rows:
        last = rows[-1]
        lines.append(f"  last row of metrics: epoch {last['epoch']}, loss {last['loss']:.4f}")
        lines += [
            f"    {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in head.items())
            for name, head in last.get("heads", {}).items()
        ]
    result = path / "result.json"
    if result.exists():
        lines.append(f"  accuracy {json.loads(result.read_text())['accuracy']:.2%} on its test images")
    return {"kind": "run", "finished": finished, "config": config, "last": rows[-1] if rows else None}, "\n".join(lines)
