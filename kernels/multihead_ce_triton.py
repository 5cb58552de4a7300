"""The multi-head cross-entropy as one Triton launch: a program takes one (row, head).

Where the widest head fits a block, a program loads student and teacher once and keeps them in registers from the
maxima to the gradient. Wider heads are walked twice: for running maxima and sums (an online softmax of both together),
then for the gradient. Quantised teacher logits become floats in registers. Everything is float32 inside, results of
each (row, head) are written without atomics and row offsets are 64-bit, so nothing depends on scheduling.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from fastcon.kernels.multihead_ce import EMBEDDING, SHORT, SIGMOID, QuantisedLogits, Segments
from torch import Tensor

LARGEST_BLOCK = 4096
"""Columns that a program holds at once. Wider heads are walked, by so few programs at a time (4 or 5, of 4 warps, on
each multiprocessor) that what they read lies in a GPU's 50 MB of L2 when they come back for the gradient."""
MANY = 1024
"""Programs that fill a GPU: from then on one warp takes 1,024 columns, 32 per lane, which costs the fewest
instructions per column; where they are fewer, four warps share them, as nothing else would fill the time that one
waits."""

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SHORTEST = tl.constexpr(SHORT)
NEVER = tl.constexpr(-1e30)
"""The logit of a column outside the head: finite, as it is multiplied by a probability of zero."""


@triton.jit
def _logits(row, column, inside, top, scale, QUANTISED: tl.constexpr):
    """float32 logits; of columns that are not inside, anything."""
    stored = tl.load(row + column, mask=inside).to(tl.float32)
    return top - scale * stored * stored if QUANTISED else stored


@triton.jit
def _standardised(row, mean_row, scale_row, column, inside, top, scale, QUANTISED: tl.constexpr):
    """A teacher's standardised features; zero of columns that are not inside."""
    mean = tl.load(mean_row + column, mask=inside)
    by = tl.load(scale_row + column, mask=inside)
    return tl.where(inside, (_logits(row, column, inside, top, scale, QUANTISED) - mean) * by, 0.0)


