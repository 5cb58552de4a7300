"""A store opened for reading: every byte of it is checked against its record."""

from __future__ import annotations

import abc
import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcon.data.manifest import Manifest
from fastcon.errors import FastconError, one_line
from fastcon.remote import Unreachable, files_of, filesystem_of, is_url
from fastcon.store import arrays
from fastcon.store.chunks import Chunks
from fastcon.store.codec import Codec, Parts, codec
from fastcon.store.format import (
    COPY,
    FORMAT,
    IMAGE_COLUMNS,
    SAMPLES,
    VIEW_COLUMNS,
    Recipe,
    Record,
    TeacherRecord,
    View,
    checksum,
    digest,
    layout,
    record_digest,
)


class Stored(abc.ABC):
    """Logits of views, in one store or in parts of it: what `Store` and `parts.StoreOfParts` have in common.

    Rows and chunks are numbered through all parts.
    """

    path: str
    recipe: Recipe
    views: int
    teachers: Mapping[str, TeacherRecord]
    """Name → record of each teacher."""
    chunking: Chunks
    """How the rows of a view are divided."""
    sources: list[str]
    """IMAGES as they were given, absolute: where the images were."""
    images_digest: str

    @property
    def rows(self) -> int:
        """Rows of a view: the images."""
        return self.chunking.rows

    @property
    def chunks(self) -> int:
        """Chunks in one view of one teacher."""
        return len(self.chunking)

    @property
    def generalist(self) -> str | None:
        """The name of the generalist, if there is one."""
        return next((name for name, teacher in self.teachers.items() if teacher.role == "generalist"), None)

    def codec(self, name: str) -> Codec:
        """How a teacher's logits are stored."""
        return codec(self.teachers[name].logits)

    def logit_bytes(self, name: str) -> int:
        """Bytes of one row of a teacher's logits."""
        return self.codec(name).row_bytes(len(self.teachers[name].classes))

    @abc.abstractmethod
    def part(self, number: int) -> Store:
        """A part of the store, opened."""

    @abc.abstractmethod
    def require(self, name: str, views: int) -> None:
        """Raise FastconError where not all logits of a teacher are there, for the first `views` views."""

    def ahead(self, names: Sequence[str], view: int, chunk: int) -> None:
        """Begin to fetch what is needed of a chunk, where it is not on this machine."""
        part, inside = self.chunking.place(chunk)
        self.part(part).ahead(names, view, inside)

    def logits(self, name: str, view: int, chunk: int) -> NDArray[Any]:
        """One chunk of a teacher's logits [rows, C], verified. Raises FastconError for an absent or damaged one."""
        return self.codec(name).decode(self.parts(name, view, chunk), len(self.teachers[name].classes))

    def parts(self, name: str, view: int, chunk: int) -> Parts:
        """One chunk of a teacher's logits as they are stored, verified; raises as `logits` does."""
        part, inside = self.chunking.place(chunk)
        return self.part(part).parts(name, view, inside)

    def shard(self, view: int, chunk: int) -> list[NDArray[np.uint8]]:
        """The encoded bytes of a chunk's baked views, verified and mapped into memory; raises FastconError."""
        part, inside = self.chunking.place(chunk)
        return self.part(part).shard(view, inside)

    def weights(self, name: str) -> bytes:
        """The stored safetensors file of a teacher (the generalist has one)."""
        return self.part(0).weights(name)


