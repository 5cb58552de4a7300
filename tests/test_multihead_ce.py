"""The fused loss against a float64 oracle: values, gradients, awkward sizes, large logits, both implementations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fastcon.kernels import multihead_ce
from fastcon.kernels.multihead_ce import QuantisedLogits, Segments, Standard, multihead_cross_entropy
from fastcon.kernels.multihead_ce_triton import MANY, launch
from torch import Tensor

IMPLEMENTATIONS = ["torch", "triton"]
LAYOUTS = {
    "one of 1": [1],
    "one of 2": [2],
    "13 and 1000": [13, 1000],
    "one large block": [1001, 9999, 7],
    "two loads": [17000, 7],
    "aligned": [16, 1000, 8, 248],
    "eleven": [200, 98, 45, 251, 24, 228, 47, 51, 129, 100, 50],
    "alike side by side": [40, 40, 40, 7, 7, 7, 40],
    "thirty-two": [5 + k for k in range(32)],
}


def standard(width: int) -> Standard:
    generator = torch.Generator().manual_seed(width)
    return Standard(torch.randn(width, generator=generator), 0.1 + torch.rand(width, generator=generator))


def table(widths: list[int], kinds: list[str] | None = None, gap: int = 0) -> Segments:
    """Every other embedding with a standard."""
    offsets, at = [], 0
    for width in widths:
        offsets.append(at)
        at += width + gap
    n = len(widths)
    return Segments(
        tuple(offsets),
        tuple(widths),
        tuple(0.25 + 0.5 * (k % 3) for k in range(n)),
        tuple(2.0 if k % 4 else 1.0 for k in range(n)),
        tuple(kinds or ["softmax"] * n),
        tuple(
            standard(w) if kind == "embedding" and k % 2 == 0 else None
            for k, (w, kind) in enumerate(zip(widths, kinds, strict=False))
        )
        if kinds
        else (),
    )


def oracle(student: Tensor, teacher: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """Total, losses [B, H] and gradient by autograd, in float64, from the paper's formula."""
    z_s, z_t = student.detach().double().requires_grad_(), teacher.double()
    losses = []
    heads = zip(segments.offsets, segments.widths, segments.temperatures, segments.kinds, strict=True)
    for h, (o, w, t, kind) in enumerate(heads):
        if kind == "embedding":
            y, z, standard = z_s[:, o : o + w], z_t[:, o : o + w], segments.standards[h]
            if standard:
                z = (z - standard.mean.double()) * standard.scale.double()
            distance = torch.nn.functional.smooth_l1_loss(y, z, reduction="none").mean(1)
            losses.append(1 - torch.nn.functional.cosine_similarity(y, z) + distance)
            continue
        a, b = z_s[:, o : o + w] / t, z_t[:, o : o + w] / t
        if kind == "sigmoid":  # every label a two-class softmax of (z, 0), the mean over labels
            a, b = (torch.stack([z, torch.zeros_like(z)], 2) for z in (a, b))
            losses.append(-(b.softmax(2) * a.log_softmax(2)).sum(2).mean(1))
        else:
            losses.append(-(b.softmax(1) * a.log_softmax(1)).sum(1))
    stacked = torch.stack(losses, 1)
    total = (stacked.mean(0) * torch.tensor(segments.weights, dtype=torch.float64)).sum()
    total.backward()
    return total, stacked.detach(), z_s.grad


def logits(rows: int, columns: int, scale: float, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, columns, generator=generator) * scale for _ in range(2))
    return student.to(dtype), teacher.to(torch.float16)


