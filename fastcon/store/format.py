"""What is on disk: teacher logits of augmented views in Zarr 3, in training order, checked on every read.

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
which bytes belong, so that a chunk that is missing, torn or in the wrong place is an error, never zeros.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from fastcon.data.manifest import Share
from fastcon.errors import FastconError
from fastcon.store.codec import codec

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
        """As written into the store."""
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


@dataclasses.dataclass(frozen=True)
class Layout:
    """An array of a store: shape, chunks, dtype and what is read where nothing was written."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    fill: int = 0


@dataclasses.dataclass(frozen=True)
class ImagesRecord:
    """Of which images a store holds views."""

    count: int
    digest: str
    """Of the manifest: ids and contents, in order."""
    columns_digest: str
    """Of the columns under images/."""
    name_bytes: int
    sources: list[str]
    """IMAGES as the user gave them, absolute: where the images were."""
    share: Share | None = None
    """Which of their images; None: all."""

    def json(self) -> dict[str, Any]:
        """As written into the store."""
        values = dataclasses.asdict(self)
        del values["share"]
        if self.share is not None:
            values["share"] = list(self.share[: 2 if self.share.by == "image" else 3])
        return values

    @classmethod
    def parse(cls, record: dict[str, Any]) -> ImagesRecord:
        """The record that `json` wrote. Raises TypeError for another."""
        share = record.get("share")
        return cls(**{**record, "share": share and Share(*share)})


@dataclasses.dataclass(frozen=True)
class TeacherRecord:
    """Whose logits are stored, and how they were computed; None is not recorded."""

    role: str
    """"generalist" or "teacher"."""
    spec: str | None = None
    architecture: str | None = None
    weights: str = ""
    """Digest of the network's state."""
    task: str | None = None
    """What it was taught, where it is a RUN of `teach`, and on which class split."""
    split: str | None = None
    split_seed: int | None = None
    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: tuple[str, ...] = ()
    kind: str = "softmax"
    logits: str = "float16"
    """Name of the codec."""
    precision: str | None = None
    batch_size: int | None = None
    device: str | None = None
    compile: str | None = None
    """"default" where the network ran compiled; None: as it is."""
    weights_file_digest: str | None = None
    """Of the generalist: the stored safetensors file, and its length."""
    weights_bytes: int | None = None

    def json(self) -> dict[str, Any]:
        """As written into the store."""
        values = dataclasses.asdict(self).items()
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values if value is not None}

    @classmethod
    def parse(cls, record: dict[str, Any]) -> TeacherRecord:
        """The record that `json` wrote. Raises TypeError for another."""
        lists = {key: tuple(value) for key, value in record.items() if isinstance(value, list)}
        return cls(**{**record, **lists})

    def without_weights_file(self) -> TeacherRecord:
        """As before its weights were stored."""
        return dataclasses.replace(self, weights_file_digest=None, weights_bytes=None)

    def same_network(self, other: TeacherRecord) -> list[str]:
        """What differs between two records of one teacher, where it was computed or kept aside."""
        mine, theirs = self.json(), other.json()
        apart = ("spec", "task", "split", "split_seed", "weights_file_digest", "weights_bytes")
        return [key for key in mine | theirs if key not in apart and mine.get(key) != theirs.get(key)]


@dataclasses.dataclass(frozen=True)
class Record:
    """Everything a store records about itself."""

    recipe: Recipe
    pipeline: dict[str, Any]
    """What pixels were decoded with: see `data.decode.settings`."""
    images: ImagesRecord
    views: int
    view_digests: list[str] = dataclasses.field(default_factory=list)
    samples_digest: str | None = None
    teachers: dict[str, TeacherRecord] = dataclasses.field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """As it is written into the store, with its own digest."""
        values = {
            "format": FORMAT,
            "recipe": self.recipe.record(),
            "pipeline": self.pipeline,
            "images": self.images.json(),
            "views": self.views,
            "view_digests": self.view_digests,
            "samples_digest": self.samples_digest,
            "teachers": {name: teacher.json() for name, teacher in self.teachers.items()},
        }
        return values | {"digest": record_digest(values)}

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Record:
        """The record that `json` wrote. Raises some exception for one that is malformed or impossible."""
        record = cls(
            Recipe.from_record(fields["recipe"]),
            fields["pipeline"],
            ImagesRecord.parse(fields["images"]),
            fields["views"],
            fields["view_digests"],
            fields["samples_digest"],
            {name: TeacherRecord.parse(teacher) for name, teacher in fields["teachers"].items()},
        )
        if not (0 < record.images.count <= LARGEST and record.views == len(record.view_digests)):
            raise ValueError(f"{record.images.count:,} images, {record.views} views")
        if not all(NAME.fullmatch(name) for name in record.teachers):
            raise ValueError(f"a teacher named {next(name for name in record.teachers if not NAME.fullmatch(name))!r}")
        return record

    def without_teacher(self, name: str) -> Record:
        """This record without a teacher."""
        return dataclasses.replace(self, teachers={k: v for k, v in self.teachers.items() if k != name})

    def with_teacher(self, name: str, teacher: TeacherRecord) -> Record:
        """The record with another teacher, or another record of one."""
        return dataclasses.replace(self, teachers=self.teachers | {name: teacher})


def layout(record: Record) -> dict[str, Layout]:
    """Path → layout of every array that a record implies."""
    n, views = record.images.count, record.views
    rows, bake = record.recipe.chunk_rows, record.recipe.bake
    chunks = -(-n // rows)
    block, names = min(n, 1 << 20), record.images.name_bytes
    arrays = {
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
        arrays["baked/checksums"] = checksums
    if record.samples_digest is not None:
        k, size = min(SAMPLES, n), record.recipe.size
        arrays["samples/rows"] = Layout((k,), (k,), "uint32")
        arrays["samples/pixels"] = Layout((k, size, size, 3), (k, size, size, 3), "uint8")
    for name, teacher in record.teachers.items():
        for part, (dtype, width) in codec(teacher.logits).parts(len(teacher.classes)).items():
            arrays[f"teachers/{name}/{part}"] = Layout((views, n, width), (1, rows, width), dtype)
        arrays[f"teachers/{name}/checksums"] = checksums
        if teacher.weights_bytes is not None:
            size = teacher.weights_bytes
            arrays[f"teachers/{name}/weights"] = Layout((size,), (min(size, 1 << 26),), "uint8")
    return arrays


def check_name(name: str) -> None:
    """Raise FastconError for an invalid name of a teacher, which is also a folder of the store."""
    if not NAME.fullmatch(name):
        raise FastconError(
            f"{name!r} cannot name a teacher: letters, digits, '.', '_' and '-', at most 64, are allowed"
        )


def checksum(rows: NDArray[Any], before: int = 0) -> int:
    """CRC-32C of the rows' bytes in C order, little endian, continuing from that of the bytes before them."""
    return int(google_crc32c.extend(before, np.ascontiguousarray(rows).reshape(-1).view(np.uint8)))  # type: ignore[arg-type]


def digest(*columns: NDArray[Any]) -> str:
    """SHA-256 of arrays, one after another."""
    hasher = hashlib.sha256()
    for column in columns:
        hasher.update(np.ascontiguousarray(column).data)
    return hasher.hexdigest()


def record_digest(record: dict[str, Any]) -> str:
    """SHA-256 of the record but for this digest, as JSON with sorted keys."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
