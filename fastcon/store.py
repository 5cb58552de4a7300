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

The record is written last and at once (one atomic file): what it does not name is not there. Every array
carries CRC-32C, and the record or `checksums` says which bytes belong, so that a chunk that is missing, torn or
in the wrong place is an error, never zeros. This is the only module that knows Zarr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
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

from fastcon import views
from fastcon.checkpoint import write_atomically
from fastcon.codec import Codec, Parts, check_kind, codec
from fastcon.errors import FastconError
from fastcon.manifest import Manifest

FORMAT = 1
CHUNK_ROWS = 1024
SAMPLES = 64
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
        self._arrays: dict[str, Any] = {}
        self._expected: dict[tuple[str, int], NDArray[np.int64]] = {}
        self.record: dict[str, Any] = record
        self.recipe = Recipe.from_record(record["recipe"])
        self.rows: int = record["images"]["count"]
        self.views: int = record["views"]

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
        columns = [_read(self._array(name), view) for name in ("order", "boxes", "flips")]
        if _digest(*columns) != self.record["view_digests"][view]:
            raise FastconError(
                f"{self.path}: the recorded order, boxes or flips of view {view} are missing or damaged; "
                "`fastcon verify --repair` writes them anew from the recipe"
            )
        return View(*columns)

    def image_columns(self) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """Ids [n] and content digests [n, 16] of the images, in manifest order."""
        columns = [_read(self._array(f"images/{name}")) for name in ("ids", "digests", "names", "name_ends")]
        if _digest(*columns) != self.record["images"]["columns_digest"]:
            raise FastconError(
                f"{self.path}: the recorded ids, digests or names of the images are missing or damaged; make the store again"
            )
        return columns[0], columns[1]

    def image_name(self, index: int) -> str:
        """The name of an image, relative to its source."""
        ends = self._array("images/name_ends")
        start = int(ends[index - 1]) if index else 0
        return os.fsdecode(np.asarray(self._array("images/names")[start : int(ends[index])]).tobytes())

    def samples(self) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
        """Rows of view 0 [k] and the uint8 pixels [k, size, size, 3] that were decoded for them."""
        rows, pixels = _read(self._array("samples/rows")), _read(self._array("samples/pixels"))
        if _digest(rows, pixels) != self.record["samples_digest"]:
            raise FastconError(f"{self.path}: the sample pixels are missing or damaged; make the store again")
        return rows, pixels

    def done(self, name: str) -> NDArray[np.bool_]:
        """Which chunks of a teacher are finished: bool [V, chunks]; False beyond the views it was asked for."""
        checksums = _read(self._array(name, "checksums"))
        done = np.zeros((self.views, self.chunks), dtype=bool)
        done[: len(checksums)] = checksums[: self.views] >= 0
        return done

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
            array = self._array(name, part)
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
            checksums = self._array(name, "checksums")
            if view >= checksums.shape[0]:
                return -1
            self._expected[name, view] = _read(checksums, view)
        return int(self._expected[name, view][chunk])

    def _read_chunk(self, array: Any, view: int, chunk: int) -> tuple[NDArray[Any], int]:
        """The rows of one chunk of a [V, n, C] array, and their CRC-32C; raises whatever goes wrong.

        From a folder the chunk's file is read at once: its bytes, as `_create` lays them out, are the rows (the last
        chunk padded) and their CRC-32C. That is twice as fast as Zarr's way to the same bytes.
        """
        start, stop = self.chunk_range(chunk)
        if is_url(self.path):
            found = np.ascontiguousarray(array[view, start:stop])
            return found, checksum(found)
        data = np.fromfile(os.path.join(self.path, array.path, f"c/{view}/{chunk}/0"), dtype=np.uint8)
        rows, width = array.chunks[1:]
        if len(data) != rows * width * array.dtype.itemsize + 4:
            raise FastconError(f"{len(data)} bytes long")
        own = checksum(data[:-4])
        if own != int.from_bytes(data[-4:].tobytes(), "little"):
            raise FastconError("its CRC-32C differs")
        found = data[:-4].view(array.dtype).reshape(rows, width)[: stop - start]
        return found, own if stop - start == rows else checksum(found)

    def baked(self) -> NDArray[np.bool_]:
        """Which shards of baked views are written: bool [V, chunks]."""
        checksums = _read(self._array("baked/checksums"))
        done = np.zeros((self.views, self.chunks), dtype=bool)
        done[: len(checksums)] = checksums[: self.views] >= 0
        return done

    def shard(self, view: int, chunk: int) -> list[NDArray[np.uint8]]:
        """The encoded bytes of a chunk's baked views, verified and mapped into memory; raises FastconError."""
        path = self._shard_path(view, chunk)
        expected = int(_read(self._array("baked/checksums"), view)[chunk])
        if expected < 0:
            raise FastconError(f"{path} is not baked yet: run `fastcon precompute` again, it resumes")
        try:
            data = np.memmap(path, dtype=np.uint8, mode="r")
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
        data = _read(self._array(name, "weights"))
        if _digest(data) != self.teachers[name]["weights_file_digest"]:
            raise FastconError(
                f"{self.path}: the weights of {name!r} are missing or damaged; run `fastcon precompute` with the same "
                "generalist again, it writes them anew"
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

    def _array(self, name: str, part: str | None = None) -> Any:
        """An array of the store by its path, or a part of a teacher; opened once."""
        if part is not None and name not in self.teachers:
            raise FastconError(f"{self.path} has no teacher {name!r}; it has {', '.join(self.teachers) or 'none'}")
        path = name if part is None else f"teachers/{name}/{part}"
        if path not in self._arrays:
            try:
                with zarr.config.set({"array.write_empty_chunks": True}):  # a chunk of zeros is no missing chunk
                    self._arrays[path] = self._group[path]
            except Exception as error:
                raise FastconError(f"{self.path}: array {path!r} is missing or damaged ({_line(error)})") from error
        return self._arrays[path]


class StoreWriter(Store):
    """A store opened for writing: one process at a time. Create or reopen it with `open_for_writing`."""

    def grow(self, manifest: Manifest, view_count: int) -> None:
        """Record the order, boxes and flips of views up to `view_count`, where they are not there yet."""
        _write_views(self._group, self.record, self.recipe, manifest, view_count)
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
        parts = self.codec(name).parts(len(record["classes"]))
        if self._array(name, "checksums").shape[0] < self.views:
            for part, (_, width) in parts.items():
                self._array(name, part).resize((self.views, self.rows, width))
            self._array(name, "checksums").resize((self.views, self.chunks))

    def write(self, name: str, view: int, chunk: int, parts: Parts) -> None:
        """Store one finished chunk, the parts of its rows, then mark it done."""
        start, stop = self.chunk_range(chunk)
        seen = 0
        for part, (dtype, width) in self.codec(name).parts(len(self.teachers[name]["classes"])).items():
            rows = parts[part]
            if (rows.shape, rows.dtype) != ((stop - start, width), np.dtype(dtype)):
                raise ValueError(f"{part} of chunk {chunk} takes {dtype} {(stop - start, width)}, got {rows.shape}")
            self._array(name, part)[view, start:stop] = rows
            seen = checksum(rows, seen)
        self._array(name, "checksums")[view, chunk] = seen
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
        for name in ("order", "boxes", "flips"):
            self._array(name)[view] = getattr(made, name)

    def _create_teacher(self, name: str, record: dict[str, Any]) -> None:
        check_kind(record["logits"], record["kind"], name)
        where = f"teachers/{name}"
        for part, (dtype, width) in codec(record["logits"]).parts(len(record["classes"])).items():
            shape, chunk = (self.views, self.rows, width), (1, self.recipe.chunk_rows, width)
            _create(self._group, f"{where}/{part}", shape, chunk, dtype)
        _create(self._group, f"{where}/checksums", (self.views, self.chunks), (1, self.chunks), "int64", fill=-1)
        self._arrays = {path: array for path, array in self._arrays.items() if not path.startswith(f"{where}/")}
        self.record["teachers"][name] = record
        self._commit()

    def _write_weights(self, name: str, weights: bytes) -> None:
        """Keep a teacher's weights file, unless it is there, whole."""
        with contextlib.suppress(FastconError):
            if self.weights(name) == weights:
                return
        data = np.frombuffer(weights, dtype=np.uint8)
        path = f"teachers/{name}/weights"
        _create(self._group, path, data.shape, (min(len(data), 1 << 26),), "uint8")[:] = data
        self._arrays.pop(path, None)
        self.record["teachers"][name]["weights_file_digest"] = _digest(data)
        self._commit()

    def _check_same_teacher(self, name: str, record: dict[str, Any]) -> None:
        stored = {key: value for key, value in self.teachers[name].items() if key != "weights_file_digest"}
        differing = [key for key in stored if key != "spec" and stored[key] != record.get(key)]
        if not differing:
            return
        key = "weights" if "weights" in differing else differing[0]
        was, now = (_short(value) for value in (stored[key], record.get(key)))
        raise FastconError(
            f"teacher {name!r} is in {self.path} with {key} {was}, the one given has {now}: give the "
            "recorded one, or add this one under another name"
        )

    def _commit(self) -> None:
        self._group.attrs["fastcon"] = self.record
        self.views = self.record["views"]


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
    size = store.recipe.size
    _create(store._group, "samples/rows", rows.shape, rows.shape, "uint32")[:] = rows
    _create(store._group, "samples/pixels", pixels.shape, (len(rows), size, size, 3), "uint8")[:] = pixels
    store.record["samples_digest"] = _digest(rows, pixels)
    store._commit()


def sample_rows(store: Store) -> NDArray[np.uint32]:
    """Which rows of view 0 are kept as pixels: evenly spread, at most 64."""
    count = min(SAMPLES, store.rows)
    return (np.arange(count, dtype=np.int64) * store.rows // count).astype(np.uint32)


def checksum(rows: NDArray[Any], before: int = 0) -> int:
    """CRC-32C of the rows' bytes in C order, little endian, going on from that of the bytes before them."""
    return int(google_crc32c.extend(before, np.ascontiguousarray(rows).reshape(-1).view(np.uint8)))  # type: ignore[arg-type]


def _create_store(path: str, manifest: Manifest, recipe: Recipe, view_count: int, pipeline: dict[str, Any]) -> None:
    if len(manifest) > np.iinfo(np.uint32).max:
        raise FastconError(f"a store holds at most 2^32 images, these are {len(manifest)}")
    group = _open(path, "a")
    record: dict[str, Any] = {
        "format": FORMAT,
        "recipe": recipe.record(),
        "pipeline": pipeline,
        "images": {"count": len(manifest), "digest": manifest.digest, "sources": manifest.sources},
        "views": 0,
        "view_digests": [],
        "samples_digest": None,
        "teachers": {},
    }
    n = len(manifest)
    columns = {name: np.asarray(getattr(manifest, name)) for name in ("ids", "digests", "names", "name_ends")}
    record["images"]["columns_digest"] = _digest(*columns.values())
    for name, column in columns.items():
        chunk = (min(len(column), 1 << 20), *column.shape[1:])
        _create(group, f"images/{name}", column.shape, chunk, str(column.dtype))[:] = column
    for name, shape, dtype in (("order", (0, n), "uint32"), ("boxes", (0, n, 4), "int32"), ("flips", (0, n), "uint8")):
        _create(group, name, shape, (1, *shape[1:]), dtype)
    if recipe.bake is not None:
        if is_url(path):
            raise FastconError(f"{path}: baked views are tar files in a folder; bake into one, or leave out --bake")
        chunks = -(-n // recipe.chunk_rows)
        _create(group, "baked/checksums", (0, chunks), (1, chunks), "int64", fill=-1)
    _write_views(group, record, recipe, manifest, view_count)
    group.attrs["fastcon"] = record


def _write_views(group: Any, record: dict[str, Any], recipe: Recipe, manifest: Manifest, view_count: int) -> None:
    n = len(manifest)
    for name, shape in (("order", (n,)), ("boxes", (n, 4)), ("flips", (n,))):
        group[name].resize((max(view_count, record["views"]), *shape))
    if recipe.bake is not None:
        group["baked/checksums"].resize((max(view_count, record["views"]), -(-n // recipe.chunk_rows)))
    for view in range(record["views"], view_count):
        made = make_view(recipe, manifest, view)
        group["order"][view], group["boxes"][view], group["flips"][view] = made.order, made.boxes, made.flips
        record["view_digests"].append(_digest(made.order, made.boxes, made.flips))
    record["views"] = max(view_count, record["views"])


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


def _create(group: Any, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, fill: int = 0) -> Any:
    return group.create_array(
        name,
        shape=shape,
        chunks=tuple(max(c, 1) for c in chunks),
        dtype=dtype,
        fill_value=fill,
        overwrite=True,
        filters=None,
        serializer=BytesCodec(endian="little" if np.dtype(dtype).itemsize > 1 else None),
        compressors=Crc32cCodec(),
    )


def _read(array: Any, index: int | None = None) -> NDArray[Any]:
    """An array's values. What is damaged raises; what is missing reads as fill and fails its digest."""
    try:
        return np.ascontiguousarray(array[...] if index is None else array[index])
    except Exception as error:
        raise FastconError(
            f"{array.store_path}: array {array.path!r} is damaged ({_line(error)}); `fastcon verify "
            "--repair` mends what can be mended"
        ) from error


def _digest(*columns: NDArray[Any]) -> str:
    hasher = hashlib.sha256()
    for column in columns:
        hasher.update(np.ascontiguousarray(column).data)
    return hasher.hexdigest()


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
