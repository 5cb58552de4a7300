"""Is a store intact and correct? Structure, checksums and digests in full, and a sample of rows recomputed.

The sample takes the real path: images → decoded views → teachers, compared with the stored logits by KL and argmax.
`repair` computes damaged or missing chunks again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fastcon.data import views
from fastcon.data.decode import Request, decode, rgb
from fastcon.data.manifest import ImageSet, Manifest
from fastcon.distill import precompute
from fastcon.distill.embeddings import CONSTANT
from fastcon.distill.pending import Pending
from fastcon.distill.precompute import Teacher
from fastcon.errors import FastconError
from fastcon.machine import Machine
from fastcon.models.frozen import Frozen
from fastcon.models.load import from_bytes, load
from fastcon.remote import is_url
from fastcon.store import bake, parts
from fastcon.store.codec import Parts
from fastcon.store.images import image_sets, manifest_of
from fastcon.store.lease import Lost
from fastcon.store.mirror import ALL, mirrored
from fastcon.store.pixels import check_pixels, decode_samples
from fastcon.store.reader import Store
from fastcon.store.replay import Replay
from fastcon.store.writer import make_view, open_for_writing, restore_record

LARGEST_KL = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 2e-2}
"""Mean KL(stored || computed) at T = 2 in nats that the precision of the computation explains; of an embedding the mean
squared error of standardised features."""

BATCH = 128

Damaged = list[tuple[bake.Place, str]]
"""Chunks or shards, each with what is wrong."""


@dataclasses.dataclass
class Check:
    """One line of the table: what was checked, whether it holds, and what was seen."""

    what: str
    passed: bool
    seen: str


def verify(
    path: str,
    images: Sequence[str] | Manifest | None = None,
    rows: int = 256,
    machine: Machine | None = None,
    repair: bool = False,
    seed: int = 0,
    index: Callable[[Sequence[str]], ImageSet] = ImageSet,
) -> list[Check]:
    """Check a store; `rows` are recomputed per teacher. Raises FastconError where it cannot be opened at all.

    Of one in object storage every byte is fetched anew.

    images: where they are now (default: where they were); index: how IMAGES are looked up.
    """
    if parts.has_parts(path):
        given = images if isinstance(images, Manifest) else list(images) if images else None
        sets = image_sets(parts.read(path), given, index)
        return _verify_parts(path, sets, rows, machine, repair, seed)
    if repair and is_url(path):
        with mirrored(path, ALL) as folder:
            checks = verify(folder, images, rows, machine, repair, seed, index)
        return [dataclasses.replace(check, seen=check.seen.replace(folder, path)) for check in checks]
    machine = (machine or Machine()).settled()
    restored = repair and restore_record(path)
    store = Store(path)
    store.distrust()
    manifest = manifest_of(store, images if isinstance(images, Manifest) else index(images or store.sources))
    if repair:
        _mend(store, manifest, machine)
        if store.recipe.bake is not None:
            _repair_shards(Store(path), manifest, machine)
        _mend_samples(store, manifest, machine)
        store = Store(path)
    checks = [_metadata(store, restored), _images(store), _recipe(store, manifest)]
    if store.recipe.bake is not None:
        checks.append(_shards(store))
        if checks[-1].passed and rows:
            checks.append(_baked(store, manifest, rows, machine, seed))
    checks.append(_pixels(store, manifest, machine))
    for name in store.teachers:
        whole, usable, damaged = _whole(store, name)
        if repair and damaged:
            try:
                _repair(store, manifest, name, damaged, machine)
            except Lost:
                raise
            except FastconError as error:
                checks.append(Check(f"{name}: repair", False, str(error)))
            store = Store(path)
            whole, usable, _ = _whole(store, name)
        checks.append(whole)
        if store.teachers[name].weights_bytes is not None:
            checks.append(_weights(store, name))
        if rows and usable:
            checks.append(_recompute(store, manifest, name, rows, machine, seed))
    return checks


def _verify_parts(
    path: str, sets: list[ImageSet], rows: int, machine: Machine | None, repair: bool, seed: int
) -> list[Check]:
    """The checks of every part, those of one kind on one line, and whether the parts are those that the record speaks of."""
    binding = parts.read(path)
    by_kind: dict[str, list[tuple[int, Check]]] = {}
    other: list[str] = []
    for number in range(binding.count):
        where, (which, share) = parts.folder(path, number), binding.share(number)
        try:
            checks = verify(where, sets[which].manifest(share), -(-rows // binding.count), machine, repair, seed)
            seen = parts.Bound.of(Store(where))
            if binding.bound.get(number) != seen:
                other.append(f"part {number} has {seen.rows:,} rows of {seen.views} views, the record says otherwise")
        except FastconError as error:
            checks = [Check("part", False, str(error))]
        for check in checks:
            by_kind.setdefault(check.what, []).append((number, check))
    lines = [_of_all(what, found) for what, found in by_kind.items()]
    text = f"{other[0]}: run `fastcon precompute` again" if other else f"{binding.count} parts, as the record says"
    return [Check("parts", not other, text), *lines]


def _of_all(what: str, found: list[tuple[int, Check]]) -> Check:
    """One check for all parts."""
    failed = [(number, check) for number, check in found if not check.passed]
    if failed:
        number, check = failed[0]
        return Check(what, False, f"part {number}: {check.seen}" + f" (and {len(failed) - 1} more)" * (len(failed) > 1))
    where = f"in {len(found)} parts, the first" if len(found) > 1 else "in one part"
    return Check(what, True, f"{where}: {found[0][1].seen}")


def _mend(store: Store, manifest: Manifest, machine: Machine) -> None:
    """Rewrite what follows from the record and the images; the rest must be recomputed."""
    with open_for_writing(store.path, manifest, store.recipe, store.views, {}) as writer:
        writer.repair_metadata()
        for number in range(writer.views):
            if _fails(lambda number=number: writer.view(number)):  # type: ignore[misc]
                writer.repair_view(manifest, number)
        if _fails(writer.image_columns):
            writer.repair_images(manifest)
        writer.repair_checksums()
        for name, teacher in writer.teachers.items():
            if teacher.weights_bytes is not None and _fails(lambda name=name: writer.weights(name)):  # type: ignore[misc]
                model = load(str(teacher.spec), size=teacher.size, untrained=True)
                writer.repair_weights(name, model.export(model.heads[0].name))


def _mend_samples(store: Store, manifest: Manifest, machine: Machine) -> None:
    """The sample pixels come from the images, or from baked views, which have been repaired by then."""
    with open_for_writing(store.path, manifest, store.recipe, store.views, {}) as writer:
        if writer.record.samples_digest is not None and _fails(writer.samples):
            writer.repair_samples(decode_samples(writer, manifest, machine))


def _fails(read: Callable[[], object]) -> bool:
    try:
        read()
    except FastconError:
        return True
    return False


def _metadata(store: Store, restored: bool) -> Check:
    damaged = store.damaged_metadata()
    if damaged:
        return Check(
            "metadata", False, f"{damaged[0]} is damaged" + f" and {len(damaged) - 1} more" * (len(damaged) > 1)
        )
    return Check("metadata", True, "the record was restored from its copy" if restored else "as the record implies")


def _images(store: Store) -> Check:
    try:
        store.image_columns()
    except FastconError as error:
        return Check("images", False, str(error))
    return Check("images", True, f"{store.rows:,} images, digest {store.record.images.digest[:12]}")


def _damaged_shards(store: Store) -> Damaged:
    damaged = []
    for view, chunk in np.argwhere(store.baked()):
        try:
            store.shard(int(view), int(chunk))
        except FastconError as error:
            damaged.append(((int(view), int(chunk)), str(error)))
    return damaged


def _shards(store: Store) -> Check:
    try:
        damaged, unwritten = _damaged_shards(store), bake.missing(store, store.views)
    except FastconError as error:
        return Check("shards", False, str(error))
    return Check("shards", not damaged and not unwritten, _counted(store, "shards", damaged, unwritten, "written"))


def _counted(store: Store, what: str, damaged: Damaged, unfinished: list[bake.Place], done: str) -> str:
    """How many chunks or shards are whole, not done yet, damaged, and how the first of those is."""
    total = store.views * store.chunks
    text = f"{total - len(damaged) - len(unfinished)} of {total} {what} whole"
    if unfinished:
        text += f", {len(unfinished)} not {done} yet"
    if damaged:
        text += f"; damaged: {damaged[0][1]}" + (f" and {len(damaged) - 1} more" if len(damaged) > 1 else "")
    return text


def _baked(store: Store, manifest: Manifest, rows: int, machine: Machine, seed: int) -> Check:
    """Bake a sample of view 0 again from the images, and compare the pixels."""
    assert store.recipe.bake is not None
    view, size = store.view(0), store.recipe.size
    order = views.permutation(seed, np.arange(store.rows, dtype=np.uint64), 0, views.SAMPLE)
    chosen = np.sort(order[: min(rows, BATCH)])
    request = Request(view.order[chosen], view.boxes[chosen], view.flips[chosen])
    [pixels] = decode(manifest, [request], [size], BATCH, machine)
    made = [bake.encode(image, store.recipe.bake) for image in pixels[size].permute(0, 2, 3, 1).cpu().numpy()]
    reader = Replay(store, None).images.reader()
    stored = [part.tobytes() for part in reader.read(chosen.tolist())]
    reader.close()
    difference = max(
        np.abs(np.subtract(*(np.asarray(rgb(data), dtype=np.int16) for data in pair))).mean()
        for pair in zip(stored, made, strict=True)
    )
    text = f"{len(chosen)} views baked again: {sum(a == b for a, b in zip(stored, made, strict=True))} the same bytes"
    return Check("baked", difference <= 2, f"{text}, pixels within {difference:.2f} of 255 on average (at most 2)")


def _repair_shards(store: Store, manifest: Manifest, machine: Machine) -> None:
    damaged = [place for place, _ in _damaged_shards(store)]
    if damaged:
        with open_for_writing(store.path, manifest, store.recipe, store.views, {}) as writer:
            bake.bake(writer, manifest, damaged, machine)


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
        made = make_view(store.recipe, manifest, number)
        for column in ("order", "boxes", "flips"):
            if not np.array_equal(getattr(recorded, column), getattr(made, column)):
                return Check(
                    "views",
                    False,
                    f"the recorded {column} of view {number} are not what the recipe makes: the "
                    "rows may belong to other images; make the store again",
                )
    return Check("views", True, f"order, boxes and flips of {store.views} views are what the recipe makes")


def _pixels(store: Store, manifest: Manifest, machine: Machine) -> Check:
    if store.record.samples_digest is None:
        return Check("pixels", False, "no sample pixels yet: run `fastcon precompute` again, it resumes")
    try:
        warning = check_pixels(store, manifest, machine, exact=False)
    except FastconError as error:
        return Check("pixels", False, str(error))
    return Check("pixels", True, warning or "the sample rows decode to the recorded pixels, bit for bit")


def _chunks(store: Store, name: str) -> tuple[Damaged, list[bake.Place]]:
    """Chunks that are damaged, each with what is wrong, and those that are not computed yet."""
    damaged: Damaged = []
    done = store.done(name)
    for view, chunk in np.argwhere(done):
        try:
            store.parts(name, int(view), int(chunk))
        except FastconError as error:
            damaged.append(((int(view), int(chunk)), str(error)))
    return damaged, [(int(view), int(chunk)) for view, chunk in np.argwhere(~done)]


def _whole(store: Store, name: str) -> tuple[Check, bool, list[bake.Place]]:
    """What is there of a teacher, whether a sample can be drawn (some rows are there, none damaged), damaged chunks."""
    try:
        damaged, unfinished = _chunks(store, name)
    except FastconError as error:
        return Check(f"{name}: chunks", False, str(error)), False, []
    check = Check(
        f"{name}: chunks", not damaged and not unfinished, _counted(store, "chunks", damaged, unfinished, "computed")
    )
    usable = not damaged and len(unfinished) < store.views * store.chunks
    return check, usable, [place for place, _ in damaged]


def _teacher(store: Store, name: str) -> Teacher:
    record = store.teachers[name]
    generalist = record.role == "generalist"
    if generalist and record.weights_bytes is not None:
        model = from_bytes(store.weights(name), f"the generalist of {store.path}")
    else:
        model = load(str(record.spec), size=record.size, untrained=True)
    if model.digest() != record.weights:
        raise FastconError(
            f"teacher {name!r} of {store.path} was {record.spec} with weights {record.weights[:12]}, "
            f"there are now weights {model.digest()[:12]}: put the former back to recompute its rows"
        )
    model.set_size(int(record.size or model.size))
    return Teacher(name, str(record.spec), model, generalist)


def _as_computed(store: Store, name: str, machine: Machine) -> Machine:
    return dataclasses.replace(machine, precision=str(store.teachers[name].precision))


def _recompute(store: Store, manifest: Manifest, name: str, rows: int, machine: Machine, seed: int) -> Check:
    """A sample of rows, by the real path; what can no longer be read or computed fails the check."""
    try:
        return _compared(store, manifest, name, rows, machine, seed)
    except FastconError as error:
        return Check(f"{name}: rows", False, str(error))


def _compared(store: Store, manifest: Manifest, name: str, rows: int, machine: Machine, seed: int) -> Check:
    teacher = _teacher(store, name)
    machine = _as_computed(store, name, machine)
    places = np.arange(store.views * store.rows, dtype=np.uint64)
    view_of, row_of = np.divmod(places, np.uint64(store.rows))
    stored_rows = store.done(name)[view_of, row_of // np.uint64(store.recipe.chunk_rows)]
    order = views.permutation(seed, places[stored_rows], 0, views.SAMPLE)
    view_of, row_of = np.divmod(np.sort(places[stored_rows][order[:rows]]).astype(np.int64), store.rows)
    kind, classes = store.teachers[name].kind, len(store.teachers[name].classes)
    stored = np.stack([_row(store, name, int(v), int(r)) for v, r in zip(view_of, row_of, strict=True)])
    computed = store.codec(name).decode(_parts(store, manifest, teacher, view_of, row_of, machine), classes)
    limit = LARGEST_KL[machine.precision] + store.codec(name).largest_kl
    if kind == "embedding":
        error, same = _distance(stored.astype(np.float64), computed.astype(np.float64))
        seen = f"squared error {error:.1e} of a variance (at most {limit:.0e}), cosine {same:.4f}"
    else:
        error, same = _compare(torch.from_numpy(stored), torch.from_numpy(computed), kind)
        seen = f"KL {error:.1e} nats (at most {limit:.0e}), same argmax {same:.1%}"
    return Check(f"{name}: rows", error <= limit and same >= 0.95, f"{len(stored)} rows computed again: {seen}")


def _row(store: Store, name: str, view: int, row: int) -> NDArray:
    chunk, inside = divmod(row, store.recipe.chunk_rows)
    return store.logits(name, view, chunk)[inside]


def _parts(
    store: Store, manifest: Manifest, teacher: Teacher, view_of: NDArray, row_of: NDArray, machine: Machine
) -> Parts:
    record, replay = store.teachers[teacher.name], Replay(store, manifest)
    batch_size = record.batch_size or BATCH
    requests = (
        replay.request(int(view), rows[at : at + batch_size])
        for view in np.unique(view_of)
        for rows in [row_of[view_of == view]]
        for at in range(0, len(rows), batch_size)
    )
    size = teacher.model.size
    decoded = decode(replay.images, requests, [size], batch_size, machine)
    run = Frozen(teacher.model, machine, batch_size)  # uncompiled, even if the rows come from the compiled network
    batches = [Pending(run(pixels[size]), record.logits).parts() for pixels in decoded]
    return {part: np.concatenate([batch[part] for batch in batches]) for part in batches[0]}


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


def _distance(stored: NDArray, computed: NDArray) -> tuple[float, float]:
    """Mean squared error of standardised features, and their mean cosine; a single row is compared as it is."""
    middle, spread = (stored.mean(0), stored.std(0)) if len(stored) > 1 else (0.0, np.sqrt(np.square(stored).mean()))
    scale = 1 / np.where(spread > CONSTANT * np.max(spread), spread, np.inf)
    a, b = ((rows - middle) * scale for rows in (stored, computed))
    lengths = np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
    return float(np.square(a - b).mean()), float(((a * b).sum(1) / lengths).mean())


def _require_same_machine(store: Store, manifest: Manifest, machine: Machine, device: str) -> None:
    """Rewritten rows must equal the former ones: the same pixels, on the same kind of device."""
    if machine.target.type != device:
        raise FastconError(
            f"{store.path} was computed on {device}: repair it with `device` {device}, other devices round differently"
        )
    check_pixels(store, manifest, machine, exact=True)


def _repair(store: Store, manifest: Manifest, name: str, places: list[bake.Place], machine: Machine) -> None:
    """Recompute a teacher's damaged chunks."""
    teacher = _teacher(store, name)
    _require_same_machine(store, manifest, machine, str(store.teachers[name].device))
    machine = _as_computed(store, name, machine)
    missing = np.zeros((store.views, store.chunks), dtype=bool)
    missing[tuple(zip(*places, strict=True))] = True
    record, used = store.teachers[name], store.record.pipeline
    with open_for_writing(store.path, manifest, store.recipe, store.views, used) as writer:
        precompute.fill(
            writer,
            manifest,
            [teacher],
            {name: missing},
            sorted(places),
            machine,
            record.batch_size or BATCH,
        )
