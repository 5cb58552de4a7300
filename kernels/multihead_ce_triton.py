"""The multi-head cross-entropy as one Triton launch: a program takes one (row, head).

It walks the head's columns twice: once for running maxima and sums (an online softmax of student and
teacher together), once to write the gradient. Everything is float32 inside, per-(row, head) results are
written without atomics, and row offsets are 64-bit, so the result does not depend on scheduling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastcon.kernels.multihead_ce import SIGMOID, Segments
from torch import Tensor

LARGEST_BLOCK = 4096


@triton.jit
def _softplus(z):
    return tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z)))


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _multihead_ce(
    student_ptr,
    teacher_ptr,
    gradient_ptr,
    losses_ptr,
    entropies_ptr,
    agreement_ptr,
    places_ptr,
    factors_ptr,
    student_stride,
    teacher_stride,
    gradient_stride,
    heads,
    SIGMOID_KIND: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    offset = tl.load(places_ptr + head * 3)
    width = tl.load(places_ptr + head * 3 + 1)
    kind = tl.load(places_ptr + head * 3 + 2)
    weight = tl.load(factors_ptr + head * 2)
    temperature = tl.load(factors_ptr + head * 2 + 1)
    student_row = student_ptr + row * student_stride + offset
    teacher_row = teacher_ptr + row * teacher_stride + offset
    gradient_row = gradient_ptr + row * gradient_stride + offset
    lanes = tl.arange(0, BLOCK)
    out = row * heads + head

    if kind == SIGMOID_KIND:
        cross = 0.0
        own = 0.0
        agree = 0.0
        for start in range(0, width, BLOCK):
            inside = start + lanes < width
            z_s = tl.load(student_row + start + lanes, mask=inside, other=0.0).to(tl.float32) / temperature
            z_t = tl.load(teacher_row + start + lanes, mask=inside, other=0.0).to(tl.float32) / temperature
            p_t = _sigmoid(z_t)
            cross += tl.sum(tl.where(inside, _softplus(z_s) - p_t * z_s, 0.0))
            own += tl.sum(tl.where(inside, _softplus(z_t) - p_t * z_t, 0.0))
            agree += tl.sum(tl.where(inside & ((z_s > 0) == (z_t > 0)), 1.0, 0.0))
            if GRADIENT:
                slope = (_sigmoid(z_s) - p_t) * (weight / (temperature * width))
                tl.store(gradient_row + start + lanes, slope, mask=inside)
        tl.store(losses_ptr + out, cross / width)
        tl.store(entropies_ptr + out, own / width)
        tl.store(agreement_ptr + out, agree / width)
    else:
        max_s = float("-inf")
        max_t = float("-inf")
        sum_s = 0.0
        sum_t = 0.0
        dot_s = 0.0  # sum of exp(z_t - max_t) * z_s
        dot_t = 0.0  # sum of exp(z_t - max_t) * z_t
        best_s = width
        best_t = width
        for start in range(0, width, BLOCK):
            column = start + lanes
            inside = column < width
            z_s = tl.load(student_row + column, mask=inside, other=float("-inf")).to(tl.float32) / temperature
            z_t = tl.load(teacher_row + column, mask=inside, other=float("-inf")).to(tl.float32) / temperature
            top_s = tl.max(z_s)
            top_t = tl.max(z_t)
            # The first column of the largest value, as torch.argmax on ties.
            first_s = tl.min(tl.where(z_s == top_s, column, width))
            first_t = tl.min(tl.where(z_t == top_t, column, width))
            best_s = tl.where(top_s > max_s, first_s, best_s)
            best_t = tl.where(top_t > max_t, first_t, best_t)
            new_s = tl.maximum(max_s, top_s)
            new_t = tl.maximum(max_t, top_t)
            sum_s = sum_s * tl.exp(max_s - new_s) + tl.sum(tl.exp(z_s - new_s))
            shrink = tl.exp(max_t - new_t)
            e_t = tl.exp(z_t - new_t)
            sum_t = sum_t * shrink + tl.sum(e_t)
            dot_s = dot_s * shrink + tl.sum(e_t * tl.where(inside, z_s, 0.0))
            dot_t = dot_t * shrink + tl.sum(e_t * tl.where(inside, z_t, 0.0))
            max_s = new_s
            max_t = new_t
        tl.store(losses_ptr + out, max_s + tl.log(sum_s) - dot_s / sum_t)
        tl.store(entropies_ptr + out, max_t + tl.log(sum_t) - dot_t / sum_t)
        tl.store(agreement_ptr + out, tl.where(best_s == best_t, 1.0, 0.0))
        if GRADIENT:
            for start in range(0, width, BLOCK):
                column = start + lanes
                inside = column < width
                z_s = tl.load(student_row + column, mask=inside, other=0.0).to(tl.float32) / temperature
                z_t = tl.load(teacher_row + column, mask=inside, other=0.0).to(tl.float32) / temperature
                slope = tl.exp(z_s - max_s) / sum_s - tl.exp(z_t - max_t) / sum_t
                tl.store(gradient_row + column, slope * (weight / temperature), mask=inside)


def losses_and_gradient(
    student: Tensor, teacher: Tensor, segments: Segments, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `multihead_ce.losses_and_gradient_torch`, in one launch.

    Columns of `student` that no head covers get gradient zero. Raises ValueError for float64, which the
    kernel would silently round.
    """
    if torch.float64 in (student.dtype, teacher.dtype):
        raise ValueError("the Triton kernel computes in float32: give float64 logits to impl='torch'")
    student, teacher = _rows_contiguous(student), _rows_contiguous(teacher)
    places, factors = segments.on(student.device)
    rows, heads = len(student), len(segments.widths)
    statistics = torch.empty(3, rows, heads, dtype=torch.float32, device=student.device)
    covered = sum(segments.widths) == student.shape[1]
    gradient = (torch.empty_like(student) if covered else torch.zeros_like(student)) if needs_gradient else None
    with torch.cuda.device_of(student):  # Triton launches on the current device, which need not be the logits'
        _multihead_ce[(rows, heads)](
            student,
            teacher,
            student if gradient is None else gradient,
            *statistics,
            places,
            factors,
            student.stride(0),
            teacher.stride(0),
            student.stride(0) if gradient is None else gradient.stride(0),
            heads,
            SIGMOID_KIND=SIGMOID,
            GRADIENT=needs_gradient,
            BLOCK=min(triton.next_power_of_2(max(segments.widths)), LARGEST_BLOCK),
        )
    losses, entropies, agreement = statistics
    return losses, entropies, agreement, gradient


def _rows_contiguous(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()
