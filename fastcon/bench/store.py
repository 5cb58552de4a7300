"""Reading a store in training order against the raw bytes, and what every codec costs and keeps."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcon.bench import Row, Say, compared, interleave
from fastcon.bench.fixtures import manifest_of
from fastcon.distill.loader import LogitCache
from fastcon.distill.schedule import Schedule
from fastcon.store.codec import codec
from fastcon.store.format import Recipe, TeacherRecord
from fastcon.store.parts import opened
from fastcon.store.reader import Store
from fastcon.store.writer import open_for_writing

CODECS = ("float16", "uint8", "top10", "top100")


def bench(
    say: Say, logits_of: str | None = None, rows: int = 24 * 1024, classes: int = 1500, rounds: int = 7
) -> list[Row]:
    """Rows/s of checked chunks in training order, and gathered into batches, against reading the files' bytes.

    Then, for each codec, on the teachers' logits of the store `logits_of` (default: random ones): bytes per row, KL(teacher
    || decoded) at T = 2 in nats, mean and worst, and the share of rows with the same argmax.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "store"
        manifest = manifest_of(rows)
        with open_for_writing(str(path), manifest, Recipe(size=64), 1, {}) as writer:
            for kind in CODECS[:2]:
                described = tuple(str(k) for k in range(classes))
                record = TeacherRecord("teacher", weights=kind, classes=described, logits=kind)
                writer.add_teacher(kind, record, None)
                for chunk in range(writer.chunks):
                    start, stop = writer.chunk_range(chunk)
                    random = 3 * torch.randn(stop - start, classes, generator=torch.Generator().manual_seed(chunk))
                    parts = codec(kind).encode(random)
                    writer.write(kind, 0, chunk, {part: values.numpy() for part, values in parts.items()})
        rows_read = [row for kind in CODECS[:2] for row in _speed(path, kind, rounds, say)]
    logits = _real_logits(logits_of) if logits_of else {"random": 3 * torch.randn(4096, 1000)}
    return rows_read + [_quality(name, kind, values, say) for name, values in logits.items() for kind in CODECS]


def _speed(path: Path, kind: str, rounds: int, say: Say) -> list[Row]:
    store = Store(path)
    files = [
        path / "teachers" / kind / part / f"c/0/{chunk}/0"
        for chunk in range(store.chunks)
        for part in store.codec(kind).parts(len(store.teachers[kind].classes))
    ]
    buffer = bytearray(max(file.stat().st_size for file in files))

    def raw() -> None:
        for file in files:
            with open(file, "rb", buffering=0) as opened:
                opened.readinto(buffer)

    def chunks() -> None:
        for chunk in range(store.chunks):
            store.parts(kind, 0, chunk)

    def batches() -> None:
        schedule = Schedule(store.rows, 1, store.recipe.chunk_rows, 256, 8, 0)
        cache = LogitCache(store, [kind], keep=16)
        for rows in schedule.epoch(0):
            cache.stacked(0, rows)

    def rate(work: Callable[[], None]) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            work()
            return store.rows / (time.perf_counter() - started)

        return run

    rates = interleave({"raw": rate(raw), "chunks": rate(chunks), "batches": rate(batches)}, rounds)
    case = {"case": f"{kind}, {len(store.teachers[kind].classes)} classes"}
    rows = [
        compared("store_read", rates["chunks"], rates["raw"], "rows/s", "cpu", **case),
        compared("store_read, in batches of 256", rates["batches"], rates["raw"], "rows/s", "cpu", **case),
    ]
    for row in rows:
        say(f"{row['name']} ({row['case']}): {row['ours']:,.0f} rows/s, {row['ratio']:.0%} of the bare bytes")
    return rows


def _real_logits(path: str) -> dict[str, torch.Tensor]:
    """The first view of every teacher of a store that keeps floats, at most 16 chunks of it."""
    store = opened(path)
    kept = [name for name in store.teachers if store.teachers[name].logits in ("float16", "float32")]
    logits = {}
    for name in kept:
        chunks = [store.logits(name, 0, chunk) for chunk in range(min(store.chunks, 16))]
        logits[name] = torch.from_numpy(np.concatenate(chunks)).float()
    return logits


def _quality(name: str, kind: str, logits: torch.Tensor, say: Say) -> Row:
    chosen, classes = codec(kind), logits.shape[1]
    parts = {part: rows.numpy() for part, rows in chosen.encode(logits).items()}
    decoded = torch.from_numpy(chosen.decode(parts, classes).astype(np.float32))
    p, q = ((z.double() / 2).log_softmax(1) for z in (logits, decoded))
    kl = (p.exp() * (p - q)).sum(1)
    same = (logits.argmax(1) == decoded.argmax(1)).double().mean().item()
    ours, theirs = chosen.row_bytes(classes), codec("float16").row_bytes(classes)
    row: dict[str, Any] = compared("codec", [float(ours)], [float(theirs)], "bytes per row", "cpu")
    row |= {"case": f"{kind}, {name}, {classes} classes", "kl_mean": kl.mean().item(), "kl_worst": kl.max().item()}
    row |= {"same_argmax": same, "n": len(logits)}
    say(f"{row['case']}: {ours} bytes, KL {row['kl_mean']:.1e} (worst {row['kl_worst']:.1e}), argmax {same:.2%}")
    return row