@triton.jit
def _multihead_ce(
    student_ptr,
    teacher_ptr,
    scales_ptr,
    gradient_ptr,
    statistics_ptr,
    places_ptr,
    factors_ptr,
    standards_ptr,
    student_stride,
    teacher_stride,
    gradient_stride,
    rows,
    heads,
    columns,
    SIGMOID_KIND: tl.constexpr,
    ANY_SIGMOID: tl.constexpr,
    EMBEDDING_KIND: tl.constexpr,
    ANY_EMBEDDING: tl.constexpr,
    QUANTISED: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ONE_PASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    # What divides every offset, width and stride: without it the compiler loads one element at a time.
    offset = tl.multiple_of(tl.load(places_ptr + head * 3), ALIGNMENT)
    width = tl.multiple_of(tl.load(places_ptr + head * 3 + 1), ALIGNMENT)
    kind = tl.load(places_ptr + head * 3 + 2)
    weight = tl.load(factors_ptr + head * 2)
    temperature = tl.load(factors_ptr + head * 2 + 1)
    student_row = student_ptr + tl.multiple_of(row * student_stride, ALIGNMENT) + offset
    teacher_row = teacher_ptr + tl.multiple_of(row * teacher_stride, ALIGNMENT) + offset
    gradient_row = gradient_ptr + tl.multiple_of(row * gradient_stride, ALIGNMENT) + offset
    lanes = tl.arange(0, BLOCK)
    out = row * heads + head
    top = 0.0
    scale = 0.0
    if QUANTISED:
        top = tl.load(scales_ptr + out * 2)
        scale = tl.load(scales_ptr + out * 2 + 1)
    slope = weight / temperature
    unit = LOG2_E / temperature  # logits times this are exponents of 2

    if ANY_SIGMOID and kind == SIGMOID_KIND:
        loss = 0.0
        entropy = 0.0
        agree = 0.0
        for start in range(0, width, BLOCK):
            column = start + lanes
            inside = column < width
            z_s = tl.where(inside, _logits(student_row, column, inside, top, scale, False), NEVER) / temperature
            z_t = tl.where(inside, _logits(teacher_row, column, inside, top, scale, QUANTISED), NEVER) / temperature
            u_s = tl.exp2(-tl.abs(z_s) * LOG2_E)
            u_t = tl.exp2(-tl.abs(z_t) * LOG2_E)
            p_s = tl.where(z_s > 0, 1.0, u_s) / (1.0 + u_s)
            p_t = tl.where(z_t > 0, 1.0, u_t) / (1.0 + u_t)
            # softplus(z) is max(z, 0) + log(1 + exp(-|z|)); where no column is, both terms of either sum are zero
            loss += tl.sum(tl.maximum(z_s, 0.0) + tl.log(1.0 + u_s) - p_t * z_s)
            entropy += tl.sum(tl.maximum(z_t, 0.0) + tl.log(1.0 + u_t) - p_t * z_t)
            agree += tl.sum(tl.where(inside & ((z_s > 0) == (z_t > 0)), 1.0, 0.0))
            if GRADIENT:
                tl.store(gradient_row + column, (p_s - p_t) * (slope / width), mask=inside)
        loss /= width
        entropy /= width
        agree /= width
    elif ANY_EMBEDDING and kind == EMBEDDING_KIND:
        mean_row = standards_ptr + offset
        scale_row = standards_ptr + tl.multiple_of(offset + columns, ALIGNMENT)
        dot_s = 0.0
        dot_t = 0.0
        agree = 0.0
        smooth = 0.0
        squares = 0.0
        for start in range(0, width, BLOCK):
            column = start + lanes
            inside = column < width
            y = tl.where(inside, _logits(student_row, column, inside, top, scale, False), 0.0)
            t = _standardised(teacher_row, mean_row, scale_row, column, inside, top, scale, QUANTISED)
            difference = y - t
            slope_1 = tl.minimum(tl.maximum(difference, -1.0), 1.0)
            dot_s += tl.sum(y * y)
            dot_t += tl.sum(t * t)
            agree += tl.sum(y * t)
            smooth += tl.sum(slope_1 * (difference - 0.5 * slope_1))
            squares += tl.sum(difference * difference)
        short_s = tl.rsqrt(tl.maximum(dot_s, SHORTEST))
        short_t = tl.rsqrt(tl.maximum(dot_t, SHORTEST))
        agree *= short_s * short_t
        loss = 1.0 - agree + smooth / width
        entropy = loss - squares / width
        if GRADIENT:
            for start in range(0, width, BLOCK):
                column = start + lanes
                inside = column < width
                y = tl.where(inside, _logits(student_row, column, inside, top, scale, False), 0.0)
                t = _standardised(teacher_row, mean_row, scale_row, column, inside, top, scale, QUANTISED)
                slope_1 = tl.minimum(tl.maximum(y - t, -1.0), 1.0)
                turned = agree * short_s * short_s * y - short_s * short_t * t
                tl.store(gradient_row + column, weight * (turned + slope_1 / width), mask=inside)
    elif ONE_PASS:
        inside = lanes < width
        z_s = tl.where(inside, _logits(student_row, lanes, inside, top, scale, False), NEVER)
        z_t = tl.where(inside, _logits(teacher_row, lanes, inside, top, scale, QUANTISED), NEVER)
        max_s = tl.max(z_s)
        max_t = tl.max(z_t)
        agree = tl.where(tl.max(tl.where(z_t == max_t, z_s, NEVER)) == max_s, 1.0, 0.0)
        below_s = z_s - max_s
        below_t = z_t - max_t
        e_s = tl.exp2(below_s * unit)
        e_t = tl.exp2(below_t * unit)
        sum_s = tl.sum(e_s)
        sum_t = tl.sum(e_t)
        loss = LN_2 * (tl.log2(sum_s) - tl.sum(e_t * below_s) * unit / sum_t)
        entropy = LN_2 * (tl.log2(sum_t) - tl.sum(e_t * below_t) * unit / sum_t)
        if GRADIENT:
            tl.store(gradient_row + lanes, e_s * (slope / sum_s) - e_t * (slope / sum_t), mask=inside)
    else:
        max_s = NEVER
        max_t = NEVER
        agree = 0.0
        sum_s = 0.0
        sum_t = 0.0
        dot_s = 0.0  # sum of exp(z_t - max_t) * (z_s - max_s)
        dot_t = 0.0
        for start in range(0, width, BLOCK):
            column = start + lanes
            inside = column < width
            z_s = tl.where(inside, _logits(student_row, column, inside, top, scale, False), NEVER)
            z_t = tl.where(inside, _logits(teacher_row, column, inside, top, scale, QUANTISED), NEVER)
            new_s = tl.maximum(max_s, tl.max(z_s))
            new_t = tl.maximum(max_t, tl.max(z_t))
            # Columns before can be the largest of both only while neither maximum has moved on.
            before = tl.where((new_s == max_s) & (new_t == max_t), agree, 0.0)
            same = tl.max(tl.where(z_t == new_t, z_s, NEVER)) == new_s
            agree = tl.maximum(before, tl.where(same, 1.0, 0.0))
            down_s = max_s - new_s
            down_t = max_t - new_t
            shrink = tl.exp2(down_t * unit)
            below_s = z_s - new_s
            below_t = z_t - new_t
            e_t = tl.exp2(below_t * unit)
            dot_s = (dot_s + sum_t * down_s) * shrink + tl.sum(e_t * below_s)
            dot_t = (dot_t + sum_t * down_t) * shrink + tl.sum(e_t * below_t)
            sum_s = sum_s * tl.exp2(down_s * unit) + tl.sum(tl.exp2(below_s * unit))
            sum_t = sum_t * shrink + tl.sum(e_t)
            max_s = new_s
            max_t = new_t
        loss = LN_2 * (tl.log2(sum_s) - dot_s * unit / sum_t)
        entropy = LN_2 * (tl.log2(sum_t) - dot_t * unit / sum_t)
        if GRADIENT:
            for start in range(0, width, BLOCK):
                column = start + lanes
                inside = column < width
                z_s = _logits(student_row, column, inside, top, scale, False)
                z_t = _logits(teacher_row, column, inside, top, scale, QUANTISED)
                e_s = tl.exp2((z_s - max_s) * unit)
                e_t = tl.exp2((z_t - max_t) * unit)
                tl.store(gradient_row + column, e_s * (slope / sum_s) - e_t * (slope / sum_t), mask=inside)

    each = tl.num_programs(0).to(tl.int64) * heads
    tl.store(statistics_ptr + out, loss * weight / rows)
    tl.store(statistics_ptr + each + out, loss)
    tl.store(statistics_ptr + 2 * each + out, entropy)
    tl.store(statistics_ptr + 3 * each + out, agree)


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
    table = segments.on(student.device)
    rows, heads = len(student), len(segments.widths)
    statistics = torch.empty(4, rows, heads, dtype=torch.float32, device=student.device)
    covered = sum(segments.widths) == student.shape[1]
    gradient = (torch.empty_like(student) if covered else torch.zeros_like(student)) if needs_gradient else None
    strides = tuple(z.stride(0) for z in (student, values, student if gradient is None else gradient))
    with torch.cuda.device_of(student):  # Triton launches on the current device, which need not be the logits'
        _multihead_ce[(rows, heads)](
            student,
            values,
            student if scales is None else scales.contiguous(),
            student if gradient is None else gradient,
            statistics,
            table.places,
            table.factors,
            table.standards,
            *strides,
            rows,
            heads,
            segments.columns,
            QUANTISED=scales is not None,
            GRADIENT=needs_gradient,
            **launch(segments, rows, strides),
        )
    totals, losses, entropies, agreement = statistics.unbind()
    return totals.sum(), losses, entropies, agreement, gradient


def _rows_contiguous(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


@functools.lru_cache(64)  # too slow to derive in every step
def launch(segments: Segments, rows: int, strides: tuple[int, ...]) -> dict[str, Any]:
    """How the kernel is compiled and launched for logits [rows, >= sum C] of these strides."""
    widest, many = triton.next_power_of_2(max(segments.widths)), rows * len(segments.widths) >= MANY
    block = min(widest, LARGEST_BLOCK)
    return {
        "SIGMOID_KIND": SIGMOID,
        "ANY_SIGMOID": "sigmoid" in segments.kinds,
        "EMBEDDING_KIND": EMBEDDING,
        "ANY_EMBEDDING": "embedding" in segments.kinds,
        "ALIGNMENT": math.gcd(segments.alignment, *strides),
        "ONE_PASS": widest == block,
        "BLOCK": block,
        "num_warps": max(block // (1024 if many else 256), 1),
        "enable_fp_fusion": True,
    }
