"""Store rows + pixels → one batch: the loader of the training loop, and of any other.

Rows come in the order of the disk, so whole chunks are read in sequence: see `schedule`.
"""

from __future__ import annotations

import copy
import itertools
import os
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcon.data.decode import decode, hand_over
from fastcon.data.prefetch import prefetch
from fastcon.distill import loss as objective
from fastcon.distill.embeddings import standard
from fastcon.distill.schedule import Schedule, default_lanes
from fastcon.errors import FastconError
from fastcon.kernels.multihead_ce import QuantisedLogits, Segments
from fastcon.machine import Machine
from fastcon.models.classifier import Head
from fastcon.remote import is_url
from fastcon.store.codec import Parts, Quantised
from fastcon.store.images import Given, PartImages, images_of
from fastcon.store.parts import opened
from fastcon.store.pixels import check_pixels
from fastcon.store.reader import Stored
from fastcon.store.replay import Replay

AHEAD = 64
"""Batches ahead of the present one whose chunks are fetched from object storage."""
_Rows = tuple[Tensor | QuantisedLogits, NDArray[np.int64], Tensor | None]
"""Logits, image indices and labels of a batch, as in `Batch`."""


class Batch(NamedTuple):
    """What a loader yields."""

    pixels: Tensor
    """uint8 [B, 3, size, size], channels-last: the pixels the teachers saw. Of baked views a part of the memory of several
    batches: clone what you keep."""
    stacked: Tensor | QuantisedLogits
    """All teachers' logits side by side [B, sum C], in `Loader.names` order; one byte each where all are stored so."""
    indices: NDArray[np.int64]
    """Which image each row is, by its place in the manifest (of a store in parts: in those of all parts) [B]."""
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