def quantised(rows: int, segments: Segments, seed: int) -> tuple[QuantisedLogits, Tensor]:
    """Random codes and scales, and the logits they mean by the formula, float64."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, segments.columns), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, len(segments.widths), 2, generator=generator) * torch.tensor([10, 20 / 255**2])
    dense = torch.zeros(rows, segments.columns, dtype=torch.float64)
    for h, (o, w) in enumerate(zip(segments.offsets, segments.widths, strict=True)):
        dense[:, o : o + w] = scales[:, h, :1].double() - scales[:, h, 1:].double() * codes[:, o : o + w].double() ** 2
    return QuantisedLogits(codes, scales), dense


def check(
    student: Tensor,
    teacher: Tensor | QuantisedLogits,
    segments: Segments,
    impl: str,
    dense: Tensor | None = None,
    device: str = "cpu",
) -> None:
    total, losses, gradient = oracle(student, teacher if dense is None else dense, segments)
    leaf = student.to(device, copy=True).requires_grad_()
    quantised = isinstance(teacher, QuantisedLogits)
    teacher = QuantisedLogits(*(part.to(device) for part in teacher)) if quantised else teacher.to(device)
    result = multihead_cross_entropy(leaf, teacher, segments, impl)
    (3 * result.total).backward()
    torch.testing.assert_close(result.losses.cpu().double(), losses, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(result.total.cpu().double(), total.detach(), rtol=2e-5, atol=2e-5)
    # The gradient comes in the student's own type, rounded twice (Triton's interpreter cuts bfloat16 off instead).
    spacing = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.25e-2}[student.dtype]
    error = (leaf.grad.cpu().double() / 3 - gradient).abs()
    subnormal = 2**-24 if student.dtype == torch.float16 else 0  # the spacing of its smallest numbers
    assert (error <= spacing * gradient.abs() + 1e-6 / len(student) + subnormal).all(), error.max()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_the_oracle(impl, dtype, layout):
    widths = LAYOUTS[layout]
    segments = table(widths)
    check(*logits(7, segments.columns, 4, dtype, 0), segments, impl)


EMBEDDINGS = {
    "alone": ([64], ["embedding"]),
    "of one feature, and not standardised": ([1, 1], ["softmax", "embedding"]),
    "among others": ([33, 100, 20, 384, 384], ["embedding", "softmax", "sigmoid", "embedding", "embedding"]),
    "wider than a block": ([10, 5000, 7], ["softmax", "softmax", "embedding"]),
    "a wide one": ([5000, 10, 300], ["embedding", "softmax", "embedding"]),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", EMBEDDINGS)
def test_embeddings(impl, dtype, layout):
    segments = table(*EMBEDDINGS[layout])
    check(*logits(7, segments.columns, 2, dtype, 0), segments, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_embeddings_of_one_byte(impl):
    segments = table(*EMBEDDINGS["among others"])
    teacher, dense = quantised(7, segments, 5)
    student, _ = logits(7, segments.columns, 2, torch.float32, 5)
    check(student, teacher, segments, impl, dense)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_metrics_say_of_an_embedding(impl):
    """agreement is the cosine, losses - entropies the mean squared error; a perfect student loses nothing."""
    segments = table([40, 25], ["embedding", "embedding"])
    student, teacher = logits(9, 65, 1, torch.float32, 3)
    result = multihead_cross_entropy(student, teacher, segments, impl)
    first = (teacher[:, :40].float() - segments.standards[0].mean) * segments.standards[0].scale
    for h, (y, z) in enumerate([(student[:, :40], first), (student[:, 40:], teacher[:, 40:].float())]):
        torch.testing.assert_close(result.agreement[:, h], torch.nn.functional.cosine_similarity(y, z))
        torch.testing.assert_close(
            (result.losses - result.entropies)[:, h], (y - z).square().mean(1), rtol=1e-4, atol=1e-5
        )
    perfect = torch.cat([first, teacher[:, 40:].float()], 1).requires_grad_()
    result = multihead_cross_entropy(perfect, teacher, segments, impl)
    result.total.backward()
    assert result.losses.abs().max() < 1e-5
    assert perfect.grad.abs().max() < 1e-6
    zero = torch.zeros(2, 65, requires_grad=True)
    multihead_cross_entropy(zero, teacher[:2], segments, impl).total.backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [1, 7, 257])
def test_batches(impl, rows):
    segments = table([13, 40])
    check(*logits(rows, segments.columns, 4, torch.float32, rows), segments, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_large_logits_and_equal_ones(impl):
    segments = table([10, 2000])
    student, teacher = logits(5, segments.columns, 3000, torch.float32, 0)
    check(student, teacher, segments, impl)
    check(torch.zeros_like(student), torch.zeros_like(teacher), segments, impl)
    check(student * 1e-3, teacher * 1e-3, segments, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("widths", [[9], [5, 1, 228], [5000, 40], [8, 8, 8, 8]])
def test_sigmoid_heads(impl, widths):
    segments = table(widths, ["sigmoid" if k % 2 == 0 else "softmax" for k in range(len(widths))])
    check(*logits(6, segments.columns, 5, torch.float32, 1), segments, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", [[1], [13, 1000, 5], [17000, 40], [9, 9, 9, 9]])
def test_quantised_teachers(impl, dtype, widths):
    segments = table(widths, ["softmax"] * (len(widths) - 1) + ["sigmoid"])
    student, _ = logits(6, segments.columns, 4, dtype, 5)
    teacher, dense = quantised(6, segments, 6)
    check(student, teacher, segments, impl, dense)


def test_the_twin_takes_large_batches_in_blocks(monkeypatch):
    monkeypatch.setattr(multihead_ce, "BLOCK", 100)
    monkeypatch.setattr(multihead_ce, "_kept", threading.local())
    segments = table([7, 7, 40, 13], ["softmax", "softmax", "softmax", "sigmoid"])
    check(*logits(23, segments.columns, 4, torch.float32, 7), segments, "torch")
    teacher, dense = quantised(23, segments, 8)
    check(logits(23, segments.columns, 4, torch.float32, 7)[0], teacher, segments, "torch", dense)


def test_what_the_twin_keeps_from_call_to_call_is_bounded(monkeypatch):
    monkeypatch.setattr(multihead_ce, "_kept", threading.local())
    segments = table([13, 40])
    for rows in [*range(60, 0, -1), *range(1, 80)]:
        check(*logits(rows, segments.columns, 4, torch.float32, rows), segments, "torch")
        kept = vars(multihead_ce._kept)
        assert len(kept["plans"]) <= 16
        memory = {part._work[0].untyped_storage().data_ptr() for parts, _ in kept["plans"].values() for part in parts}
        assert len(memory) == 1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_training_goes_on_after_a_loss_in_inference_mode(impl):
    segments = table([12, 17])  # a table of no other test
    student, teacher = logits(9, segments.columns, 4, torch.float32, 5)
    with torch.inference_mode():
        before = multihead_cross_entropy(student, teacher, segments, impl)
    check(student, teacher, segments, impl)
    assert torch.equal(before.losses, multihead_cross_entropy(student, teacher, segments, impl).losses)


def test_the_twin_runs_in_several_threads_at_once():
    segments = table([200, 300])
    given = [logits(64, segments.columns, 4, torch.float32, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda k: check(*given[k % 4], segments, "torch"), range(100)))


def test_quantised_logits_need_their_scales():
    segments = table([4, 6])
    teacher, _ = quantised(3, segments, 0)
    with pytest.raises(ValueError, match="give both as QuantisedLogits"):
        multihead_cross_entropy(torch.zeros(3, 10), teacher.codes, segments)
    with pytest.raises(ValueError, match=r"scales are \[B, heads, 2\]"):
        multihead_cross_entropy(torch.zeros(3, 10), QuantisedLogits(teacher.codes, teacher.scales[:, :1]), segments)


def test_alignment_divides_every_offset_and_width():
    assert [table(widths).alignment for widths in ([16, 1000, 8], [16, 1000, 4], [6], [13, 8])] == [8, 4, 2, 1]


def test_the_kernel_is_told_no_more_than_offsets_widths_and_strides_have_in_common():
    tables = [table([16, 1000]), table([16, 1000]), table([16, 1002])]
    strides = [(1016, 1016, 1016), (1016, 1017, 1016), (1032, 1032, 1032)]
    assert [launch(t, 8, s)["ALIGNMENT"] for t, s in zip(tables, strides, strict=True)] == [8, 1, 2]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_columns_between_heads_get_no_gradient(impl):
    segments = table([3, 11, 11], gap=5)
    student, teacher = logits(4, segments.columns + 6, 4, torch.float32, 2)
    check(student, teacher, segments, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_entropy_and_agreement(impl):
    segments = table([6, 5000], ["softmax", "softmax"])
    student, teacher = logits(50, segments.columns, 4, torch.float32, 3)
    student[:20, :6] = teacher[:20, :6].float()
    result = multihead_cross_entropy(student, teacher, segments, impl)
    for h, (o, w, t) in enumerate(zip(segments.offsets, segments.widths, segments.temperatures, strict=True)):
        p = (teacher[:, o : o + w].double() / t).softmax(1)
        torch.testing.assert_close(result.entropies[:, h].double(), -(p * p.log()).sum(1), rtol=1e-4, atol=1e-4)
        same = student[:, o : o + w].argmax(1) == teacher[:, o : o + w].argmax(1)
        assert result.agreement[:, h].bool().tolist() == same.tolist()
    assert (result.losses - result.entropies)[:20, 0].abs().max() < 1e-5  # equal logits: KL is zero


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [40, 17000], ids=["in one pass", "in blocks"])
def test_agreement_is_a_class_that_both_rank_first(impl, width):
    end = width - 1
    cases = [  # columns where the student's logits peak, with which height, and the teacher's; is it one of both?
        ({3: 5.0}, {3: 5.0}, True),
        ({end: 5.0}, {end: 5.0}, True),
        ({3: 5.0, end: 4.0}, {3: 4.0, end: 5.0}, False),
        ({3: 5.0, end: 6.0}, {3: 5.0}, False),  # agreed until the last block
        ({3: 5.0, end: 5.0}, {end: 5.0}, True),  # of two equals, the one they share
        ({3: 5.0, end: 5.0}, {20: 5.0}, False),
    ]
    student, teacher = torch.zeros(len(cases), width), torch.zeros(len(cases), width)
    for row, (ours, theirs, _) in enumerate(cases):
        for peaks, values in ((ours, student), (theirs, teacher)):
            values[row, list(peaks)] = torch.tensor(list(peaks.values()))
    segments = Segments((0,), (width,), (1.0,), (1.0,), ("softmax",))
    found = multihead_cross_entropy(student, teacher, segments, impl).agreement[:, 0]
    assert found.tolist() == [float(shared) for *_, shared in cases]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [40, 5000], ids=["in one pass", "in blocks"])
@pytest.mark.parametrize("whose", ["student", "teacher", "both"])
def test_classes_that_are_masked_by_the_lowest_number(impl, width, whose):
    segments = Segments((0,), (width,), (1.0,), (1.0,), ("softmax",))
    student, _ = logits(3, width, 4, torch.float32, 5)
    teacher = student.flip(1).contiguous()
    lowest = torch.finfo(torch.float32).min
    for z in (student,) * (whose != "teacher") + (teacher,) * (whose != "student"):
        z[:, 7] = lowest
    if whose == "student":  # what the teacher gives such a class costs that much
        teacher[:, 7] = lowest / 2
    check(student, teacher, segments, impl)
    result = multihead_cross_entropy(student, teacher, segments, impl)
    p = teacher.double().softmax(1)
    torch.testing.assert_close(result.entropies[:, 0].double(), -(p * p.clamp_min(1e-300).log()).sum(1))


def test_gradcheck():
    segments = table([4, 1, 6, 5, 5], ["softmax", "softmax", "sigmoid", "embedding", "embedding"])
    student = torch.randn(3, segments.columns, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, segments.columns, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: multihead_cross_entropy(z, teacher, segments, "torch").total, (student,))


def test_a_scaled_float16_gradient_does_not_underflow():
    segments = Segments((0,), (1000,), (1.0,), (2.0,), ("softmax",))
    student, teacher = logits(256, 1000, 1, torch.float16, 4)
    _, _, gradient = oracle(student, teacher, segments)
    leaf = student.clone().requires_grad_()
    (multihead_cross_entropy(leaf, teacher, segments).total * 65536).backward()
    recovered = leaf.grad.double() / 65536
    assert ((recovered - gradient).abs() / gradient.abs()).median() < 2e-3


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast_around_the_loss_rounds_nothing(impl):
    segments = table([13, 1000])
    student, teacher = logits(32, segments.columns, 4, torch.float32, 5)
    with torch.autocast("cpu", torch.bfloat16):
        check(student, teacher, segments, impl)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((3, 10), (3, 9), "segment table ends at column 10"),
        ((3, 10), (4, 10), "of equal B"),
        ((3,), (3,), "of equal B"),
    ],
)
def test_shapes_that_do_not_fit(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        multihead_cross_entropy(torch.zeros(student), torch.zeros(teacher), table([4, 6]))


def test_tables_that_cannot_be():
    with pytest.raises(ValueError, match="one entry per head"):
        Segments((0,), (1, 2), (1.0,), (1.0,), ("softmax",))
    with pytest.raises(ValueError, match="T > 0"):
        Segments((0,), (1,), (1.0,), (0.0,), ("softmax",))
    with pytest.raises(ValueError, match="unknown head kind"):
        Segments((0,), (1,), (1.0,), (1.0,), ("hinge",))
    with pytest.raises(ValueError, match="each of 2 features"):
        Segments((0,), (2,), (1.0,), (1.0,), ("embedding",), (standard(3),))
    with pytest.raises(ValueError, match="a standard is of an embedding"):
        Segments((0,), (3,), (1.0,), (1.0,), ("softmax",), (standard(3),))


def test_the_kernel_refuses_float64():
    with pytest.raises(ValueError, match="float32"):
        multihead_cross_entropy(torch.zeros(1, 4).double(), torch.zeros(1, 4), table([4]), "triton")


COMPILE = """
import itertools, json, re, subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fastcon.kernels.multihead_ce import Segments
from fastcon.kernels.multihead_ce_triton import _multihead_ce as kernel, launch

