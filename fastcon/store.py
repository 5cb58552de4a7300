"""The store: teacher logits of augmented views in Zarr 3, in training order, checked on every read.

    zarr.json            attributes.fastcon: format, recipe, images, views, digests, teachers  (the record)
    order   [V, n]       uint32   row r of view v is image order[v, r]
    boxes   [V, n, 4]    int32    its crop: top, left, height, width
    flips   [V, n]       uint8    1: mirrored left to right
    images/ids [n] uint64 · digests [n, 16] uint8 · names uint8 · name_ends [n] int64
    samples/rows [k] uint32 · pixels [k, size, size, 3] uint8      rows of view 0 and what was decoded for them
    baked/checksums [V, chunks] int64                              of a store with baked views; -1: no shard yet
    shards/view-VVV/chunk-CCCCC.tar                                … which are here: a chunk's rows as JPEGs, see `bake`
    teachers/NAME/logits [V, n, C] float16                         or the parts of another codec, see `codec`
    teachers/NAME/checksums [V, chunks] int64                      -1: not done, else CRC-32C of the rows of all parts
    teachers/NAME/weights [bytes] uint8                            the generalist's weights, a safetensors file

    record.copy                                                    the record once more, to restore it from

The record is written last and at once (one atomic file): what it does not name is not there. It carries its own
digest, and all metadata follow from it (`layout`). Every array carries CRC-32C, and the record or `checksums` says
which bytes belong, so that a chunk that is missing, torn or in the wrong place is an error, never zeros. This is the
only module that knows Zarr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from fastcon import views
from fastcon.checkpoint import write_atomically
from fastcon.codec import Codec, Parts, check_kind, codec
from fastcon.errors import FastconError
from fastcon.manifest import Manifest

FORMAT = 2
CHUNK_ROWS = 1024
SAMPLES = 64
LARGEST = 2**32 - 1
"""Images that a store holds at most."""
COPY = "record.copy"
IMAGE_COLUMNS = ("ids", "digests", "names", "name_ends")
VIEW_COLUMNS = ("order", "boxes", "flips")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How views are made: together with the images it determines every row of a store."""

    seed: int = 0
    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    chunk_rows: int = CHUNK_ROWS
    bake: int | None = None
    """JPEG quality of the baked views; None: views are cut out of the images whenever they are used."""

    def record(self) -> dict[str, Any]:
        """As it is written into the store."""
        return dataclasses.asdict(self) | {"scale": list(self.scale), "ratio": list(self.ratio)}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Recipe:
        """The recipe of a store."""
        return cls(**record | {"scale": tuple(record["scale"]), "ratio": tuple(record["ratio"])})


@dataclasses.dataclass(frozen=True)
class View:
    """One view of every image, in row order: image index [n], box [n, 4], flip [n]."""

    order: NDArray[np.uint32]
    boxes: NDArray[np.int32]
    flips: NDArray[np.uint8]


