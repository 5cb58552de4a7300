"""The compiled kernel against the float64 oracle: every layout, type of logits and size of batch; autograd, autocast, graphs."""

from __future__ import annotations

import pytest
import torch
from device import DEVICE
from fastcon.kernels.multihead_ce import multihead_cross_entropy
from test_multihead_ce import LAYOUTS, check, logits, quantised, table

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("rows", [1, 7, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_compiled_kernel_against_the_oracle(layout, dtype, rows):
    segments = table(LAYOUTS[layout])
    student, teacher = logits(rows, segments.columns, 4, dtype, rows)
    for stored in (torch.float16, torch.float32):
        check(student, teacher.to(stored), segments, "triton", device=DEVICE)


@pytest.mark.parametrize("rows", [1, 7, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantised_teachers_and_sigmoid_heads(layout, dtype, rows):
    widths = LAYOUTS[layout]
    segments = table(widths, ["softmax" if k % 2 else "sigmoid" for k in range(len(widths))])
    student, _ = logits(rows, segments.columns, 4, dtype, rows)
    teacher, dense = quantised(rows, segments, 6)
    check(student, teacher, segments, "triton", dense, device=DEVICE)


def test_large_logits_and_equal_ones():
    segments = table([10, 2000])
    student, teacher = logits(5, segments.columns, 3000, torch.float32, 0)
    check(student, teacher, segments, "triton", device=DEVICE)
    check(torch.zeros_like(student), torch.zeros_like(teacher), segments, "triton", device=DEVICE)


def test_a_gpu_takes_the_kernel_unasked_and_its_twin_agrees():
    segments = table([1000, 98, 40])
    student, teacher = logits(64, segments.columns, 4, torch.float32, 3)
    found = {}
    for impl in (None, "triton", "torch"):
        leaf = student.to(DEVICE).requires_grad_()
        result = multihead_cross_entropy(leaf, teacher.to(DEVICE), segments, impl)
        result.total.backward()
        found[impl] = result.losses, leaf.grad
    for mine, kernels, twins in zip(found[None], found["triton"], found["torch"], strict=True):
        if DEVICE.startswith("cuda"):
            assert torch.equal(mine, kernels)
        torch.testing.assert_close(kernels, twins, rtol=2e-5, atol=2e-5)


def test_autocast_around_the_loss_rounds_nothing():
    segments = table([100, 40])
    student, teacher = (z.to(DEVICE) for z in logits(16, segments.columns, 4, torch.float32, 1))
    plain = multihead_cross_entropy(student, teacher, segments, "triton").losses
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        assert torch.equal(multihead_cross_entropy(student, teacher, segments, "triton").losses, plain)


def test_the_loss_replays_in_a_cuda_graph():
    if not DEVICE.startswith("cuda"):
        pytest.skip("a CUDA graph needs a GPU")
    segments = table([1000, 98])
    student, teacher = (z.to(DEVICE) for z in logits(64, segments.columns, 4, torch.float32, 2))
    leaf = student.clone().requires_grad_()

    def step() -> torch.Tensor:
        return torch.autograd.grad(multihead_cross_entropy(leaf, teacher, segments).total, leaf)[0]

    expected = step().clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # decoding threads go on meanwhile
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
