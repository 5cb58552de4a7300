"""A store in parts: STORE/part-00000, …, each a store of its own with a share of the images, and a small record of them.

    parts.json   format, sets (IMAGES, and in how many parts), recipe, pipeline, teachers, and of each finished part: rows,
                 views, the digest of its images, and of how many views which teacher's logits are all there

Any number of processes make the parts, one process a part; what they share is this record, written under a lock and at
once. Opening reads it alone; a part is opened, and compared with it, when it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastcon.data.manifest import Share
from fastcon.errors import FastconError, one_line
from fastcon.files import write_atomically
from fastcon.remote import Unreachable, get, has, is_url, put
from fastcon.store import writer
from fastcon.store.chunks import Chunks
from fastcon.store.format import FORMAT, Recipe, TeacherRecord, record_digest
from fastcon.store.lease import Lease
from fastcon.store.reader import Store, Stored

FILE, LEASE = "parts.json", "parts.lease"
OPEN = 64
"""Parts held open."""


@dataclasses.dataclass(frozen=True)
class Bound:
    """What the record says of a finished part."""

    rows: int
    views: int
    images: str
    """Digest of its images."""
    done: dict[str, int]
    """Of how many views, from the first on, a teacher's logits are all there."""

    @classmethod
    def of(cls, part: Store) -> Bound:
        """What there is to say of a part as it is now."""
        done = {}
        for name in part.teachers:
            whole = part.done(name).all(1)
            done[name] = part.views if whole.all() else int(whole.argmin())
        return cls(part.rows, part.views, part.images_digest, done)


@dataclasses.dataclass(frozen=True)
class Shared:
    """IMAGES that are shared among so many parts."""

    sources: list[str]
    parts: int
    by: str = "image"
    """How: see `data.manifest.Share`."""


@dataclasses.dataclass(frozen=True)
class Binding:
    """The record of a store in parts."""

    sets: tuple[Shared, ...]
    """What the first parts are made of, what the next are, …"""
    recipe: Recipe
    pipeline: dict[str, Any]
    """What pixels are decoded with, in every part: see `data.decode.settings`."""
    teachers: dict[str, TeacherRecord] = dataclasses.field(default_factory=dict)
    bound: dict[int, Bound] = dataclasses.field(default_factory=dict)

    @property
    def count(self) -> int:
        """All parts."""
        return sum(each.parts for each in self.sets)

    @property
    def sources(self) -> list[str]:
        """All IMAGES."""
        return [source for each in self.sets for source in each.sources]

    def numbers(self, which: int) -> range:
        """The parts of a set."""
        start = sum(each.parts for each in self.sets[:which])
        return range(start, start + self.sets[which].parts)

    def share(self, number: int) -> tuple[int, Share]:
        """Which set a part has a share of, and which share."""
        which = next(k for k in range(len(self.sets)) if number in self.numbers(k))
        numbers = self.numbers(which)
        return which, Share(number - numbers.start, len(numbers), self.sets[which].by)

    def file(self) -> bytes:
        """As it is written."""
        values: dict[str, Any] = {
            "format": FORMAT,
            "sets": [dataclasses.asdict(each) for each in self.sets],
            "recipe": self.recipe.record(),
            "pipeline": self.pipeline,
            "teachers": {name: teacher.json() for name, teacher in self.teachers.items()},
            "bound": {str(number): dataclasses.asdict(self.bound[number]) for number in sorted(self.bound)},
        }
        return (json.dumps(values | {"digest": record_digest(values)}, indent=2) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes) -> Binding:
        """The record that `file` wrote. Raises some exception for another."""
        fields = json.loads(data)
        if fields["digest"] != record_digest(fields):
            raise ValueError("its digest differs")
        return cls(
            tuple(Shared(**each) for each in fields["sets"]),
            Recipe.from_record(fields["recipe"]),
            fields["pipeline"],
            {name: TeacherRecord.parse(teacher) for name, teacher in fields["teachers"].items()},
            {int(number): Bound(**bound) for number, bound in fields["bound"].items()},
        )


