"""A store opened for writing, by one process at a time: created, grown, repaired. Its record is written last and at once."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcon.data import views
from fastcon.data.manifest import Manifest
from fastcon.errors import Busy, FastconError
from fastcon.files import write_atomically
from fastcon.remote import is_url
from fastcon.store import arrays
from fastcon.store.codec import Parts, check_kind
from fastcon.store.format import (
    COPY,
    FORMAT,
    IMAGE_COLUMNS,
    LARGEST,
    VIEW_COLUMNS,
    ImagesRecord,
    Recipe,
    Record,
    TeacherRecord,
    View,
    check_name,
    checksum,
    digest,
    layout,
    record_digest,
)
from fastcon.store.mirror import FACTS, PIXELS, check_held, mirrored
from fastcon.store.reader import Store, record_file, sample_rows


class StoreWriter(Store):
    """A store opened for writing: one process at a time. Create or reopen it with `open_for_writing`."""

    def grow(self, manifest: Manifest, view_count: int) -> None:
        """Record the order, boxes and flips of views up to `view_count`, where they are not there yet."""
        digests = list(self.record.view_digests)
        grown = dataclasses.replace(self.record, views=view_count, view_digests=digests)
        for path, array_layout in layout(grown).items():
            if array_layout.shape[0] != self.layout[path].shape[0]:
                self._array(path).resize(array_layout.shape)
        for view in range(self.views, view_count):
            made = make_view(self.recipe, manifest, view)
            for name in VIEW_COLUMNS:
                self._array(name)[view] = getattr(made, name)
            digests.append(digest(made.order, made.boxes, made.flips))
        self._commit(grown)

    def add_teacher(self, name: str, record: TeacherRecord, weights: bytes | None) -> None:
        """Make room for a teacher's logits up to the store's views, or check that it is the one recorded."""
        check_name(name)
        if record.role == "generalist" and self.generalist not in (None, name):
            raise FastconError(
                f"{self.path} has the generalist {self.generalist!r}, and a store has one: add {name!r} with "
                "`teacher`, or use another `store`"
            )
        if name in self.teachers and self.done(name).any():
            check_same_teacher(self.path, name, self.teachers[name], record)
        else:  # nothing of it is stored: a teacher that failed at once may come back fixed
            self._create_teacher(name, record)
        if weights is not None:
            self._write_weights(name, weights)

    def forget(self, name: str) -> None:
        """Remove a teacher: first its entry in the record, atomically, then its arrays. Raises FastconError."""
        if name not in self.teachers:
            names = ", ".join(self.teachers) or "none"
            raise FastconError(f"{self.path} has no teacher {name!r}: there are {names}")
        self._commit(self.record.without_teacher(name))
        self._remove_unnamed()

    def _remove_unnamed(self) -> None:
        """Delete arrays of teachers that the record does not name: a kill may have left them."""
        for entry in Path(self.path, "teachers").glob("*/"):
            if entry.name not in self.teachers:
                shutil.rmtree(entry)
        self._arrays = {path: array for path, array in self._arrays.items() if path in self.layout}

    def write(self, name: str, view: int, chunk: int, parts: Parts) -> None:
        """Store one finished chunk, the parts of its rows, then mark it done. Raises Lost where another writes the store by now."""
        check_held(self.path)
        start, stop = self.chunk_range(chunk)
        crc = 0
        for part, (dtype, width) in self.codec(name).parts(len(self.teachers[name].classes)).items():
            rows = parts[part]
            if (rows.shape, rows.dtype) != ((stop - start, width), np.dtype(dtype)):
                raise ValueError(f"{part} of chunk {chunk} takes {dtype} {(stop - start, width)}, got {rows.shape}")
            self._array(self._path(name, part))[view, start:stop] = rows
            crc = checksum(rows, crc)
        self._array(self._path(name, "checksums"))[view, chunk] = crc
        self._expected.pop((name, view), None)

    def write_shard(self, view: int, chunk: int, data: bytes) -> None:
        """Store the tar of a chunk's baked views. Raises FastconError where another was recorded, which this one replaces, or
        another process writes the store by now.
        """
        check_held(self.path)
        checksums = self._array("baked/checksums")
        expected, crc = int(checksums[view, chunk]), checksum(np.frombuffer(data, dtype=np.uint8))
        if expected not in (-1, crc):
            raise FastconError(
                f"{self._shard_name(view, chunk)} of {self.path} would come out with other bytes than the teachers saw, from another "
                "version of Pillow or DALI: repair it with the versions that baked it, or make a new store"
            )
        path = Path(self.path, self._shard_name(view, chunk))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
        checksums[view, chunk] = crc

    def repair_view(self, manifest: Manifest, view: int) -> None:
        """Write the order, boxes and flips of a view again, if the recipe makes what the record says."""
        made = make_view(self.recipe, manifest, view)
        if digest(made.order, made.boxes, made.flips) != self.record.view_digests[view]:
            raise FastconError(f"{self.path}: the recipe does not make view {view} any more; make the store again")
        for name in VIEW_COLUMNS:
            self._array(name)[view] = getattr(made, name)

    def _create_teacher(self, name: str, teacher: TeacherRecord) -> None:
        check_kind(teacher.logits, teacher.kind, name)
        record = self.record.with_teacher(name, teacher)
        where = f"teachers/{name}/"
        for path, array_layout in layout(record).items():
            if path.startswith(where):
                arrays.create(self._group, path, array_layout)
                self._arrays.pop(path, None)
        self._commit(record)

    def _write_weights(self, name: str, weights: bytes) -> None:
        """Store a teacher's weights file, unless it is there and intact."""
        with contextlib.suppress(FastconError):
            if self.weights(name) == weights:
                return
        data = np.frombuffer(weights, dtype=np.uint8)
        path = f"teachers/{name}/weights"
        kept = dataclasses.replace(self.teachers[name], weights_file_digest=digest(data), weights_bytes=len(data))
        record = self.record.with_teacher(name, kept)
        arrays.create(self._group, path, layout(record)[path])[:] = data
        self._arrays.pop(path, None)
        self._commit(record)

    def repair_metadata(self) -> None:
        """Write the metadata files that differ from what the record implies."""
        files = self.metadata_files()
        for name in self.damaged_metadata():
            Path(self.path, name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(self.path, name), files[name])

    def repair_images(self, manifest: Manifest) -> None:
        """Write ids, digests and names of the images anew, from a manifest that `check_images` passed by its digest."""
        columns = {name: np.asarray(getattr(manifest, name)) for name in IMAGE_COLUMNS}
        if digest(*columns.values()) != self.record.images.columns_digest:
            raise FastconError(f"{self.path}: these are the images, under other names: give them as they were named")
        for name, column in columns.items():
            self._array(f"images/{name}")[:] = column

    def repair_samples(self, pixels: NDArray[np.uint8]) -> None:
        """Write the sample pixels again, if these match the record."""
        rows = sample_rows(self)
        if digest(rows, pixels) != self.record.samples_digest:
            raise FastconError(f"{self.path}: the images decode differently now, so the sample pixels are lost")
        self._array("samples/rows")[:], self._array("samples/pixels")[:] = rows, pixels

    def repair_weights(self, name: str, weights: bytes) -> None:
        """Write a teacher's weights file again, if this one matches the record."""
        data = np.frombuffer(weights, dtype=np.uint8)
        if digest(data) != self.teachers[name].weights_file_digest:
            raise FastconError(
                f"{self.path}: {self.teachers[name].spec} no longer holds the recorded weights of {name!r}: restore it"
            )
        self._array(self._path(name, "weights"))[:] = data

    def repair_checksums(self) -> None:
        """Where a view's checksums are lost, take those of the intact chunks; the others count as not done."""
        for path in [path for path in self.layout if path.endswith("/checksums")]:
            name = None if path.startswith("baked/") else path.split("/")[1]
            for view in range(self.views):
                try:
                    self._read(path, view)
                except FastconError:
                    self._array(path)[view] = [self._found_checksum(name, view, c) for c in range(self.chunks)]
        self._expected.clear()

    def _found_checksum(self, name: str | None, view: int, chunk: int) -> int:
        """The checksum of a chunk as it is on disk (name None: of a shard); -1 where it is missing or damaged."""
        try:
            if name is None:
                return checksum(np.fromfile(Path(self.path, self._shard_name(view, chunk)), dtype=np.uint8))
            crc = 0
            for part in self.codec(name).parts(len(self.teachers[name].classes)):
                crc = checksum(self._read_chunk(self._array(self._path(name, part)), view, chunk)[0], crc)
            return crc
        except Exception:
            return -1

    def _commit(self, record: Record) -> None:
        """Write a record: from then on it is in force."""
        _commit(self._group, self.path, record)
        self._take(record)


