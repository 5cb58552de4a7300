"""precompute for a store in parts: a process makes whichever parts nobody else is making, one after another.

What the parts have in common, above all how each teacher is run, is settled once, under the lock of their record, by
whoever comes first. So any number of processes with the same command make one store: those of torchrun, of Ray, of a
Slurm array, or those that somebody starts by hand. A part whose process died is free again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any

from fastcon.data import decode
from fastcon.data.manifest import ImageSet, Manifest
from fastcon.distill import precompute as one
from fastcon.distill.options import PrecomputeOptions
from fastcon.distill.precompute import Progress, Say, Teacher
from fastcon.errors import Busy, FastconError
from fastcon.machine import Machine, rank
from fastcon.models import frozen
from fastcon.store import parts
from fastcon.store.codec import check_kind
from fastcon.store.format import is_url
from fastcon.store.images import manifest_of
from fastcon.store.parts import Binding, Bound
from fastcon.store.pixels import check_pixels
from fastcon.store.reader import Store
from fastcon.store.writer import check_recipe, check_same_teacher

POLL = 1.0
"""Seconds between two looks at the parts that other processes are making."""


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
    if options.parts is not None or options.part or parts.has_parts(path):
        if is_url(path):
            raise FastconError(f"{path}: parts are folders so far; make them in one, or leave out `parts` and `part`")
        shared = ImageSet(images.sources) if isinstance(images, Manifest) else images
        return precompute(path, shared, teachers, options, views, machine, progress, say)
    manifest = images if isinstance(images, Manifest) else images.manifest()
    return one.precompute(
        path,
        manifest,
        teachers,
        options.recipe,
        views,
        machine,
        options.batch_size,
        options.logits,
        progress,
        options.compile,
        say,
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
    binding = _bind(path, images, teachers, options, views, machine, say)
    wanted = _in_turn(binding.count, options.part)
    names, rows, told = [teacher.name for teacher in teachers], 0, False

    def missing() -> list[int]:
        bound = parts.read(path).bound
        return [number for number in wanted if not _whole(bound.get(number), names, views)]

    while left := missing():
        made = False
        for number in left:
            if number in missing():  # nobody made it meanwhile
                with contextlib.suppress(Busy):
                    rows += _part(path, number, images, teachers, options, views, machine, progress, say)
                    made = True
        if not made:
            if not told:
                say(f"waiting for {_listed(left)}, which other processes are making")
                told = True
            time.sleep(POLL)
    return rows


def _bind(
    path: str,
    images: ImageSet,
    teachers: list[Teacher],
    options: PrecomputeOptions,
    views: int,
    machine: Machine,
    say: Say,
) -> Binding:
    """The record of the parts, made or extended by these teachers. Raises FastconError for what does not go with it."""
    settings = decode.settings(machine)
    count = parts.read(path).count if parts.has_parts(path) else options.parts
    if count is None:
        raise FastconError(f"{path} has no parts yet: say with `parts` how many there are to be")
    if options.parts not in (None, count):
        raise FastconError(f"{path} has {count} parts, this call says {options.parts}: use `parts` {count}")
    outside = [number for number in options.part if number >= count]
    if outside:
        raise FastconError(f"{path} has parts 0 to {count - 1}: there is no `part` {outside[0]}")
    rows = len(images.manifest((_in_turn(count, options.part)[0], count))) * count * views  # long, so before the lock
    with parts.changing(path) as write:
        binding = parts.read(path) if parts.has_parts(path) else _begun(path, images, options, settings)
        check_recipe(path, binding.recipe, options.recipe)
        if settings != binding.pipeline:
            _check_pixels(path, binding, images, machine)
        for teacher in teachers:
            binding = _with_teacher(path, binding, teacher, options, machine, rows, say)
        write(binding)
    return binding


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


def _begun(path: str, images: ImageSet, options: PrecomputeOptions, settings: dict[str, Any]) -> Binding:
    """A new record; where the parts are there already, as after its loss, with their teachers."""
    if os.path.exists(os.path.join(path, "zarr.json")):
        raise FastconError(f"{path} is a store without parts: leave out `parts`, or use another `store`")
    assert options.parts is not None
    foreign = [name for name in sorted(os.listdir(path)) if not name.startswith("part")]
    if foreign:
        raise FastconError(f"{path} holds other files ({foreign[0]}, …) and no store: give an empty or a new folder")
    binding = Binding(options.parts, images.sources, options.recipe, settings)
    for number in range(binding.count):
        with contextlib.suppress(FastconError):
            part = Store(parts.folder(path, number))
            bound = binding.bound | {number: Bound.of(part)}
            teachers = {name: t.without_weights_file() for name, t in part.teachers.items()}
            binding = dataclasses.replace(binding, teachers={**teachers, **binding.teachers}, bound=bound)
    return binding


def _check_pixels(path: str, binding: Binding, images: ImageSet, machine: Machine) -> None:
    """Raise FastconError where images would decode to other pixels than in the parts that are there."""
    for number in binding.bound:
        part = Store(parts.folder(path, number))
        check_pixels(part, manifest_of(part, images), machine, exact=True)
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
) -> int:
    """Make a part, and enter it into the record. Raises Busy where another process is making it."""
    binding, where = parts.read(path), parts.folder(path, number)
    ways = {name: record.compile or frozen.PLAIN for name, record in binding.teachers.items()}
    manifest = images.manifest((number, binding.count))
    rows = one.precompute(
        where,
        manifest,
        teachers,
        options.recipe,
        views,
        machine,
        options.batch_size,
        options.logits,
        progress,
        ways,
        say,
    )
    with parts.changing(path) as write:
        binding = parts.read(path)
        write(dataclasses.replace(binding, bound=binding.bound | {number: Bound.of(Store(where))}))
    say(f"part {number} of {binding.count} is made ({len(manifest):,} images)")
    return rows


def _in_turn(count: int, chosen: Sequence[int]) -> list[int]:
    """The parts to make, each rank of torchrun beginning with others."""
    number, ranks = rank()
    wanted = list(chosen or range(count))
    start = number * len(wanted) // ranks
    return wanted[start:] + wanted[:start]


def _whole(bound: Bound | None, names: list[str], views: int) -> bool:
    return bound is not None and bound.views >= views and all(bound.done.get(name, 0) >= views for name in names)


def _listed(numbers: list[int]) -> str:
    return "part " + ", ".join(map(str, numbers[:4])) + (f" and {len(numbers) - 4} more" if len(numbers) > 4 else "")
