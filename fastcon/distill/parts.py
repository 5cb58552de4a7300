"""precompute for a store in parts: a process makes whichever parts nobody else is making, one after another.

What the parts have in common, above all how each teacher is run, is settled once, under the lock of their record, by
whoever comes first. So any number of processes with the same command make one store: those of torchrun, of Ray, of a
Slurm array, or those that somebody starts by hand. A part whose process died is free again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from fastcon.data import decode
from fastcon.data.manifest import ImageSet, Manifest
from fastcon.distill import precompute as one
from fastcon.distill.options import PrecomputeOptions
from fastcon.distill.precompute import Progress, Say, Teacher
from fastcon.errors import Busy, FastconError
from fastcon.machine import Machine, rank
from fastcon.models import frozen
from fastcon.remote import has, is_url, names
from fastcon.store import parts
from fastcon.store.codec import check_kind
from fastcon.store.images import manifest_of
from fastcon.store.mirror import mirrored
from fastcon.store.parts import Binding, Bound, Shared
from fastcon.store.pixels import check_pixels
from fastcon.store.reader import Store
from fastcon.store.writer import check_recipe, check_same_teacher

POLL, POLL_THERE = 1.0, 10.0
"""Seconds between two looks at the parts that other processes are making, in a folder and in object storage."""


def make(
    path: str,
    images: ImageSet | Manifest,
    teachers: list[Teacher],
    options: PrecomputeOptions,
    views: int,
    machine: Machine,
    progress: Progress | None = None,
    say: Say = lambda line: None,
) -> int:
    """Make a store with or without parts, as the options say or as it is; returns the number of rows computed."""
    if in_parts(path, options):
        shared = ImageSet(images.sources) if isinstance(images, Manifest) else images
        return precompute(path, shared, teachers, options, views, machine, progress, say)
    manifest = images if isinstance(images, Manifest) else images.manifest()
    return _fill(path, manifest, teachers, options, views, machine, progress, options.compile, say)


def in_parts(path: str, options: PrecomputeOptions) -> bool:
    """Whether a call makes parts: as the options say, or as the store is."""
    return parts.has_parts(path) or bool(options.part) or options.add or (options.parts or 1) > 1


def _fill(
    path: str,
    manifest: Manifest,
    teachers: list[Teacher],
    options: PrecomputeOptions,
    views: int,
    machine: Machine,
    progress: Progress | None,
    compile: str | dict[str, str],
    say: Say,
) -> int:
    """One store, or one part."""
    size, logits = options.batch_size, options.logits
    return one.precompute(
        path, manifest, teachers, options.recipe, views, machine, size, logits, progress, compile, say
    )


def precompute(
    path: str,
    images: ImageSet,
    teachers: list[Teacher],
    options: PrecomputeOptions,
    views: int,
    machine: Machine,
    progress: Progress | None = None,
    say: Say = lambda line: None,
) -> int:
    """Make the parts of a store that are not made yet; returns the number of rows that this process computed.

    Parts that others are making are waited for, and made here where those end without them. Raises FastconError and
    Interrupted as `distill.precompute.precompute` does.
    """
    one.check_names([teacher.name for teacher in teachers])
    machine = machine.settled()
    binding, which = _bind(path, images, teachers, options, views, machine, say)
    wanted = _in_turn(_chosen(path, binding.numbers(which), options))
    names, rows, told = [teacher.name for teacher in teachers], 0, False

    def missing() -> list[int]:
        bound = parts.read(path).bound
        return [number for number in wanted if not _whole(bound.get(number), names, views)]

    with _Ending(not is_url(path), say) as ending:
        while left := missing():
            made = False
            for number in left:
                if number not in ending.going and number in missing():  # nobody made it meanwhile
                    with contextlib.suppress(Busy):
                        computed, end = _part(path, number, images, teachers, options, views, machine, progress, say)
                        ending.add(number, end)
                        rows, made = rows + computed, True
            ending.wait()
            if not made:
                if not told:
                    say(f"waiting for {_listed(left)}, which other processes are making")
                    told = True
                time.sleep(POLL_THERE if is_url(path) else POLL)
    return rows


class _Ending:
    """Ends parts: at once, or, where that means uploads, one after another while the next are computed."""

    def __init__(self, at_once: bool, say: Say) -> None:
        self.going: set[int] = set()
        """Those that are not ended yet."""
        self._at_once, self._say, self._pool = at_once, say, ThreadPoolExecutor(1)
        self._last: tuple[int, Future[str]] | None = None

    def __enter__(self) -> _Ending:
        return self

    def add(self, number: int, end: Callable[[], str]) -> None:
        """End a part, once the one before has ended. Raises what ending that raised; this one is ended all the same."""
        if self._at_once:
            self._say(end())
            return
        try:
            self.wait()
        finally:
            self.going.add(number)
            self._last = number, self._pool.submit(end)

    def wait(self) -> None:
        """Wait for the last one. Raises what ending it raised."""
        if self._last is not None:
            (number, last), self._last = self._last, None
            self._say(last.result())
            self.going.discard(number)

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown()


def _bind(
    path: str,
    images: ImageSet,
    teachers: list[Teacher],
    options: PrecomputeOptions,
    views: int,
    machine: Machine,
    say: Say,
) -> tuple[Binding, int]:
    """The record of the parts, made or extended by these images and teachers, and which of its sets the images are.

    Raises FastconError for what does not go with it.
    """
    settings = decode.settings(machine)
    known = parts.read(path) if parts.has_parts(path) else None
    planned, which = _with_images(path, known or Binding((), options.recipe, settings), images, options)
    first = _in_turn(_chosen(path, planned.numbers(which), options))[0]
    manifest = images.manifest(planned.share(first)[1])  # long, so before the lock
    if first in planned.bound:
        Store(parts.folder(path, first)).check_images(manifest)
    rows = len(manifest) * planned.count * views
    with parts.changing(path) as write:
        binding = parts.read(path) if parts.has_parts(path) else _begun(path, planned)
        binding, which = _with_images(path, binding, images, options)
        check_recipe(path, binding.recipe, options.recipe)
        if settings != binding.pipeline:
            _check_pixels(path, binding, machine)
        for teacher in teachers:
            binding = _with_teacher(path, binding, teacher, options, machine, rows, say)
        write(binding)
    return binding, which


def planned(path: str, images: ImageSet, options: PrecomputeOptions) -> list[int]:
    """The parts that a call would make. Raises FastconError."""
    known = parts.read(path) if parts.has_parts(path) else Binding((), options.recipe, {})
    binding, which = _with_images(path, known, images, options)
    return _chosen(path, binding.numbers(which), options)


def _with_images(path: str, binding: Binding, images: ImageSet, options: PrecomputeOptions) -> tuple[Binding, int]:
    """The record with these images, and which of its sets they are: of one set alone, wherever they are now."""
    which = next((k for k, each in enumerate(binding.sets) if each.sources == images.sources), None)
    if which is None and (options.add or not binding.sets):
        if not binding.sets and (options.parts is None or options.add):
            raise FastconError(f"{path} has no parts yet: say with `parts` how many there are to be, without `add`")
        made = Shared(images.sources, options.parts or 1, images.by)
        return dataclasses.replace(binding, sets=(*binding.sets, made)), len(binding.sets)
    if which is None and len(binding.sets) > 1:
        raise FastconError(
            f"{path} was made from {' and from '.join(', '.join(each.sources) for each in binding.sets)}: give one of those, "
            "or `add` these"
        )
    which = which or 0
    parted = binding.sets[which].parts
    if options.parts not in (None, parted):
        raise FastconError(f"{path} has {parted} parts, this call says {options.parts}: use `parts` {parted}")
    return binding, which


def _chosen(path: str, numbers: range, options: PrecomputeOptions) -> list[int]:
    """The parts that this call is to make."""
    outside = [number for number in options.part if number not in numbers]
    if outside:
        first, last = numbers[0], numbers[-1]
        raise FastconError(f"{path} has parts {first} to {last} of these images: there is no `part` {outside[0]}")
    return list(options.part or numbers)


def _with_teacher(
    path: str, binding: Binding, teacher: Teacher, options: PrecomputeOptions, machine: Machine, rows: int, say: Say
) -> Binding:
    """The record with a teacher, which is run as it was, or as pays for itself over so many rows. Raises FastconError."""
    name, stored = teacher.name, binding.teachers.get(teacher.name)
    general = next((key for key, record in binding.teachers.items() if record.role == "generalist"), name)
    if teacher.generalist and general != name:
        raise FastconError(
            f"{path} has the generalist {general!r}, and a store has one: add {name!r} with `teacher`, or use another `store`"
        )
    if stored is not None and options.compile == "auto":
        how = stored.compile or frozen.PLAIN
    else:
        how = one.way(None, teacher, machine, options.batch_size, options.compile, rows, say)
    given = one.record_of(teacher, machine, options.batch_size, options.logits, how)
    if stored is not None:
        check_same_teacher(path, name, stored, given)
        return binding
    check_kind(options.logits, given.kind, name)
    return dataclasses.replace(binding, teachers=binding.teachers | {name: given})


def _begun(path: str, binding: Binding) -> Binding:
    """A new record; where the parts are there already, as after its loss, with their teachers."""
    if has(path, "zarr.json"):
        raise FastconError(f"{path} is a store without parts: leave out `parts`, or use another `store`")
    foreign = [name for name in names(path) if not name.startswith("part")]
    if foreign:
        raise FastconError(f"{path} holds other files ({foreign[0]}, …) and no store: give an empty or a new folder")
    for number in range(binding.count):
        with contextlib.suppress(FastconError):
            part = Store(parts.folder(path, number))
            bound = binding.bound | {number: Bound.of(part)}
            teachers = {name: t.without_weights_file() for name, t in part.teachers.items()}
            binding = dataclasses.replace(binding, teachers={**teachers, **binding.teachers}, bound=bound)
    return binding


def _check_pixels(path: str, binding: Binding, machine: Machine) -> None:
    """Raise FastconError where images would decode to other pixels than in the parts that are there."""
    for number in binding.bound:
        part = Store(parts.folder(path, number))
        check_pixels(part, manifest_of(part, ImageSet(part.sources)), machine, exact=True)
        return


def _part(
    path: str,
    number: int,
    images: ImageSet,
    teachers: list[Teacher],
    options: PrecomputeOptions,
    views: int,
    machine: Machine,
    progress: Progress | None,
    say: Say,
) -> tuple[int, Callable[[], str]]:
    """Make a part; the rows computed, and what enters it into the record and says so. Raises Busy where another process is making it."""
    binding, where = parts.read(path), parts.folder(path, number)
    ways = {name: record.compile or frozen.PLAIN for name, record in binding.teachers.items()}
    with contextlib.ExitStack() as held:
        folder = held.enter_context(mirrored(where, patient=False)) if is_url(where) else where
        manifest = images.manifest(binding.share(number)[1])
        rows = _fill(folder, manifest, teachers, options, views, machine, progress, ways, say)
        still_held = held.pop_all()

    def end() -> str:
        still_held.close()
        with parts.changing(path) as write:
            binding = parts.read(path)
            write(dataclasses.replace(binding, bound=binding.bound | {number: Bound.of(Store(where))}))
        return f"part {number} of {binding.count} is made ({len(manifest):,} images)"

    return rows, end


def _in_turn(wanted: list[int]) -> list[int]:
    """The parts to make, each rank of torchrun beginning with others."""
    number, ranks = rank()
    start = number * len(wanted) // ranks
    return wanted[start:] + wanted[:start]


def _whole(bound: Bound | None, names: list[str], views: int) -> bool:
    return bound is not None and bound.views >= views and all(bound.done.get(name, 0) >= views for name in names)


def _listed(numbers: list[int]) -> str:
    return "part " + ", ".join(map(str, numbers[:4])) + (f" and {len(numbers) - 4} more" if len(numbers) > 4 else "")
