"""Distillation loss of all heads at once: loss, statistics and gradient in one call.

In: concatenated student and teacher outputs [B, sum C] and a segment table that says where each head
lies, its weight, temperature and kind: cross-entropy with the teacher's softmax or sigmoids, or, of an
embedding, cosine and smooth L1 distance. Out: the weighted scalar that training minimises, and per-(row,
head) losses, teacher entropies and agreements for the metrics.

On a GPU one Triton launch does it (`multihead_ce_triton`); elsewhere the PyTorch twin in this file.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

SOFTMAX, SIGMOID, EMBEDDING = 0, 1, 2
KINDS = {"softmax": SOFTMAX, "sigmoid": SIGMOID, "embedding": EMBEDDING}
SHORT = 1e-12
"""Least squared length of an embedding in its cosine."""


@dataclasses.dataclass(frozen=True, eq=False)
class Standard:
    """What an embedding's features are standardised with, dimension by dimension: (z - mean) * scale."""

    mean: Tensor
    """float32 [C]."""
    scale: Tensor
    """float32 [C]: 1 / standard deviation."""


@dataclasses.dataclass(frozen=True)
class Segments:
    """Where each head's outputs lie in a row of [sum C] columns, and how its loss is taken.

    All tuples have one entry per head: first column, number of classes, weight (lambda), temperature (T)
    and kind: "softmax", "sigmoid" for a multi-label teacher, or "embedding", which has features for classes
    and no temperature. standards: of each embedding, with which the teacher's features are standardised, or
    None to take them as they are; an empty tuple does so for all.
    """

    offsets: tuple[int, ...]
    widths: tuple[int, ...]
    weights: tuple[float, ...]
    temperatures: tuple[float, ...]
    kinds: tuple[str, ...]
    standards: tuple[Standard | None, ...] = ()

    def __post_init__(self) -> None:
        columns = [getattr(self, field.name) for field in dataclasses.fields(self)]
        lengths = {len(column) for column in columns if column or column is not self.standards}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"a segment table needs one entry per head in every column, got lengths {lengths}")
        if min(self.widths) < 1 or min(self.temperatures) <= 0 or min(self.weights) < 0:
            raise ValueError("a head needs at least one class, T > 0 and a weight >= 0")
        if not set(self.kinds) <= set(KINDS):
            raise ValueError(f"unknown head kind in {self.kinds}: it is one of {', '.join(KINDS)}")
        for kind, width, standard in zip(self.kinds, self.widths, self.standards, strict=False):
            if standard and (kind != "embedding" or {standard.mean.shape, standard.scale.shape} != {(width,)}):
                raise ValueError(f"a standard is of an embedding, with one mean and scale for each of {width} features")

    @functools.cached_property
    def columns(self) -> int:
        """Columns that a row of logits needs: the end of the last head."""
        return max(offset + width for offset, width in zip(self.offsets, self.widths, strict=True))

    @property
    def alignment(self) -> int:
        """The largest of 1, 2, 4 and 8 that divides every offset and width: how far loads may be taken together."""
        return math.gcd(8, *self.offsets, *self.widths)

    @functools.cached_property
    def alike(self) -> list[slice]:
        """Runs of heads of one width, kind and T that lie side by side: [B, k * C] of logits are then [B, k, C]."""
        runs = [0]
        for head in range(1, len(self.widths)):
            before = (self.offsets[head - 1] + self.widths[head - 1], self.widths[head - 1])
            before += (self.kinds[head - 1], self.temperatures[head - 1])
            if before != (self.offsets[head], self.widths[head], self.kinds[head], self.temperatures[head]):
                runs.append(head)
        return [slice(a, b) for a, b in itertools.pairwise([*runs, len(self.widths)])]

    @functools.cache  # noqa: B019 - tables are few, and live as long as the run that trains with them
    def on(self, device: torch.device) -> Table:
        """The table as tensors on `device`."""
        places = [self.offsets, self.widths, [KINDS[kind] for kind in self.kinds]]
        table = zip(self.widths, self.weights, self.temperatures, self.kinds, strict=True)
        slopes = [
            [weight if kind == "embedding" else weight / t / (width if kind == "sigmoid" else 1)]
            for width, weight, t, kind in table
        ]
        standards = torch.tensor([[0.0], [1.0]]).repeat(1, self.columns if "embedding" in self.kinds else 1)
        for offset, width, standard in zip(self.offsets, self.widths, self.standards, strict=False):
            if standard:
                standards[:, offset : offset + width] = torch.stack([standard.mean, standard.scale])
        return Table(
            torch.tensor(places, dtype=torch.int32).T.contiguous().to(device),
            torch.tensor([self.weights, self.temperatures], dtype=torch.float32).T.contiguous().to(device),
            torch.tensor(slopes, dtype=torch.float32, device=device),
            standards.to(device),
        )


