"""What would make a run's steps faster here, measured on one of its own batches when it is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastcon.machine import WORTH

if TYPE_CHECKING:  # reporting what was measured needs no PyTorch, which takes seconds to import
    from torch import Tensor

    from fastcon.cores import Cores
    from fastcon.models.classifier import Classifier


def measure(student: Classifier, pixels: Tensor, precision: str, cores: Cores) -> dict[str, float]:
    """Images per second, forward and backward, with the option of that name instead of the run's own ("" is as it ran).

    pixels: a batch, uint8 [B, 3, size, size]. Changes gradients and, where they are trained, running statistics.
    """
    import torch

    from fastcon.training import step_seconds

    others = ["float32", "bfloat16", *(["float16"] if pixels.is_cuda else [])]
    cases = {"": (pixels, precision)}
    cases |= {f"`precision` {other}": (pixels, other) for other in others if other != precision}
    cases[f"`batch_size` {2 * len(pixels)}"] = (torch.cat([pixels, pixels]), precision)
    return {name: 1 / seconds for name, seconds in step_seconds(student, cases, cores).items()}


def say(rates: dict[str, float]) -> str:
    """The measurements on one line."""
    base = rates[""]
    name, rate = max(rates.items(), key=lambda item: item[1])
    if rate < WORTH * base:
        tried = ", ".join(name for name in rates if name)
        return f"nothing that was tried ({tried}) is faster than {base:.0f} images/s"
    return f"{name}: {rate:.0f} images/s instead of {base:.0f}, as measured here"
