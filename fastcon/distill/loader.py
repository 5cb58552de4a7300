"""Store rows + pixels → one batch: the loader of the training loop, and of any other.

Rows come in the order of the disk, so whole chunks are read in sequence. The sequence of batches is
a pure function of (seed, epoch, batch size, lanes): see `Schedule`.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcon.data import views
from fastcon.data.decode import decode, hand_over
from fastcon.data.manifest import Manifest, index
from fastcon.data.prefetch import prefetch
from fastcon.distill import loss as objective
from fastcon.errors import FastconError
from fastcon.kernels.multihead_ce import QuantisedLogits, Segments
from fastcon.machine import Machine
from fastcon.models.classifier import Head
from fastcon.store.codec import Parts, Quantised
from fastcon.store.pixels import check_pixels
from fastcon.store.reader import Store
from fastcon.store.replay import Replay

_Rows = tuple[Tensor | QuantisedLogits, NDArray[np.uint32], Tensor | None]
"""Logits, image indices and labels of a batch, as in `Batch`."""


class Batch(NamedTuple):
    """What a loader yields."""

    pixels: Tensor
    """uint8 [B, 3, size, size], channels-last: the pixels the teachers saw. Of baked views a part of the memory of several
    batches: clone what you keep."""
    stacked: Tensor | QuantisedLogits
    """All teachers' logits side by side [B, sum C], in `Loader.names` order; one byte each where all are stored so."""
    indices: NDArray[np.uint32]
    """Which image each row is, by its place in the manifest [B]."""
    labels: Tensor | None
    """int64 [B] labels of the images, -1 without; None where no image has one, or there is no manifest."""
    names: list[str]
    widths: list[int]

    @property
    def logits(self) -> dict[str, Tensor]:
        """{teacher: logits [B, C]}: views of `stacked`, or float32 made of its bytes."""
        if isinstance(self.stacked, Tensor):
            return dict(zip(self.names, self.stacked.split(self.widths, dim=1), strict=True))
        ends = np.cumsum(self.widths).tolist()
        spans = [slice(end - width, end) for end, width in zip(ends, self.widths, strict=True)]
        return {name: self.stacked.head(k, span) for k, (name, span) in enumerate(zip(self.names, spans, strict=True))}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which rows each global batch of an epoch takes.

    Epoch e reads view e mod V. Its rows, with whole chunks and the rows inside them shuffled by (seed, epoch) (in the
    first round of seed 0: in the order on disk), are cut into `lanes` equal runs; a batch takes the next B / lanes rows
    of every lane. The n mod B rows left over are left out of that epoch.
    """

    rows: int
    views: int
    chunk_rows: int
    batch_size: int
    lanes: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size > self.rows:
            raise FastconError(
                f"a batch of {self.batch_size} needs as many images, the store has {self.rows}: use a "
                f"`batch_size` of at most {self.rows}"
            )
        if self.batch_size % self.lanes:
            raise FastconError(f"{self.lanes} lanes do not divide a batch of {self.batch_size}")

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return self.rows // self.batch_size

    @property
    def left_out(self) -> int:
        """Rows of an epoch that are in no batch."""
        return self.rows % self.batch_size

    def epoch(self, epoch: int) -> NDArray[np.uint32]:
        """Rows of every batch of an epoch: [steps, B]; row ids are those of view `epoch mod views`."""
        used = self._order(epoch)[: self.steps * self.batch_size]
        share = self.batch_size // self.lanes
        return used.reshape(self.lanes, self.steps, share).transpose(1, 0, 2).reshape(self.steps, self.batch_size)

    def _order(self, epoch: int) -> NDArray[np.uint32]:
        if epoch < self.views and self.seed == 0:
            return np.arange(self.rows, dtype=np.uint32)
        chunks = np.arange(-(-self.rows // self.chunk_rows), dtype=np.uint64)
        chunk_order = views.permutation(self.seed, chunks, epoch, views.EPOCH_CHUNKS)
        inside = views.keys(self.seed, np.arange(self.rows, dtype=np.uint64), epoch, views.EPOCH_ROWS)
        place = np.empty(len(chunks), dtype=np.int64)
        place[chunk_order] = np.arange(len(chunks))
        return np.lexsort((inside, np.repeat(place, self.chunk_rows)[: self.rows])).astype(np.uint32)


def default_lanes(batch_size: int) -> int:
    """The largest of 8, 4, 2, 1 that divides the batch."""
    return next(lanes for lanes in (8, 4, 2, 1) if batch_size % lanes == 0)


class Loader:
    """Yields `Batch`es of a store: pixels as the teachers saw them, and what each teacher said of them.

    Iterating runs through `epochs` epochs from `start_epoch` on; `batches` gives finer control. Opening checks that these
    are the store's images and that they decode to the pixels the store recorded.
    """

    def __init__(
        self,
        store: Store | str | os.PathLike[str],
        images: Sequence[str] | str | Manifest | None = None,
        batch_size: int = 32,
        *,
        heads: Sequence[str] | None = None,
        views: int | None = None,
        epochs: int = 1,
        start_epoch: int = 0,
        seed: int = 0,
        lanes: int | None = None,
        device: str | torch.device = "cpu",
        loader: str = "dali",
        threads: int | None = None,
        exact_pixels: bool = False,
        temperature: float = 2.0,
    ) -> None:
        """images: where they are now (default: where they were; baked views need none); heads: teachers to read;
        views: use the first so many of the store's (default: all)."""
        self.store = store if isinstance(store, Store) else Store(store)
        self.manifest = _manifest(images, self.store)
        if self.manifest is not None:
            self.store.check_images(self.manifest)
        self.views = views or self.store.views
        if self.views > self.store.views:
            raise FastconError(f"{self.store.path} has {self.store.views} views of each image, not {self.views}")
        self._read(list(heads or self.store.teachers), temperature)
        self.batch_size, self.epochs, self.start_epoch = batch_size, epochs, start_epoch
        self.machine = Machine(str(device), loader=loader, threads=threads)
        self.device = self.machine.target
        self.schedule = Schedule(
            self.store.rows,
            self.views,
            self.store.recipe.chunk_rows,
            batch_size,
            lanes or default_lanes(batch_size),
            seed,
        )
        self.warning = check_pixels(self.store, self.manifest, self.machine, exact_pixels)
        self.waits = {"pixels": 0.0, "logits": 0.0}
        """Seconds that the consumer has waited so far."""

    def with_heads(self, names: Sequence[str], temperature: float = 2.0) -> Loader:
        """The same batches, with the logits of these teachers."""
        other = copy.copy(self)
        other._read(list(names), temperature)
        return other

    def _read(self, names: list[str], temperature: float) -> None:
        self.names = names
        self._check_complete()
        records = {name: self.store.teachers[name] for name in names}
        self.heads = [Head(name, record.classes, record.kind) for name, record in records.items()]
        """The teachers as heads of a student: an argument of `Classifier.replace_heads`."""
        self._widths = [len(head.classes) for head in self.heads]
        weights = objective.head_weights(self.names, self.store.generalist)
        self.segments: Segments = objective.segments(
            self._widths, weights, temperature, [head.kind for head in self.heads]
        )
        """The segment table of `Batch.stacked` with the paper's weights: an argument of `fastcon.loss`."""

    def __len__(self) -> int:
        return self.schedule.steps * self.epochs

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(range(self.start_epoch, self.start_epoch + self.epochs))

    def batches(self, epochs: Sequence[int], skip: int = 0) -> Iterator[Batch]:
        """The batches of some epochs, without the first `skip` of the first."""
        plan = [(epoch, skip if k == 0 else 0) for k, epoch in enumerate(epochs)]
        replay = Replay(self.store, self.manifest, keep=2 * self.schedule.lanes)
        requests = (replay.request(number, rows) for number, rows in self._rows(plan))
        pixels = decode(replay.images, requests, [self.store.recipe.size], self.batch_size, self.machine)
        rows = prefetch(_on(self.device, self._logits(plan)), depth=2)
        try:
            while True:
                started = time.perf_counter()
                images = next(pixels, None)
                decoded = time.perf_counter()
                self.waits["pixels"] += decoded - started
                if images is None:
                    return
                (stacked, indices, labels), copied = next(rows)
                hand_over(_tensors(stacked, labels), copied)
                self.waits["logits"] += time.perf_counter() - decoded
                yield Batch(images[self.store.recipe.size], stacked, indices, labels, self.names, self._widths)
        finally:
            rows.close()
            pixels.close()  # type: ignore[attr-defined]

    def _rows(self, plan: Sequence[tuple[int, int]]) -> Iterator[tuple[int, NDArray[np.uint32]]]:
        for epoch, skip in plan:
            for rows in self.schedule.epoch(epoch)[skip:]:
                yield epoch % self.views, rows

    def _logits(self, plan: Sequence[tuple[int, int]]) -> Iterator[_Rows]:
        """Of every batch: the teachers' logits, image indices, labels."""
        chunks = LogitCache(self.store, self.names, keep=2 * self.schedule.lanes)
        replay = Replay(self.store, self.manifest)
        all_labels = None if self.manifest is None else self.manifest.labels
        labelled = all_labels is not None and bool((all_labels >= 0).any())
        for number, rows in self._rows(plan):
            stacked, indices = chunks.stacked(number, rows), replay.view(number).order[rows]
            labels = torch.from_numpy(all_labels[indices].astype(np.int64)) if labelled else None  # type: ignore[index]
            yield stacked, indices, labels

    def _check_complete(self) -> None:
        for name in self.names:
            unfinished = np.argwhere(~self.store.done(name)[: self.views])
            if len(unfinished):
                view, chunk = unfinished[0]
                raise FastconError(
                    f"{self.store.path}: teacher {name!r} is not finished (first: view {view}, chunk {chunk}; "
                    f"{len(unfinished)} chunks in all): run `fastcon precompute` again, it resumes"
                )


