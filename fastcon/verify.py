"""Is a store whole and true? Structure, checksums and digests in full, and a sample of rows computed again.

The sample goes the real way: images → decoded views → teachers, compared with what is stored by KL and argmax.
`repair` computes damaged or missing chunks again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fastcon import models, pipeline, precompute, views
from fastcon import store as stores
from fastcon.errors import FastconError
from fastcon.manifest import Manifest, index
from fastcon.pipeline import Request
from fastcon.precompute import Settings, Teacher
from fastcon.store import Store

LARGEST_KL = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 2e-2}
"""Mean KL(stored || computed) at T = 2 in nats that the precision of the computation explains."""


@dataclasses.dataclass
class Check:
    """One line of the table: what was checked, whether it holds, and what was seen."""

    what: str
    passed: bool
    seen: str


def verify(
    path: str,
    images: Sequence[str] | Manifest | None,
    rows: int,
    settings: Settings,
    repair: bool = False,
    seed: int = 0,
) -> list[Check]:
    """Check a store; `rows` are recomputed per teacher. Raises FastconError where it cannot be opened at all."""
    store = Store(path)
    manifest = images if isinstance(images, Manifest) else index(list(images or store.record["images"]["sources"]))
    store.check_images(manifest)
    if repair:
        _repair_views(store, manifest)
    checks = [_images(store), _recipe(store, manifest)]
    checks.append(_pixels(store, manifest, settings))
    for name in store.teachers:
        damaged, unfinished = _chunks(store, name)
        if repair and damaged:
            _repair(store, manifest, name, damaged, settings)
            damaged, unfinished = _chunks(store, name)
        seen = f"{store.views * store.chunks - len(damaged) - len(unfinished)} of {store.views * store.chunks} chunks whole"
        if unfinished:
            seen += f", {len(unfinished)} not computed yet"
        if damaged:
            seen += f"; damaged: {damaged[0][1]}" + (f" and {len(damaged) - 1} more" if len(damaged) > 1 else "")
        checks.append(Check(f"{name}: chunks", not damaged and not unfinished, seen))
        if "weights_file_digest" in store.teachers[name]:
            checks.append(_weights(store, name))
        if rows and not damaged and store.done(name).any():
            checks.append(_recompute(store, manifest, name, rows, settings, seed))
    return checks


def _images(store: Store) -> Check:
    try:
        store.image_columns()
    except FastconError as error:
        return Check("images", False, str(error))
    return Check("images", True, f"{store.rows:,} images, digest {store.record['images']['digest'][:12]}")


def _weights(store: Store, name: str) -> Check:
    try:
        store.weights(name)
    except FastconError as error:
        return Check(f"{name}: weights", False, str(error))
    return Check(f"{name}: weights", True, "the stored weights are whole")


def _recipe(store: Store, manifest: Manifest) -> Check:
    for number in range(store.views):
        try:
            recorded = store.view(number)
        except FastconError as error:
            return Check("views", False, str(error))
        made = stores.make_view(store.recipe, manifest, number)
        for column in ("order", "boxes", "flips"):
            if not np.array_equal(getattr(recorded, column), getattr(made, column)):
                return Check(
                    "views",
                    False,
                    f"the recorded {column} of view {number} are not what the recipe makes: the "
                    "rows may belong to other images; make the store again",
                )
    return Check("views", True, f"order, boxes and flips of {store.views} views are what the recipe makes")


def _pixels(store: Store, manifest: Manifest, settings: Settings) -> Check:
    try:
        warning = precompute.check_pixels(store, manifest, settings, exact=False)
    except FastconError as error:
        return Check("pixels", False, str(error))
    return Check("pixels", True, warning or "the sample rows decode to the recorded pixels, bit for bit")


Damaged = list[tuple[tuple[int, int], str]]


def _chunks(store: Store, name: str) -> tuple[Damaged, list[tuple[int, int]]]:
    damaged: Damaged = []
    done = store.done(name)
    for view, chunk in np.argwhere(done):
        try:
            store.logits(name, int(view), int(chunk))
        except FastconError as error:
            damaged.append(((int(view), int(chunk)), str(error)))
    return damaged, [(int(view), int(chunk)) for view, chunk in np.argwhere(~done)]


def _teacher(store: Store, name: str) -> Teacher:
    record = store.teachers[name]
    if record["role"] == "generalist":
        model = models.from_bytes(store.weights(name), f"the generalist of {store.path}")
    else:
        model = models.load(record["spec"], size=record["size"])
    if model.digest() != record["weights"]:
        raise FastconError(
            f"teacher {name!r} of {store.path} was {record['spec']} with weights {record['weights'][:12]}, "
            f"there are now weights {model.digest()[:12]}: put the former back to recompute its rows"
        )
    model.set_size(record["size"])
    return Teacher(name, record["spec"], model, record["role"] == "generalist")


def _as_computed(store: Store, name: str, settings: Settings) -> Settings:
    record = store.teachers[name]
    return dataclasses.replace(
        settings, precision=record["precision"], batch_size=record["batch_size"], logits=record["logits"]
    )


def _recompute(store: Store, manifest: Manifest, name: str, rows: int, settings: Settings, seed: int) -> Check:
    try:
        teacher = _teacher(store, name)
    except FastconError as error:
        return Check(f"{name}: rows", False, str(error))
    settings = _as_computed(store, name, settings)
    places = np.arange(store.views * store.rows, dtype=np.uint64)
    view_of, row_of = np.divmod(places, np.uint64(store.rows))
    there = store.done(name)[view_of, row_of // np.uint64(store.recipe.chunk_rows)]
    order = views.permutation(seed, places[there], 0, views.SAMPLE)
    view_of, row_of = np.divmod(np.sort(places[there][order[:rows]]).astype(np.int64), store.rows)
    stored = [
        store.logits(name, int(v), int(r) // store.recipe.chunk_rows)[int(r) % store.recipe.chunk_rows]
        for v, r in zip(view_of, row_of, strict=True)
    ]
    computed = _logits(store, manifest, teacher, view_of, row_of, settings)
    kl, same = _compare(torch.from_numpy(np.stack(stored)), torch.from_numpy(computed), store.teachers[name]["kind"])
    limit = LARGEST_KL[settings.precision]
    seen = f"{len(stored)} rows computed again: KL {kl:.1e} nats (at most {limit:.0e}), same argmax {same:.1%}"
    return Check(f"{name}: rows", kl <= limit and same >= 0.95, seen)


def _logits(
    store: Store, manifest: Manifest, teacher: Teacher, view_of: NDArray, row_of: NDArray, settings: Settings
) -> NDArray:
    teacher.model.on(settings.device)
    columns = {int(v): store.view(int(v)) for v in np.unique(view_of)}
    at = [(columns[int(v)], int(r)) for v, r in zip(view_of, row_of, strict=True)]
    request = [
        Request(
            np.array([v.order[r] for v, r in part]),
            np.stack([v.boxes[r] for v, r in part]),
            np.array([v.flips[r] for v, r in part]),
        )
        for part in (at[k : k + settings.batch_size] for k in range(0, len(at), settings.batch_size))
    ]
    size = teacher.model.size
    decoded = pipeline.decode(
        manifest,
        request,
        [size],
        batch_size=settings.batch_size,
        device=settings.device,
        loader=settings.loader,
        threads=settings.threads,
    )
    return np.concatenate([precompute.run_teacher(teacher.model, pixels[size], settings) for pixels in decoded])


def _compare(stored: torch.Tensor, computed: torch.Tensor, kind: str) -> tuple[float, float]:
    """Mean KL at T = 2 in nats, and the share of rows with the same argmax (sigmoid: of labels with the same sign)."""
    a, b = stored.double() / 2, computed.double() / 2
    if kind == "sigmoid":
        p = a.sigmoid()
        kl = p * (torch.nn.functional.logsigmoid(a) - torch.nn.functional.logsigmoid(b))
        kl += (1 - p) * (torch.nn.functional.logsigmoid(-a) - torch.nn.functional.logsigmoid(-b))
        return kl.mean().item(), ((a > 0) == (b > 0)).double().mean().item()
    log_a, log_b = a.log_softmax(1), b.log_softmax(1)
    return (log_a.exp() * (log_a - log_b)).sum(1).mean().item(), (a.argmax(1) == b.argmax(1)).double().mean().item()


def _require_same_machine(store: Store, manifest: Manifest, settings: Settings, device: str) -> None:
    """What is written anew must be what was there: the same pixels, on the same kind of device."""
    if settings.device.type != device:
        raise FastconError(
            f"{store.path} was computed on {device}: repair it with --device {device}, other devices round differently"
        )
    precompute.check_pixels(store, manifest, settings, exact=True)


def _repair_views(store: Store, manifest: Manifest) -> None:
    for number in range(store.views):
        try:
            store.view(number)
        except FastconError:
            with stores.open_for_writing(store.path, manifest, store.recipe, store.views, {}) as writer:
                writer.repair_view(manifest, number)


def _repair(store: Store, manifest: Manifest, name: str, damaged: Damaged, settings: Settings) -> None:
    teacher = _teacher(store, name)
    _require_same_machine(store, manifest, settings, store.teachers[name]["device"])
    settings = _as_computed(store, name, settings)
    used = store.record["pipeline"]
    with stores.open_for_writing(store.path, manifest, store.recipe, store.views, used) as writer:
        missing = np.zeros((store.views, store.chunks), dtype=bool)
        for (view, chunk), _ in damaged:
            missing[view, chunk] = True
        precompute.fill(writer, manifest, [teacher], {name: missing}, [place for place, _ in damaged], settings)
