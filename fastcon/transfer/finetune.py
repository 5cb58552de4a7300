"""Fine-tuning a MODEL on labelled images: how teachers are made, and how backbones are judged. One loop, random views.

In: training and test subsets, a MODEL to start from. Out: RUN/model.safetensors with the head of the task, its
metrics, and the learning rate that a held-out part of the training set chose.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastcon.data import splits, views
from fastcon.data.decode import Request, decode
from fastcon.data.splits import Subset
from fastcon.errors import FastconError, Interrupted
from fastcon.files import write_atomically, write_json
from fastcon.machine import Machine
from fastcon.models.classifier import Classifier, Head, choose_batch_norm
from fastcon.models.load import load
from fastcon.models.origin import is_random
from fastcon.ranks import ALONE, Ranks, join
from fastcon.run import RUN_WEIGHTS, Metrics, Run, stop_signals
from fastcon.training import Loop, make_optimizer, set_rate, settle
from fastcon.transfer import features
from fastcon.transfer.few_shot import interval
from fastcon.transfer.options import FinetuneOptions, TuneOptions

RESULT = RUN_WEIGHTS[1]
REPORT = "result.json"
CHECKPOINT_SECONDS = 60.0
VALIDATION = 0.1
"""Share of each training class held out to choose the learning rate."""


class Diverged(FastconError):
    """A learning rate at which the loss turned NaN or infinite."""


Say = Callable[[str], None]
Progress = Callable[[int, int], None]


def teach(
    init: str,
    train: Subset,
    test: Subset,
    out: str,
    options: TuneOptions,
    machine: Machine,
    data: dict[str, Any] | None = None,
    say: Say = lambda line: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tune `init` on `train`, write the teacher into `out` and return its accuracy on `test`.

    With several learning rates each is tried on all but a tenth of every class, and the best on that tenth trains on
    everything. data: how the parts were chosen, for the record. Rerunning resumes; a finished run only
    reports. Under torchrun the ranks share every batch, and the first writes.
    """
    tuning = _Tuning.of("teach", init, train, test, out, options, machine, data, say)
    if tuning.finished(RESULT):
        return tuning.reported()
    tuning.begin(init)
    tuning.count_to(tuning.steps(train), progress)
    model, result = tuning.tune(train, "")
    result |= {"test_images": len(test), "classes": len(train.classes)}
    if tuning.ranks.first:
        write_json(tuning.run.path / REPORT, result)
        tuning.run.end(RESULT, model.export(options.head))
    return result


