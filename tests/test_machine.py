"""Where and how to compute: what a machine's options mean, and memory that is freed is used again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from fastcon.errors import UsageError
from fastcon.machine import Machine, _without_tf32, cpu_has_bfloat16

PROGRAM = """
import resource, sys
import numpy as np
if sys.argv[1] == "keep":
    from fastcon.machine import keep_freed_memory
    keep_freed_memory()
def fill():
    kept = [np.ones(2 << 20, dtype=np.uint8) for _ in range(8)]
for _ in range(3):
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_not_fetched_from_the_system_again():
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("give back") > 10 * 8 * 100  # a page fault for every 4 KiB, were they all small pages
    assert faults("keep") < 100


def test_a_settled_machine_says_what_auto_means():
    machine = Machine("cpu")
    assert machine.settled().device == "cpu"
    assert machine.settled().precision == ("bfloat16" if cpu_has_bfloat16() else "float32")
    assert Machine("cpu", "float16").settled() == Machine("cpu", "float16")
    assert machine.target == torch.device("cpu")
    assert Machine(threads=3).cores == 3


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"precision": "float8"}, {"loader": "pil"}])
def test_what_a_machine_cannot_be(wrong):
    with pytest.raises(UsageError, match=f"`{next(iter(wrong))}`"):
        Machine(**wrong)


def test_autocast_is_that_of_the_precision():
    with Machine("cpu", "bfloat16").autocast():
        assert torch.nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.bfloat16
    with Machine("cpu", "float32").autocast():
        assert torch.nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.float32


def test_float32_on_a_gpu_is_not_tf32():
    cudnn = torch.backends.cudnn
    assert cudnn.allow_tf32  # what PyTorch starts with
    with _without_tf32(torch.device("cuda")):
        assert not cudnn.allow_tf32
    assert cudnn.allow_tf32
    with _without_tf32(torch.device("cpu")):
        assert cudnn.allow_tf32