class LogitCache:
    """The last few chunks of each teacher: every lane is inside one and may be leaving another."""

    def __init__(self, store: Store, names: Sequence[str], keep: int) -> None:
        self._store, self._names, self._keep = store, names, keep
        self._widths = [len(store.teachers[name].classes) for name in names]
        self._as_bytes = all(isinstance(store.codec(name), Quantised) for name in names)
        self._chunks: dict[str, OrderedDict[tuple[int, int], Parts]] = {name: OrderedDict() for name in names}

    def stacked(self, view: int, rows: NDArray[np.uint32]) -> Tensor | QuantisedLogits:
        """The logits of `rows` [B] of one view, all teachers' side by side."""
        chunk_of, inside = np.divmod(rows, self._store.recipe.chunk_rows)
        bounds = [0, *(np.flatnonzero(np.diff(chunk_of)) + 1).tolist(), len(rows)]
        runs = [(int(chunk_of[a]), slice(a, b), _as_slice(inside[a:b])) for a, b in itertools.pairwise(bounds)]
        chunks_of = [{chunk: self._get(name, view, chunk) for chunk, *_ in runs} for name in self._names]
        dtype = np.result_type(*(parts["logits"].dtype for chunks in chunks_of for parts in chunks.values()))
        logits = np.empty((len(rows), sum(self._widths)), dtype=dtype)
        scales = np.empty((len(rows), len(self._names), 2), dtype=np.float32)
        at = 0
        for k, (chunks, width) in enumerate(zip(chunks_of, self._widths, strict=True)):
            for chunk, rows_of_run, taken in runs:
                logits[rows_of_run, at : at + width] = chunks[chunk]["logits"][taken]
                if self._as_bytes:
                    scales[rows_of_run, k] = chunks[chunk]["scales"][taken]
            at += width
        values = torch.from_numpy(logits)
        return QuantisedLogits(values, torch.from_numpy(scales)) if self._as_bytes else values

    def _get(self, name: str, view: int, chunk: int) -> Parts:
        """A chunk as it is stored where all teachers are stored in bytes, else its logits as floats."""
        chunks = self._chunks[name]
        if (view, chunk) not in chunks:
            chunks[view, chunk] = (
                self._store.parts(name, view, chunk)
                if self._as_bytes
                else {"logits": self._store.logits(name, view, chunk)}
            )
            if len(chunks) > self._keep:
                chunks.popitem(last=False)
        chunks.move_to_end((view, chunk))
        return chunks[view, chunk]