def finetune(
    backbone: str,
    train: Subset,
    test: Subset,
    out: str,
    options: FinetuneOptions,
    machine: Machine,
    data: dict[str, Any] | None = None,
    say: Say = lambda line: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tune `backbone` on a downstream task: on all of `train` once, or on draws of `shots` images per class.

    The draws are those of the probes with the same seed, and every trial chooses its own learning rate as `teach` does.
    Returns the mean accuracy on `test` and each trial's; on all images `out` becomes a MODEL too. Rerunning resumes.
    """
    tuning = _Tuning.of("finetune", backbone, train, test, out, options, machine, data, say)
    run, ranks = tuning.run, tuning.ranks
    if tuning.finished(REPORT):
        return tuning.reported()
    tuning.begin(backbone)
    draws = [train]
    if options.shots is not None:
        trials = range(options.draws)
        rows = (splits.draw(train.ids, train.labels, options.shots, options.seed, trial) for trial in trials)
        draws = [splits.pick(train, chosen) for chosen in rows]
    tuning.count_to(sum(tuning.steps(draw) for draw in draws), progress)
    results = []
    for trial, draw in enumerate(draws):
        done = run.path / f"trial-{trial}.json"
        before = ranks.same(lambda done=done: json.loads(done.read_text()) if done.exists() else None)  # type: ignore[misc]
        if before is not None:
            results.append(before)
            tuning.count(tuning.steps(draw))
            continue
        model, result = tuning.tune(draw, f"trial-{trial}-")
        results.append(result)
        if ranks.first:
            if options.shots is None:
                write_atomically(run.path / RESULT, model.export(options.head))
            write_json(done, result)
            run.forget_checkpoints()
    accuracies = [trial["accuracy"] for trial in results]
    summary = {
        "accuracy": float(np.mean(accuracies)),
        "accuracies": accuracies,
        "ci95": interval(accuracies),
        "multi_label": train.multi_label,
        "lr": [trial["lr"] for trial in results],
        "train_images": len(draws[0]),
        "test_images": len(test),
        "classes": len(train.classes),
        "architecture": tuning.start.architecture,
    }
    if ranks.first:
        write_json(run.path / REPORT, summary)
    return summary


class _Tuning:
    """A run of `teach` or `finetune`: what it starts from, how it trains, and how far it has come."""

    def __init__(
        self,
        start: Classifier,
        test: Subset,
        run: Run,
        options: TuneOptions,
        machine: Machine,
        judge: Machine,
        ranks: Ranks,
        say: Say,
    ) -> None:
        """machine: trains; judge: measures accuracies, in the precision in which `evaluate` and the probes do."""
        self.start, self.test, self.run, self.options, self.ranks = start, test, run, options, ranks
        self.machine, self.judge, self.say = machine, judge, say if ranks.first else lambda line: None
        self.count: Callable[[int], None] = lambda steps: None

    @classmethod
    def of(
        cls,
        command: str,
        init: str,
        train: Subset,
        test: Subset,
        out: str,
        options: TuneOptions,
        machine: Machine,
        data: dict[str, Any] | None,
        say: Say,
    ) -> _Tuning:
        """Open the run of these options and images. Raises FastconError if `out` holds another."""
        ranks = join(machine.target)
        with ranks.agreeing(in_turn=True):
            start = load(init, size=options.size, untrained=command == "teach")
            start.set_size(options.size or start.size)
        precision = ranks.same(lambda: settle(machine, start, options.batch_size, out).precision)
        judge, machine = (
            machine.settled(),
            dataclasses.replace(machine, device=str(machine.target), precision=precision),
        )
        options = dataclasses.replace(options, batch_norm=choose_batch_norm(options.batch_norm, start))
        identity = {
            "init_weights": start.digest(),
            "train": train.digest,
            "test": test.digest,
            "train_images": len(train),
            "test_images": len(test),
            "classes": list(train.classes),
            "data": data,
        }
        given = {**dataclasses.asdict(options), "precision": machine.precision}
        if isinstance(options, FinetuneOptions):
            given["trials"] = options.draws
        config = {"command": command, "init": init, **identity, **given}
        with ranks.agreeing():
            run = Run(out, config, machine.threads)
        ranks.require_same("other images or options", config)
        machine, judge = (dataclasses.replace(each, threads=run.threads) for each in (machine, judge))
        return cls(start, test, run, options, machine, judge, ranks, say)

    def finished(self, result: str) -> bool:
        """Whether the run has the file that is written last."""
        return self.ranks.same(lambda: self.run.finished(result))

    def begin(self, init: str) -> None:
        """Write the run's configuration, and print what it starts from."""
        self.ranks.same(self.run.begin)
        self.say(f"starts from {init}{', random weights' if is_random(init) else ''}, at {self.start.size} px")

    def reported(self) -> dict[str, Any]:
        """The result of a run that is finished."""
        self.say(f"{self.run.path} is finished: nothing to do")
        return self.ranks.same(lambda: json.loads((self.run.path / REPORT).read_text()))

    def count_to(self, total: int, progress: Progress | None) -> None:
        """Report steps as they are done, out of a total."""
        done = 0

        def count(steps: int) -> None:
            nonlocal done
            done += steps
            if progress and self.ranks.first:
                progress(done, total)

        self.count = count

    def steps(self, train: Subset) -> int:
        """Steps that `tune` takes."""
        options = self.options
        grid = options.lr_grid if len(options.lr_grid) > 1 else ()
        kept = splits.part(train, VALIDATION, options.seed)[0] if grid else train
        return options.epochs * (_steps(train, options) + len(grid) * _steps(kept, options))

    def tune(self, train: Subset, prefix: str) -> tuple[Classifier, dict[str, Any]]:
        """Choose a learning rate on a held-out tenth of `train`, then train on all of it; returns the network and its result."""
        try:
            return self._tuned(train, prefix)
        except Diverged as error:
            raise self.ranks.error(str(error)) from error

    def _tuned(self, train: Subset, prefix: str) -> tuple[Classifier, dict[str, Any]]:
        rates, head = sorted(self.options.lr_grid), self.options.head
        tried = self._tried(train, rates, prefix) if len(rates) > 1 else {}
        best = max(tried, key=lambda rate: (tried[rate], -rate)) if tried else rates[0]
        model = self._fit(train, best, f"{prefix}final")
        result = {
            "accuracy": accuracy(model, head, self.test, self.judge, ranks=self.ranks),
            "lr": best,
            "tried": {f"{rate:g}": value for rate, value in tried.items()},
        }
        return model, result

    def _tried(self, train: Subset, rates: list[float], prefix: str) -> dict[float, float]:
        """Accuracy that each learning rate reaches on the held-out tenth; those that diverge are left out."""
        tried = {}
        kept, aside = splits.part(train, VALIDATION, self.options.seed)
        if not len(aside):
            raise self.ranks.error(
                f"{len(train)} training images, one per class, leave none aside to choose among {len(rates)} learning "
                "rates: give one (`lr_grid` 0.01), or more images per class"
            )
        for rate in rates:
            try:
                model = self._fit(kept, rate, f"{prefix}lr-{rate:g}")
            except Diverged as error:
                self.say(f"learning rate {rate:g} is out: {error}")
                continue
            tried[rate] = accuracy(model, self.options.head, aside, self.judge, ranks=self.ranks)
            self.say(f"learning rate {rate:g}: {tried[rate]:.1%} of the held-out tenth")
        if not tried:
            raise self.ranks.error(
                f"the loss turned NaN at every learning rate of {rates}: use another `out` with lower ones"
            )
        return tried

    def _fit(self, train: Subset, rate: float, stage: str) -> Classifier:
        return fit(self.start, train, rate, self.options, self.machine, self.run, stage, self.count, self.ranks)


def fit(
    start: Classifier,
    train: Subset,
    rate: float,
    options: TuneOptions,
    machine: Machine,
    run: Run,
    stage: str,
    count: Callable[[int], None] = lambda steps: None,
    ranks: Ranks = ALONE,
) -> Classifier:
    """Fine-tune a copy of `start` with a fresh head at one learning rate; machine: settled.

    Saved on a signal, and when the last checkpoint is a minute old. ranks: of several each takes its share of every batch.
    """
    model = _copy(start, Head(options.head, train.classes, "sigmoid" if train.multi_label else "softmax"), options.seed)
    loss_of = _binary_cross_entropy if train.multi_label else nn.functional.cross_entropy
    model.on(machine.target).learn(options.batch_norm, options.dropout)
    optimizer = make_optimizer(model, rate, rate, options.momentum, options.weight_decay)
    loop = Loop(model, optimizer, machine, run.checkpoints / stage, CHECKPOINT_SECONDS, ranks)
    steps, rows = _steps(train, options), min(len(train), options.batch_size)
    if rows < ranks.count:
        raise ranks.error(f"a batch of {rows} images cannot be shared by {ranks.count} ranks: start fewer")
    total = steps * options.epochs
    loss_sum = torch.zeros((), device=machine.target)
    saved = loop.begin(options.seed)
    if saved is not None:
        loss_sum.copy_(saved["loss"] * float(ranks.first))  # a sum over all ranks: the others begin anew
        count(loop.step)
    metrics = Metrics(run.path / f"metrics-{stage}.jsonl", saved["metrics"] if saved else 0) if ranks.first else None
    forward = ranks.parallel(model, buffers=options.batch_norm == "batch")
    share = ranks.share(rows)
    batches = _batches(train, loop.step, model.size, options, machine, share)
    with (
        machine.computing(turns=ranks.count == 1) as cores,
        ranks.lost(f": the same command resumes from the last checkpoint in {run.path}"),
        contextlib.closing(batches),
        stop_signals() as stop,
    ):
        for pixels, labels in batches:
            set_rate(optimizer, loop.step / total, options.milestones)
            with cores.turn():
                with machine.autocast():
                    logits = forward(pixels)
                loss = loss_of(logits, labels) * (len(share) / rows)  # of all ranks the sum is the mean over the batch
                loop.update(loss * ranks.count)  # whose gradients are averaged
            loss_sum += loss.detach()
            count(1)
            if loop.step % steps == 0:
                mean = ranks.total(loss_sum).item() / steps
                epoch = loop.step // steps
                if not math.isfinite(mean):
                    raise Diverged(
                        f"the loss is {mean} in epoch {epoch} at learning rate {rate:g}: use another `out` with a lower one"
                    )
                if metrics:
                    metrics.write({"epoch": epoch - 1, "lr": optimizer.param_groups[0]["lr"], "loss": mean})
                    run.log(f"{stage} epoch {epoch}/{options.epochs} loss {mean:.4f}")
                loss_sum.zero_()
            stopped, due = ranks.most(stop[0] if stop else 0, loop.due())
            if stopped or due:
                loop.save({"loss": ranks.total(loss_sum), "metrics": metrics.position if metrics else 0})
            if stopped and loop.step < total:
                if metrics:
                    metrics.close()
                raise Interrupted(
                    f"stopped by signal {stopped} at step {loop.step} of {total}, saved; run the same command to resume"
                )
    if metrics:
        metrics.close()
    ranks.align(model)  # each has had its own statistics since the last step
    return model.eval()


def accuracy(
    model: Classifier, head: str, test: Subset, machine: Machine, batch_size: int = 128, ranks: Ranks = ALONE
) -> float:
    """Share of images that the head classifies correctly; classes are matched by name.

    Of multi-label images the share of (image, label) pairs whose sign is right. ranks: as in `features`.
    """
    chosen, columns = model.head_index(head)
    place = {name: k for k, name in enumerate(chosen.classes)}
    missing = [name for name in test.classes if name not in place]
    if missing:
        raise FastconError(
            f"head {head!r} does not know the class {missing[0]!r} of the test images ({len(missing)} such); "
            f"it knows {splits.few(chosen.classes)}"
        )
    if test.multi_label != (chosen.kind == "sigmoid"):
        raise FastconError(
            f"head {head!r} is a {chosen.kind} head, and the test images have "
            f"{'several labels each' if test.multi_label else 'one class each'}"
        )
    column_of = np.array([place[name] for name in test.classes])
    model.on(machine.target).eval()
    logits = features.logits(model, test.manifest, test.indices, machine, batch_size, ranks)[:, columns]
    if test.multi_label:
        return float(((logits[:, column_of] > 0) == test.labels).mean())
    return float((logits.argmax(1) == column_of[test.labels]).mean())


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits, labels.float())