class Loader:
    """Yields `Batch`es of a store: pixels as the teachers saw them, and what each teacher said of them.

    Iterating runs through `epochs` epochs from `start_epoch` on; `batches` gives finer control. Opening checks that these
    are the store's images and that they decode to the pixels the store recorded.
    """

    def __init__(
        self,
        store: Stored | str | os.PathLike[str],
        images: Given = None,
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
        rank: tuple[int, int] = (0, 1),
    ) -> None:
        """images: where they are now (default: where they were; baked views need none); heads: teachers to read;
        views: use the first so many of the store's (default: all); rank: (r, W), yield the r-th of W equal shares of every
        batch. The batches are the same for any W that divides the lanes."""
        self.store = store if isinstance(store, Stored) else opened(store)
        unneeded = images is None and self.store.recipe.bake is not None
        self.manifest = None if unneeded else images_of(self.store, images)
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
            tuple(np.diff(self.store.chunking.part_starts).tolist()),
        )
        self._share_among(*rank)
        first = self.manifest.part(0) if isinstance(self.manifest, PartImages) else self.manifest
        self.warning = check_pixels(self.store.part(0), first, self.machine, exact_pixels)
        self.waits = {"pixels": 0.0, "logits": 0.0}
        """Seconds that the consumer has waited so far."""

    def with_heads(self, names: Sequence[str], temperature: float = 2.0) -> Loader:
        """The same batches, with the logits of these teachers."""
        other = copy.copy(self)
        other._read(list(names), temperature)
        return other

    def whole(self) -> Loader:
        """The same batches, whole, on this rank."""
        other = copy.copy(self)
        other._share_among(0, 1)
        return other

    def _share_among(self, rank: int, ranks: int) -> None:
        each, rest = divmod(self.schedule.lanes, ranks)
        if rest:
            raise FastconError(
                f"{ranks} ranks do not divide the {self.schedule.lanes} lanes of a batch of {self.batch_size}: use a multiple "
                f"of {ranks} as `lanes`, and a `batch_size` that they divide"
            )
        self._lanes = range(rank * each, (rank + 1) * each)
        self._rows_each = self.batch_size // ranks

    def _read(self, names: list[str], temperature: float) -> None:
        self.names = names
        for name in names:
            self.store.require(name, self.views)
        records = {name: self.store.teachers[name] for name in names}
        self.heads = [Head(name, record.classes, record.kind) for name, record in records.items()]
        """The teachers as heads of a student: an argument of `Classifier.replace_heads`."""
        self._widths = [len(head.classes) for head in self.heads]
        self._temperature, self._standards = temperature, [standard(self.store, name) for name in names]
        self.segments = self.table(objective.head_weights(self.names, self.store.generalist))
        """The segment table of `Batch.stacked` with the paper's weights: an argument of `fastcon.loss`."""

    def table(self, weights: Sequence[float]) -> Segments:
        """The segment table of `Batch.stacked` with a lambda for each head."""
        kinds = [head.kind for head in self.heads]
        return objective.segments(self._widths, weights, self._temperature, kinds, self._standards)

    def __len__(self) -> int:
        return self.schedule.steps * self.epochs

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(range(self.start_epoch, self.start_epoch + self.epochs))

    def batches(self, epochs: Sequence[int], skip: int = 0) -> Iterator[Batch]:
        """The batches of some epochs, without the first `skip` of the first."""
        plan = [(epoch, skip if k == 0 else 0) for k, epoch in enumerate(epochs)]
        replay = Replay(self.store, self.manifest, keep=2 * self.schedule.lanes)
        requests = (replay.request(number, rows) for number, rows in self._rows(plan))
        pixels = decode(replay.images, requests, [self.store.recipe.size], self._rows_each, self.machine)
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

    def _rows_ahead(self, plan: Sequence[tuple[int, int]]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """As `_rows`, where a store is in object storage with the chunks of the next AHEAD batches on their way."""
        if not is_url(self.store.path):
            yield from self._rows(plan)
            return
        asked: tuple[int, set[int]] = (-1, set())
        waiting: deque[tuple[int, NDArray[np.int64]]] = deque()
        asking = ThreadPoolExecutor(1)  # opening a part takes a few requests
        try:
            for number, rows in self._rows(plan):
                if asked[0] != number:
                    asked = number, set()
                chunks = set(self.store.chunking.locate(rows)[0].tolist()) - asked[1]
                asked[1].update(chunks)
                for chunk in sorted(chunks):
                    asking.submit(self.store.ahead, self.names, number, chunk)
                waiting.append((number, rows))
                if len(waiting) > AHEAD:
                    yield waiting.popleft()
            yield from waiting
        finally:
            asking.shutdown(cancel_futures=True)

    def _rows(self, plan: Sequence[tuple[int, int]]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        for epoch, skip in plan:
            for rows in self.schedule.batches(epoch, skip, self._lanes):
                yield epoch % self.views, rows

    def _logits(self, plan: Sequence[tuple[int, int]]) -> Iterator[_Rows]:
        """Of every batch: the teachers' logits, image indices, labels."""
        chunks = LogitCache(self.store, self.names, keep=2 * self.schedule.lanes)
        replay = Replay(self.store, self.manifest, keep=2 * self.schedule.lanes)
        manifest = self.manifest if self.manifest is not None and self.manifest.has_labels else None
        for number, rows in self._rows_ahead(plan):
            stacked, indices = chunks.stacked(number, rows), replay.indices(number, rows)
            labels = None if manifest is None else torch.from_numpy(manifest.labels_of(indices))
            yield stacked, indices, labels


class LogitCache:
    """The last few chunks of each teacher: every lane is inside one and may be leaving another."""

    def __init__(self, store: Stored, names: Sequence[str], keep: int) -> None:
        self._store, self._names, self._keep = store, names, keep
        self._widths = [len(store.teachers[name].classes) for name in names]
        self._as_bytes = all(isinstance(store.codec(name), Quantised) for name in names)
        self._chunks: dict[str, OrderedDict[tuple[int, int], Parts]] = {name: OrderedDict() for name in names}

    def stacked(self, view: int, rows: NDArray[np.int64]) -> Tensor | QuantisedLogits:
        """The logits of `rows` [B] of one view, all teachers' side by side."""
        chunk_of, inside = self._store.chunking.locate(rows)
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
