"""Distillation cross-entropy of all heads at once: loss, statistics and gradient in one call.

In: concatenated student and teacher logits [B, sum C] and a segment table that says where each head
lies, its weight, temperature and kind. Out: the weighted scalar that training minimises, and per-(row,
head) losses, teacher entropies and agreements for the metrics.

On a GPU one Triton launch does it (`multihead_ce_triton`); elsewhere the PyTorch twin in this file.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

SOFTMAX, SIGMOID = 0, 1
KINDS = {"softmax": SOFTMAX, "sigmoid": SIGMOID}


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

    @functools.cache  # noqa: B019 - tables are few, and live as long as the run that trains with them
    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The table as tensors on `device`: int64 [H, 3] offset, width, kind; float32 [H, 2] lambda, T."""
        places = [self.offsets, self.widths, [KINDS[kind] for kind in self.kinds]]
        factors = [self.weights, self.temperatures]
        return (
            torch.tensor(places, dtype=torch.int64).T.contiguous().to(device),
            torch.tensor(factors, dtype=torch.float32).T.contiguous().to(device),
        )


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
    student: Tensor, teacher: Tensor, segments: Segments, impl: str | None = None
) -> MultiHeadLoss:
    """Weighted soft-target cross-entropy over all heads (arXiv 2107.08039, Eq. 1 and 2; no T^2 factor).

    student: [B, >= sum C] float16, bfloat16, float32 or float64, the tensor that gets the gradient.
    teacher: [B, >= sum C], any of these dtypes, raw logits. impl: "torch", "triton" or None to choose by device.
    Raises ValueError for shapes that do not fit the table.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            f"logits are [B, C] of equal B: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
        )
    if min(student.shape[1], teacher.shape[1]) < segments.columns:
        raise ValueError(
            f"the segment table ends at column {segments.columns}, the logits have "
            f"{student.shape[1]} (student) and {teacher.shape[1]} (teacher)"
        )
    chosen = impl or ("triton" if student.is_cuda else "torch")
    return MultiHeadLoss(*_MultiHeadCrossEntropy.apply(student, teacher, segments, chosen))


class _MultiHeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, segments: Segments, impl: str) -> tuple:
        if impl == "triton":
            from fastcon.kernels.multihead_ce_triton import losses_and_gradient
        elif impl == "torch":
            losses_and_gradient = losses_and_gradient_torch
        else:
            raise ValueError(f"impl is 'torch' or 'triton', not {impl!r}")
        losses, entropies, agreement, gradient = losses_and_gradient(
            student, teacher, segments, ctx.needs_input_grad[0]
        )
        weights = segments.on(student.device)[1][:, 0].to(losses.dtype)
        ctx.save_for_backward(gradient)
        ctx.rows = len(student)
        ctx.mark_non_differentiable(losses, entropies, agreement)
        return (losses.mean(0) * weights).sum(), losses, entropies, agreement

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple:
        # The stored gradient is lambda/T (p_s - p_t), of order one: dividing by B only here, where a
        # loss scale has come in, keeps it from underflowing in float16.
        (gradient,) = ctx.saved_tensors
        return gradient * (grad_total / ctx.rows), None, None, None


def losses_and_gradient_torch(
    student: Tensor, teacher: Tensor, segments: Segments, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """PyTorch twin of the Triton kernel: losses, entropies, agreement [B, H]; gradient like `student`.

    The gradient is lambda / T * (softmax(z_s / T) - softmax(z_t / T)), not yet divided by B. Sums run in
    float32 (float64 for float64 logits).
    """
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    gradient = torch.zeros_like(student) if needs_gradient else None
    columns = []
    for offset, width, weight, temperature, kind in zip(
        segments.offsets, segments.widths, segments.weights, segments.temperatures, segments.kinds, strict=True
    ):
        here = slice(offset, offset + width)
        z_s = student[:, here].to(dtype) / temperature
        z_t = teacher[:, here].to(dtype) / temperature
        head = _softmax_head if kind == "softmax" else _sigmoid_head
        *statistics, slope = head(z_s, z_t)
        columns.append(statistics)
        if gradient is not None:
            gradient[:, here] = (slope * (weight / temperature)).to(gradient.dtype)
    losses, entropies, agreement = (torch.stack(parts, dim=1) for parts in zip(*columns, strict=True))
    return losses, entropies, agreement, gradient


def _softmax_head(z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_p_s, log_p_t = z_s.log_softmax(1), z_t.log_softmax(1)
    p_t = log_p_t.exp()
    agreement = (z_s.argmax(1) == z_t.argmax(1)).to(z_s.dtype)
    return -(p_t * log_p_s).sum(1), -(p_t * log_p_t).sum(1), agreement, log_p_s.exp() - p_t


def _sigmoid_head(z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Each logit is a two-class softmax of (z, 0); the loss is the mean over labels.
    softplus = torch.nn.functional.softplus
    p_t = z_t.sigmoid()
    agreement = ((z_s > 0) == (z_t > 0)).to(z_s.dtype).mean(1)
    loss, entropy = ((softplus(z) - p_t * z).mean(1) for z in (z_s, z_t))
    return loss, entropy, agreement, (z_s.sigmoid() - p_t) / z_s.shape[1]