class Table(NamedTuple):
    """A segment table on a device."""

    places: Tensor
    """int32 [H, 3]: offset, width, kind."""
    factors: Tensor
    """float32 [H, 2]: lambda, T."""
    slopes: Tensor
    """float32 [H, 1]: what a difference of probabilities is multiplied with in the gradient: lambda / T, over the width
    for a sigmoid head; of an embedding lambda."""
    standards: Tensor
    """float32 [2, sum C]: mean and scale of each column; of one column where no head is an embedding."""


class QuantisedLogits(NamedTuple):
    """Logits at one byte per class: z = offset - scale * code^2, with one offset and scale per row and head."""

    codes: Tensor
    """uint8 [B, >= sum C]."""
    scales: Tensor
    """float32 [B, H, 2]: offset and scale."""

    def head(self, number: int, columns: slice) -> Tensor:
        """The logits of one head, float32 [B, C]."""
        offset, scale = self.scales[:, number, :1], self.scales[:, number, 1:]
        return offset - scale * self.codes[:, columns].float().square()


class MultiHeadLoss(NamedTuple):
    """The result of `multihead_cross_entropy`; only `total` carries a gradient."""

    total: Tensor
    """Scalar: mean over rows, sum over heads with lambda."""
    losses: Tensor
    """[B, H] cross-entropy of each row and head, in nats, without lambda. Of an embedding: 1 - cosine, plus the smooth L1
    distance, the mean over its features."""
    entropies: Tensor
    """[B, H] entropy of the teacher at T; losses - entropies is KL(teacher || student), and of an embedding the mean
    squared error over its standardised features."""
    agreement: Tensor
    """[B, H] 1 where a class has the largest logit of both, the teacher's and the student's (sigmoid: the share of labels
    of equal sign; embedding: the cosine)."""


def multihead_cross_entropy(
    student: Tensor, teacher: Tensor | QuantisedLogits, segments: Segments, impl: str | None = None
) -> MultiHeadLoss:
    """Weighted soft-target cross-entropy over all heads (arXiv 2107.08039, Eq. 1 and 2; no T^2 factor).

    Of an embedding, cosine plus smooth L1 distance to the teacher's standardised features, as in UNIC (arXiv 2408.05088).

    student: [B, >= sum C] float16, bfloat16, float32 or float64, the tensor that gets the gradient.
    teacher: raw logits [B, >= sum C] of any of these dtypes, or quantised ones, which are never expanded to floats.
    impl: "torch", "triton" or None to choose by device. "triton" never waits for a GPU once the first call has put the
    segment table there; "torch" keeps memory from call to call, which is not for CUDA graphs.
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
        ctx.set_materialize_grads(False)
        return total, losses, entropies, agreement

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, *_: None) -> tuple:
        if grad_total is None:
            return None, None, None, None, None
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
    parts, weights = _plan(segments, len(student), dtype, student.device)
    covered = sum(segments.widths) == student.shape[1]
    gradient = (torch.empty_like(student) if covered else torch.zeros_like(student)) if needs_gradient else None
    statistics = torch.empty(3, len(student), len(segments.widths), dtype=dtype, device=student.device)
    for part in parts:
        part.take(student, teacher, statistics, gradient)
    losses, entropies, agreement = statistics.unbind()
    return torch.dot(losses.flatten(), weights), losses, entropies, agreement, gradient


BLOCK = 1 << 20
"""Elements that the twin handles at a time: bounds its memory."""

_kept = threading.local()


def _plan(segments: Segments, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[list[_Part], Tensor]:
    """The parts that the twin takes one after another, and the weight of each (row, head) in the total [B * H].

    Kept from call to call, as is the memory they share: on small batches, making them would cost as much as the work.
    """
    plans = vars(_kept).setdefault("plans", {})
    key = (segments, rows, dtype, device)
    if key in plans:
        return plans[key]
    with torch.inference_mode(False):  # else it could not be used outside later
        blocks = []
        for heads in segments.alike:
            width = segments.widths[heads.start] * (heads.stop - heads.start)
            step = max(BLOCK // width, 1)
            blocks += [(heads, slice(start, min(start + step, rows)), width) for start in range(0, rows, step)]
        needed = max((4 * (block.stop - block.start) * width for _, block, width in blocks), default=0)
        memory = vars(_kept).get((dtype, device))
        if memory is None or len(memory) < needed or len(plans) >= 16:
            plans.clear()  # so that buffers that have become too small are freed
            memory = vars(_kept)[dtype, device] = torch.empty(needed, dtype=dtype, device=device)
        weights = (segments.on(device).factors[:, 0].to(dtype) / max(rows, 1)).repeat(rows)
        plans[key] = [_Part(segments, heads, block, memory) for heads, block, _ in blocks], weights
        return plans[key]


class _Part:
    """Some rows of heads that are alike, and views of the memory [rows, 2, k, C] they are worked on in.

    Rows come first, so that threads, which share out an operation by its first dimension, keep to their rows.
    """

    def __init__(self, segments: Segments, heads: slice, rows: slice, memory: Tensor) -> None:
        first, count, n = heads.start, heads.stop - heads.start, rows.stop - rows.start
        width, self._offset = segments.widths[first], segments.offsets[first]
        self._rows, self._heads, self._width = rows, heads, width
        self._columns = slice(self._offset, self._offset + count * width)
        self._shape = n, count, width
        kind, table = segments.kinds[first], segments.on(memory.device)
        self._take = {"softmax": _softmax_heads, "sigmoid": _sigmoid_heads, "embedding": _embeddings}[kind]
        # A tensor of one number and not the number: so that logits of fewer bits become `dtype` before they are scaled.
        self._unit = memory.new_tensor([1.0 if kind == "embedding" else 1 / segments.temperatures[first]])
        self._slopes = table.slopes[heads].to(memory.dtype)
        self._standards = None
        if kind == "embedding":
            self._standards = table.standards[:, self._columns].to(memory.dtype).view(2, count, width).unbind()
        self._work = memory[: 4 * n * count * width].view(2, n, 2, count, width).unbind()
        (self._z_s, self._z_t), (self._p_s, self._p_t) = (part.unbind(1) for part in self._work)

    def take(
        self, student: Tensor, teacher: Tensor | QuantisedLogits, statistics: Tensor, gradient: Tensor | None
    ) -> None:
        """Fill in the part's statistics of [3, B, H] and its gradient."""
        torch.mul(student[self._rows, self._columns].view(self._shape), self._unit, out=self._z_s)
        if isinstance(teacher, QuantisedLogits):
            some = QuantisedLogits(*(x[self._rows] for x in teacher))
            for k, head in enumerate(range(self._heads.start, self._heads.stop)):
                start = self._offset + k * self._width
                torch.mul(some.head(head, slice(start, start + self._width)), self._unit, out=self._z_t[:, k])
        else:
            torch.mul(teacher[self._rows, self._columns].view(self._shape), self._unit, out=self._z_t)
        if self._standards is not None:
            self._z_t.sub_(self._standards[0]).mul_(self._standards[1])
        self._take(*self._work, statistics[:, self._rows, self._heads])
        if gradient is not None:
            out = gradient[self._rows, self._columns].view(self._shape)
            torch.mul(self._p_s.sub_(self._p_t), self._slopes, out=out)


