"""Distillation cross-entropy of all heads at once: loss, statistics and gradient in one call.

In: concatenated student and teacher logits [B, sum C] and a segment table that says where each head
lies, its weight, temperature and kind. Out: the weighted scalar that training minimises, and per-(row,
head) losses, teacher entropies and agreements for the metrics.

On a GPU one Triton launch does it (`multihead_ce_triton`); elsewhere the PyTorch twin in this file.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

SOFTMAX, SIGMOID = 0, 1
KINDS = {"softmax": SOFTMAX, "sigmoid": SIGMOID}
STEPS = 255
"""The largest code of a quantised logit."""


@dataclasses.dataclass(frozen=True)
class Segments:
    """Where each head's logits lie in a row of [sum C] columns, and how its loss is taken.

    All tuples have one entry a head: first column, number of classes, weight (lambda), temperature (T)
    and kind: "softmax", or "sigmoid" for a multi-label teacher.
    """

    offsets: tuple[int, ...]
    widths: tuple[int, ...]
    weights: tuple[float, ...]
    temperatures: tuple[float, ...]
    kinds: tuple[str, ...]

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, field.name)) for field in dataclasses.fields(self)}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"a segment table needs one entry a head in every column, got lengths {lengths}")
        if min(self.widths) < 1 or min(self.temperatures) <= 0 or min(self.weights) < 0:
            raise ValueError("a head needs at least one class, T > 0 and a weight >= 0")
        if not set(self.kinds) <= set(KINDS):
            raise ValueError(f"unknown head kind in {self.kinds}: it is one of {', '.join(KINDS)}")

    @property
    def columns(self) -> int:
        """Columns that a row of logits needs: the end of the last head."""
        return max(offset + width for offset, width in zip(self.offsets, self.widths, strict=True))

    @property
    def alignment(self) -> int:
        """The largest of 1, 2, 4 and 8 that divides every offset and width: how far loads may be taken together."""
        return math.gcd(8, *self.offsets, *self.widths)

    @functools.cache  # noqa: B019 - tables are few, and live as long as the run that trains with them
    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The table as tensors on `device`: int64 [H, 3] offset, width, kind; float32 [H, 2] lambda, T."""
        places = [self.offsets, self.widths, [KINDS[kind] for kind in self.kinds]]
        factors = [self.weights, self.temperatures]
        return (
            torch.tensor(places, dtype=torch.int64).T.contiguous().to(device),
            torch.tensor(factors, dtype=torch.float32).T.contiguous().to(device),
        )


class QuantisedLogits(NamedTuple):
    """Logits at one byte a class: z = offset - scale * code^2, with one offset and scale a row and head."""

    codes: Tensor
    """uint8 [B, >= sum C]."""
    scales: Tensor
    """float32 [B, H, 2]: offset and scale."""

    def head(self, number: int, columns: slice) -> Tensor:
        """The logits of one head, float32 [B, C]."""
        offset, scale = self.scales[:, number, :1], self.scales[:, number, 1:]
        return offset - scale * self.codes[:, columns].float().square()


class MultiHeadLoss(NamedTuple):
    """What `multihead_cross_entropy` returns; only `total` carries a gradient."""

    total: Tensor
    """Scalar: mean over rows, sum over heads with lambda."""
    losses: Tensor
    """[B, H] cross-entropy of each row and head, in nats, without lambda."""
    entropies: Tensor
    """[B, H] entropy of the teacher at T; losses - entropies is KL(teacher || student)."""
    agreement: Tensor
    """[B, H] 1 where teacher and student have the same argmax (sigmoid: share of labels of equal sign)."""


def multihead_cross_entropy(
    student: Tensor, teacher: Tensor | QuantisedLogits, segments: Segments, impl: str | None = None
) -> MultiHeadLoss:
    """Weighted soft-target cross-entropy over all heads (arXiv 2107.08039, Eq. 1 and 2; no T^2 factor).

    student: [B, >= sum C] float16, bfloat16, float32 or float64, the tensor that gets the gradient.
    teacher: raw logits [B, >= sum C] of any of these dtypes, or quantised ones, which no tensor of floats is made of.
    impl: "torch", "triton" or None to choose by device. Nothing waits for a GPU once the
    first call has put the segment table there.
    Raises ValueError for shapes that do not fit the table.
    """
    values, scales = teacher if isinstance(teacher, QuantisedLogits) else (teacher, None)
    if student.ndim != 2 or values.ndim != 2 or len(student) != len(values):
        raise ValueError(f"logits are [B, C] of equal B: student {tuple(student.shape)}, teacher {tuple(values.shape)}")
    if min(student.shape[1], values.shape[1]) < segments.columns:
        raise ValueError(
            f"the segment table ends at column {segments.columns}, the logits have "
            f"{student.shape[1]} (student) and {values.shape[1]} (teacher)"
        )
    if (scales is None) == (values.dtype == torch.uint8):
        raise ValueError("quantised logits are uint8 codes with their scales: give both as QuantisedLogits")
    if scales is not None and scales.shape != (len(values), len(segments.widths), 2):
        raise ValueError(f"scales are [B, heads, 2], got {tuple(scales.shape)}")
    chosen = impl or ("triton" if student.is_cuda else "torch")
    return MultiHeadLoss(*_MultiHeadCrossEntropy.apply(student, values, scales, segments, chosen))