def check_name(name: str) -> None:
    """Raise FastconError for what cannot name a teacher, and so a folder of the store."""
    if not NAME.fullmatch(name):
        raise FastconError(
            f"{name!r} cannot name a teacher: letters, digits, '.', '_' and '-', at most 64, are allowed"
        )


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a store lies in object storage (s3://…) rather than in a folder."""
    return "://" in os.fspath(path)


@dataclasses.dataclass(frozen=True)
class Layout:
    """An array of a store: shape, chunks, dtype and what is read where nothing was written."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    fill: int = 0


def layout(record: dict[str, Any]) -> dict[str, Layout]:
    """Path → layout of every array that a record implies."""
    n, views = record["images"]["count"], record["views"]
    rows, bake = record["recipe"]["chunk_rows"], record["recipe"]["bake"]
    chunks = -(-n // rows)
    block, names = min(n, 1 << 20), record["images"]["name_bytes"]
    found = {
        "images/ids": Layout((n,), (block,), "uint64"),
        "images/digests": Layout((n, 16), (block, 16), "uint8"),
        "images/names": Layout((names,), (min(names, 1 << 20),), "uint8"),
        "images/name_ends": Layout((n,), (block,), "int64"),
        "order": Layout((views, n), (1, n), "uint32"),
        "boxes": Layout((views, n, 4), (1, n, 4), "int32"),
        "flips": Layout((views, n), (1, n), "uint8"),
    }
    checksums = Layout((views, chunks), (1, chunks), "int64", fill=-1)
    if bake is not None:
        found["baked/checksums"] = checksums
    if record["samples_digest"] is not None:
        k, size = min(SAMPLES, n), record["recipe"]["size"]
        found["samples/rows"] = Layout((k,), (k,), "uint32")
        found["samples/pixels"] = Layout((k, size, size, 3), (k, size, size, 3), "uint8")
    for name, teacher in record["teachers"].items():
        for part, (dtype, width) in codec(teacher["logits"]).parts(len(teacher["classes"])).items():
            found[f"teachers/{name}/{part}"] = Layout((views, n, width), (1, rows, width), dtype)
        found[f"teachers/{name}/checksums"] = checksums
        if "weights_bytes" in teacher:
            size = teacher["weights_bytes"]
            found[f"teachers/{name}/weights"] = Layout((size,), (min(size, 1 << 26),), "uint8")
    return found


class Store:
    """A store opened for reading. Raises FastconError where there is none, or of another format."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._group = _open(self.path, "r")
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
        if record.get("digest") != _record_digest(record):
            raise FastconError(
                f"{self.path}: the record of the store (in zarr.json) is damaged; `fastcon verify --repair` restores it"
            )
        self._arrays: dict[str, Any] = {}
        self._expected: dict[tuple[str, int], NDArray[np.int64]] = {}
        self.record: dict[str, Any] = record
        try:
            self.recipe = Recipe.from_record(record["recipe"])
            self.rows: int = record["images"]["count"]
            self.views: int = record["views"]
            possible = 0 < self.rows <= LARGEST and self.views == len(record["view_digests"])
            self.layout = layout(record)
        except Exception as error:  # whole, but by another hand than ours
            raise FastconError(
                f"{self.path} has a record that is none ({_line(error)}): make the store again"
            ) from error
        if not possible or not all(NAME.fullmatch(name) for name in self.teachers):
            raise FastconError(f"{self.path} has a record that cannot be ({self.rows:,} images): make the store again")

    @property
    def teachers(self) -> dict[str, dict[str, Any]]:
        """Name → record of each teacher: role, classes, kind, size, mean, std, weights digest, precision."""
        return self.record["teachers"]

    @property
    def generalist(self) -> str | None:
        """The name of the generalist, if there is one."""
        return next((name for name, teacher in self.teachers.items() if teacher["role"] == "generalist"), None)

    def codec(self, name: str) -> Codec:
        """How a teacher's logits are stored."""
        return codec(self.teachers[name]["logits"])

    def logit_bytes(self, name: str) -> int:
        """Bytes of one row of a teacher's logits."""
        return self.codec(name).row_bytes(len(self.teachers[name]["classes"]))

    @property
    def chunks(self) -> int:
        """Chunks in one view of one teacher."""
        return -(-self.rows // self.recipe.chunk_rows)

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """First row and one past the last row of a chunk."""
        start = chunk * self.recipe.chunk_rows
        return start, min(start + self.recipe.chunk_rows, self.rows)

    def view(self, view: int) -> View:
        """Order, boxes and flips of a view, checked against the record's digest."""
        columns = [self._read(name, view) for name in VIEW_COLUMNS]
        if _digest(*columns) != self.record["view_digests"][view]:
            raise FastconError(
                f"{self.path}: the recorded order, boxes or flips of view {view} are missing or damaged; "
                "`fastcon verify --repair` writes them anew from the recipe"
            )
        return View(*columns)

    def image_columns(self) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """Ids [n] and content digests [n, 16] of the images, in manifest order."""
        columns = [self._read(f"images/{name}") for name in IMAGE_COLUMNS]
        if _digest(*columns) != self.record["images"]["columns_digest"]:
            raise FastconError(
                f"{self.path}: the recorded ids, digests or names of the images are missing or damaged; "
                "`fastcon verify --repair` writes them anew"
            )
        return columns[0], columns[1]

    def image_name(self, index: int) -> str:
        """The name of an image, relative to its source."""
        ends = self._array("images/name_ends")
        start = int(ends[index - 1]) if index else 0
        return os.fsdecode(np.asarray(self._array("images/names")[start : int(ends[index])]).tobytes())

    def samples(self) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
        """Rows of view 0 [k] and the uint8 pixels [k, size, size, 3] that were decoded for them."""
        rows, pixels = self._read("samples/rows"), self._read("samples/pixels")
        if _digest(rows, pixels) != self.record["samples_digest"]:
            raise FastconError(
                f"{self.path}: the sample pixels are missing or damaged; `fastcon verify --repair` decodes them anew"
            )
        return rows, pixels

    def done(self, name: str) -> NDArray[np.bool_]:
        """Which chunks of a teacher are finished: bool [V, chunks]."""
        checksums = self._read(self._path(name, "checksums"))
        return checksums[: self.views] >= 0

    def logits(self, name: str, view: int, chunk: int) -> NDArray[Any]:
        """One chunk of a teacher's logits [rows, C], verified. Raises FastconError for an absent or damaged one."""
        return self.codec(name).decode(self.parts(name, view, chunk), len(self.teachers[name]["classes"]))

    def parts(self, name: str, view: int, chunk: int) -> Parts:
        """One chunk of a teacher's logits as they are stored, verified; raises as `logits` does."""
        start, stop = self.chunk_range(chunk)
        where = f"{self.path}: teacher {name!r}, view {view}, chunk {chunk} (rows {start} to {stop - 1})"
        expected = self._checksum(name, view, chunk)
        if expected < 0:
            raise FastconError(f"{where} is not computed yet: run `fastcon precompute` again, it resumes")
        parts: Parts = {}
        seen = 0
        for part in self.codec(name).parts(len(self.teachers[name]["classes"])):
            array = self._array(self._path(name, part))
            try:
                rows, own = self._read_chunk(array, view, chunk)
            except FileNotFoundError:
                raise FastconError(f"{where} is missing: `fastcon verify --repair` computes it again") from None
            except Exception as error:
                raise FastconError(
                    f"{where} is damaged ({_line(error)}): `fastcon verify --repair` computes it again"
                ) from error
            seen = checksum(rows, seen) if parts else own
            parts[part] = rows
        if seen != expected:
            raise FastconError(
                f"{where} is missing or holds other rows than were written: `fastcon verify --repair` computes it again"
            )
        return parts

    def _checksum(self, name: str, view: int, chunk: int) -> int:
        """What a chunk must hold; -1: it is not done."""
        if (name, view) not in self._expected or self._expected[name, view][chunk] < 0:
            self._expected[name, view] = self._read(self._path(name, "checksums"), view)
        return int(self._expected[name, view][chunk])

    def _read_chunk(self, array: Any, view: int, chunk: int) -> tuple[NDArray[Any], int]:
        """The rows of one chunk of a [V, n, C] array, and their CRC-32C; raises whatever goes wrong.

        From a folder the chunk's file is read: its bytes, as `_create` lays them out, are the rows (the last chunk
        padded) and their CRC-32C. That is twice as fast as Zarr's way to the same bytes.
        """
        start, stop = self.chunk_range(chunk)
        if is_url(self.path):
            found = np.ascontiguousarray(array[view, start:stop])
            return found, checksum(found)
        here = self.layout[array.path]
        rows, width = here.chunks[1:]
        data = np.empty((rows, width), here.dtype)
        tail = bytearray(5)  # a longer file fills it
        file = os.path.join(self.path, array.path, f"c/{view}/{chunk}/0")
        fd = os.open(file, os.O_RDONLY)
        try:
            whole = os.readv(fd, [data.data, tail]) == data.nbytes + 4
        finally:
            os.close(fd)
        if not whole:  # a file of another length, or a system that gives only some of it at once
            read = np.fromfile(file, dtype=np.uint8)
            if len(read) != data.nbytes + 4:
                raise FastconError(f"{len(read)} bytes long")
            data, tail = read[:-4].view(here.dtype).reshape(rows, width), bytearray(read[-4:])
        own = checksum(data)
        if tail[:4] != own.to_bytes(4, "little"):
            raise FastconError("its CRC-32C differs")
        return data[: stop - start], own if stop - start == rows else checksum(data[: stop - start])

    def baked(self) -> NDArray[np.bool_]:
        """Which shards of baked views are written: bool [V, chunks]."""
        return self._read("baked/checksums")[: self.views] >= 0

    def shard(self, view: int, chunk: int) -> list[NDArray[np.uint8]]:
        """The encoded bytes of a chunk's baked views, verified and mapped into memory; raises FastconError."""
        path = self._shard_path(view, chunk)
        expected = int(self._read("baked/checksums", view)[chunk])
        if expected < 0:
            raise FastconError(f"{path} is not baked yet: run `fastcon precompute` again, it resumes")
        try:
            data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))  # a plain array: slices of it cost less
        except (OSError, ValueError) as error:
            raise FastconError(f"{path} is missing or empty: `fastcon verify --repair` bakes it again") from error
        if checksum(data) != expected:
            raise FastconError(f"{path} is damaged: `fastcon verify --repair` bakes it again")
        start, stop = self.chunk_range(chunk)
        found, at = [], 0
        for _ in range(start, stop):  # the bytes are ours: a header, then the file, in blocks of 512
            size = int(data[at + 124 : at + 135].tobytes(), 8)
            found.append(data[at + 512 : at + 512 + size])
            at += 512 + size + -size % 512
        return found

    def _shard_path(self, view: int, chunk: int) -> str:
        return os.path.join(self.path, f"shards/view-{view:03d}/chunk-{chunk:05d}.tar")

    def weights(self, name: str) -> bytes:
        """The stored safetensors file of a teacher (the generalist has one)."""
        if "weights_file_digest" not in self.teachers.get(name, {}):
            raise FastconError(f"{self.path} keeps no weights of {name!r}, only those of a generalist")
        data = self._read(self._path(name, "weights"))
        if _digest(data) != self.teachers[name]["weights_file_digest"]:
            raise FastconError(
                f"{self.path}: the weights of {name!r} are missing or damaged; `fastcon verify --repair` writes them "
                "anew from where they came from"
            )
        return data.tobytes()

    def check_images(self, manifest: Manifest) -> None:
        """Raise FastconError, naming the first difference, where these are not the store's images."""
        if manifest.digest == self.record["images"]["digest"]:
            return
        ids, digests = self.image_columns()
        here = (
            f"the store was made from {self.rows:,} images (digest {self.record['images']['digest'][:12]}), these are "
            f"{len(manifest):,} (digest {manifest.digest[:12]})"
        )
        way = "give the images it was made from, or make a new store"
        known = {int(i): k for k, i in enumerate(manifest.ids)}
        for k, image in enumerate(ids):
            other = known.get(int(image))
            if other is None:
                raise FastconError(f"{here}: {self.image_name(k)!r} is gone; {way}")
            if manifest.digests[other].tobytes() != digests[k].tobytes():
                raise FastconError(f"{here}: {self.image_name(k)!r} has other content; {way}")
        kept = set(ids.tolist())
        extra = next((k for k, image in enumerate(manifest.ids.tolist()) if image not in kept), None)
        what = "the images come in another order" if extra is None else f"{manifest.name(extra)!r} is new"
        raise FastconError(f"{here}: {what}; {way}")

    def _path(self, name: str, part: str) -> str:
        if name not in self.teachers:
            raise FastconError(f"{self.path} has no teacher {name!r}; it has {', '.join(self.teachers) or 'none'}")
        return f"teachers/{name}/{part}"

    def _array(self, path: str) -> Any:
        """An array of the store; opened once, and refused where its metadata are not what the record implies."""
        if path not in self._arrays:
            try:
                with zarr.config.set({"array.write_empty_chunks": True}):  # a chunk of zeros is no missing chunk
                    array = self._group[path]
                found, implied = (_fields(data) for data in (array.metadata.to_dict(), _metadata(self.layout[path])))
                if array.shape[0] > implied["shape"][0]:
                    found["shape"][0] = implied["shape"][0]  # a writer may be adding views
                if found != implied:
                    raise ValueError("its zarr.json is not what the record implies")
            except Exception as error:
                raise FastconError(
                    f"{self.path}: array {path!r} is missing or damaged ({_line(error)}); `fastcon verify --repair` "
                    "mends what can be mended"
                ) from error
            self._arrays[path] = array
        return self._arrays[path]

    def _read(self, path: str, index: int | None = None) -> NDArray[Any]:
        """An array's values. What is damaged raises; what is missing too, but for checksums, which then say "not done"."""
        array, here = self._array(path), self.layout[path]
        try:
            if here.fill == 0 and not is_url(self.path):  # Zarr would make zeros of them
                numbers = range(-(-here.shape[0] // here.chunks[0])) if index is None else [index // here.chunks[0]]
                for number in numbers:
                    os.stat(os.path.join(self.path, path, f"c/{number}" + "/0" * (len(here.shape) - 1)))
            return np.ascontiguousarray(array[: here.shape[0]] if index is None else array[index])
        except Exception as error:
            raise FastconError(
                f"{self.path}: array {path!r} is missing or damaged ({_reason(error)}); `fastcon verify --repair` mends "
                "what can be mended"
            ) from error

    def damaged_metadata(self) -> list[str]:
        """Metadata files (zarr.json of arrays and groups, record.copy) that differ from what the record implies.

        From a folder; of a store in object storage none is looked at but those of arrays, on use.
        """
        if is_url(self.path):
            return []
        return [name for name, data in self.metadata_files().items() if not _same_json(Path(self.path, name), data)]

    def metadata_files(self) -> dict[str, bytes]:
        """Name → bytes of every metadata file of the store, as they must be."""
        files = {"zarr.json": _group_file({"fastcon": self.record}), COPY: _record_file(self.record)}
        for path, here in self.layout.items():
            parts = path.split("/")
            files |= {"/".join([*parts[:k], "zarr.json"]): _group_file({}) for k in range(1, len(parts))}
            files[f"{path}/zarr.json"] = _array_file(here)
        return files


class StoreWriter(Store):
    """A store opened for writing: one process at a time. Create or reopen it with `open_for_writing`."""

    def grow(self, manifest: Manifest, view_count: int) -> None:
        """Record the order, boxes and flips of views up to `view_count`, where they are not there yet."""
        digests = list(self.record["view_digests"])
        grown = self.record | {"views": view_count, "view_digests": digests}
        for path, here in layout(grown).items():
            if here.shape[0] != self.layout[path].shape[0]:
                self._array(path).resize(here.shape)
        for view in range(self.views, view_count):
            made = make_view(self.recipe, manifest, view)
            for name in VIEW_COLUMNS:
                self._array(name)[view] = getattr(made, name)
            digests.append(_digest(made.order, made.boxes, made.flips))
        self.record = grown
        self._commit()

    def add_teacher(self, name: str, record: dict[str, Any], weights: bytes | None) -> None:
        """Make room for a teacher's logits up to the store's views, or check that it is the one recorded."""
        check_name(name)
        if record["role"] == "generalist" and self.generalist not in (None, name):
            raise FastconError(
                f"{self.path} has the generalist {self.generalist!r}, and a store has one: add {name!r} with "
                "--teacher, or use another --store"
            )
        if name in self.teachers and self.done(name).any():
            self._check_same_teacher(name, record)
        else:  # nothing of it is stored: a teacher that failed at once may come back mended
            self._create_teacher(name, record)
        if weights is not None:
            self._write_weights(name, weights)

    def write(self, name: str, view: int, chunk: int, parts: Parts) -> None:
        """Store one finished chunk, the parts of its rows, then mark it done."""
        start, stop = self.chunk_range(chunk)
        seen = 0
        for part, (dtype, width) in self.codec(name).parts(len(self.teachers[name]["classes"])).items():
            rows = parts[part]
            if (rows.shape, rows.dtype) != ((stop - start, width), np.dtype(dtype)):
                raise ValueError(f"{part} of chunk {chunk} takes {dtype} {(stop - start, width)}, got {rows.shape}")
            self._array(self._path(name, part))[view, start:stop] = rows
            seen = checksum(rows, seen)
        self._array(self._path(name, "checksums"))[view, chunk] = seen
        self._expected.pop((name, view), None)

    def write_shard(self, view: int, chunk: int, data: bytes) -> None:
        """Store the tar of a chunk's baked views. Raises FastconError where another was recorded, which this one replaces."""
        checksums = self._array("baked/checksums")
        expected, seen = int(checksums[view, chunk]), checksum(np.frombuffer(data, dtype=np.uint8))
        if expected not in (-1, seen):
            raise FastconError(
                f"{self._shard_path(view, chunk)} would come out with other bytes than the teachers saw, from another "
                "version of Pillow or DALI: repair it with the versions that baked it, or make a new store"
            )
        path = Path(self._shard_path(view, chunk))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
        checksums[view, chunk] = seen

    def repair_view(self, manifest: Manifest, view: int) -> None:
        """Write the order, boxes and flips of a view anew, where the recipe makes what the record says."""
        made = make_view(self.recipe, manifest, view)
        if _digest(made.order, made.boxes, made.flips) != self.record["view_digests"][view]:
            raise FastconError(f"{self.path}: the recipe does not make view {view} any more; make the store again")
        for name in VIEW_COLUMNS:
            self._array(name)[view] = getattr(made, name)

    def _create_teacher(self, name: str, record: dict[str, Any]) -> None:
        check_kind(record["logits"], record["kind"], name)
        self.record["teachers"][name] = record
        where = f"teachers/{name}/"
        for path, here in layout(self.record).items():
            if path.startswith(where):
                _create(self._group, path, here)
                self._arrays.pop(path, None)
        self._commit()

    def _write_weights(self, name: str, weights: bytes) -> None:
        """Keep a teacher's weights file, unless it is there, whole."""
        with contextlib.suppress(FastconError):
            if self.weights(name) == weights:
                return
        data = np.frombuffer(weights, dtype=np.uint8)
        path = f"teachers/{name}/weights"
        self.record["teachers"][name] |= {"weights_file_digest": _digest(data), "weights_bytes": len(data)}
        _create(self._group, path, layout(self.record)[path])[:] = data
        self._arrays.pop(path, None)
        self._commit()

    def _check_same_teacher(self, name: str, record: dict[str, Any]) -> None:
        stored = {key: value for key, value in self.teachers[name].items() if not key.startswith("weights_")}
        differing = [key for key in stored if key != "spec" and stored[key] != record.get(key)]
        if not differing:
            return
        key = "weights" if "weights" in differing else differing[0]
        was, now = (_short(value) for value in (stored[key], record.get(key)))
        raise FastconError(
            f"teacher {name!r} is in {self.path} with {key} {was}, the one given has {now}: give the "
            "recorded one, or add this one under another name"
        )

    def repair_metadata(self) -> None:
        """Write the metadata files that differ from what the record implies."""
        files = self.metadata_files()
        for name in self.damaged_metadata():
            Path(self.path, name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(self.path, name), files[name])

    def repair_images(self, manifest: Manifest) -> None:
        """Write ids, digests and names of the images anew, from a manifest that `check_images` passed by its digest."""
        columns = {name: np.asarray(getattr(manifest, name)) for name in IMAGE_COLUMNS}
        if _digest(*columns.values()) != self.record["images"]["columns_digest"]:
            raise FastconError(f"{self.path}: these are the images, under other names: give them as they were named")
        for name, column in columns.items():
            self._array(f"images/{name}")[:] = column

    def repair_samples(self, pixels: NDArray[np.uint8]) -> None:
        """Write the sample pixels anew, where these are what the record says."""
        rows = sample_rows(self)
        if _digest(rows, pixels) != self.record["samples_digest"]:
            raise FastconError(f"{self.path}: the images decode differently now, so the sample pixels are lost")
        self._array("samples/rows")[:], self._array("samples/pixels")[:] = rows, pixels

    def repair_weights(self, name: str, weights: bytes) -> None:
        """Write a teacher's weights file anew, where this is what the record says."""
        data = np.frombuffer(weights, dtype=np.uint8)
        if _digest(data) != self.teachers[name]["weights_file_digest"]:
            raise FastconError(f"{self.path}: {self.teachers[name]['spec']} is no more what {name!r} was: put it back")
        self._array(self._path(name, "weights"))[:] = data

    def repair_checksums(self) -> None:
        """Where a view's checksums are lost, take those of the chunks that are there and whole; the others are not done."""
        for path in [path for path in self.layout if path.endswith("/checksums")]:
            name = None if path.startswith("baked/") else path.split("/")[1]
            for view in range(self.views):
                try:
                    self._read(path, view)
                except FastconError:
                    self._array(path)[view] = [self._found_checksum(name, view, c) for c in range(self.chunks)]
        self._expected.clear()

    def _found_checksum(self, name: str | None, view: int, chunk: int) -> int:
        """The checksum of what is there of a chunk (name None: of a shard); -1 where it is missing or damaged."""
        try:
            if name is None:
                return checksum(np.fromfile(self._shard_path(view, chunk), dtype=np.uint8))
            seen = 0
            for part in self.codec(name).parts(len(self.teachers[name]["classes"])):
                seen = checksum(self._read_chunk(self._array(self._path(name, part)), view, chunk)[0], seen)
            return seen
        except Exception:
            return -1

    def _commit(self) -> None:
        """Write the record: from then on what it says is so."""
        _commit(self._group, self.path, self.record)
        self.views, self.layout = self.record["views"], layout(self.record)


@contextlib.contextmanager
def open_for_writing(
    path: str | os.PathLike[str], manifest: Manifest, recipe: Recipe, view_count: int, pipeline: dict[str, Any]
) -> Iterator[StoreWriter]:
    """Create the store, or reopen the one that this recipe and these images made; held by one process at a time.

    pipeline: the settings that pixels were decoded with (rule: recorded, and compared by pixels on use).
    """
    path = os.fspath(path)
    with _lock(path):
        _remove_leftovers(path)
        if not _exists(path):
            _create_store(path, manifest, recipe, view_count, pipeline)
        store = StoreWriter(path)
        store._group = _open(path, "r+")
        _check_recipe(store, recipe)
        store.check_images(manifest)
        if view_count > store.views:
            store.grow(manifest, view_count)
        yield store


def set_samples(store: StoreWriter, pixels: NDArray[np.uint8]) -> None:
    """Keep the decoded pixels [k, size, size, 3] of `sample_rows`: done once, before the first logits."""
    rows = sample_rows(store)
    store.record["samples_digest"] = _digest(rows, pixels)
    made = layout(store.record)
    for path, values in (("samples/rows", rows), ("samples/pixels", pixels)):
        _create(store._group, path, made[path])[:] = values
    store._commit()


def sample_rows(store: Store) -> NDArray[np.uint32]:
    """Which rows of view 0 are kept as pixels: evenly spread, at most 64."""
    count = min(SAMPLES, store.rows)
    return (np.arange(count, dtype=np.int64) * store.rows // count).astype(np.uint32)


def checksum(rows: NDArray[Any], before: int = 0) -> int:
    """CRC-32C of the rows' bytes in C order, little endian, going on from that of the bytes before them."""
    return int(google_crc32c.extend(before, np.ascontiguousarray(rows).reshape(-1).view(np.uint8)))  # type: ignore[arg-type]


def restore_record(path: str) -> bool:
    """Bring back a damaged record from its copy; whether that was needed. Raises FastconError where it cannot be."""
    if is_url(path) or not os.path.exists(os.path.join(path, COPY)):
        return False
    with contextlib.suppress(FastconError):
        Store(path)
        return False
    with _lock(path):
        try:
            record = json.loads(Path(path, COPY).read_bytes())
            if record["format"] != FORMAT:
                return False  # opening it says so
            whole = record["digest"] == _record_digest(record)
        except (ValueError, KeyError, TypeError, OSError):
            whole = False
        if not whole:
            raise FastconError(f"{path}: the record of the store and its copy are both damaged; make the store again")
        write_atomically(Path(path, "zarr.json"), _group_file({"fastcon": record}))
    return True


def _create_store(path: str, manifest: Manifest, recipe: Recipe, view_count: int, pipeline: dict[str, Any]) -> None:
    if len(manifest) > LARGEST:
        raise FastconError(f"a store holds at most {LARGEST:,} images, these are {len(manifest):,}")
    if recipe.bake is not None and is_url(path):
        raise FastconError(f"{path}: baked views are tar files in a folder; bake into one, or leave out --bake")
    group = _open(path, "a")
    columns = {name: np.asarray(getattr(manifest, name)) for name in IMAGE_COLUMNS}
    images = {
        "count": len(manifest),
        "digest": manifest.digest,
        "columns_digest": _digest(*columns.values()),
        "name_bytes": len(columns["names"]),
        "sources": manifest.sources,
    }
    record: dict[str, Any] = {
        "format": FORMAT,
        "recipe": recipe.record(),
        "pipeline": pipeline,
        "images": images,
        "views": view_count,
        "view_digests": [],
        "samples_digest": None,
        "teachers": {},
    }
    arrays = {path: _create(group, path, here) for path, here in layout(record).items()}
    for name, column in columns.items():
        arrays[f"images/{name}"][:] = column
    for view in range(view_count):
        made = make_view(recipe, manifest, view)
        for name in VIEW_COLUMNS:
            arrays[name][view] = getattr(made, name)
        record["view_digests"].append(_digest(made.order, made.boxes, made.flips))
    _commit(group, path, record)


def _commit(group: Any, path: str, record: dict[str, Any]) -> None:
    record["digest"] = _record_digest(record)
    group.attrs["fastcon"] = record
    if not is_url(path):
        write_atomically(Path(path, COPY), _record_file(record))


def make_view(recipe: Recipe, manifest: Manifest, view: int) -> View:
    """What the recipe says of a view: a pure function of (seed, image ids and sizes, view)."""
    order = views.order(recipe.seed, manifest.ids, view)
    ids, widths, heights = manifest.ids[order], manifest.widths[order], manifest.heights[order]
    boxes = views.boxes(recipe.seed, ids, view, widths, heights, recipe.scale, recipe.ratio)
    return View(order.astype(np.uint32), boxes, views.flips(recipe.seed, ids, view))


def _check_recipe(store: Store, recipe: Recipe) -> None:
    stored, given = store.recipe.record(), recipe.record()
    if stored["bake"] != given["bake"]:
        was, now = (f"views baked at quality {r['bake']}" if r["bake"] else "no baked views" for r in (stored, given))
        raise FastconError(f"{store.path} was made with {was}, this call says {now}: use the same, or another --store")
    for key, value in stored.items():
        if value != given[key]:
            raise FastconError(
                f"{store.path} was made with {key} {value}, this call says {given[key]}: use the same "
                f"{key}, or another --store"
            )


def _open(path: str, mode: str) -> Any:
    """The root group: "r" and "r+" need one, "a" makes it where there is none."""
    try:
        return zarr.open_group(path, mode=mode, zarr_format=3, use_consolidated=False)  # type: ignore[arg-type]
    except ImportError as error:
        raise FastconError(f"{path} lies in object storage: pip install 'fastcon[s3]' to read it ({error})") from error
    except Exception as error:
        raise FastconError(
            f"{path} is no fastcon store ({_line(error)}): give the folder that `fastcon precompute --store` wrote"
        ) from error


def _exists(path: str) -> bool:
    """Whether a finished creation is there; refuses a place that holds something else, or cannot be looked at."""
    try:
        group = zarr.open_group(path, mode="r", zarr_format=3, use_consolidated=False)
    except FileNotFoundError:  # the one error that means "nothing there": any other must not start a new store
        foreign = [] if is_url(path) else [n for n in sorted(os.listdir(path)) if not n.endswith((".lock", ".log"))]
        if foreign:
            raise FastconError(
                f"{path} holds other files ({foreign[0]}, …) and no store: give an empty or a new folder"
            ) from None
        return False
    except Exception as error:
        raise FastconError(f"{path} cannot be looked at ({_line(error)})") from error
    if "fastcon" in group.attrs:
        return True
    if set(group.attrs) or not {name.split("/")[0] for name in group.keys()} <= _CREATED:  # noqa: SIM118 - no mapping
        raise FastconError(f"{path} is a Zarr group of something else: give a new folder as --store")
    return False


_CREATED = {"images", "order", "boxes", "flips", "baked"}
"""What an interrupted creation may have left: it is written again from the start."""


def _remove_leftovers(path: str) -> None:
    """Temporary files of writes that a kill cut off; only the holder of the lock may call this."""
    if not is_url(path):
        for partial in Path(path).rglob("*.partial"):
            partial.unlink()


def _create(group: Any, name: str, here: Layout) -> Any:
    return group.create_array(
        name,
        config={"write_empty_chunks": True},  # a chunk of zeros is no missing chunk
        shape=here.shape,
        chunks=tuple(max(c, 1) for c in here.chunks),
        dtype=here.dtype,
        fill_value=here.fill,
        overwrite=True,
        filters=None,
        serializer=BytesCodec(endian="little" if np.dtype(here.dtype).itemsize > 1 else None),
        compressors=Crc32cCodec(),
    )


def _metadata(here: Layout) -> dict[str, Any]:
    """The metadata of an array, as this version of Zarr has them."""
    return _create(zarr.open_group(MemoryStore(), mode="w", zarr_format=3), "x", here).metadata.to_dict()


def _array_file(here: Layout) -> bytes:
    memory = MemoryStore()
    _create(zarr.open_group(memory, mode="w", zarr_format=3), "x", here)
    return memory._store_dict["x/zarr.json"].to_bytes()


def _group_file(attributes: dict[str, Any]) -> bytes:
    memory = MemoryStore()
    zarr.open_group(memory, mode="w", zarr_format=3, attributes=attributes)
    return memory._store_dict["zarr.json"].to_bytes()


def _record_file(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()


def _record_digest(record: dict[str, Any]) -> str:
    """SHA-256 of the record but for this digest, as JSON with sorted keys."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _fields(metadata: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(metadata, default=str))


def _same_json(path: Path, expected: bytes) -> bool:
    """Whether a file says the same, digit by digit; spaces and the order of keys are a version's own.

    A first axis that is longer than it must be is a growth that goes on, or was cut off: what it adds is not used.
    """
    try:
        found, implied = (json.loads(data, parse_float=str, parse_int=str) for data in (path.read_bytes(), expected))
        if implied.get("shape") and int(found["shape"][0]) > int(implied["shape"][0]):
            found["shape"][0] = implied["shape"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False
    return found == implied


def _digest(*columns: NDArray[Any]) -> str:
    hasher = hashlib.sha256()
    for column in columns:
        hasher.update(np.ascontiguousarray(column).data)
    return hasher.hexdigest()


def _reason(error: BaseException) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else _line(error)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _short(value: Any) -> str:
    text = f"{len(value)} of them" if isinstance(value, list) and len(value) > 4 else str(value)
    return text if len(text) <= 48 else text[:12] + "…"


@contextlib.contextmanager
def _lock(path: str) -> Iterator[None]:
    """Hold STORE/write.lock; the system frees it when the process ends, however it ends."""
    if is_url(path):
        yield
        return
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "write.lock"), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise FastconError(f"{path} is being written by {holder}: wait for it, or stop it first") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
