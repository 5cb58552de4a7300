"""precompute, train, verify."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from fastcon.cli.group import main
from fastcon.cli.options import NamedModel, common, dry_run, group
from fastcon.cli.output import Bar, finish, image_set, in_bytes, in_time, note
from fastcon.data.options import Indexing
from fastcon.distill.options import PrecomputeOptions, TrainOptions, Upkeep
from fastcon.errors import FastconError, UsageError
from fastcon.machine import Machine, rank

if TYPE_CHECKING:
    from fastcon.data.manifest import Manifest


@main.command()
@click.argument("images", nargs=-1, required=True)
@click.option("--store", required=True, help="Folder (or s3:// URL) of the store.")
@click.option("--views", type=click.IntRange(1), required=True, help="Augmented views of every image.")
@click.option("--generalist", type=NamedModel(), default=None, help="The generalist: the student starts from it.")
@click.option("--teacher", "teachers", type=NamedModel(), multiple=True, help="A task-specific teacher (repeatable).")
@click.option("--ray", default=None, help="Make the parts on a Ray cluster: its address, auto, or local (extra).")
@group("options", PrecomputeOptions)
@group("machine", Machine)
@group("indexing", Indexing)
@dry_run
@common
def precompute(
    images: tuple[str, ...],
    store: str,
    views: int,
    generalist: tuple[str, str] | None,
    teachers: tuple[tuple[str, str], ...],
    ray: str | None,
    options: PrecomputeOptions,
    machine: Machine,
    indexing: Indexing,
    dry_run: bool,
    json_file: str | None,
) -> None:
    """Run every teacher once over augmented views of IMAGES and store its logits.

    Running it again resumes; more --views or another --teacher compute just those.

    \b
    fastcon precompute proxy/ --store store --views 4 --generalist imagenet=torchvision:resnet50@IMAGENET1K_V2 \\
        --teacher birds=runs/birds
    """
    if generalist is None and not teachers:
        raise UsageError("no teacher given: --generalist NAME=MODEL, --teacher NAME=MODEL, or both")
    from fastcon.distill import parts
    from fastcon.distill import precompute as stage
    from fastcon.models.origin import is_random

    loaded = stage.load_teachers(generalist, teachers, options.size)
    given = image_set(indexing, images)
    manifest = None if parts.in_parts(store, options) and not dry_run else given.manifest()
    Bar.end()
    classes = ", ".join(
        f"{t.name} ({len(t.model.heads[0].classes)} classes{', random weights' if is_random(t.spec) else ''})"
        for t in loaded
    )
    note((f"{len(manifest):,} images x {views} views = {len(manifest) * views:,} rows; " if manifest else "") + classes)
    if generalist is None and not _has_generalist(store):
        note(
            "no generalist: the paper found (Table 4) that students without one lose on unrelated tasks what they gain "
            "on the related; --generalist can be added to this store later"
        )
    if dry_run:
        assert manifest is not None
        cost = stage.estimate(manifest, loaded, options, views, machine)
        size, rate, seconds = in_bytes(cost["bytes"]), cost["rows_per_second"], in_time(cost["seconds"])
        finish(cost, json_file, f"would store {size} in about {seconds} ({rate:,.0f} rows/s here)")
        return
    bar = Bar("precompute", "parts" if ray else "rows")
    if ray:
        from fastcon.distill import on_ray

        task = on_ray.Task(store, images, generalist, teachers, options, views, machine, indexing, os.getcwd())
        done = on_ray.precompute(ray, task, bar)
    else:
        done = parts.make(store, manifest or given, loaded, options, views, machine, bar, note)
    bar.close()
    finish(*_made(store, done, bar.seconds, manifest, json_file))


def _made(
    path: str, done: int, seconds: float, manifest: Manifest | None, json_file: str | None
) -> tuple[dict[str, Any], str | None, str]:
    """What precompute made: facts, where they go, and the same as text."""
    from fastcon.store.parts import has_parts, opened, read
    from fastcon.store.reader import bytes_on_disk

    result: dict[str, Any] = {"store": path, "rows_computed": done, "seconds": seconds}
    text = f"{done:,} rows computed in {in_time(seconds)}" if done else "every row is there: nothing to do"
    if has_parts(path):
        binding = read(path)
        result |= {"parts": binding.count, "parts_made": len(binding.bound)}
        if len(binding.bound) < binding.count:
            return result, json_file, f"{path}: {text}; {len(binding.bound)} of {binding.count} parts are made"
    store = opened(path)
    result |= {"images": store.rows, "views": store.views, "rejects": manifest.rejects if manifest else []}
    return result, json_file, f"{path}: {text}; {in_bytes(bytes_on_disk(path))} on disk"


def _has_generalist(path: str) -> bool:
    from fastcon.store.parts import has_parts, read
    from fastcon.store.reader import Store

    try:
        teachers = read(path).teachers if has_parts(path) else Store(path).teachers
        return any(teacher.role == "generalist" for teacher in teachers.values())
    except FastconError:
        return False


@main.command()
@click.option("--store", required=True, help="The store that precompute made.")
@click.option("--out", required=True, help="Folder of the run.")
@click.option("--images", multiple=True, help="Where the images are now (default: where they were).")
@group("options", TrainOptions)
@group("upkeep", Upkeep)
@group("machine", Machine)
@group("indexing", Indexing)
@dry_run
@common
def train(
    store: str,
    out: str,
    images: tuple[str, ...],
    options: TrainOptions,
    upkeep: Upkeep,
    machine: Machine,
    indexing: Indexing,
    dry_run: bool,
    json_file: str | None,
) -> None:
    """Train a student on the stored logits of all teachers. Running it again resumes.

    \b
    fastcon train --store store --out runs/student
    fastcon train --store store --out runs/related --balance 1:3 --epochs 10
    """
    from fastcon.distill import train as stage
    from fastcon.info import diagnosis_of
    from fastcon.store.parts import opened

    if dry_run:
        cost = stage.estimate(opened(store), options)
        heads = ", ".join(f"{name} (weight {value:.3g})" for name, value in cost["weights"].items())
        read = in_bytes(cost["logit_bytes_read"])
        finish(
            cost,
            json_file,
            f"would train {cost['steps']:,} steps of {options.batch_size}, reading {read} of logits: {heads}",
        )
        return
    bar = Bar("train", "steps")
    index = partial(image_set, indexing)
    row = stage.train(store, out, options, machine, upkeep, images or None, say=note, progress=bar, index=index)
    bar.close()
    heads = "; ".join(f"{name}: {_values(head)}" for name, head in row["heads"].items())
    finish({"out": out, "seconds": bar.seconds, **row}, json_file, f"{out}: loss {row['loss']:.4f} ({heads})")
    if bar.seconds > upkeep.advise_seconds and rank()[0] == 0:
        for line in diagnosis_of(out):
            note(line)


def _values(head: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.3f}" for key, value in head.items())


@main.command()
@click.argument("store")
@click.option(
    "--rows", type=click.IntRange(0), default=256, show_default=True, help="Rows per teacher to compute again."
)
@click.option("--images", multiple=True, help="Where the images are now (default: where they were).")
@click.option("--repair", is_flag=True, help="Compute damaged chunks again.")
@group("machine", Machine, leave=("precision",))
@group("indexing", Indexing)
@common
def verify(
    store: str,
    rows: int,
    images: tuple[str, ...],
    repair: bool,
    machine: Machine,
    indexing: Indexing,
    json_file: str | None,
) -> None:
    """Check a STORE: checksums, digests and recipe in full, and a sample of rows computed again.

    \b
    fastcon verify store --rows 1000
    """
    from fastcon.distill.verify import verify as stage

    checks = stage(store, images or None, rows, machine, repair, index=partial(image_set, indexing))
    Bar.end()
    width = max(len(check.what) for check in checks)
    for check in checks:
        click.echo(f"{'ok    ' if check.passed else 'FAILED'}  {check.what:{width}}  {check.seen}")
    failed = [check for check in checks if not check.passed]
    result: dict[str, Any] = {"store": store, "passed": not failed}
    finish(result | {"checks": [dataclasses.asdict(check) for check in checks]}, json_file)
    if failed:
        raise FastconError(
            f"{store}: {len(failed)} of {len(checks)} checks failed, first {failed[0].what}: {failed[0].seen}"
        )


@main.command()
@click.argument("store")
@click.argument("teacher")
@common
def forget(store: str, teacher: str, json_file: str | None) -> None:
    """Remove a TEACHER's logits from a STORE, for good.

    precompute with another MODEL under the same name then replaces it; the generalist can be removed as well.

    \b
    fastcon forget store birds
    """
    from fastcon.store.parts import forget as stage
    from fastcon.store.parts import opened
    from fastcon.store.reader import bytes_on_disk

    before = bytes_on_disk(store)
    stage(store, teacher)
    left, freed = list(opened(store).teachers), before - bytes_on_disk(store)
    result = {"store": store, "forgotten": teacher, "teachers": left, "bytes_freed": freed}
    finish(
        result,
        json_file,
        f"{store}: {teacher} is gone, {in_bytes(freed)} freed; left: {', '.join(left) or 'no teacher'}",
    )