class _MultiHeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, values: Tensor, scales: Tensor | None, segments: Segments, impl: str
    ) -> tuple[Tensor, ...]:
        if impl == "triton":
            from fastcon.kernels.multihead_ce_triton import losses_and_gradient
        elif impl == "torch":
            losses_and_gradient = losses_and_gradient_torch
        else:
            raise ValueError(f"impl is 'torch' or 'triton', not {impl!r}")
        teacher = values if scales is None else QuantisedLogits(values, scales)
        total, losses, entropies, agreement, gradient = losses_and_gradient(
            student, teacher, segments, ctx.needs_input_grad[0]
        )
        ctx.save_for_backward(gradient)
        ctx.rows = len(student)
        ctx.mark_non_differentiable(losses, entropies, agreement)
        return total, losses, entropies, agreement

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple:
        # The stored gradient is lambda/T (p_s - p_t), of order one: dividing by B only here, where a
        # loss scale has come in, keeps it from underflowing in float16.
        (gradient,) = ctx.saved_tensors
        return gradient * (grad_total / ctx.rows), None, None, None, None


def losses_and_gradient_torch(
    student: Tensor, teacher: Tensor | QuantisedLogits, segments: Segments, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """PyTorch twin of the Triton kernel: total; losses, entropies, agreement [B, H]; gradient like `student`.

    The gradient is lambda / T * (softmax(z_s / T) - softmax(z_t / T)), not yet divided by B. Sums run in
    float32 (float64 for float64 logits).
    """
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    covered = sum(segments.widths) == student.shape[1]
    gradient = (torch.empty_like(student) if covered else torch.zeros_like(student)) if needs_gradient else None
    statistics = torch.empty(3, len(student), len(segments.widths), dtype=dtype, device=student.device)
    table = zip(segments.offsets, segments.widths, segments.weights, segments.temperatures, segments.kinds, strict=True)
    for number, (offset, width, weight, temperature, kind) in enumerate(table):
        columns = slice(offset, offset + width)
        head = _softmax_head if kind == "softmax" else _sigmoid_head
        step = max(BLOCK // width, 1)
        scratch = _scratch(4 * min(step, len(student)) * width, dtype, student.device).view(4, -1, width)
        for start in range(0, len(student), step):
            rows = slice(start, start + step)
            z_s, z_t, *rest = scratch[:, : len(student[rows])]
            z_s.copy_(student[rows, columns])
            if isinstance(teacher, QuantisedLogits):
                z_t.copy_(QuantisedLogits(*(part[rows] for part in teacher)).head(number, columns))
            else:
                z_t.copy_(teacher[rows, columns])
            out = None if gradient is None else gradient[rows, columns]
            values = head(z_s.mul_(1 / temperature), z_t.mul_(1 / temperature), *rest, weight / temperature, out)
            for kept, value in zip(statistics, values, strict=True):
                kept[rows, number] = value
    losses, entropies, agreement = statistics
    total = (losses.mean(0) * segments.on(student.device)[1][:, 0].to(dtype)).sum()
    return total, losses, entropies, agreement, gradient


BLOCK = 1 << 18
"""Elements that the twin takes at a time: bounds its memory."""

_kept = threading.local()


def _scratch(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of this thread's, kept from call to call: on a CPU, fresh pages would cost more than the arithmetic."""
    key = (dtype, device)
    held = vars(_kept).setdefault("memory", {})
    if key not in held or len(held[key]) < elements:
        held[key] = torch.empty(elements, dtype=dtype, device=device)
    return held[key][:elements]


def _softmax_head(
    z_s: Tensor, z_t: Tensor, p_t: Tensor, scratch: Tensor, factor: float, gradient: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    z_s.sub_(z_s.amax(1, keepdim=True))
    z_t.sub_(z_t.amax(1, keepdim=True))
    agreement = (_argmax(z_s) == _argmax(z_t)).to(z_s.dtype)
    torch.exp(z_t, out=p_t)
    sum_t = p_t.sum(1, keepdim=True)
    p_t.div_(sum_t)
    entropy = sum_t.log().squeeze(1) - torch.mul(p_t, z_t, out=scratch).sum(1)
    cross = torch.mul(p_t, z_s, out=scratch).sum(1)
    sum_s = z_s.exp_().sum(1, keepdim=True)
    if gradient is not None:
        torch.sub(z_s.mul_(factor / sum_s), p_t, alpha=factor, out=gradient)
    return sum_s.log().squeeze(1) - cross, entropy, agreement


def _argmax(z: Tensor) -> Tensor:
    # NumPy's is ten times as fast as PyTorch's on a CPU; both name the first of equals.
    return torch.from_numpy(z.numpy().argmax(1)) if z.device.type == "cpu" else z.argmax(1)


def _sigmoid_head(
    z_s: Tensor, z_t: Tensor, p_t: Tensor, scratch: Tensor, factor: float, gradient: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    # Each logit is a two-class softmax of (z, 0); the loss is the mean over labels.
    softplus = torch.nn.functional.softplus
    torch.sigmoid(z_t, out=p_t)
    agreement = ((z_s > 0) == (z_t > 0)).to(z_s.dtype).mean(1)
    loss, entropy = ((softplus(z) - torch.mul(p_t, z, out=scratch)).mean(1) for z in (z_s, z_t))
    if gradient is not None:
        torch.sub(z_s.sigmoid_(), p_t, out=scratch)
        gradient.copy_(scratch.mul_(factor / z_s.shape[1]))
    return loss, entropy, agreement