student, teacher, rows, widths, *kinds = json.loads(sys.argv[1])
offsets, heads, stride = [0, *itertools.accumulate(widths)][:-1], len(widths), sum(widths)
table = Segments(tuple(offsets), tuple(widths), (1.0,) * heads, (2.0,) * heads, tuple(kinds or ["softmax"] * heads))
constants = launch(table, rows, (stride,) * 3) | {"QUANTISED": teacher == "u8", "GRADIENT": True}
constants |= {name: 1 for name, value in (("rows", rows), ("heads", heads)) if value == 1}  # as at a launch
options = {option: constants.pop(option) for option in ("num_warps", "enable_fp_fusion")}
names = kernel.arg_names
pointers = {"student_ptr": student, "gradient_ptr": student, "teacher_ptr": teacher, "places_ptr": "i32"}
signature = {n: "*" + pointers.get(n, "fp32") if n.endswith("_ptr") else "constexpr" if n in constants else "i32"
             for n in names}
sixteens = [n for n in names if n.endswith("_ptr") or (n.endswith("_stride") and stride % 16 == 0)]
hints = {(names.index(n),): [["tt.divisibility", 16]] for n in sixteens}
source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, hints)
Path("cubin").write_bytes(compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"])

def tool(name, *arguments):
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    return subprocess.run([tools / name, *arguments, "cubin"], capture_output=True, text=True, check=True).stdout

registers, spilled = map(int, re.search(r"REG:(\\d+) STACK:(\\d+)", tool("cuobjdump", "-res-usage")).groups())
code = re.findall(r"^\\s+/\\*[0-9a-f]+\\*/\\s+(?:@!?U?P\\d+ )?([A-Z0-9.]+)", tool("nvdisasm", "-c"), re.M)
warps = options["num_warps"]
programs = min(65536 // (-(-registers // 8) * 8 * 32 * warps), 64 // warps, 32)
bits = [max([int(b) for b in re.findall(r"\\.(64|128)", c)] + [32]) for c in code if c.startswith(("LDG", "STG"))]
print(json.dumps({"spilled": spilled, "programs": programs, "warps": programs * warps, "widest": max(bits), "narrow": bits.count(32),
                  "a column": len(code) / (constants["BLOCK"] // (32 * warps))}))
"""


@pytest.mark.parametrize(
    ("case", "widest"),
    [
        (["bf16", "fp16", 32, [1000]], 128),  # rows of 1,000: multiples of 8, not of 16
        (["bf16", "fp16", 1024, [1000, 1000, 1000]], 128),
        (["bf16", "fp16", 1024, [1500, 1500]], 64),
        (["fp32", "fp32", 256, [1000]], 128),
        (["fp16", "u8", 1024, [1000, 200]], 128),
        (["bf16", "fp16", 4096, [10_000]], 128),
        (["bf16", "u8", 32, [10_000]], 128),
        (["bf16", "fp16", 1, [1000, 200]], 128),
        (["bf16", "fp16", 1024, [1000, 768], "softmax", "embedding"], 128),
        (["bf16", "u8", 32, [384], "embedding"], 128),
    ],
    ids=str,
)
def test_compiles_for_a_hopper_gpu(case, widest, tmp_path):
    """As it would be launched there, which needs no GPU: all logits in wide loads, room for other warps, few steps."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    arguments = [sys.executable, "-c", COMPILE, json.dumps(case)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["spilled"], found["widest"]) == (0, widest)
    assert found["narrow"] <= 11  # the table, the scales and the results of a (row, head)
    assert found["warps"] >= 16
    assert 132 * found["programs"] * max(case[3]) * 4 < 40e6  # what is walked twice stays in a GPU's L2
    both = len(case) > 4  # steps of both kinds
    assert case[2] * len(case[3]) < MANY or found["a column"] < (80 if both else 55)
