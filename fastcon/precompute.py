"""Images + views → the logits of every teacher, in a store. Each view of an image is decoded once for all of them.

Chunks are the unit of work: a chunk of rows is decoded in batches that never straddle it, shown to the teachers
that still lack it, and written by a background thread while the next is computed. Running it again resumes;
asking for more views or another teacher computes just those.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastcon import bake, models, pipeline, views
from fastcon import store as stores
from fastcon.codec import Parts, codec
from fastcon.errors import FastconError, Interrupted
from fastcon.machine import Cores
from fastcon.manifest import Manifest
from fastcon.models import Classifier
from fastcon.pipeline import Request
from fastcon.replay import Replay
from fastcon.run import stop_signals


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model to be run over the views: its name in the store, MODEL spec, network and whether it is the generalist."""

    name: str
    spec: str
    model: Classifier
    generalist: bool = False

    def __post_init__(self) -> None:
        if len(self.model.heads) > 1:
            heads = ", ".join(head.name for head in self.model.heads)
            raise FastconError(
                f"{self.spec} has several heads ({heads}): choose one, as {self.spec}?head={heads.split(',')[0]}"
            )


@dataclasses.dataclass(frozen=True)
class Settings(pipeline.Options):
    """How to decode and compute: besides `Options`, the precision of the networks and the codec of the logits."""

    precision: str = "float32"
    logits: str = "float16"


Progress = Callable[[int, int], None]


def precompute(
    path: str,
    manifest: Manifest,
    teachers: list[Teacher],
    recipe: stores.Recipe,
    view_count: int,
    settings: Settings,
    progress: Progress | None = None,
) -> int:
    """Fill a store; returns the number of rows computed (0: all were there). progress gets (rows done, rows to do).

    Raises FastconError for a store, teacher or image set that does not go with what is recorded, Interrupted after a
    signal: finished chunks are then written.
    """
    check_names([teacher.name for teacher in teachers])
    started = time.perf_counter()
    used = pipeline.settings(settings.loader, settings.device)
    with stores.open_for_writing(path, manifest, recipe, view_count, used) as store, stop_signals() as stop:
        if recipe.bake is not None:
            unbaked = bake.missing(store, view_count)
            if unbaked:
                bake.bake(store, manifest, unbaked, settings, progress, stop)
        if store.record["samples_digest"] is None:
            stores.set_samples(store, decode_samples(store, manifest, settings))
        else:
            check_pixels(store, manifest, settings, exact=True)
        for teacher in teachers:
            weights = teacher.model.export(teacher.model.heads[0].name) if teacher.generalist else None
            store.add_teacher(teacher.name, _record(teacher, settings), weights)
        missing = {teacher.name: ~store.done(teacher.name)[:view_count] for teacher in teachers}
        work = [
            (view, chunk)
            for view in range(view_count)
            for chunk in range(store.chunks)
            if any(lacks[view, chunk] for lacks in missing.values())
        ]
        if work:
            fill(store, manifest, teachers, missing, work, settings, progress, stop)
        rows = sum(b - a for a, b in (store.chunk_range(chunk) for _, chunk in work))
        if rows and not stores.is_url(path):
            seconds = time.perf_counter() - started
            with open(os.path.join(path, "precompute.log"), "a") as log:
                log.write(f"{', '.join(missing)}: {rows} rows in {seconds:.1f} s ({rows / seconds:.0f} rows/s)\n")
        return rows


def decode_samples(store: stores.Store, manifest: Manifest | None, options: pipeline.Options) -> NDArray[np.uint8]:
    """Decode the store's sample rows: uint8 [k, size, size, 3]."""
    replay = Replay(store, manifest)
    rows = stores.sample_rows(store)
    size = store.recipe.size
    options = dataclasses.replace(options, batch_size=len(rows))
    [pixels] = pipeline.decode(replay.images, [replay.request(0, rows)], [size], options)
    return pixels[size].permute(0, 2, 3, 1).contiguous().cpu().numpy()


