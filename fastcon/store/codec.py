"""How a row of logits is stored: float16 or float32 as it is, one byte per class, or the largest k.

A codec turns logits [B, C] into its parts, the arrays that a store keeps side by side, and back. Raw logits in every
case, never probabilities: another temperature stays possible (for `topK` only roughly, see there).
"""

from __future__ import annotations

import abc
import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastcon.errors import FastconError, UsageError
from fastcon.kernels import STEPS

if TYPE_CHECKING:  # inspecting a store should not import PyTorch, which takes seconds
    from torch import Tensor

Parts = dict[str, NDArray[Any]]
"""Name of an array of the store → its rows [B, width]."""


def codec(name: str) -> Codec:
    """The codec of a name: float16, float32, uint8 or topK, as top32. Raises UsageError for any other."""
    if name in ("float16", "float32"):
        return Float(name)
    if name == "uint8":
        return Quantised(name)
    if re.fullmatch(r"top[1-9]\d{0,4}", name):
        return TopK(name)
    raise UsageError(f"`logits` {name!r} is none of float16, float32, uint8 and topK with a number, as top32")


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
    """A way to store logits; `name` is what the store's record calls it."""

    name: str

    largest_kl = 0.0
    """Mean KL at T = 2, in nats, that storing may add when the same logits are computed again with other rounding."""

    @abc.abstractmethod
    def parts(self, classes: int) -> dict[str, tuple[str, int]]:
        """Array name → (dtype, width) of what is stored of a row."""

    @abc.abstractmethod
    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """float32 logits [B, C], on any device → the parts of every row."""

    @abc.abstractmethod
    def decode(self, parts: Parts, classes: int) -> NDArray[Any]:
        """Parts → logits [B, C]."""

    def row_bytes(self, classes: int) -> int:
        """Bytes of one row."""
        return sum(np.dtype(dtype).itemsize * width for dtype, width in self.parts(classes).values())


class Float(Codec):
    """As computed, rounded once."""

    def parts(self, classes: int) -> dict[str, tuple[str, int]]:
        """One array."""
        return {"logits": (self.name, classes)}

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """Round to the stored type."""
        import torch

        return {"logits": logits.to(getattr(torch, self.name))}

    def decode(self, parts: Parts, classes: int) -> NDArray[Any]:
        """As stored."""
        return parts["logits"]


class Quantised(Codec):
    """One byte per class and eight bytes per row: z = offset - scale * code^2, rounded to the nearest step.

    The offset is the row's largest logit (code 0), the smallest gets code 255. Steps are finest near the largest
    logits, where the probability is, so the argmax survives and the KL is of the order of 1e-5 nats.
    """

    largest_kl = 1e-4

    def parts(self, classes: int) -> dict[str, tuple[str, int]]:
        """The codes, and (offset, scale)."""
        return {"logits": ("uint8", classes), "scales": ("float32", 2)}

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """The nearest steps."""
        import torch

        offset = logits.amax(1, keepdim=True)
        scale = (offset - logits.amin(1, keepdim=True)) / STEPS**2
        steps = (offset - logits) / torch.where(scale > 0, scale, 1.0)
        # d^2 and (d + 1)^2 are equally far from d^2 + d + 1/2.
        codes = (steps - 0.25).clamp(min=0).sqrt_().add_(0.5).floor_().clamp_(max=STEPS)
        return {"logits": codes.nan_to_num_(0).to(torch.uint8), "scales": torch.cat([offset, scale], 1)}

    def decode(self, parts: Parts, classes: int) -> NDArray[Any]:
        """float32 logits."""
        offset, scale = parts["scales"][:, :1], parts["scales"][:, 1:]
        return offset - scale * np.square(parts["logits"], dtype=np.float32)


class TopK(Codec):
    """The k largest logits, their classes, and one logit for all others.

    The others' is chosen so that at T = 2, the paper's, the k probabilities are exactly the teacher's; at another
    temperature they are not. Of the other classes only their sum is kept.
    """

    temperature = 2.0

    @property
    def k(self) -> int:
        """How many are kept."""
        return int(self.name.removeprefix("top"))

    def parts(self, classes: int) -> dict[str, tuple[str, int]]:
        """The k logits and the others', the classes of the k."""
        k = min(self.k, classes)
        return {"logits": ("float16", k + 1), "classes": ("uint16" if classes <= 1 << 16 else "uint32", k)}

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """The largest k, in descending order."""
        import torch

        classes = logits.shape[1]
        k = min(self.k, classes)
        top, where = logits.topk(k, dim=1)
        rest = (logits / self.temperature).scatter(1, where, -math.inf)
        tail = self.temperature * (rest.logsumexp(1, keepdim=True) - math.log(max(classes - k, 1)))
        tail = tail if k < classes else top[:, -1:]
        kind = torch.uint16 if classes <= 1 << 16 else torch.uint32
        return {"logits": torch.cat([top, tail], 1).half(), "classes": where.to(kind)}

    def decode(self, parts: Parts, classes: int) -> NDArray[Any]:
        """Dense float16 logits, the others' equal."""
        logits = np.repeat(parts["logits"][:, -1:], classes, axis=1)
        np.put_along_axis(logits, parts["classes"].astype(np.int64), parts["logits"][:, :-1], axis=1)
        return logits


def check_kind(name: str, kind: str, teacher: str) -> None:
    """Raise FastconError where a codec cannot hold a teacher's kind of head."""
    other = {"sigmoid": "multi-label", "embedding": "an embedding"}.get(kind)
    if isinstance(codec(name), TopK) and other:
        raise FastconError(
            f"`logits` {name} keeps the largest classes of a softmax, and teacher {teacher!r} is {other}: "
            "store it with `logits` float16 or uint8"
        )