def _softmax_heads(z: Tensor, p: Tensor, out: Tensor) -> None:
    """z: student and teacher logits over T [B, 2, k, C], overwritten; p: gets their probabilities; out: [3, B, k].

    log sum exp(z - max z) is -log of the largest probability: no pass over the logits of its own.
    """
    z.sub_(z.amax(3, keepdim=True))
    torch.eq(torch.add(z[:, 0], z[:, 1], out=p[:, 0]).amax(2), 0, out=out[2])
    torch.softmax(z, 3, out=p)
    torch.neg(p.amax(3).log_().add_(z.mul_(p[:, 1:]).sum(3)), out=out[:2].transpose(0, 1))


def _sigmoid_heads(z: Tensor, p: Tensor, out: Tensor) -> None:
    """As `_softmax_heads`; each logit is a two-class softmax of (z, 0), and the loss is the mean over labels."""
    positive = z > 0
    torch.mean((positive[:, 0] == positive[:, 1]).to(z.dtype), 2, out=out[2])
    torch.sigmoid(z, out=p)
    softplus = torch.nn.functional.softplus(z)
    torch.mean(softplus.sub_(z.mul_(p[:, 1:])), 3, out=out[:2].transpose(0, 1))


def _embeddings(z: Tensor, p: Tensor, out: Tensor) -> None:
    """As `_softmax_heads`, of student and standardised teacher features; the difference of both `p` is the gradient."""
    y, t, d_s, d_t = z[:, 0], z[:, 1], p[:, 0], p[:, 1]
    shortened = [torch.mul(a, a, out=d_t).sum(2).clamp_(min=SHORT).rsqrt_().unsqueeze(2) for a in (y, t)]
    cosine = torch.mul(y, t, out=d_t).sum(2, keepdim=True).mul_(shortened[0]).mul_(shortened[1])
    torch.sub(y, t, out=d_t)
    squares = torch.mul(d_t, d_t, out=d_s).mean(2)
    slope = d_t.clamp_(-1, 1)  # of the smooth L1 distance, whose value is slope * (difference - slope / 2)
    torch.sub(y, t, out=d_s).sub_(slope, alpha=0.5).mul_(slope)
    torch.add(d_s.mean(2), 1 - cosine[:, :, 0], out=out[0])
    torch.sub(out[0], squares, out=out[1])
    out[2].copy_(cosine[:, :, 0])
    torch.mul(slope, 1 / slope.shape[2], out=d_s)
    d_s.add_(torch.mul(y, cosine * shortened[0].square(), out=d_t))
    torch.mul(t, shortened[0] * shortened[1], out=d_t)
