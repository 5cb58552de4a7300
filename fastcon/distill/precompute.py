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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastcon.data import decode, views
from fastcon.data.decode import Request
from fastcon.data.manifest import Manifest
from fastcon.distill.options import PrecomputeOptions
from fastcon.distill.pending import Pending, one_late
from fastcon.errors import FastconError, Interrupted
from fastcon.machine import Machine
from fastcon.models import frozen
from fastcon.models.classifier import Classifier
from fastcon.models.frozen import Frozen
from fastcon.models.load import load
from fastcon.models.origin import taught
from fastcon.run import stop_signals
from fastcon.store import bake
from fastcon.store.codec import Parts, codec
from fastcon.store.format import Recipe, TeacherRecord, check_name
from fastcon.store.pixels import check_pixels, decode_samples
from fastcon.store.reader import Store
from fastcon.store.replay import Replay
from fastcon.store.writer import StoreWriter, open_for_writing, set_samples


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model to be run over the views: its name in the store, MODEL spec, network and whether it is the generalist."""

    name: str
    spec: str
    model: Classifier
    generalist: bool = False
    _runs: dict[Any, Frozen] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def run(self, machine: Machine, batch_size: int, how: str) -> Frozen:
        """The network made ready to run, once for all parts of a store."""
        key = (machine, batch_size, how)
        if key not in self._runs:
            self._runs[key] = Frozen(self.model, machine, batch_size, how)
        return self._runs[key]

    def __post_init__(self) -> None:
        if len(self.model.heads) > 1:
            heads = ", ".join(head.name for head in self.model.heads)
            raise FastconError(
                f"{self.spec} has several heads ({heads}): choose one, as {self.spec}?head={heads.split(',')[0]}"
            )
        if self.generalist and self.model.heads[0].kind == "embedding":
            raise FastconError(
                f"{self.spec} is an embedding, and the generalist a classifier, whose head is the student's first: give it "
                f"as a `teacher` {self.name}={self.spec}"
            )


ENLARGED, BLURRED = 2, 1 / 3
"""By how much a crop may be enlarged, and what share of crops may exceed that, before a warning."""
LARGER_CROPS = 0.35, 1.0
"""Shares of the area that were better on photos of 72 px at 64 and 96 px: see benchmarks/proof."""
Progress = Callable[[int, int], None]
Say = Callable[[str], None]


def precompute(
    path: str,
    manifest: Manifest,
    teachers: list[Teacher],
    recipe: Recipe,
    view_count: int,
    machine: Machine,
    batch_size: int = 128,
    logits: str = "float16",
    progress: Progress | None = None,
    compile: str | Mapping[str, str] = "auto",
    say: Say = lambda line: None,
) -> int:
    """Fill a store; returns the number of rows computed (0: nothing was missing). progress gets (rows done, rows to do).

    logits: the codec's name. Every teacher is shown the first `view_count` views of each image of the manifest.
    compile: "none", "default" (see `models.frozen`), or "auto", what the store has, else what pays for itself; or which of
    the two for each teacher. Of the parts of a store the first keeps the generalist's weights: see `distill.parts`.

    Raises FastconError for a store, teacher or image set that does not go with what is recorded, Interrupted after a
    signal: finished chunks are then written.
    """
    check_names([teacher.name for teacher in teachers])
    started = time.perf_counter()
    machine = machine.settled()
    used = decode.settings(machine)
    with open_for_writing(path, manifest, recipe, view_count, used) as store, stop_signals() as stop:
        if recipe.bake is not None:
            unbaked = bake.missing(store, view_count)
            if unbaked:
                bake.bake(store, manifest, unbaked, machine, batch_size, progress, stop)
        if store.record.samples_digest is None:
            set_samples(store, decode_samples(store, manifest, machine))
        else:
            check_pixels(store, manifest, machine, exact=True)
        first = manifest.share is None or manifest.share.number == 0
        for teacher in teachers:
            weights = teacher.model.export(teacher.model.heads[0].name) if teacher.generalist and first else None
            if isinstance(compile, Mapping):
                how = compile[teacher.name]
            else:
                how = way(store, teacher, machine, batch_size, compile, len(manifest) * view_count, say)
            store.add_teacher(teacher.name, record_of(teacher, machine, batch_size, logits, how), weights)
        missing = {teacher.name: ~store.done(teacher.name)[:view_count] for teacher in teachers}
        work = [
            (view, chunk)
            for view in range(view_count)
            for chunk in range(store.chunks)
            if any(lacks[view, chunk] for lacks in missing.values())
        ]
        warning = enlarged(manifest, recipe)
        if warning and work:
            say(f"warning: {warning}")
        if work:
            fill(store, manifest, teachers, missing, work, machine, batch_size, progress, stop)
        rows = sum(b - a for a, b in (store.chunk_range(chunk) for _, chunk in work))
        if rows:
            seconds = time.perf_counter() - started
            with open(os.path.join(store.path, "precompute.log"), "a") as log:
                log.write(f"{', '.join(missing)}: {rows} rows in {seconds:.1f} s ({rows / seconds:.0f} rows/s)\n")
        return rows


def enlarged(manifest: Manifest, recipe: Recipe) -> str | None:
    """Warning if many crops have far fewer pixels than the view that is made of them."""
    some = slice(0, 4096)
    ids, widths, heights = manifest.ids[some], manifest.widths[some], manifest.heights[some]
    boxes = views.boxes(recipe.seed, ids, 0, widths, heights, recipe.scale, recipe.ratio)
    share = float((boxes[:, 2:].min(1) < recipe.size / ENLARGED).mean())
    if share <= BLURRED:
        return None
    low, high = LARGER_CROPS
    crops = f", or larger crops, as `scale` {low:g} {high:g}" if recipe.scale[0] < low else ""
    return (
        f"{share:.0%} of the crops are enlarged more than {ENLARGED} times to {recipe.size} px and hold little detail: give "
        f"larger images or a smaller `size`{crops}"
    )


def load_teachers(generalist: tuple[str, str] | None, teachers: Sequence[tuple[str, str]], size: int) -> list[Teacher]:
    """Networks of (name, MODEL) pairs, the generalist's first; size: input size where a MODEL names none."""
    named = [*([generalist] if generalist else []), *teachers]
    check_names([name for name, _ in named])
    return [Teacher(name, spec, load(spec, size=size), (name, spec) == generalist) for name, spec in named]


