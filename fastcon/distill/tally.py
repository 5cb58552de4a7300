"""Rows of metrics: sums of each head's loss, KL and agreement (of an embedding loss, error and cosine), kept on the
device until they are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcon.errors import FastconError
from fastcon.kernels.multihead_ce import MultiHeadLoss
from fastcon.models.classifier import Head
from fastcon.ranks import Ranks

LABELS_HEAD = "labels"
METRICS = ("loss", "kl", "agreement")
OF_EMBEDDINGS = ("loss", "r2", "cosine")


class Tally:
    """Sums of each head's three measures, on the device, from one row of metrics to the next."""

    def __init__(self, heads: Sequence[Head], device: torch.device, ranks: Ranks | None = None) -> None:
        """heads: the student's; of one for labels there is only its loss."""
        self._heads, self._ranks = heads, ranks or Ranks(0, 1)
        self._sums = torch.zeros(3, len(heads), dtype=torch.float64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._rows = 0
        self._batches = 0

    def add(self, result: MultiHeadLoss, supervised: Tensor | None) -> None:
        """Add a batch: the heads' losses, and the supervised one where there is a head for labels."""
        parts = torch.stack([result.losses, result.losses - result.entropies, result.agreement]).sum(1).detach()
        self._sums[:, : parts.shape[1]] += parts
        self._loss += result.total.detach()
        if supervised is not None:
            self._sums[0, -1] += supervised.detach() * len(result.losses)
            self._loss += supervised.detach()
        self._rows += len(result.losses) * self._ranks.count
        self._batches += 1

    def take(self, about: dict[str, Any], reset: bool = True) -> Taken:
        """Start copying the sums to the host without waiting; `reset`: begin anew.

        about: what else the row holds, its step and epoch among it; to look for NaN in the sums so far the step suffices.
        """
        sums = torch.cat([self._sums.flatten(), self._loss[None] / self._ranks.count])
        sums = self._ranks.total(sums)
        host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=sums.is_cuda)
        host.copy_(sums, non_blocking=True)
        event = torch.cuda.current_stream(sums.device).record_event() if sums.is_cuda else None
        taken = Taken(about, self._heads, host, event, self._rows, self._batches)
        if reset:
            self._sums.zero_()
            self._loss.zero_()
            self._rows = self._batches = 0
        return taken

    def state(self) -> dict[str, Any]:
        """Its state for a checkpoint, over all ranks."""
        sums, loss = self._ranks.total(self._sums), self._ranks.total(self._loss / self._ranks.count)
        return {"sums": sums, "loss": loss, "rows": self._rows, "batches": self._batches}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        mine = float(self._ranks.first)  # the others begin anew
        self._sums.copy_(state["sums"] * mine)
        self._loss.copy_(state["loss"] * mine * self._ranks.count)
        self._rows, self._batches = state["rows"], state["batches"]


class Taken(NamedTuple):
    """The sums of a row of metrics, on their way from the device or arrived."""

    about: dict[str, Any]
    student_heads: Sequence[Head]
    sums: Tensor
    event: torch.cuda.Event | None
    images: int
    batches: int

    def arrived(self) -> bool:
        """Whether `row` would return without waiting."""
        return self.event is None or self.event.query()

    def row(self) -> dict[str, Any]:
        """The row: means over the images and, for the loss, over the batches. Waits if necessary."""
        *sums, loss = self._values()
        heads = {}
        for k, head in enumerate(self.student_heads):
            means = [value / self.images for value in sums[k :: len(self.student_heads)]]
            heads[head.name] = _measures(head, means)
        about = dict(self.about)
        position = {key: about.pop(key) for key in ("step", "epoch")}
        return {**position, "images": self.images, "loss": loss / self.batches, "heads": heads, **about}

    def refuse_nan(self, out: str) -> None:
        """Raise FastconError, naming the head, where a loss has turned NaN or infinite."""
        *sums, loss = self._values()
        if math.isfinite(loss):
            return
        losses = zip(self.student_heads, sums, strict=False)
        head = next((head.name for head, value in losses if not math.isfinite(value)), "?")
        raise FastconError(
            f"the loss is {loss} at step {self.about['step']} (first at head {head!r}); the last good checkpoint is in "
            f"{out}/checkpoints: use another `out` with lower learning rates or `precision` float32"
        )

    def _values(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        return self.sums.tolist()


def _measures(head: Head, means: list[float]) -> dict[str, float]:
    """Name → mean over the images; of an embedding's standardised features R^2 is 1 less their squared error."""
    if head.name == LABELS_HEAD:
        return {"loss": means[0]}
    if head.kind == "embedding":
        loss, error, cosine = means
        return dict(zip(OF_EMBEDDINGS, (loss, 1 - error, cosine), strict=True))
    return dict(zip(METRICS, means, strict=True))