def check_pixels(store: stores.Store, manifest: Manifest | None, options: pipeline.Options, exact: bool) -> str | None:
    """Decode the sample rows again and compare them with the stored pixels.

    None: equal. A warning to show: within 0.5 of 255 on average. Raises FastconError beyond, or with `exact` for
    any difference.
    """
    _, stored = store.samples()
    difference = float(np.abs(decode_samples(store, manifest, options).astype(np.int16) - stored).mean())
    if difference == 0:
        return None
    was, now = store.record["pipeline"], pipeline.settings(options.loader, options.device)
    changed = ", ".join(
        f"{key} {was.get(key)} → {now.get(key)}" for key in sorted({*was, *now}) if was.get(key) != now.get(key)
    )
    what = (
        f"images decode differently from when {store.path} was made: {difference:.3f} of 255 on average over "
        f"{len(stored)} samples ({changed or 'same settings'})"
    )
    if exact or difference > 0.5:
        raise FastconError(f"{what}: use the loader, device and versions that made it, or make a new store")
    return what


def check_names(names: Sequence[str]) -> None:
    """Raise FastconError for a name that is used twice or cannot name a teacher."""
    for name in names:
        if names.count(name) > 1:
            raise FastconError(f"teacher name {name!r} is given twice: every teacher needs a name of its own")
        stores.check_name(name)


class Measured(NamedTuple):
    """What the first few batches took here."""

    rate: float
    """Rows a second of decoding, baking and running the teachers."""
    baked: float
    """Bytes a row of baked views; 0 without."""


def measure(manifest: Manifest, teachers: list[Teacher], recipe: stores.Recipe, settings: Settings) -> Measured:
    """Time the first few batches, after one to warm up."""
    for teacher in teachers:
        teacher.model.on(settings.device)
    indices = np.arange(5 * settings.batch_size) % len(manifest)
    boxes = views.boxes(
        recipe.seed, manifest.ids[indices], 0, manifest.widths[indices], manifest.heights[indices], recipe.scale
    )
    flips = views.flips(recipe.seed, manifest.ids[indices], 0)
    slices = [slice(at, at + settings.batch_size) for at in range(0, len(indices), settings.batch_size)]
    requests = [Request(indices[rows], boxes[rows], flips[rows]) for rows in slices]
    start, baked = 0.0, 0
    sizes = [recipe.size, *(teacher.model.size for teacher in teachers)]
    for k, pixels in enumerate(pipeline.decode(manifest, requests, sizes, settings)):
        for teacher in teachers:
            run_teacher(teacher.model, pixels[teacher.model.size], settings)
        if recipe.bake is not None:
            crops = pixels[recipe.size].permute(0, 2, 3, 1).cpu().numpy()
            baked += sum(len(bake.member(0, bake.encode(crop, recipe.bake))) for crop in crops)
        if k == 0:
            start = time.perf_counter()
    rate = (len(indices) - settings.batch_size) / (time.perf_counter() - start)
    return Measured(rate, baked / len(indices))


def _record(teacher: Teacher, settings: Settings) -> dict[str, Any]:
    model = teacher.model
    return {
        "role": "generalist" if teacher.generalist else "teacher",
        "spec": teacher.spec,
        "architecture": model.architecture,
        "weights": model.digest(),
        "size": model.size,
        "mean": list(model.mean),
        "std": list(model.std),
        "classes": list(model.heads[0].classes),
        "kind": model.heads[0].kind,
        "logits": settings.logits,
        "precision": settings.precision,
        "batch_size": settings.batch_size,
        "device": settings.device.type,
    }


Work = list[tuple[int, int]]