@contextlib.contextmanager
def open_for_writing(
    path: str | os.PathLike[str], manifest: Manifest, recipe: Recipe, view_count: int, pipeline: dict[str, Any]
) -> Iterator[StoreWriter]:
    """Create the store, or reopen the one that this recipe and these images made; held by one process at a time.

    pipeline: the settings that pixels were decoded with (rule: recorded, and compared by pixels on use).
    """
    with _held(os.fspath(path)) as path:
        _remove_leftovers(path)
        if not _exists(path):
            _create_store(path, manifest, recipe, view_count, pipeline)
        store = _reopened(path)
        check_recipe(path, store.recipe, recipe)
        store.check_images(manifest)
        if view_count > store.views:
            store.grow(manifest, view_count)
        yield store


def forget(path: str | os.PathLike[str], name: str) -> None:
    """Remove a teacher from a store; a kill at any moment leaves it either there or gone. Raises FastconError."""
    path = os.fspath(path)
    Store(path)  # an error where there is none, and no lock file
    with _held(path, FACTS) as folder:
        _remove_leftovers(folder)
        _reopened(folder).forget(name)


def _reopened(path: str) -> StoreWriter:
    """A store for writing, rid of what a kill left in it; only the holder of the lock may call this."""
    store = StoreWriter(path)
    store._group = arrays.open_group(path, "r+")
    store._remove_unnamed()
    return store


