"""The fused loss, forward and gradient, against a loop over heads in PyTorch, eager and compiled."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastcon.bench import Row, Say, compared, interleave
from fastcon.distill import loss as objective
from fastcon.kernels.multihead_ce import Segments, Standard, multihead_cross_entropy

T = TypeVar("T")
CASES = [(32, [1000]), (32, [1000, 98]), (256, [1000, 1000]), (256, [1000] + [200] * 10), (1024, [1500, 1500])]
"""Rows of a batch, classes of its heads."""
EMBEDDINGS = [(256, 1000, 384), (1024, 1000, 768)]
"""Rows of a batch, classes of a head, features of an embedding beside it."""
LARGE = (4096, [10_000])


def bench(
    say: Say, device: torch.device, rounds: int = 7, cases: list[tuple[int, list[int]]] | None = None
) -> list[Row]:
    """us of loss and gradient: the fused call, which also gives KL and agreement, against a loop over heads.

    The loop gives the loss alone, in a second row as much as the fused call. The student's logits are float32, as training
    gives them; on a GPU bfloat16, too, there are times under a CUDA graph, and the share of the bandwidth of a plain copy
    at 4,096 x 10,000. Where torch.compile, or Liger-Kernel's KL divergence on a GPU, does not work its rows are left out.
    """
    rows: list[Row] = []
    on_gpu = device.type == "cuda"
    dtypes = (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,)
    for (batch, widths), dtype in itertools.product(cases or CASES, dtypes):
        segments = objective.segments(widths, objective.head_weights(list(map(str, range(len(widths)))), "0"))
        student, teacher = _logits(batch, segments, device, dtype)
        variants = {
            "ours": _timed(functools.partial(_fused, student, teacher, segments), student),
            "eager": _timed(functools.partial(_loop, student, teacher, segments), student),
            "as much": _timed(lambda: _loop_with_statistics(student, teacher, segments)[0], student),  # noqa: B023
        }
        others = {"compiled": _tried("torch.compile", say, _compiled, student, teacher, segments)}
        if on_gpu and importlib.util.find_spec("liger_kernel"):
            others["liger"] = _tried("Liger-Kernel", say, _liger, student, teacher, segments)
        variants |= {name: _timed(loss, student) for name, found in others.items() for loss in found}
        seconds = interleave(variants, rounds)
        case: dict[str, Any] = {
            "case": f"B = {batch}, {len(widths)} heads, {sum(widths)} classes",
            "dtype": str(dtype)[6:],
        }
        for name, theirs in (
            ("loss_vs_eager", "eager"),
            ("loss_vs_eager, with KL and agreement", "as much"),
            ("loss_vs_compile", "compiled"),
            ("loss_vs_liger", "liger"),
        ):
            if theirs in seconds:
                ours, other = (_micro(seconds[k]) for k in ("ours", theirs))
                rows.append(compared(name, ours, other, "us", device.type, **case))
                say(f"{name}, {case['case']}: {rows[-1]['ours']:.0f} against {rows[-1]['theirs']:.0f} us")
        if on_gpu:
            rows += _tried(
                "loss_vs_eager, both in a CUDA graph,", say, _graph_row, student, teacher, segments, rounds, case
            )
    for batch, classes, features in EMBEDDINGS if cases is None else []:
        rows.append(_embedding_row(batch, classes, features, device, rounds))
        say(f"{rows[-1]['name']}, {rows[-1]['case']}: {rows[-1]['ours']:.0f} against {rows[-1]['theirs']:.0f} us")
    for dtype in dtypes if on_gpu else ():
        rows += _tried("loss_bandwidth", say, _bandwidth, device, dtype, rounds)
    return rows


def _embedding_row(batch: int, classes: int, features: int, device: torch.device, rounds: int) -> Row:
    """us of a classifier's and an embedding's loss with gradient, fused, against PyTorch's functions for them."""
    standard = Standard(torch.zeros(features), torch.ones(features))
    segments = objective.segments(
        [classes, features], [1.0, 1.0], kinds=["softmax", "embedding"], standards=[None, standard]
    )
    student, teacher = _logits(batch, segments, device)
    mean, scale = standard.mean.to(device), standard.scale.to(device)
    logits = dataclasses.replace(segments, offsets=(0,), widths=(classes,), weights=(1.0,), temperatures=(2.0,),
                                 kinds=("softmax",), standards=())  # fmt: skip

    def eager() -> Tensor:
        y, t = student[:, classes:], (teacher[:, classes:].float() - mean) * scale
        distance = torch.nn.functional.smooth_l1_loss(y, t) - torch.nn.functional.cosine_similarity(y, t).mean() + 1
        return _loop(student, teacher, logits) + distance

    variants = {
        "ours": _timed(functools.partial(_fused, student, teacher, segments), student),
        "eager": _timed(eager, student),
    }
    torch.testing.assert_close(_fused(student, teacher, segments), eager(), rtol=1e-4, atol=1e-4)
    seconds = interleave(variants, rounds)
    ours, theirs = (_micro(seconds[name]) for name in variants)
    case = f"B = {batch}, {classes} classes and {features} features"
    return compared("embedding_vs_eager", ours, theirs, "us", device.type, case=case, dtype="float32")


def _tried(what: str, say: Say, make: Callable[..., T], *arguments: Any) -> list[T]:
    """The result of `make`; None where it does not work here, with the reason printed."""
    try:
        return [make(*arguments)]
    except Exception as error:
        say(f"{what} does not work here: {' '.join(str(error).split())[:80]}")
        return []


def _logits(
    batch: int, segments: Segments, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(batch, segments.columns, generator=generator) * 3 for _ in range(2))
    return student.to(device, dtype).requires_grad_(), teacher.to(device, torch.float16)