def _on(device: torch.device, rows: Iterator[_Rows]) -> Iterator[tuple[_Rows, torch.cuda.Event | None]]:
    """Rows on a device, copied on a stream of their own, and what to wait for before their use."""
    if device.type != "cuda":
        yield from ((row, None) for row in rows)
        return
    stream = torch.cuda.Stream(device)
    for stacked, indices, labels in rows:
        with torch.cuda.stream(stream):
            moved = [tensor.pin_memory().to(device, non_blocking=True) for tensor in _tensors(stacked, labels)]
            done = stream.record_event()
        labels = None if labels is None else moved.pop()
        yield (moved[0] if isinstance(stacked, Tensor) else QuantisedLogits(*moved), indices, labels), done


def _tensors(stacked: Tensor | QuantisedLogits, labels: Tensor | None) -> list[Tensor]:
    return [*([stacked] if isinstance(stacked, Tensor) else stacked), *([] if labels is None else [labels])]


def _as_slice(rows: NDArray[np.integer]) -> slice | NDArray[np.integer]:
    """Consecutive rows as a slice, which copies faster; others as they are."""
    if (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[0]) + len(rows))
    return rows


def _manifest(images: Sequence[str] | str | Manifest | None, store: Store) -> Manifest | None:
    """The images to train on; None where the store holds baked views and none are given."""
    if isinstance(images, Manifest) or (images is None and store.recipe.bake is not None):
        return images
    if images is None:
        return index(store.record.images.sources)
    return index([images] if isinstance(images, str) else list(images))
