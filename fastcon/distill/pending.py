"""Logits in transit from the device: no batch is waited for before the next one has been launched."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastcon.store.codec import Parts, codec

T = TypeVar("T")


class Pending:
    """The raw logits of one batch, as the parts to be stored, and which of its rows are not finite."""

    @torch.inference_mode()
    def __init__(self, raw: Tensor, logits: str) -> None:
        """raw: float32 [B, C]; logits: the codec's name."""
        parts = codec(logits).encode(raw)
        numbers = [part for part in parts.values() if part.is_floating_point()]
        self.dtype = str(numbers[0].dtype).removeprefix("torch.")
        """Of the first part that holds floats."""
        parts["finite"] = torch.stack([part.isfinite().all(1) for part in numbers]).all(0)
        self._there: torch.cuda.Event | None = None
        if raw.is_cuda:
            parts = {name: _to_pinned(part) for name, part in parts.items()}
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(raw.device))
        self._finite = parts.pop("finite")
        self._parts = parts

    def parts(self) -> Parts:
        """The parts, once they have arrived."""
        self._wait()
        return {name: part.numpy() for name, part in self._parts.items()}

    def bad_row(self) -> int | None:
        """The first row with NaN, infinite or overflowing logits, once they have arrived."""
        self._wait()
        bad = np.flatnonzero(~self._finite.numpy())
        return int(bad[0]) if len(bad) else None

    def _wait(self) -> None:
        if self._there is not None:
            self._there.synchronize()


def one_late(items: Iterable[T]) -> Iterator[T]:
    """The same items, each yielded once the next has been made, so that a device always has work."""
    for item, _ in itertools.pairwise(itertools.chain(items, [None])):
        yield item  # type: ignore[misc]


def _to_pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, which a GPU writes asynchronously."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