def set_samples(store: StoreWriter, pixels: NDArray[np.uint8]) -> None:
    """Keep the decoded pixels [k, size, size, 3] of `sample_rows`: done once, before the first logits."""
    rows = sample_rows(store)
    record = dataclasses.replace(store.record, samples_digest=digest(rows, pixels))
    made = layout(record)
    for path, values in (("samples/rows", rows), ("samples/pixels", pixels)):
        arrays.create(store._group, path, made[path])[:] = values
    store._commit(record)


def restore_record(path: str) -> bool:
    """Restore a damaged record from its copy; returns whether that was needed. Raises FastconError if it cannot be."""
    if not os.path.exists(os.path.join(path, COPY)):
        return False
    with contextlib.suppress(FastconError):
        Store(path)
        return False
    with _held(path):
        try:
            record = json.loads(Path(path, COPY).read_bytes())
            if record["format"] != FORMAT:
                return False  # opening it says so
            whole = record["digest"] == record_digest(record)
        except (ValueError, KeyError, TypeError, OSError):
            whole = False
        if not whole:
            raise FastconError(f"{path}: the record of the store and its copy are both damaged; make the store again")
        write_atomically(Path(path, "zarr.json"), arrays.group_file({"fastcon": record}))
    return True


def _create_store(path: str, manifest: Manifest, recipe: Recipe, view_count: int, pipeline: dict[str, Any]) -> None:
    if len(manifest) > LARGEST:
        raise FastconError(f"a store holds at most {LARGEST:,} images, these are {len(manifest):,}")
    group = arrays.open_group(path, "a")
    columns = {name: np.asarray(getattr(manifest, name)) for name in IMAGE_COLUMNS}
    columns_digest = digest(*columns.values())
    images = ImagesRecord(
        len(manifest), manifest.digest, columns_digest, len(columns["names"]), manifest.sources, manifest.share
    )
    record = Record(recipe, pipeline, images, view_count)
    created = {path: arrays.create(group, path, array_layout) for path, array_layout in layout(record).items()}
    for name, column in columns.items():
        created[f"images/{name}"][:] = column
    for view in range(view_count):
        made = make_view(recipe, manifest, view)
        for name in VIEW_COLUMNS:
            created[name][view] = getattr(made, name)
        record.view_digests.append(digest(made.order, made.boxes, made.flips))
    _commit(group, path, record)


