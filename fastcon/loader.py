"""Store rows + pixels → one batch: the loader of the training loop, and of anybody else's.

Rows come in the order in which they lie on disk, so whole chunks are read in sequence. The sequence of batches is
a pure function of (seed, epoch, batch size, lanes): see `Schedule`.
"""

from __future__ import annotations

import dataclasses
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcon import models, objective, pipeline, views
from fastcon.errors import FastconError
from fastcon.kernels.multihead_ce import Segments
from fastcon.manifest import Manifest, index
from fastcon.models import Head
from fastcon.pipeline import Request
from fastcon.precompute import Settings, check_pixels
from fastcon.store import Store, View


class Batch(NamedTuple):
    """What a loader yields."""

    pixels: Tensor
    """uint8 [B, 3, size, size], channels-last: the pixels the teachers saw."""
    stacked: Tensor
    """All teachers' logits side by side [B, sum C], in `Loader.names` order."""
    logits: dict[str, Tensor]
    """{teacher: logits [B, C]}: views of `stacked`."""
    indices: NDArray[np.uint32]
    """Which image each row is, by its place in the manifest [B]."""
    labels: Tensor | None
    """int64 [B] labels of the images, -1 without; None where no image has one."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which rows each global batch of an epoch takes.

    Epoch e reads view e mod V. Its rows, in the order on disk (from the second round on with whole chunks, and the
    rows inside them, shuffled by (seed, epoch)), are cut into `lanes` equal runs; a batch takes the next B / lanes
    rows of every lane. The n mod B rows left over are left out of that epoch.
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
                f"--batch-size of at most {self.rows}"
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
        if epoch < self.views:
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
        """images: where they are now (default: where they were); heads: the teachers to read (default: all)."""
        self.store = store if isinstance(store, Store) else Store(store)
        self.manifest = images if isinstance(images, Manifest) else index(_sources(images, self.store))
        self.store.check_images(self.manifest)
        self.names = list(heads or self.store.teachers)
        self._check_complete()
        self.batch_size, self.epochs, self.start_epoch = batch_size, epochs, start_epoch
        self.device = models.choose_device(str(device))
        self.schedule = Schedule(
            self.store.rows,
            self.store.views,
            self.store.recipe.chunk_rows,
            batch_size,
            lanes or default_lanes(batch_size),
            seed,
        )
        self._settings = Settings(batch_size, self.device, loader=loader, threads=threads)
        self.warning = check_pixels(self.store, self.manifest, self._settings, exact_pixels)
        records = {name: self.store.teachers[name] for name in self.names}
        self.heads = [Head(name, tuple(record["classes"]), record["kind"]) for name, record in records.items()]
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
        pixels = pipeline.decode(
            self.manifest,
            self._requests(plan),
            [self.store.recipe.size],
            batch_size=self.batch_size,
            device=self.device,
            loader=self._settings.loader,
            threads=self._settings.threads,
        )
        rows = pipeline.prefetch(self._logits(plan), depth=2)
        labelled = bool((self.manifest.labels >= 0).any())
        try:
            for images, (stacked, indices) in zip(pixels, rows, strict=True):
                labels = torch.from_numpy(self.manifest.labels[indices].astype(np.int64)) if labelled else None
                stacked = self._to_device(stacked)
                logits = dict(zip(self.names, stacked.split(self._widths, dim=1), strict=True))
                yield Batch(
                    images[self.store.recipe.size],
                    stacked,
                    logits,
                    indices,
                    None if labels is None else self._to_device(labels),
                )
        finally:
            rows.close()
            pixels.close()  # type: ignore[attr-defined]

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _rows(self, plan: Sequence[tuple[int, int]]) -> Iterator[tuple[int, View, NDArray[np.uint32]]]:
        for epoch, skip in plan:
            number = epoch % self.store.views
            view = self.store.view(number)
            for rows in self.schedule.epoch(epoch)[skip:]:
                yield number, view, rows

    def _requests(self, plan: Sequence[tuple[int, int]]) -> Iterator[Request]:
        for _, view, rows in self._rows(plan):
            yield Request(view.order[rows], view.boxes[rows], view.flips[rows])

    def _logits(self, plan: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, NDArray[np.uint32]]]:
        chunks = _ChunkCache(self.store, keep=2 * self.schedule.lanes)
        types = [np.dtype(self.store.teachers[name]["logits"]) for name in self.names]
        for number, view, rows in self._rows(plan):
            stacked = np.empty((len(rows), sum(self._widths)), dtype=np.result_type(*types))
            at = 0
            for name, width in zip(self.names, self._widths, strict=True):
                chunks.gather(name, number, rows, stacked[:, at : at + width])
                at += width
            yield torch.from_numpy(stacked), view.order[rows]

    def _check_complete(self) -> None:
        for name in self.names:
            unfinished = np.argwhere(~self.store.done(name))
            if len(unfinished):
                view, chunk = unfinished[0]
                raise FastconError(
                    f"{self.store.path}: teacher {name!r} is not finished (first: view {view}, chunk {chunk}; "
                    f"{len(unfinished)} chunks in all): run `fastcon precompute` again, it resumes"
                )


class _ChunkCache:
    """The last few chunks of each teacher: every lane is inside one, and may just be leaving another."""

    def __init__(self, store: Store, keep: int) -> None:
        self._store, self._keep = store, keep
        self._chunks: dict[str, OrderedDict[tuple[int, int], NDArray[Any]]] = {}

    def gather(self, name: str, view: int, rows: NDArray[np.uint32], out: NDArray[Any]) -> None:
        """Copy the logits of `rows` [B] of one view into out [B, C]."""
        chunk_of, inside = np.divmod(rows, self._store.recipe.chunk_rows)
        for chunk in np.unique(chunk_of):
            here = chunk_of == chunk
            out[here] = self._get(name, view, int(chunk))[inside[here]]

    def _get(self, name: str, view: int, chunk: int) -> NDArray[Any]:
        chunks = self._chunks.setdefault(name, OrderedDict())
        if (view, chunk) not in chunks:
            chunks[view, chunk] = self._store.logits(name, view, chunk)
            if len(chunks) > self._keep:
                chunks.popitem(last=False)
        chunks.move_to_end((view, chunk))
        return chunks[view, chunk]


def _sources(images: Sequence[str] | str | None, store: Store) -> list[str]:
    if images is None:
        return list(store.record["images"]["sources"])
    return [images] if isinstance(images, str) else list(images)