def estimate(
    manifest: Manifest, teachers: list[Teacher], options: PrecomputeOptions, views: int, machine: Machine
) -> dict[str, Any]:
    """The cost of a store: images, rows, bytes, and seconds at the rate of a few batches measured here."""
    rate, baked = measure(manifest, teachers, options, machine)
    rows, stored = len(manifest) * views, codec(options.logits)
    row_bytes = round(baked + sum(stored.row_bytes(len(t.model.heads[0].classes)) for t in teachers))
    return {
        "images": len(manifest),
        "rows": rows,
        "bytes": rows * row_bytes,
        "rows_per_second": rate,
        "seconds": rows / rate,
    }


def check_names(names: Sequence[str]) -> None:
    """Raise FastconError for a name that is used twice or cannot name a teacher."""
    for name in names:
        if names.count(name) > 1:
            raise FastconError(f"teacher name {name!r} is given twice: every teacher needs a name of its own")
        check_name(name)


class Measured(NamedTuple):
    """Times of the first few batches here."""

    rate: float
    """Rows per second of decoding, baking and running the teachers."""
    baked: float
    """Bytes per row of baked views; 0 without."""


def measure(manifest: Manifest, teachers: list[Teacher], options: PrecomputeOptions, machine: Machine) -> Measured:
    """Time the first few batches, after one to warm up; networks are compiled only where that is asked for."""
    machine, recipe, batch_size = machine.settled(), options.recipe, options.batch_size
    how = frozen.PLAIN if options.compile == "auto" else options.compile
    runs = {teacher.name: Frozen(teacher.model, machine, batch_size, how) for teacher in teachers}
    indices = np.arange(5 * batch_size) % len(manifest)
    boxes = views.boxes(
        recipe.seed, manifest.ids[indices], 0, manifest.widths[indices], manifest.heights[indices], recipe.scale
    )
    flips = views.flips(recipe.seed, manifest.ids[indices], 0)
    slices = [slice(at, at + batch_size) for at in range(0, len(indices), batch_size)]
    requests = [Request(indices[rows], boxes[rows], flips[rows]) for rows in slices]
    start, baked = 0.0, 0
    sizes = [recipe.size, *(teacher.model.size for teacher in teachers)]
    for k, pixels in enumerate(decode.decode(manifest, requests, sizes, batch_size, machine)):
        for teacher in teachers:
            run = runs[teacher.name]
            Pending(run(pixels[run.size]), options.logits).parts()
        if recipe.bake is not None:
            crops = pixels[recipe.size].permute(0, 2, 3, 1).cpu().numpy()
            baked += sum(len(bake.member(0, bake.encode(crop, recipe.bake))) for crop in crops)
        if k == 0:
            start = time.perf_counter()
    rate = (len(indices) - batch_size) / (time.perf_counter() - start)
    return Measured(rate, baked / len(indices))


def way(
    store: StoreWriter | None, teacher: Teacher, machine: Machine, batch_size: int, compile: str, rows: int, say: Say
) -> str:
    """How a teacher is run: as requested, as its stored rows were made, or whichever is faster for `rows`."""
    if compile != "auto":
        return compile
    if store and teacher.name in store.teachers and store.done(teacher.name).any():
        return store.teachers[teacher.name].compile or frozen.PLAIN
    return frozen.choose(teacher.model, machine, batch_size, rows, say)