def _copy(start: Classifier, head: Head, seed: int) -> Classifier:
    model = copy.deepcopy(start)
    model.replace_heads([head], keep={}, seed=seed)
    return model


def _steps(train: Subset, options: TuneOptions) -> int:
    return max(len(train) // options.batch_size, 1)


def _batches(
    train: Subset, start: int, size: int, options: TuneOptions, machine: Machine, share: range
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Random views, a new one of every image each epoch: (uint8 [B, 3, size, size], int64 labels [B]); from a step on.

    share: which of the images of each batch.
    """
    ids = train.ids
    widths, heights = train.manifest.widths[train.indices], train.manifest.heights[train.indices]
    steps = _steps(train, options)

    def plan() -> Iterator[tuple[Request, NDArray[np.int64]]]:
        for epoch in range(start // steps, options.epochs):
            order = views.permutation(options.seed, ids, epoch, views.SHUFFLE)
            boxes = views.boxes(options.seed, ids, epoch, widths, heights, options.scale)
            flips = views.flips(options.seed, ids, epoch)
            for step in range(max(start - epoch * steps, 0), steps):
                rows = order[step * options.batch_size : (step + 1) * options.batch_size][share.start : share.stop]
                yield Request(train.indices[rows], boxes[rows], flips[rows]), train.labels[rows]

    requests = (request for request, _ in plan())
    decoded = decode(train.manifest, requests, [size], options.batch_size, machine)
    for pixels, (_, labels) in zip(decoded, plan(), strict=True):
        yield pixels[size], torch.from_numpy(labels).to(machine.target, non_blocking=True)
