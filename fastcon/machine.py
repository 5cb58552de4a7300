"""Where and how to compute: one object for every stage. Importing this module does not import PyTorch."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcon.cores import Cores, default_threads
from fastcon.errors import FastconError
from fastcon.options import Options, option

if TYPE_CHECKING:
    import torch

LOADERS = ("dali", "torchvision")
WORTH = 1.1
"""Least speed-up at which something is preferred to what is finer, plainer or already chosen."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
_LARGEST_MMAP_THRESHOLD = 32 << 20  # its maximum


@dataclasses.dataclass(frozen=True)
class Machine(Options):
    """Device, precision, decoder and threads."""

    device: str = option("auto", "cpu, cuda, cuda:1 … ; auto: a GPU if there is one.")
    precision: str = option(
        "auto",
        "What the network computes in; heads are always float32.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    loader: str = option("dali", "Image decoder.", choices=LOADERS)
    threads: int | None = option(None, "Threads, to decode and to compute (default: one per core).", low=1)

    @property
    def target(self) -> torch.device:
        """The device. Raises FastconError for a GPU that does not exist."""
        return choose_device(self.device)

    @property
    def cores(self) -> int:
        """Threads to decode and to compute with."""
        return self.threads or default_threads()

    def settled(self) -> Machine:
        """With "auto" resolved: the device that there is, and the precision in which networks run there untrained.

        A fixed rule, so that two calls store the same bytes; what a network trains in is `training.settle`'s to say.
        """
        device = self.target
        return dataclasses.replace(self, device=str(device), precision=choose_precision(self.precision, device))

    def autocast(self) -> AbstractContextManager[Any]:
        """What a network's forward pass runs in; an unsettled precision is that of inference."""
        return precision_context(choose_precision(self.precision, self.target), self.target)

    @contextlib.contextmanager
    def computing(self, turns: bool = True) -> Iterator[Cores]:
        """The context of a stage's forward and backward passes: its cores, and true float32 (no TF32) on a GPU.

        turns: as in `Cores`.
        """
        with Cores(self.threads, self.target, turns=turns) as cores, _without_tf32(self.target):
            yield cores


def precision_context(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast for "float32", "bfloat16" or "float16" on `device`."""
    import torch

    dtype = getattr(torch, precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def choose_precision(precision: str, device: torch.device) -> str:
    """Resolve "auto" for inference: float16 on a GPU (finer than bfloat16), bfloat16 where a CPU has it, else float32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "float16"
    return "bfloat16" if cpu_has_bfloat16() else "float32"


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    import torch

    supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported and bool(_flags() & {"avx512_bf16", "amx_bf16"})


def rank() -> tuple[int, int]:
    """The number of this process and how many there are, as torchrun says; 0 of 1 without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def choose_device(device: str) -> torch.device:
    """Resolve "auto" to a GPU, else the CPU; of GPUs the first, or under torchrun this process's. Raises FastconError for a
    GPU that is not there."""
    import torch

    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = "cuda"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise FastconError(f"`device` {device} is none of auto, cpu, cuda and cuda:N")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise FastconError(f"`device` {device}: PyTorch sees no GPU here; use `device` cpu or auto")
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return chosen


def keep_freed_memory() -> None:
    """Let glibc reuse what it frees instead of handing it back, for the whole process; meant for commands.

    Activations are megabytes that come and go with every layer, and fresh pages from the system cost more than
    filling them. Does nothing where there is no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


@contextlib.contextmanager
def _without_tf32(device: torch.device) -> Iterator[None]:
    """Let cuDNN's float32 convolutions round to float32, not to TF32's 10 bits; a process-wide switch, restored afterwards."""
    import torch

    cudnn = torch.backends.cudnn
    try:
        before = cudnn.allow_tf32
    except RuntimeError:  # set through the newer switches, which do not mix with this one: leave them alone
        before = False
    if device.type != "cuda" or not before:
        yield
        return
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def _flags() -> set[str]:
    with contextlib.suppress(OSError):
        return set(Path("/proc/cpuinfo").read_text().split())
    return set()