def record_of(teacher: Teacher, machine: Machine, batch_size: int, logits: str, how: str) -> TeacherRecord:
    """What a store records of a teacher that is run on a settled machine, compiled or not as `how` says."""
    model = teacher.model
    return TeacherRecord(
        role="generalist" if teacher.generalist else "teacher",
        spec=teacher.spec,
        architecture=model.architecture,
        weights=model.digest(),
        size=model.size,
        mean=model.mean,
        std=model.std,
        classes=model.heads[0].classes,
        kind=model.heads[0].kind,
        logits=logits,
        precision=machine.precision,
        batch_size=batch_size,
        device=machine.target.type,
        compile=None if how == frozen.PLAIN else how,
        **({} if teacher.generalist else taught(teacher.spec)),
    )


Work = list[tuple[int, int]]
Planned = tuple[int, int, slice]
"""View, chunk, rows."""


def fill(
    store: StoreWriter,
    manifest: Manifest,
    teachers: list[Teacher],
    missing: dict[str, NDArray[np.bool_]],
    work: Work,
    machine: Machine,
    batch_size: int,
    progress: Progress | None = None,
    stop: Sequence[int] = (),
) -> None:
    """Compute the (view, chunk) pairs of `work` for the teachers whose `missing` [V, chunks] says so, and write them.

    Raises Interrupted when a signal's number has come into `stop`: what was finished is then written.
    """
    planned = [(view, chunk, rows) for view, chunk in work for rows in batches_of(store, chunk, batch_size)]
    total, done = sum(rows.stop - rows.start for *_, rows in planned), 0
    replay = Replay(store, manifest)
    requests = (replay.request(view, rows) for view, _, rows in planned)
    decoded = decode.decode(replay.images, requests, [teacher.model.size for teacher in teachers], batch_size, machine)
    pieces: dict[str, list[Parts]] = {}
    with _Writer(store) as writer, machine.computing() as cores:
        runs = {
            teacher.name: teacher.run(machine, batch_size, store.teachers[teacher.name].compile or frozen.PLAIN)
            for teacher in teachers
        }

        def started() -> Iterator[tuple[Planned, dict[str, Pending]]]:
            """Every batch, launched on all teachers that lack it before the first is waited for."""
            for plan, pixels in zip(planned, decoded, strict=True):
                with cores.turn():
                    batch = {
                        name: Pending(run(pixels[run.size]), store.teachers[name].logits)
                        for name, run in runs.items()
                        if missing[name][plan[:2]]
                    }
                yield plan, batch

        for (view, chunk, rows), batch in one_late(started()):
            for name, pending in batch.items():
                _check_finite(pending, name, store, manifest, view, rows)
                pieces.setdefault(name, []).append(pending.parts())
            if rows.stop == store.chunk_range(chunk)[1]:
                writer.put([(name, view, chunk, _joined(batches)) for name, batches in pieces.items()])
                pieces = {}
            done += rows.stop - rows.start
            if progress:
                progress(done, total)
            if stop:
                break
    if stop and done < total:
        raise Interrupted(f"stopped by signal {stop[0]} after {done} of {total} rows; run the same command to resume")


def _joined(batches: list[Parts]) -> Parts:
    """The parts of consecutive batches, concatenated."""
    return {part: np.concatenate([batch[part] for batch in batches]) for part in batches[0]}


def batches_of(store: Store, chunk: int, batch_size: int) -> list[slice]:
    """A chunk's rows in batches; the last may be shorter, none reaches into another chunk."""
    start, stop = store.chunk_range(chunk)
    return [slice(at, min(at + batch_size, stop)) for at in range(start, stop, batch_size)]


def _check_finite(pending: Pending, name: str, store: Store, manifest: Manifest, view: int, rows: slice) -> None:
    bad = pending.bad_row()
    if bad is not None:
        image = manifest.name(int(store.view(view).order[rows.start + bad]))
        raise FastconError(
            f"teacher {name!r} gives NaN, infinite or {pending.dtype}-overflowing logits for image "
            f"{image!r} (view {view}): check its weights, or try `precision` float32 and `logits` float32"
        )


class _Writer:
    """Writes a finished chunk in a thread of its own while the next is computed; its error is raised at the next `put`.

    So a kill costs at most two chunks: the one being written and the one being computed.
    """

    def __init__(self, store: StoreWriter) -> None:
        self._store = store
        self._queue: queue.Queue[Any] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def put(self, items: list[tuple[str, int, int, Parts]]) -> None:
        """Hand over a chunk of every teacher, once the previous one is written."""
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