class StoreOfParts(Stored):
    """A store in parts, opened for reading. Raises FastconError where it is damaged or a part is not finished."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.binding = read(self.path)
        bound = [self.binding.bound.get(number) for number in range(self.binding.count)]
        absent = [number for number, part in enumerate(bound) if part is None]
        if absent:
            raise FastconError(
                f"{self.path}: part {absent[0]} is not finished ({len(absent)} of {self.binding.count} are not): run "
                f"`fastcon precompute` again, with `part` {absent[0]} or for all"
            )
        self._bound = [part for part in bound if part is not None]
        self.recipe, self.teachers, self.sources = self.binding.recipe, self.binding.teachers, self.binding.sources
        self.views = min(part.views for part in self._bound)
        self.chunking = Chunks([part.rows for part in self._bound], self.recipe.chunk_rows)
        self.images_digest = hashlib.sha256("".join(part.images for part in self._bound).encode()).hexdigest()
        self._parts: OrderedDict[int, Store] = OrderedDict()
        self._opening = threading.Lock()

    def part(self, number: int) -> Store:
        """See `Stored`. Raises FastconError where it is not the part that the record speaks of."""
        with self._opening:
            if number not in self._parts:
                if len(self._parts) >= OPEN:
                    self._parts.popitem(last=False)
                self._parts[number] = self._checked(number)
            self._parts.move_to_end(number)
            return self._parts[number]

    def _checked(self, number: int) -> Store:
        part, bound = Store(folder(self.path, number)), self._bound[number]
        if (part.rows, part.images_digest, part.recipe) != (bound.rows, bound.images, self.recipe):
            raise FastconError(
                f"{part.path} is not the part that {self.path}/{FILE} speaks of: put that one back, or remove this one "
                f"and run `fastcon precompute` with `part` {number}"
            )
        for name, teacher in part.teachers.items():
            if name in self.teachers and self.teachers[name].same_network(teacher):
                key = self.teachers[name].same_network(teacher)[0]
                raise FastconError(f"{part.path}: teacher {name!r} has another {key} than in the other parts")
        return part

    def require(self, name: str, views: int) -> None:
        """See `Stored`."""
        if name not in self.teachers:
            raise FastconError(f"{self.path} has no teacher {name!r}; it has {', '.join(self.teachers) or 'none'}")
        unfinished = [number for number, part in enumerate(self._bound) if part.done.get(name, 0) < views]
        if unfinished:
            raise FastconError(
                f"{self.path}: teacher {name!r} is not finished (first: part {unfinished[0]}; {len(unfinished)} parts in "
                "all): run `fastcon precompute` again, it resumes"
            )


def opened(path: str | os.PathLike[str]) -> Store | StoreOfParts:
    """A store, or a store in parts, opened for reading. Raises FastconError."""
    return StoreOfParts(path) if has_parts(os.fspath(path)) else Store(path)


def has_parts(path: str) -> bool:
    """Whether a store in parts is there, finished or not."""
    return has(path, FILE)


def folder(path: str, number: int) -> str:
    """Where a part lies."""
    return os.path.join(path, f"part-{number:05d}")  # also of a URL


def read(path: str) -> Binding:
    """The record of a store in parts. Raises FastconError where it is damaged."""
    try:
        return Binding.parse((get(path, FILE) or b"") if is_url(path) else Path(path, FILE).read_bytes())
    except Unreachable:
        raise
    except Exception as error:
        raise FastconError(
            f"{path}/{FILE} is missing or damaged ({one_line(error)}): remove it and run `fastcon precompute` again, which "
            "writes it from the parts"
        ) from error


def forget(path: str | os.PathLike[str], name: str) -> None:
    """Remove a teacher from a store, with parts or without; cut off, running it again ends it. Raises FastconError."""
    path = os.fspath(path)
    if not has_parts(path):
        writer.forget(path, name)
        return
    with changing(path) as write:
        binding = read(path)
        held = [k for k in sorted(binding.bound) if name in Store(folder(path, k)).teachers]
        if name not in binding.teachers and not held:
            names = ", ".join(binding.teachers) or "none"
            raise FastconError(f"{path} has no teacher {name!r}: there are {names}")
        bound = {
            number: dataclasses.replace(part, done={k: v for k, v in part.done.items() if k != name})
            for number, part in binding.bound.items()
        }
        teachers = {key: teacher for key, teacher in binding.teachers.items() if key != name}
        write(dataclasses.replace(binding, teachers=teachers, bound=bound))
        for number in held:
            writer.forget(folder(path, number), name)


@contextlib.contextmanager
def changing(path: str) -> Iterator[Any]:
    """Hold the record's lock; yields `write(binding)`. Whoever comes second waits."""
    if is_url(path):
        path = path.rstrip("/")
        lease = Lease(f"{path}/{LEASE}", path).wait()
        try:
            yield lambda binding: _put(path, binding, lease)
        finally:
            lease.release()
        return
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "parts.lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield lambda binding: write_atomically(Path(path, FILE), binding.file())


def _put(url: str, binding: Binding, lease: Lease) -> None:
    lease.check()
    put(url, FILE, binding.file())
