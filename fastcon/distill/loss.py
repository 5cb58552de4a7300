"""The objective of a student: which heads, with which weights, at which temperature (Eq. 1 and 2 of the paper).

L = mean over x, sum over heads i of lambda_i * CE(softmax(z_t,i / T), softmax(z_s,i / T)), no T^2 factor. An embedding's head
has 1 - cosine + smooth L1 to the teacher's standardised features in place of CE, and counts as a task like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastcon.errors import FastconError, UsageError
from fastcon.kernels.multihead_ce import MultiHeadLoss, Segments, Standard, multihead_cross_entropy


def choose_heads(
    method: str, teachers: Sequence[str], generalist: str | None, only: Sequence[str] | None = None
) -> list[str]:
    """The heads that a method trains: the generalist's first, then the teachers'. `only` keeps some of the teachers.

    consolidate: all; traditional: the teachers' alone; soft-label: the generalist's alone.
    """
    unknown = [name for name in only or () if name not in teachers]
    if unknown:
        raise FastconError(f"no teacher {unknown[0]!r} in the store: it has {', '.join(teachers)}")
    tasks = [name for name in teachers if name != generalist and (not only or name in only)]
    if method != "traditional" and generalist is None:
        raise FastconError(
            f"`method` {method} needs a generalist in the store: add one with precompute "
            "(`generalist`), or train with `method` traditional"
        )
    if method != "soft-label" and not tasks:
        raise FastconError(
            f"`method` {method} needs a task-specific teacher in the store: add one with precompute "
            "(`teacher`), or train with `method` soft-label"
        )
    first = [generalist] if generalist is not None and method != "traditional" else []
    return first + (tasks if method != "soft-label" else [])


def head_weights(
    heads: Sequence[str],
    generalist: str | None,
    balance: tuple[float, float] = (1, 1),
    given: Sequence[tuple[str, float] | str] = (),
) -> list[float]:
    """lambda of each head. balance (old, new): lambda_0 = 2 old / (old + new), lambda_i = 2 new / ((old + new) N).

    N counts the task-specific heads in use. Without a generalist's head every task weighs 1/N, without a task the
    generalist weighs 1. given: the lambda of some heads, whatever the balance; the others keep theirs ("auto" among them
    only says where they are from). Raises UsageError.
    """
    pairs = [pair for pair in given if not isinstance(pair, str)]
    named = dict(pairs)
    unknown = next((name for name in named if name not in heads), None)
    if unknown is not None:
        raise UsageError(f"`weight` names {unknown!r}, and this student's heads are {', '.join(heads)}")
    if len(named) < len(pairs):
        raise UsageError("`weight` gives a head two weights")
    return [named.get(name, weight) for name, weight in zip(heads, _balanced(heads, generalist, balance), strict=True)]


def _balanced(heads: Sequence[str], generalist: str | None, balance: tuple[float, float]) -> list[float]:
    tasks = sum(name != generalist for name in heads)
    old, new = balance
    if tasks in (0, len(heads)):
        return [1 / len(heads)] * len(heads)
    return [2 * old / (old + new) if name == generalist else 2 * new / ((old + new) * tasks) for name in heads]


def segments(
    widths: Sequence[int],
    weights: Sequence[float],
    temperature: float = 2.0,
    kinds: Sequence[str] | None = None,
    standards: Sequence[Standard | None] = (),
) -> Segments:
    """The segment table of heads that lie side by side."""
    offsets = [sum(widths[:i]) for i in range(len(widths))]
    return Segments(
        tuple(offsets),
        tuple(widths),
        tuple(weights),
        (float(temperature),) * len(widths),
        tuple(kinds or ["softmax"] * len(widths)),
        tuple(standards),
    )


def loss(
    student: Tensor | Mapping[str, Tensor],
    teacher: Tensor | Mapping[str, Tensor],
    weights: Mapping[str, float] | Segments | None = None,
    temperature: float = 2.0,
    kinds: Mapping[str, str] | None = None,
) -> MultiHeadLoss:
    """Distillation loss of all heads in one fused call; `.total` is the scalar to call backward on.

    student, teacher: {head: logits [B, C]} with the same heads, or side by side [B, sum C] with a segment table
    (`Loader.segments`, or `objective.segments`) as `weights`. weights: {head: lambda}, by default 1/number of heads.
    kinds: {head: "sigmoid"} for multi-label teachers, {head: "embedding"} for features, which are taken as they are; the
    loader's segment table standardises them.
    """
    if isinstance(student, Mapping) != isinstance(teacher, Mapping):
        raise FastconError("student and teacher logits come alike: both as {head: logits} or both side by side")
    if not isinstance(student, Mapping) or not isinstance(teacher, Mapping):
        if not isinstance(weights, Segments):
            raise FastconError("logits side by side need their segment table: fastcon.loss(student, teacher, segments)")
        return multihead_cross_entropy(student, teacher, weights)  # type: ignore[arg-type]
    names = list(teacher)
    if set(names) != set(student):
        raise FastconError(f"heads differ: the student has {', '.join(student)}, the teachers {', '.join(names)}")
    table = (
        weights
        if isinstance(weights, Segments)
        else segments(
            [teacher[name].shape[1] for name in names],
            [weights[name] if weights else 1 / len(names) for name in names],
            temperature,
            [(kinds or {}).get(name, "softmax") for name in names],
        )
    )
    return multihead_cross_entropy(
        torch.cat([student[name] for name in names], 1), torch.cat([teacher[name] for name in names], 1), table
    )
