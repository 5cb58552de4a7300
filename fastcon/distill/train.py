"""Store + images → a student: one backbone, one head per teacher, trained on the stored logits.

RUN/student.safetensors is the backbone with head 0 under torchvision's names, RUN/heads.safetensors all heads.
Rerunning resumes from the last checkpoint; a finished run is left alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcon.data.manifest import ImageSet, Manifest
from fastcon.distill import advice
from fastcon.distill import loss as objective
from fastcon.distill import student as students
from fastcon.distill.loader import Batch, Loader
from fastcon.distill.options import TrainOptions, Upkeep
from fastcon.distill.reliability import resolved
from fastcon.distill.schedule import Schedule
from fastcon.distill.tally import Taken, Tally
from fastcon.errors import FastconError, Interrupted, one_line
from fastcon.files import write_atomically
from fastcon.kernels.multihead_ce import MultiHeadLoss, Segments
from fastcon.machine import Machine
from fastcon.models.classifier import Classifier, choose_batch_norm
from fastcon.ranks import Ranks, join
from fastcon.remote import keep_at_most
from fastcon.run import RUN_HEADS, RUN_WEIGHTS, Metrics, Run, Waits, stop_signals
from fastcon.store.codec import TopK
from fastcon.store.images import Given, PartImages, images_of
from fastcon.store.parts import opened
from fastcon.store.reader import Stored
from fastcon.trackers import tracker
from fastcon.training import Loop, compiled, make_optimizer, newest, set_rate, settle

RESULT = RUN_WEIGHTS[0]


def train(
    store_path: str,
    out: str,
    options: TrainOptions | None = None,
    machine: Machine | None = None,
    upkeep: Upkeep | None = None,
    images: Given = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
    index: Callable[[Sequence[str]], ImageSet] = ImageSet,
) -> dict[str, Any]:
    """Train a student into the folder `out` and return its last metrics. say gets notes and warnings for the user.

    images: where they are now (default: where they were; baked views need none); index: how IMAGES are looked up.

    Raises FastconError for anything that does not fit, Interrupted after a signal (the state is then saved).
    """
    options, upkeep, machine = options or TrainOptions(), upkeep or Upkeep(), machine or Machine()
    if upkeep.cache is not None:
        keep_at_most(upkeep.cache)
    ranks, labels = join(machine.target), options.labels
    if not ranks.first:
        say, progress = (lambda line: None), None

    def find(store: Stored) -> Manifest | PartImages | None:
        """The images; of baked views none are needed but for labels."""
        if images is None and store.recipe.bake is not None and not labels:
            return None
        return images_of(store, images, index)

    job = _prepared(store_path, out, options, machine, upkeep, find, say, ranks)
    store, run, loader, options, machine = job.store, job.run, job.loader, job.options, job.machine
    names, weights = job.names, job.weights
    if loader is None:
        say(f"{out} is finished: nothing to do")
        return ranks.same(lambda: _last_row(run))
    begun = None
    if ranks.same(lambda: newest(run.checkpoints) is None) and students.starts_as_generalist(job.start, store):
        begun = ranks.same(lambda: students.agreement(job.start, loader, options, machine))
        begun.warn(say, options)
    student, untrained = students.build_student(job.start, store, names, options, loader, say)
    ranks.same(run.begin)
    device = machine.target
    if options.sync_bn:
        student.net = nn.SyncBatchNorm.convert_sync_batchnorm(student.net)
    student.on(device).learn(options.batch_norm, options.dropout)
    segments = loader.table(weights)
    how = options.optimisation
    rates = how.lr_backbone, how.lr_heads
    optimizer = make_optimizer(student, *rates, options.momentum, how.weight_decay, how.adamw)
    loop = Loop(student, optimizer, machine, run.checkpoints, 60 * upkeep.checkpoint_minutes, ranks, how.clip, how.ema)
    tally = Tally(student.heads, device, ranks)
    steps = loader.schedule.steps
    total = steps * options.epochs

    saved = loop.begin(options.seed)
    if saved is not None:
        tally.load(saved["tally"])
        say(f"resuming {out} at step {loop.step} of {total}")
    rows = Rows(run, total, loop.step, saved["metrics"] if saved else 0, upkeep.track, ranks.first)
    if begun:
        rows.put(begun.row())
    forward = compiled(ranks.parallel(student, buffers=options.batch_norm == "batch"), upkeep.compile)

    def save() -> None:
        rows.write(wait=True)
        tally.take({"step": loop.step}, reset=False).refuse_nan(out)
        loop.save({"tally": tally.state(), "metrics": rows.position})

    began, start_step = time.monotonic(), loop.step
    epoch, done = divmod(loop.step, steps)
    with (
        machine.computing(turns=ranks.count == 1) as cores,
        ranks.lost(f": the same command resumes from the last checkpoint in {out}"),
        contextlib.closing(rows),
        stop_signals() as stop,
    ):
        waits = Waits(loader.waits, cores)
        for batch in loader.batches(range(epoch, options.epochs), skip=done):
            set_rate(optimizer, loop.step / total, how.milestones, how.warm_up, how.cosine)
            with cores.turn():
                with machine.autocast():
                    logits = forward(batch.pixels)
                result, supervised = _losses(logits, batch, segments, options.labels)
                loop.update(result.total if supervised is None else result.total + supervised)
            tally.add(result, supervised)
            housekeeping = time.perf_counter()
            ends = loop.step % steps == 0
            if ends or loop.step % upkeep.log_every == 0:
                rows.write(wait=True)
                about = {"step": loop.step, "epoch": (loop.step - 1) // steps, **_rates(optimizer)}
                rows.taken = tally.take(about)
            rows.write(wait=False)
            if progress:
                progress(loop.step, total)
            stopped, due = ranks.most(stop[0] if stop else 0, loop.due())
            if stopped or ends or due:
                save()
            waits.step(time.perf_counter() - housekeeping)
            if stopped and loop.step < total:
                if ranks.first:
                    waits.write(run)
                raise Interrupted(
                    f"stopped by signal {stopped} at step {loop.step} of {total}, saved; run the same command to resume"
                )
        rows.write(wait=True)
        rows.close(ended=True)
        loop.end()
        if ranks.first:
            write_atomically(run.path / RUN_HEADS, student.export_heads())
            run.end(RESULT, students.export(student, names, untrained))
            long = time.monotonic() - began > upkeep.advise_seconds and loop.step > start_step
            waits.write(run, advice.measure(student, batch.pixels, machine.precision, cores) if long else None)
    return rows.last or ranks.same(lambda: _last_row(run))  # cut off after its last step, it had none left


def _last_row(run: Run) -> dict[str, Any]:
    row: dict[str, Any] = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    return row


class _Job(NamedTuple):
    """A run that may begin, or go on: what it trains on, and how."""

    store: Stored
    start: Classifier
    """The network that the student starts as."""
    run: Run
    loader: Loader | None
    """None: the run is finished."""
    options: TrainOptions
    machine: Machine
    names: list[str]
    weights: list[float]
    """Of the heads, in the order of their names."""


def _prepared(
    store_path: str,
    out: str,
    options: TrainOptions,
    machine: Machine,
    upkeep: Upkeep,
    find: Callable[[Stored], Manifest | PartImages | None],
    say: Callable[[str], None],
    ranks: Ranks,
) -> _Job:
    """Everything that may be wrong with a run is found here, on all ranks at once. find: the images of a store."""
    with ranks.agreeing():
        store = opened(store_path)
        start = students.starting_network(store, options.student)
    precision = ranks.same(lambda: settle(machine, start, options.batch_size, out).precision)
    machine = dataclasses.replace(machine, device=str(machine.target), precision=precision)
    with ranks.agreeing(in_turn=True):
        options = dataclasses.replace(options, batch_norm=choose_batch_norm(options.batch_norm, start))
        names = objective.choose_heads(options.method, list(store.teachers), store.generalist, options.heads)
        options = resolved(store, names, options)
        weights = objective.head_weights(names, store.generalist, options.balance, options.weight)
        config: dict[str, Any] = {"command": "train", "store": _identity(store, names)}
        config |= {**options.record(), "precision": precision, "lineage": _lineage(store, store_path, names)}
        if options.sync_bn and ranks.count > 1 and machine.target.type != "cuda":
            raise FastconError("`sync_bn` needs GPUs: PyTorch synchronises batch-norms on them only")
        run = Run(out, config, machine.threads)
        machine = dataclasses.replace(machine, threads=run.threads)
        finished, loader = run.finished(RESULT), None
        if not finished:
            loader = _loader(store, find, names, options, machine, upkeep, say, ranks)
    ranks.require_same("another store or other options", config)
    loader = None if ranks.same(lambda: finished) else loader
    return _Job(store, start, run, loader, options, machine, names, weights)


class Rows:
    """The rows of metrics.jsonl, of run.log and of trackers, each written when its sums have come from the device."""

    def __init__(self, run: Run, total: int, step: int, position: int, track: Sequence[str], writes: bool) -> None:
        """writes: whether anything is written, which the first rank does for all."""
        self._metrics = Metrics(run.path / "metrics.jsonl", position) if writes else None
        self.taken: Taken | None = None
        """The row in transit."""
        self.last: dict[str, Any] = {}
        self._run, self._total, self._logged = run, total, time.monotonic()
        self._trackers = {name: tracker(name, run, step) for name in track} if writes else {}

    @property
    def position(self) -> int:
        """Bytes of metrics written so far."""
        return self._metrics.position if self._metrics else 0

    def put(self, row: dict[str, Any]) -> None:
        """Write a row of metrics."""
        if self._metrics:
            self._metrics.write(row)
        for name, each in list(self._trackers.items()):
            try:
                each.write(row)
            except Exception as error:  # a run of hours does not end with its audience
                del self._trackers[name]
                self._run.log(f"{name} gets no more metrics: {one_line(error)}")
                warnings.warn(
                    f"{name} gets no more metrics ({one_line(error)}): metrics.jsonl has them all", stacklevel=2
                )

    def write(self, wait: bool) -> None:
        """Write the row that was last taken, if it has arrived or is waited for. Raises FastconError for a loss of NaN."""
        if self.taken is None or not (wait or self.taken.arrived()):
            return
        self.taken.refuse_nan(str(self._run.path))
        row, self.taken = self.taken.row(), None
        self.last = row
        self.put(row)
        if not self._metrics:
            return
        now = time.monotonic()
        rate = row["images"] / (now - self._logged)
        self._run.log(f"step {row['step']}/{self._total} loss {row['loss']:.4f} {rate:.0f} img/s")
        self._logged = now

    def close(self, ended: bool = False) -> None:
        """Close the files; ended: whether the run came to its end."""
        if self._metrics:
            self._metrics.close()
        while self._trackers:
            name, each = self._trackers.popitem()
            try:
                each.close(ended)
            except Exception as error:
                self._run.log(f"{name} did not take the end of the run: {one_line(error)}")


def _loader(
    store: Stored,
    find: Callable[[Stored], Manifest | PartImages | None],
    names: list[str],
    options: TrainOptions,
    machine: Machine,
    upkeep: Upkeep,
    say: Callable[[str], None],
    ranks: Ranks,
) -> Loader:
    """The batches of a run, with what is to be said of them."""
    loader = Loader(
        store,
        find(store),
        options.batch_size,
        heads=names,
        views=options.views,
        seed=options.seed,
        lanes=options.lanes,
        device=machine.device,
        loader=machine.loader,
        threads=machine.threads,
        exact_pixels=upkeep.exact_pixels,
        temperature=options.temperature,
        rank=(ranks.number, ranks.count),
    )
    for warning in (loader.warning, rough_temperature(store, names, options.temperature)):
        if warning:
            say(f"warning: {warning}")
    if loader.schedule.left_out:
        say(
            f"{loader.schedule.left_out} of {store.rows} images are left out of each epoch (batches of {options.batch_size})"
        )
    return loader


def estimate(store: Stored, options: TrainOptions) -> dict[str, Any]:
    """What a run would do: steps, images left out of each epoch, bytes of logits read, and the weight of each head."""
    names = objective.choose_heads(options.method, list(store.teachers), store.generalist, options.heads)
    options = resolved(store, names, options)
    weights = objective.head_weights(names, store.generalist, options.balance, options.weight)
    lanes, views = options.lanes or 1, options.views or store.views
    schedule = Schedule(store.rows, views, store.recipe.chunk_rows, options.batch_size, lanes, options.seed)
    steps = schedule.steps * options.epochs
    return {
        "steps": steps,
        "images_left_out": schedule.left_out,
        "logit_bytes_read": steps * options.batch_size * sum(store.logit_bytes(name) for name in names),
        "weights": dict(zip(names, weights, strict=True)),
    }


def rough_temperature(store: Stored, names: list[str], temperature: float) -> str | None:
    """Warning if top-k logits are exact only at another temperature."""
    rough = [n for n in names if isinstance(store.codec(n), TopK) and temperature != TopK.temperature]
    if not rough:
        return None
    return (
        f"teacher {rough[0]!r} is stored as {store.codec(rough[0]).name}, exact at T = {TopK.temperature:g} and rough "
        f"at T = {temperature:g}: store it with `logits` float16 or uint8"
    )


def _losses(logits: Tensor, batch: Batch, segments: Segments, labels: bool) -> tuple[MultiHeadLoss, Tensor | None]:
    width = segments.columns
    result = objective.loss(logits[:, :width], batch.stacked, segments)
    if not labels:
        return result, None
    return result, nn.functional.cross_entropy(logits[:, width:], batch.labels)  # type: ignore[arg-type]


def _rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    first, last = optimizer.param_groups[0], optimizer.param_groups[-1]
    return {"lr_backbone": first["lr"], "lr_heads": last["lr"]}


def _identity(store: Stored, names: list[str]) -> dict[str, Any]:
    """The identity of a store as far as a run depends on it."""
    return {
        "recipe": store.recipe.record(),
        "images": store.images_digest,
        "views": store.views,
        "generalist": store.generalist,
        "teachers": {name: store.teachers[name].weights for name in names},
    }


def _lineage(store: Stored, path: str, names: list[str]) -> dict[str, Any]:
    """A student's origin, for results: the proxy (named after its store) and what its teachers were taught."""

    def of(name: str) -> dict[str, Any]:
        teacher = store.teachers[name]
        about = {"task": teacher.task or name, "split": teacher.split or "none", "split_seed": teacher.split_seed or 0}
        return about | {"architecture": teacher.architecture}

    teachers = {name: of(name) for name in names if name != store.generalist}
    return {"proxy": os.path.basename(path.rstrip("/")), "teachers": teachers}
