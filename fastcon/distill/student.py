"""The student before its first step and after its last: what it starts as, which heads it gets, what is exported."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcon.distill import loss as objective
from fastcon.distill.loader import Loader
from fastcon.distill.options import TrainOptions
from fastcon.distill.tally import LABELS_HEAD, METRICS
from fastcon.errors import FastconError
from fastcon.machine import Machine
from fastcon.models.classifier import Classifier, Head, save_safetensors
from fastcon.models.load import from_bytes, load
from fastcon.store.reader import Stored

Say = Callable[[str], None]
Untrained = tuple[dict[str, Tensor], dict[str, str]]
"""Weights and metadata of an untrained head 0."""
COMPARED = 256
"""Images on which the student is compared with its generalist before the first step."""
ALIKE = 0.9
"""Least share of them on which both predict the same class if they are the same network."""


def starting_network(store: Stored, student: str | None) -> Classifier:
    """The network that the student starts as: the generalist, from its stored weights, or `student`."""
    if student is None and store.generalist is None:
        raise FastconError(
            "the store has no generalist to start from: give a `student` MODEL (the paper found that a student "
            "that does not start from a generalist loses most of what makes it general)"
        )
    if student is not None:
        start = load(student, size=store.recipe.size)
    else:
        start = from_bytes(store.weights(str(store.generalist)), f"the generalist of {store.path}")
    start.set_size(store.recipe.size)
    return start


def starts_as_generalist(start: Classifier, store: Stored) -> bool:
    """Whether a student keeps the head it comes with as head 0."""
    if store.generalist is None:
        return False
    general = store.teachers[store.generalist]
    return (start.architecture, start.heads[0].classes) == (general.architecture, general.classes)


class Agreement(NamedTuple):
    """How closely the student agrees with the generalist before its first step, in training mode: means over some images."""

    head: str
    images: int
    loss: float
    kl: float
    agreement: float

    def row(self) -> dict[str, Any]:
        """The first row of the metrics."""
        values = dict(zip(METRICS, (self.loss, self.kl, self.agreement), strict=True))
        return {"step": 0, "epoch": 0, "images": self.images, "loss": self.loss, "heads": {self.head: values}}

    def warn(self, say: Say, options: TrainOptions) -> None:
        """Warn if a student that starts with the generalist's head is not the same function."""
        if self.agreement >= ALIKE:
            return
        modes = {"`batch_norm` running": options.batch_norm == "batch", "no `dropout`": options.dropout}
        remedies = [remedy for remedy, helps in modes.items() if helps]
        say(
            f"warning: the student does not start as its generalist: they agree on {self.agreement:.0%} of {self.images} "
            f"images (KL {self.kl:.2g}): {''.join(f'try {remedy}; ' for remedy in remedies)}"
            "other weights, size, mean or std are the usual reasons"
        )


def agreement(start: Classifier, loader: Loader, options: TrainOptions, machine: Machine) -> Agreement:
    """Compare `start`, in the mode in which it will be trained, with the stored generalist over the first batches.

    Weights, running statistics and random states stay as they are.
    """
    general, device = str(loader.store.generalist), machine.target
    theirs = loader.whole().with_heads([general], options.temperature)
    start.on(device).learn(options.batch_norm, options.dropout)
    buffers = [(buffer, buffer.clone()) for buffer in start.buffers()]
    sums, images = torch.zeros(3, dtype=torch.float64), 0
    _, columns = start.head_index(start.heads[0].name)
    batches = theirs.batches(range(1))
    with contextlib.closing(batches), torch.random.fork_rng(), torch.no_grad(), machine.computing() as cores:  # type: ignore[type-var]
        for batch in itertools.islice(batches, -(-COMPARED // options.batch_size)):
            with cores.turn(), machine.autocast():
                logits = start(batch.pixels)[:, columns]
                result = objective.loss(logits.contiguous(), batch.stacked, theirs.segments)
            sums += torch.stack([result.losses, result.losses - result.entropies, result.agreement]).sum((1, 2)).cpu()
            images += len(batch.pixels)
    for buffer, value in buffers:
        buffer.copy_(value)
    return Agreement(general, images, *(sums / images).tolist())


def build_student(
    student: Classifier,
    store: Stored,
    names: list[str],
    options: TrainOptions,
    loader: Loader,
    say: Say,
) -> tuple[Classifier, Untrained | None]:
    """`student` with the heads of `names` (and the labels'); and head 0, kept aside where it is not trained."""
    heads = list(loader.heads)
    if options.labels:
        manifest = loader.manifest
        if LABELS_HEAD in store.teachers or manifest is None or not manifest.all_labelled:
            raise FastconError(
                "`labels` needs a class for every proxy image (sub-folders are classes), and no teacher "
                f"named {LABELS_HEAD!r}"
            )
        heads.append(Head(LABELS_HEAD, tuple(manifest.classes)))
    keep: dict[str, int] = {}
    general = store.teachers[store.generalist] if store.generalist else None
    if general and options.student and student.architecture != general.architecture:
        say(f"the student is {student.architecture}, the generalist {general.architecture}: head 0 starts at random")
    elif general and general.classes == student.heads[0].classes:
        keep = {store.generalist: 0}  # type: ignore[dict-item]
    elif general:
        say("the student's classes are not the generalist's: head 0 starts at random")
    aside = None
    if general and store.generalist not in names:
        first = Head(store.generalist, general.classes, general.kind)  # type: ignore[arg-type]
        student.replace_heads([first, *heads], keep=keep, seed=options.seed)
        aside = student.head_weights(first.name), student.metadata(first.name)
        student.replace_heads(heads, keep={head.name: k for k, head in enumerate(heads, 1)}, seed=options.seed)
    else:
        student.replace_heads(heads, keep=keep, seed=options.seed)
    return student, aside


def export(student: Classifier, names: list[str], untrained: Untrained | None) -> bytes:
    """student.safetensors: the backbone with head 0, which traditional distillation leaves as it was."""
    if untrained is None:
        return student.export(names[0])
    tensors, meta = untrained
    state = student.state_for_export(names[0])
    for key, value in tensors.items():
        state[f"{student.head_path}.{key}"] = value
    return save_safetensors(state, meta)