def _micro(seconds: list[float]) -> list[float]:
    return [1e6 * s for s in seconds]


def _fused(student: Tensor, teacher: Tensor, segments: Segments) -> Tensor:
    return multihead_cross_entropy(student, teacher, segments).total


def _loop(student: Tensor, teacher: Tensor, segments: Segments) -> Tensor:
    """Eq. 1, written plainly."""
    total = student.new_zeros((), dtype=torch.float32)
    for offset, width, weight, t in zip(
        segments.offsets, segments.widths, segments.weights, segments.temperatures, strict=True
    ):
        columns = slice(offset, offset + width)
        p = (teacher[:, columns].float() / t).softmax(1)
        total = total - weight * (p * (student[:, columns].float() / t).log_softmax(1)).sum(1).mean()
    return total


def _loop_with_statistics(
    student: Tensor, teacher: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, with the losses, entropies and agreement [B, H] that the fused call gives."""
    total = student.new_zeros((), dtype=torch.float32)
    losses, entropies, agreement = [], [], []
    for offset, width, weight, t in zip(
        segments.offsets, segments.widths, segments.weights, segments.temperatures, strict=True
    ):
        z_s, z_t = (z[:, offset : offset + width].float() / t for z in (student, teacher))
        log_p = z_t.log_softmax(1)
        p = log_p.exp()
        loss = -(p * z_s.log_softmax(1)).sum(1)
        total = total + weight * loss.mean()
        losses.append(loss.detach())
        entropies.append(-(p * log_p).sum(1))
        agreement.append((z_s.argmax(1) == z_t.argmax(1)).float())
    return total, torch.stack(losses, 1), torch.stack(entropies, 1), torch.stack(agreement, 1)


def _kl_loop(
    divergence: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, segments: Segments
) -> Tensor:
    """The loop by way of a function that gives KL(p || q) a row from log q and p: another value, the same gradient."""
    total = student.new_zeros((), dtype=torch.float32)
    for offset, width, weight, t in zip(
        segments.offsets, segments.widths, segments.weights, segments.temperatures, strict=True
    ):
        z_s, z_t = (z[:, offset : offset + width].float() / t for z in (student, teacher))
        total = total + weight * divergence(z_s.log_softmax(1), z_t.softmax(1))
    return total


def _liger(student: Tensor, teacher: Tensor, segments: Segments) -> Callable[[], Tensor]:
    divergence = importlib.import_module("liger_kernel.transformers").LigerKLDIVLoss(reduction="batchmean")
    _kl_loop(divergence, student, teacher, segments).backward()
    return lambda: _kl_loop(divergence, student, teacher, segments)


def _compiled(student: Tensor, teacher: Tensor, segments: Segments) -> Callable[[], Tensor]:
    torch.compiler.reset()
    loop = torch.compile(_loop)
    loop(student, teacher, segments).backward()
    return lambda: loop(student, teacher, segments)


def _timed(loss: Callable[[], Tensor], student: Tensor) -> Callable[[], float]:
    """Seconds of one loss with its gradient, over enough of them to fill a tenth of a second."""

    def once() -> None:
        student.grad = None
        loss().backward()

    def run() -> float:
        once()
        _wait(student)
        count, started = 0, time.perf_counter()
        while count < 3 or time.perf_counter() - started < 0.1:
            once()
            count += 1
            if student.is_cuda and count % 50 == 0:
                _wait(student)
        _wait(student)
        return (time.perf_counter() - started) / count

    return run


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _graph_row(student: Tensor, teacher: Tensor, segments: Segments, rounds: int, case: dict[str, Any]) -> Row:
    """us under a CUDA graph, ours against the loop over heads captured alike."""
    leaf = student.detach().clone().requires_grad_()  # whose gradient no other stream has accumulated before
    variants = {}
    for name, loss in (("ours", _fused), ("eager", _loop)):
        work = _captured(lambda: torch.autograd.grad(loss(leaf, teacher, segments), leaf), leaf.device)  # noqa: B023
        variants[name] = _replayed(work, leaf.device)
    seconds = interleave(variants, rounds)
    ours, theirs = _micro(seconds["ours"]), _micro(seconds["eager"])
    return compared("loss_vs_eager, both in a CUDA graph", ours, theirs, "us", "cuda", **case)


def _captured(work: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # whatever other threads do in the meantime
            work()
        return graph


def _replayed(graph: torch.cuda.CUDAGraph, device: torch.device, times: int = 200) -> Callable[[], float]:
    """Seconds of one replay."""

    def run() -> float:
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(times):
            graph.replay()
        torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / times

    return run


def _bandwidth(device: torch.device, dtype: torch.dtype, rounds: int) -> Row:
    """GB/s of loss and gradient (student in, float16 teacher in, gradient out) against a copy of as many bytes.

    What backward does with the gradient, which is to multiply it by a number, is not part of it. Both in a CUDA graph.
    """
    from fastcon.kernels.multihead_ce_triton import losses_and_gradient

    batch, widths = LARGE
    segments = objective.segments(widths, [1.0])
    student, teacher = _logits(batch, segments, device, dtype)
    student = student.detach()
    moved = (2 * student.element_size() + teacher.element_size()) * student.numel()
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    works: dict[str, Callable[[], object]] = {
        "ours": lambda: losses_and_gradient(student, teacher, segments, True),
        "copy": lambda: target.copy_(source),
    }
    seconds = interleave({name: _replayed(_captured(work, device), device) for name, work in works.items()}, rounds)
    ours, copied = ([moved / s / 1e9 for s in seconds[name]] for name in ("ours", "copy"))
    return compared("loss_bandwidth", ours, copied, "GB/s", "cuda", case=f"{batch} x {widths[0]}", dtype=str(dtype)[6:])