class Store(Stored):
    """A store opened for reading. Raises FastconError where there is none, or of another format."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._files = files_of(self.path)
        with contextlib.suppress(FileNotFoundError):
            self._files.path("zarr.json")
        self._group = arrays.open_group(self._files.root, "r", self.path)
        record = dict(self._group.attrs).get("fastcon")
        if not isinstance(record, dict):
            raise FastconError(
                f"{self.path} is a Zarr group but no finished fastcon store: give the folder that "
                "`fastcon precompute --store` wrote"
            )
        if record.get("format") != FORMAT:
            raise FastconError(
                f"{self.path} has store format {record.get('format')!r}, this fastcon reads format "
                f"{FORMAT}: use the fastcon that wrote it, or make the store again"
            )
        if record.get("digest") != record_digest(record):
            raise FastconError(
                f"{self.path}: the record of the store (in zarr.json) is damaged; `fastcon verify --repair` restores it"
            )
        self._arrays: dict[str, Any] = {}
        self._expected: dict[tuple[str, int], NDArray[np.int64]] = {}
        try:
            self._take(Record.parse(record))
        except Exception as error:  # intact, but not written by fastcon
            raise FastconError(
                f"{self.path} has a malformed record ({one_line(error)}): make the store again"
            ) from error

    def _take(self, record: Record) -> None:
        self.record, self.layout = record, layout(record)
        self.recipe, self.views, self.teachers = record.recipe, record.views, record.teachers
        self.chunking = Chunks((record.images.count,), record.recipe.chunk_rows)
        self.sources, self.images_digest = record.images.sources, record.images.digest

    def part(self, number: int) -> Store:
        """See `Stored`: itself."""
        return self

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """First row and one past the last row of a chunk."""
        return self.chunking.span(chunk)

    def view(self, view: int) -> View:
        """Order, boxes and flips of a view, checked against the record's digest."""
        self._files.ahead(self._view_files(view))
        columns = [self._read(name, view) for name in VIEW_COLUMNS]
        wrong = digest(*columns) != self.record.view_digests[view]
        if wrong and self._files.drop(self._view_files(view)):
            columns = [self._read(name, view) for name in VIEW_COLUMNS]
            wrong = digest(*columns) != self.record.view_digests[view]
        if wrong:
            raise FastconError(
                f"{self.path}: the recorded order, boxes or flips of view {view} are missing or damaged; "
                "`fastcon verify --repair` writes them anew from the recipe"
            )
        return View(*columns)

    def image_columns(self) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """Ids [n] and content digests [n, 16] of the images, in manifest order."""
        columns = [self._read(f"images/{name}") for name in IMAGE_COLUMNS]
        if digest(*columns) != self.record.images.columns_digest:
            raise FastconError(
                f"{self.path}: the recorded ids, digests or names of the images are missing or damaged; "
                "`fastcon verify --repair` writes them anew"
            )
        return columns[0], columns[1]

    def image_name(self, index: int) -> str:
        """The name of an image, relative to its source."""
        self._need("images/name_ends")
        self._need("images/names")
        ends = self._array("images/name_ends")
        start = int(ends[index - 1]) if index else 0
        return os.fsdecode(np.asarray(self._array("images/names")[start : int(ends[index])]).tobytes())

    def samples(self) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
        """Rows of view 0 [k] and the uint8 pixels [k, size, size, 3] that were decoded for them."""
        rows, pixels = self._read("samples/rows"), self._read("samples/pixels")
        if digest(rows, pixels) != self.record.samples_digest:
            raise FastconError(
                f"{self.path}: the sample pixels are missing or damaged; `fastcon verify --repair` decodes them anew"
            )
        return rows, pixels

    def done(self, name: str) -> NDArray[np.bool_]:
        """Which chunks of a teacher are finished: bool [V, chunks]."""
        checksums = self._read(self._path(name, "checksums"))
        return checksums[: self.views] >= 0

    def require(self, name: str, views: int) -> None:
        """See `Stored`."""
        unfinished = np.argwhere(~self.done(name)[:views])
        if len(unfinished):
            view, chunk = unfinished[0]
            raise FastconError(
                f"{self.path}: teacher {name!r} is not finished (first: view {view}, chunk {chunk}; "
                f"{len(unfinished)} chunks in all): run `fastcon precompute` again, it resumes"
            )

    def ahead(self, names: Sequence[str], view: int, chunk: int) -> None:
        """See `Stored`."""
        files = [file for name in names for file in self._chunk_files(name, view, chunk)]
        checksums = [self._path(name, "checksums") for name in names]
        if self.recipe.bake is not None:
            files.append(self._shard_name(view, chunk))
            checksums.append("baked/checksums")
        notes = [file for path in checksums for file in self._value_files(path, view)]
        read = {file.partition("/c/")[0] for file in [*self._view_files(view), *files, *notes]} & self.layout.keys()
        self._files.ahead([*sorted(f"{path}/zarr.json" for path in read), *self._view_files(view), *notes, *files])

    def _view_files(self, view: int) -> list[str]:
        return [file for name in VIEW_COLUMNS for file in self._value_files(name, view)]

    def _chunk_files(self, name: str, view: int, chunk: int) -> list[str]:
        """The files of a chunk's parts."""
        parts = self.codec(name).parts(len(self.teachers[name].classes))
        return [f"{self._path(name, part)}/c/{view}/{chunk}/0" for part in parts]

    def parts(self, name: str, view: int, chunk: int) -> Parts:
        """See `Stored`."""
        try:
            return self._parts(name, view, chunk)
        except Unreachable:
            raise
        except FastconError:
            if not self._files.drop(self._chunk_files(name, view, chunk)):
                raise
            return self._parts(name, view, chunk)

    def _parts(self, name: str, view: int, chunk: int) -> Parts:
        start, stop = self.chunk_range(chunk)
        where = f"{self.path}: teacher {name!r}, view {view}, chunk {chunk} (rows {start} to {stop - 1})"
        expected = self._checksum(name, view, chunk)
        if expected < 0:
            raise FastconError(f"{where} is not computed yet: run `fastcon precompute` again, it resumes")
        self._files.ahead(self._chunk_files(name, view, chunk))
        parts: Parts = {}
        crc = 0
        for part in self.codec(name).parts(len(self.teachers[name].classes)):
            array = self._array(self._path(name, part))
            try:
                rows, crc_of_rows = self._read_chunk(array, view, chunk)
            except FileNotFoundError:
                raise FastconError(f"{where} is missing: `fastcon verify --repair` computes it again") from None
            except Unreachable:
                raise
            except Exception as error:
                raise FastconError(
                    f"{where} is damaged ({one_line(error)}): `fastcon verify --repair` computes it again"
                ) from error
            crc = checksum(rows, crc) if parts else crc_of_rows
            parts[part] = rows
        if crc != expected:
            raise FastconError(
                f"{where} is missing or holds other rows than were written: `fastcon verify --repair` computes it again"
            )
        return parts

    def _checksum(self, name: str, view: int, chunk: int) -> int:
        """The recorded checksum of a chunk; -1: not done."""
        if (name, view) not in self._expected or self._expected[name, view][chunk] < 0:
            self._expected[name, view] = self._read(self._path(name, "checksums"), view)
        return int(self._expected[name, view][chunk])

    def _read_chunk(self, array: Any, view: int, chunk: int) -> tuple[NDArray[Any], int]:
        """The rows of one chunk of a [V, n, C] array, and their CRC-32C; raises whatever goes wrong.

        From a folder the chunk's file is read: its bytes, as `_create` lays them out, are the rows (the last chunk
        padded) and their CRC-32C. That is twice as fast as Zarr's way to the same bytes.
        """
        start, stop = self.chunk_range(chunk)
        layout = self.layout[array.path]
        rows, width = layout.chunks[1:]
        data = np.empty((rows, width), layout.dtype)
        tail = bytearray(5)  # a file that is too long fills it
        file = self._files.path(f"{array.path}/c/{view}/{chunk}/0")
        fd = os.open(file, os.O_RDONLY)
        try:
            whole = os.readv(fd, [data.data, tail]) == data.nbytes + 4
        finally:
            os.close(fd)
        if not whole:  # a file of another length, or a short read
            read = np.fromfile(file, dtype=np.uint8)
            if len(read) != data.nbytes + 4:
                raise FastconError(f"{len(read)} bytes long")
            data, tail = read[:-4].view(layout.dtype).reshape(rows, width), bytearray(read[-4:])
        crc = checksum(data)
        if tail[:4] != crc.to_bytes(4, "little"):
            raise FastconError("its CRC-32C differs")
        return data[: stop - start], crc if stop - start == rows else checksum(data[: stop - start])

    def baked(self) -> NDArray[np.bool_]:
        """Which shards of baked views are written: bool [V, chunks]."""
        return self._read("baked/checksums")[: self.views] >= 0

    def shard(self, view: int, chunk: int) -> list[NDArray[np.uint8]]:
        """See `Stored`."""
        try:
            return self._shard(view, chunk)
        except Unreachable:
            raise
        except FastconError:
            if not self._files.drop([self._shard_name(view, chunk)]):
                raise
            return self._shard(view, chunk)

    def _shard(self, view: int, chunk: int) -> list[NDArray[np.uint8]]:
        path = os.path.join(self.path, self._shard_name(view, chunk))
        expected = int(self._read("baked/checksums", view)[chunk])
        if expected < 0:
            raise FastconError(f"{path} is not baked yet: run `fastcon precompute` again, it resumes")
        try:
            local = self._files.path(self._shard_name(view, chunk))
            data = np.asarray(np.memmap(local, dtype=np.uint8, mode="r"))  # a plain array: slicing it is cheaper
        except (OSError, ValueError) as error:
            raise FastconError(f"{path} is missing or empty: `fastcon verify --repair` bakes it again") from error
        if checksum(data) != expected:
            raise FastconError(f"{path} is damaged: `fastcon verify --repair` bakes it again")
        start, stop = self.chunk_range(chunk)
        files, at = [], 0
        for _ in range(start, stop):  # a tar of our own making: a header, then the file, in blocks of 512
            size = int(data[at + 124 : at + 135].tobytes(), 8)
            files.append(data[at + 512 : at + 512 + size])
            at += 512 + size + -size % 512
        return files

    def _shard_name(self, view: int, chunk: int) -> str:
        return f"shards/view-{view:03d}/chunk-{chunk:05d}.tar"

    def weights(self, name: str) -> bytes:
        """See `Stored`."""
        if name not in self.teachers or self.teachers[name].weights_file_digest is None:
            raise FastconError(f"{self.path} keeps no weights of {name!r}, only those of a generalist")
        data = self._read(self._path(name, "weights"))
        if digest(data) != self.teachers[name].weights_file_digest:
            raise FastconError(
                f"{self.path}: the weights of {name!r} are missing or damaged; `fastcon verify --repair` writes them "
                "anew from where they came from"
            )
        return data.tobytes()

    def check_images(self, manifest: Manifest) -> None:
        """Raise FastconError, naming the first difference, if these are not the store's images."""
        if manifest.digest == self.record.images.digest:
            return
        ids, digests = self.image_columns()
        counts = (
            f"the store was made from {self.rows:,} images (digest {self.record.images.digest[:12]}), these are "
            f"{len(manifest):,} (digest {manifest.digest[:12]})"
        )
        way = "give the images it was made from, or make a new store"
        place_of = {int(i): k for k, i in enumerate(manifest.ids)}
        for k, image in enumerate(ids):
            other = place_of.get(int(image))
            if other is None:
                raise FastconError(f"{counts}: {self.image_name(k)!r} is gone; {way}")
            if manifest.digests[other].tobytes() != digests[k].tobytes():
                raise FastconError(f"{counts}: {self.image_name(k)!r} has other content; {way}")
        kept = set(ids.tolist())
        extra = next((k for k, image in enumerate(manifest.ids.tolist()) if image not in kept), None)
        what = "the images come in another order" if extra is None else f"{manifest.name(extra)!r} is new"
        raise FastconError(f"{counts}: {what}; {way}")

    def _path(self, name: str, part: str) -> str:
        if name not in self.teachers:
            raise FastconError(f"{self.path} has no teacher {name!r}; it has {', '.join(self.teachers) or 'none'}")
        return f"teachers/{name}/{part}"

    def _array(self, path: str) -> Any:
        """An array of the store; opened once, and refused where its metadata are not what the record implies."""
        if path not in self._arrays:
            try:
                self._files.path(f"{path}/zarr.json")
                self._arrays[path] = arrays.existing(self._group, path, self.layout[path])
            except Unreachable:
                raise
            except Exception as error:
                raise FastconError(
                    f"{self.path}: array {path!r} is missing or damaged ({one_line(error)}); `fastcon verify --repair` "
                    "mends what can be mended"
                ) from error
        return self._arrays[path]

    def _read(self, path: str, index: int | None = None) -> NDArray[Any]:
        """An array's values. Damaged data raise; missing data too, except checksums, which then say "not done"."""
        array, layout = self._array(path), self.layout[path]
        try:
            self._need(path, index)
            return np.ascontiguousarray(array[: layout.shape[0]] if index is None else array[index])
        except Unreachable:
            raise
        except Exception as error:
            raise FastconError(
                f"{self.path}: array {path!r} is missing or damaged ({_reason(error)}); `fastcon verify --repair` mends "
                "what can be mended"
            ) from error

    def distrust(self) -> None:
        """Forget what is kept of a store in object storage, so that all of it is looked at where it is."""
        self._files.distrust()

    def _need(self, path: str, index: int | None = None) -> None:
        """Have the chunks of an array on this machine. Raises FileNotFoundError, where Zarr would return zeros."""
        files = self._value_files(path, index)
        self._files.ahead(files)
        for file in files:
            with contextlib.suppress(FileNotFoundError) if self.layout[path].fill else contextlib.nullcontext():
                self._files.path(file)

    def _value_files(self, path: str, index: int | None = None) -> list[str]:
        """The files of an array's values; index: of one entry of the first axis."""
        layout = self.layout[path]
        numbers = range(-(-layout.shape[0] // layout.chunks[0])) if index is None else [index // layout.chunks[0]]
        return [f"{path}/c/{number}" + "/0" * (len(layout.shape) - 1) for number in numbers]

    def damaged_metadata(self) -> list[str]:
        """Metadata files (zarr.json of arrays and groups, record.copy) that differ from what the record implies."""
        files = self.metadata_files()
        self._files.ahead(files)
        return [name for name, data in files.items() if not self._same(name, data)]

    def _same(self, name: str, data: bytes) -> bool:
        try:
            return arrays.same_json(Path(self._files.path(name)), data)
        except FileNotFoundError:
            return False

    def metadata_files(self) -> dict[str, bytes]:
        """Name → bytes of every metadata file of the store, as they must be."""
        files = {"zarr.json": arrays.group_file({"fastcon": self.record.json()}), COPY: record_file(self.record)}
        for path, array_layout in self.layout.items():
            parts = path.split("/")
            files |= {"/".join([*parts[:k], "zarr.json"]): arrays.group_file({}) for k in range(1, len(parts))}
            files[f"{path}/zarr.json"] = arrays.array_file(array_layout)
        return files


def sample_rows(store: Store) -> NDArray[np.uint32]:
    """Which rows of view 0 are kept as pixels: evenly spread, at most 64."""
    count = min(SAMPLES, store.rows)
    return (np.arange(count, dtype=np.int64) * store.rows // count).astype(np.uint32)


def bytes_on_disk(path: str) -> int:
    """Bytes of all files of a store, in a folder or in object storage."""
    if is_url(path):
        filesystem, root = filesystem_of(path)
        filesystem.invalidate_cache()
        return int(filesystem.du(root))
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


def record_file(record: Record) -> bytes:
    """The bytes of record.copy."""
    return (json.dumps(record.json(), indent=2) + "\n").encode()


def _reason(error: BaseException) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
