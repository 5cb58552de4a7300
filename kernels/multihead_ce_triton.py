"""The multi-head cross-entropy as one Triton launch: a program takes one (row, head).

Where the widest head fits a block, a program loads student and teacher once and keeps them in registers from the
maxima to the gradient. Wider heads are walked twice: for running maxima and sums (an online softmax of both together),
then for the gradient. Quantised teacher logits become floats in registers. Everything is float32 inside, results of
each (row, head) are written without atomics and row offsets are 64-bit, so nothing depends on scheduling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastcon.kernels.multihead_ce import SIGMOID, QuantisedLogits, Segments
from torch import Tensor

LARGEST_BLOCK = 16384
"""Columns that a program holds at once."""
LOOP_BLOCK = 4096
"""Columns that it takes at a time where they are more."""


@triton.jit
def _softplus(z):
    return tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z)))


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _student(row, column, inside, outside, temperature):
    return tl.load(row + column, mask=inside, other=outside).to(tl.float32) / temperature


@triton.jit
def _teacher(row, column, inside, outside, temperature, top, scale, QUANTISED: tl.constexpr):
    if QUANTISED:
        code = tl.load(row + column, mask=inside, other=0).to(tl.float32)
        return tl.where(inside, (top - scale * code * code) / temperature, outside)
    else:
        return tl.load(row + column, mask=inside, other=outside).to(tl.float32) / temperature


@triton.jit
def _multihead_ce(
    student_ptr,
    teacher_ptr,
    scales_ptr,
    gradient_ptr,
    totals_ptr,
    losses_ptr,
    entropies_ptr,
    agreement_ptr,
    places_ptr,
    factors_ptr,
    student_stride,
    teacher_stride,
    gradient_stride,
    rows,
    heads,
    SIGMOID_KIND: tl.constexpr,
    ANY_SIGMOID: tl.constexpr,
    QUANTISED: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ONE_PASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    # What divides every offset and width: without it the compiler loads one element at a time.
    offset = tl.multiple_of(tl.load(places_ptr + head * 3), ALIGNMENT)
    width = tl.multiple_of(tl.load(places_ptr + head * 3 + 1), ALIGNMENT)
    kind = tl.load(places_ptr + head * 3 + 2)
    weight = tl.load(factors_ptr + head * 2)
    temperature = tl.load(factors_ptr + head * 2 + 1)
    student_row = student_ptr + row * student_stride + offset
    teacher_row = teacher_ptr + row * teacher_stride + offset
    gradient_row = gradient_ptr + row * gradient_stride + offset
    lanes = tl.arange(0, BLOCK)
    out = row * heads + head
    top = 0.0
    scale = 0.0
    if QUANTISED:
        top = tl.load(scales_ptr + out * 2)
        scale = tl.load(scales_ptr + out * 2 + 1)
    loss = 0.0
    entropy = 0.0
    agree = 0.0

    if ANY_SIGMOID and kind == SIGMOID_KIND:
        for start in range(0, width, BLOCK):
            column = start + lanes
            inside = column < width
            z_s = _student(student_row, column, inside, 0.0, temperature)
            z_t = _teacher(teacher_row, column, inside, 0.0, temperature, top, scale, QUANTISED)
            p_t = _sigmoid(z_t)
            loss += tl.sum(tl.where(inside, _softplus(z_s) - p_t * z_s, 0.0))
            entropy += tl.sum(tl.where(inside, _softplus(z_t) - p_t * z_t, 0.0))
            agree += tl.sum(tl.where(inside & ((z_s > 0) == (z_t > 0)), 1.0, 0.0))
            if GRADIENT:
                slope = (_sigmoid(z_s) - p_t) * (weight / (temperature * width))
                tl.store(gradient_row + column, slope, mask=inside)
        loss /= width
        entropy /= width
        agree /= width
    elif ONE_PASS:
        inside = lanes < width
        z_s = _student(student_row, lanes, inside, float("-inf"), temperature)
        z_t = _teacher(teacher_row, lanes, inside, float("-inf"), temperature, top, scale, QUANTISED)
        max_s = tl.max(z_s)
        max_t = tl.max(z_t)
        agree = tl.max(tl.where((z_s == max_s) & (z_t == max_t), 1.0, 0.0))
        e_s = tl.exp(z_s - max_s)
        e_t = tl.exp(z_t - max_t)
        sum_s = tl.sum(e_s)
        sum_t = tl.sum(e_t)
        loss = max_s + tl.log(sum_s) - tl.sum(e_t * tl.where(inside, z_s, 0.0)) / sum_t
        entropy = max_t + tl.log(sum_t) - tl.sum(e_t * tl.where(inside, z_t, 0.0)) / sum_t
        if GRADIENT:
            slope = (e_s / sum_s - e_t / sum_t) * (weight / temperature)
            tl.store(gradient_row + lanes, slope, mask=inside)
    else:
        max_s = float("-inf")
        max_t = float("-inf")
        sum_s = 0.0
        sum_t = 0.0
        dot_s = 0.0  # sum of exp(z_t - max_t) * z_s
        dot_t = 0.0  # sum of exp(z_t - max_t) * z_t
        for start in range(0, width, BLOCK):
            column = start + lanes
            inside = column < width
            z_s = _student(student_row, column, inside, float("-inf"), temperature)
            z_t = _teacher(teacher_row, column, inside, float("-inf"), temperature, top, scale, QUANTISED)
            new_s = tl.maximum(max_s, tl.max(z_s))
            new_t = tl.maximum(max_t, tl.max(z_t))
            # Columns before can be the largest of both only while neither maximum has moved on.
            before = tl.where((new_s == max_s) & (new_t == max_t), agree, 0.0)
            agree = tl.maximum(before, tl.max(tl.where((z_s == new_s) & (z_t == new_t), 1.0, 0.0)))
            sum_s = sum_s * tl.exp(max_s - new_s) + tl.sum(tl.exp(z_s - new_s))
            shrink = tl.exp(max_t - new_t)
            e_t = tl.exp(z_t - new_t)
            sum_t = sum_t * shrink + tl.sum(e_t)
            dot_s = dot_s * shrink + tl.sum(e_t * tl.where(inside, z_s, 0.0))
            dot_t = dot_t * shrink + tl.sum(e_t * tl.where(inside, z_t, 0.0))
            max_s = new_s
            max_t = new_t
        loss = max_s + tl.log(sum_s) - dot_s / sum_t
        entropy = max_t + tl.log(sum_t) - dot_t / sum_t
        if GRADIENT:
            for start in range(0, width, BLOCK):
                column = start + lanes
                inside = column < width
                z_s = _student(student_row, column, inside, 0.0, temperature)
                z_t = _teacher(teacher_row, column, inside, 0.0, temperature, top, scale, QUANTISED)
                slope = tl.exp(z_s - max_s) / sum_s - tl.exp(z_t - max_t) / sum_t
                tl.store(gradient_row + column, slope * (weight / temperature), mask=inside)

    tl.store(totals_ptr + out, loss * weight / rows)
    tl.store(losses_ptr + out, loss)
    tl.store(entropies_ptr + out, entropy)
    tl.store(agreement_ptr + out, agree)


def losses_and_gradient(
    student: Tensor, teacher: Tensor | QuantisedLogits, segments: Segments, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """As `multihead_ce.losses_and_gradient_torch`, in one launch and a sum.

    Columns of `student` that no head covers get gradient zero. Raises ValueError for float64, which the
    kernel would silently round.
    """
    values, scales = teacher if isinstance(teacher, QuantisedLogits) else (teacher, None)
    if torch.float64 in (student.dtype, values.dtype):
        raise ValueError("the Triton kernel computes in float32: give float64 logits to impl='torch'")
    student, values = _rows_contiguous(student), _rows_contiguous(values)
    places, factors, _ = segments.on(student.device)
    rows, heads = len(student), len(segments.widths)
    statistics = torch.empty(4, rows, heads, dtype=torch.float32, device=student.device)
    covered = sum(segments.widths) == student.shape[1]
    gradient = (torch.empty_like(student) if covered else torch.zeros_like(student)) if needs_gradient else None
    widest = triton.next_power_of_2(max(segments.widths))
    block = widest if widest <= LARGEST_BLOCK else LOOP_BLOCK
    with torch.cuda.device_of(student):  # Triton launches on the current device, which need not be the logits'
        _multihead_ce[(rows, heads)](
            student,
            values,
            student if scales is None else scales.contiguous(),
            student if gradient is None else gradient,
            *statistics,
            places,
            factors,
            student.stride(0),
            values.stride(0),
            student.stride(0) if gradient is None else gradient.stride(0),
            rows,
            heads,
            SIGMOID_KIND=SIGMOID,
            ANY_SIGMOID="sigmoid" in segments.kinds,
            QUANTISED=scales is not None,
            GRADIENT=needs_gradient,
            ALIGNMENT=segments.alignment,
            ONE_PASS=widest <= LARGEST_BLOCK,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
        )
    totals, losses, entropies, agreement = statistics
    return totals.sum(), losses, entropies, agreement, gradient


def _rows_contiguous(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()