def _commit(group: Any, path: str, record: Record) -> None:
    group.attrs["fastcon"] = record.json()
    write_atomically(Path(path, COPY), record_file(record))


def make_view(recipe: Recipe, manifest: Manifest, view: int) -> View:
    """A view by the recipe: a pure function of (seed, image ids and sizes, view)."""
    order = views.order(recipe.seed, manifest.ids, view)
    ids, widths, heights = manifest.ids[order], manifest.widths[order], manifest.heights[order]
    boxes = views.boxes(recipe.seed, ids, view, widths, heights, recipe.scale, recipe.ratio)
    return View(order.astype(np.uint32), boxes, views.flips(recipe.seed, ids, view))


def check_same_teacher(path: str, name: str, stored: TeacherRecord, given: TeacherRecord) -> None:
    """Raise FastconError where a store has another teacher of this name, or one that was computed otherwise."""
    differing = stored.same_network(given)
    if not differing:
        return
    key = "weights" if "weights" in differing else differing[0]
    was, now = (_short(teacher.json().get(key)) for teacher in (stored, given))
    raise FastconError(
        f"teacher {name!r} is in {path} with {key} {was}, the one given has {now}: give the "
        "recorded one, or add this one under another name"
    )


def check_recipe(path: str, recorded: Recipe, wanted: Recipe) -> None:
    """Raise FastconError, naming the first difference, where a store's views were made otherwise."""
    stored, given = recorded.record(), wanted.record()
    if stored["bake"] != given["bake"]:
        was, now = (f"views baked at quality {r['bake']}" if r["bake"] else "no baked views" for r in (stored, given))
        raise FastconError(f"{path} was made with {was}, this call says {now}: use the same, or another `store`")
    for key, value in stored.items():
        if value != given[key]:
            raise FastconError(
                f"{path} was made with {key} {value}, this call says {given[key]}: use the same "
                f"{key}, or another `store`"
            )


def _exists(path: str) -> bool:
    """Whether a finished store is there; refuses a place that holds something else, or cannot be read."""
    group = arrays.group_at(path)
    if group is None:
        foreign = [name for name in sorted(os.listdir(path)) if not name.endswith((".lock", ".log"))]
        if foreign:
            raise FastconError(
                f"{path} holds other files ({foreign[0]}, …) and no store: give an empty or a new folder"
            )
        return False
    if "fastcon" in group.attrs:
        return True
    if set(group.attrs) or not {name.split("/")[0] for name in group.keys()} <= _CREATED:  # noqa: SIM118 - no mapping
        raise FastconError(f"{path} is a Zarr group of something else: give a new folder as `store`")
    return False


_CREATED = {"images", "order", "boxes", "flips", "baked"}
"""Remove what an interrupted creation left: it starts again from scratch."""


def _remove_leftovers(path: str) -> None:
    """Remove temporary files of writes that a kill cut off; only the holder of the lock may call this."""
    for partial in Path(path).rglob("*.partial"):
        partial.unlink()


def _short(value: Any) -> str:
    text = f"{len(value)} of them" if isinstance(value, list) and len(value) > 4 else str(value)
    return text if len(text) <= 48 else text[:12] + "…"


@contextlib.contextmanager
def _held(path: str, having: int = PIXELS) -> Iterator[str]:
    """The folder in which a store is written, with STORE/write.lock held; the system frees it however the process ends."""
    if is_url(path):
        with mirrored(path, having) as folder, _held(folder):
            yield folder
        return
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "write.lock"), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise Busy(f"{path} is being written by {holder}: wait for it, or stop it first") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield path