def fill(
    store: stores.StoreWriter,
    manifest: Manifest,
    teachers: list[Teacher],
    missing: dict[str, NDArray[np.bool_]],
    work: Work,
    settings: Settings,
    progress: Progress | None = None,
    stop: Sequence[int] = (),
) -> None:
    """Compute the (view, chunk) pairs of `work` for the teachers whose `missing` [V, chunks] says so, and write them.

    Raises Interrupted when a signal's number has come into `stop`: what was finished is then written.
    """
    for teacher in teachers:
        teacher.model.on(settings.device)
    batches = [(view, chunk, rows) for view, chunk in work for rows in batches_of(store, chunk, settings.batch_size)]
    total, done = sum(rows.stop - rows.start for *_, rows in batches), 0
    replay = Replay(store, manifest)
    requests = (replay.request(view, rows) for view, _, rows in batches)
    decoded = pipeline.decode(replay.images, requests, [teacher.model.size for teacher in teachers], settings)
    pieces: dict[str, list[Parts]] = {}
    with _Writer(store) as writer, Cores(settings.threads, settings.device) as cores:
        for (view, chunk, rows), pixels in zip(batches, decoded, strict=True):
            for teacher in teachers:
                if missing[teacher.name][view, chunk]:
                    with cores.turn():
                        parts = run_teacher(teacher.model, pixels[teacher.model.size], settings)
                    _check_finite(parts, teacher, store, manifest, view, rows)
                    pieces.setdefault(teacher.name, []).append(parts)
            if rows.stop == store.chunk_range(chunk)[1]:
                whole = {n: {p: np.concatenate([f[p] for f in found]) for p in found[0]} for n, found in pieces.items()}
                writer.put([(name, view, chunk, parts) for name, parts in whole.items()])
                pieces = {}
            done += rows.stop - rows.start
            if progress:
                progress(done, total)
            if stop:
                break
    if stop and done < total:
        raise Interrupted(f"stopped by signal {stop[0]} after {done} of {total} rows; run the same command to resume")


def batches_of(store: stores.Store, chunk: int, batch_size: int) -> list[slice]:
    """A chunk's rows in batches; the last may be shorter, none reaches into another chunk."""
    start, stop = store.chunk_range(chunk)
    return [slice(at, min(at + batch_size, stop)) for at in range(start, stop, batch_size)]


@torch.inference_mode()
def run_teacher(model: Classifier, pixels: torch.Tensor, settings: Settings) -> Parts:
    """Raw logits of one batch, computed by heads in float32, in the parts that are stored."""
    with models.precision_context(settings.precision, settings.device):
        logits = model(pixels)
    return {part: rows.cpu().numpy() for part, rows in codec(settings.logits).encode(logits).items()}


def _check_finite(
    parts: Parts, teacher: Teacher, store: stores.Store, manifest: Manifest, view: int, rows: slice
) -> None:
    for part in parts.values():
        bad = np.flatnonzero(~np.isfinite(part).all(axis=1))
        if len(bad):
            image = manifest.name(int(store.view(view).order[rows.start + bad[0]]))
            raise FastconError(
                f"teacher {teacher.name!r} gives NaN, infinite or {part.dtype}-overflowing logits for image "
                f"{image!r} (view {view}): check its weights, or try --precision float32 --logits float32"
            )


class _Writer:
    """Writes a finished chunk in a thread of its own while the next is computed; its error is raised at the next `put`.

    So a kill costs at most two chunks: the one being written and the one being computed.
    """

    def __init__(self, store: stores.StoreWriter) -> None:
        self._store = store
        self._queue: queue.Queue[Any] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def put(self, items: list[tuple[str, int, int, Parts]]) -> None:
        """Hand over a chunk of every teacher, when the one before is written."""
        self._queue.join()
        self._raise()
        self._queue.put(items)

    def __exit__(self, *exception: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if exception[0] is None:
            self._raise()

    def _raise(self) -> None:
        if isinstance(self._error, OSError):
            raise FastconError(
                f"{self._store.path} cannot be written ({self._error.strerror}): free space, then run the "
                "same command again, it resumes"
            ) from self._error
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (items := self._queue.get()) is not None:
            try:
                for item in items if self._error is None else []:
                    self._store.write(*item)
            except BaseException as error:
                self._error = error
            self._queue.task_done()
