"""dedup, data."""

from __future__ import annotations

import dataclasses

import click

from fastcon.cli.group import main
from fastcon.cli.options import common, group
from fastcon.cli.output import Bar, finish, indexer
from fastcon.data.options import Indexing
from fastcon.errors import FastconError


@main.command()
@click.argument("first")
@click.argument("second", required=False)
@click.option("--out", required=True, help="Folder for pairs.csv and sheet.png.")
@click.option(
    "--distance",
    type=click.IntRange(0, 32),
    default=10,
    show_default=True,
    help="Bits of 64 in which hashes may differ.",
)
@click.option("--threads", type=click.IntRange(1), default=None, help="Decoding threads (default: one per core).")
@group("indexing", Indexing)
@common
def dedup(
    first: str,
    second: str | None,
    out: str,
    distance: int,
    threads: int | None,
    indexing: Indexing,
    json_file: str | None,
) -> None:
    """Near-duplicate images between two IMAGES, or within one: resized, recompressed, cropped a little, brightened.

    \b
    fastcon dedup proxy/ birds/ --out duplicates
    """
    from fastcon.data import dedup as stage

    sources = [source for source in (first, second) if source is not None]
    sets = [indexer(indexing)((source,)) for source in sources]
    prints = [
        stage.fingerprints(manifest, threads, Bar(f"hash {source}", "images"))
        for source, manifest in zip(sources, sets, strict=True)
    ]
    pairs = stage.near_duplicates(prints[0], prints[1] if second else None, distance, threads, Bar("compare", "images"))
    stage.write(out, sets, prints, pairs)
    images = " and ".join(f"{len(manifest):,}" for manifest in sets)
    finish(
        {"images": [len(manifest) for manifest in sets], "pairs": len(pairs)},
        json_file,
        f"{len(pairs)} near-duplicate pairs among {images} images: {out}/pairs.csv, {out}/sheet.png",
    )


@main.command()
@click.argument("action", type=click.Choice(["list", "check"]))
@click.argument("name", required=False)
@click.argument("root", required=False)
@common
def data(action: str, name: str | None, root: str | None, json_file: str | None) -> None:
    """The named data sets: list them, or check whether the copy of one under ROOT is whole.

    list: what they are, where a user gets them, what must lie under `root` of data:NAME?root=…. check: images and classes of
    each part against the published numbers; nothing is decoded.

    \b
    fastcon data list
    fastcon data check cars196 /data/cars196
    """
    if action == "check":
        if name is None or root is None:
            raise click.UsageError("data check takes the NAME of a data set and the folder where it lies")
        _check(name, root, json_file)
    elif name is not None:
        raise click.UsageError("data list takes no arguments")
    else:
        _list(json_file)


def _list(json_file: str | None) -> None:
    from fastcon.data.published import DATASETS

    shown = ("title", "classes", "parts", "train", "test", "where", "files")
    facts = {name: {key: getattr(data_set, key) for key in shown} for name, data_set in DATASETS.items()}
    lines = []
    for name, data_set in DATASETS.items():
        parts = ", ".join(f"{part} {count:,}" for part, count in data_set.parts.items())
        lines.append(f"{name}: {data_set.title}; {data_set.classes:,} classes; images: {parts}")
        lines += [f"    from  {data_set.where}", f"    files {data_set.files}"]
    finish(facts, json_file, "\n".join(lines))


def _check(name: str, root: str, json_file: str | None) -> None:
    from fastcon.data.check import check

    parts, absent = check(name, root)
    lines = [f"{part.name}: {'; '.join(part.faults) or f'whole, {part.images:,} images'}" for part in parts]
    lines += [f"{part}: not there" for part in absent]
    if not parts:
        raise FastconError(next(iter(absent.values())))
    facts = [dataclasses.asdict(part) | {"faults": part.faults} for part in parts]
    finish({"name": name, "root": root, "parts": facts, "absent": absent}, json_file, "\n".join(lines))
    if any(part.faults for part in parts):
        raise FastconError(f"{root} is no whole copy of {name}")
