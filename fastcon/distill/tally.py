"""Rows of metrics: sums of each head's loss, KL and agreement, kept on the device until they are written."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcon.errors import FastconError
from fastcon.kernels.multihead_ce import MultiHeadLoss
from fastcon.ranks import Ranks

LABELS_HEAD = "labels"
METRICS = ("loss", "kl", "agreement")


class Tally:
    """Sums of each head's loss, KL and agreement, on the device, from one row of metrics to the next."""

    def __init__(self, names: list[str], device: torch.device, ranks: Ranks | None = None) -> None:
        self._names, self._ranks = names, ranks or Ranks(0, 1)
        self._sums = torch.zeros(3, len(names), dtype=torch.float64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._rows = 0
        self._batches = 0

    def add(self, result: MultiHeadLoss, weights: list[float], supervised: Tensor | None) -> None:
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
        taken = Taken(about, self._names, host, event, self._rows, self._batches)
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
    names: list[str]
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
        for k, name in enumerate(self.names):
            means = [value / self.images for value in sums[k :: len(self.names)]]
            heads[name] = {"loss": means[0]} if name == LABELS_HEAD else dict(zip(METRICS, means, strict=True))
        about = dict(self.about)
        position = {key: about.pop(key) for key in ("step", "epoch")}
        return {**position, "images": self.images, "loss": loss / self.batches, "heads": heads, **about}

    def refuse_nan(self, out: str) -> None:
        """Raise FastconError, naming the head, where a loss has turned NaN or infinite."""
        *sums, loss = self._values()
        if math.isfinite(loss):
            return
        head = next((name for name, value in zip(self.names, sums, strict=False) if not math.isfinite(value)), "?")
        raise FastconError(
            f"the loss is {loss} at step {self.about['step']} (first at head {head!r}); the last good checkpoint is in "
            f"{out}/checkpoints: use another `out` with lower learning rates or `precision` float32"
        )

    def _values(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        return self.sums.tolist()
