"""What every training loop needs: a precision, an optimizer, and checkpoints to go on from after a stop.

Checkpoints hold tensors and plain values only, and the newest readable one counts.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fastcon.cores import Cores, cpu_name
from fastcon.files import remembered, write_atomically
from fastcon.machine import WORTH, Machine, cpu_has_bfloat16, precision_context
from fastcon.models.classifier import Classifier
from fastcon.ranks import Ranks
from fastcon.run import recorded

KEEP = 2
FORMAT = 2
"""Checkpoint format; checkpoints of another one are skipped."""
ROUNDS = 3
TRIED = 32
"""Most images per batch to measure with: larger batches give nearly the same ratios and take long."""
ENOUGH = 5.0
"""Seconds after which the measurements so far decide."""
AMPERE = (8, 0)
"""The first compute capability of NVIDIA with bfloat16 in hardware."""


def settle(machine: Machine, network: Classifier, batch_size: int, out: str | None = None) -> Machine:
    """`machine` with "auto" resolved to train `network`; the run in the folder `out`, if there is one, keeps what it has.

    A GPU takes bfloat16, or float16 where it lacks that. A CPU takes float32 unless a few steps of bfloat16 are at least
    WORTH times as fast: which it is depends on the network more than on the CPU. What they took is cached.
    """
    device, precision = machine.target, machine.precision
    if precision == "auto" and out is not None:
        precision = recorded(out, "precision") or "auto"
    if precision == "auto" and device.type == "cuda":
        precision = "bfloat16" if torch.cuda.get_device_capability(device) >= AMPERE else "float16"
    if precision == "auto":
        precision = _faster(network, batch_size, machine) if cpu_has_bfloat16() else "float32"
    return dataclasses.replace(machine, device=str(device), precision=precision)


def _faster(network: Classifier, batch_size: int, machine: Machine) -> str:
    """The precision in which a CPU trains `network`: measured once, then read from the cache."""
    batch_size = min(batch_size, TRIED)
    case = [network.architecture, network.size, batch_size, machine.cores, cpu_name(), torch.__version__]

    def measure() -> dict[str, float]:
        pixels = torch.zeros(batch_size, 3, network.size, network.size, dtype=torch.uint8)
        cases = {precision: (pixels, precision) for precision in ("float32", "bfloat16")}
        with torch.random.fork_rng(devices=[]), machine.computing() as cores:
            return step_seconds(copy.deepcopy(network).on(machine.target).train(), cases, cores)

    seconds = remembered("precision", case, measure)
    return "bfloat16" if seconds["float32"] >= WORTH * seconds["bfloat16"] else "float32"


def step_seconds(network: Classifier, cases: dict[str, tuple[Tensor, str]], cores: Cores) -> dict[str, float]:
    """Seconds per image of a forward and a backward pass, for each case: (uint8 [B, 3, size, size], precision).

    The minimum of up to ROUNDS interleaved rounds, after one to warm up. Changes gradients and, where they are trained,
    running statistics.
    """
    best = dict.fromkeys(cases, math.inf)
    started = math.inf
    for round_ in range(ROUNDS + 1):
        for name, (pixels, precision) in cases.items():
            seconds = _step(network, pixels, precision, cores)
            if round_:  # the first warms up
                best[name] = min(best[name], seconds / len(pixels))
        if time.monotonic() - started > ENOUGH:
            break
        started = min(started, time.monotonic())
    network.zero_grad(set_to_none=True)
    return best


def _step(network: Classifier, pixels: Tensor, precision: str, cores: Cores) -> float:
    network.zero_grad(set_to_none=True)
    with cores.turn():
        started = time.perf_counter()
        with precision_context(precision, pixels.device):
            logits = network(pixels)
        logits.square().mean().backward()
        if pixels.is_cuda:
            torch.cuda.synchronize(pixels.device)
        return time.perf_counter() - started


class Loop:
    """The state of a training loop, which can be saved after any step. Resumed, it continues as if it had never
    stopped: on a CPU to the last bit.
    """

    def __init__(
        self,
        model: Classifier,
        optimizer: torch.optim.Optimizer,
        machine: Machine,
        folder: Path,
        seconds: float,
        ranks: Ranks | None = None,
        clip: float | None = None,
        ema: float | None = None,
    ) -> None:
        """machine: settled; folder: where checkpoints lie, which the first of the ranks reads and writes; seconds: the time
        between two of them; clip: largest norm of the gradient; ema: decay of the running mean of the weights."""
        self.model, self.optimizer, self.step = model, optimizer, 0
        self._clip, self._mean = clip, None if ema is None else _running_mean(model, ema)
        self.ranks = ranks or Ranks(0, 1)
        self.device = machine.target
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=machine.precision == "float16")
        self._folder, self._seconds, self._saved = folder, seconds, time.monotonic()

    def begin(self, seed: int) -> dict[str, Any] | None:
        """Continue from the newest checkpoint and return what else was saved with it; without one, seed the random state."""
        state = self.ranks.same(lambda: newest(self._folder))
        if state is None:
            torch.manual_seed(seed + self.ranks.number)  # each rank drops out others
            return None
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self._mean is not None:
            self._mean.load_state_dict(state["mean"])
        self.step = state["step"]
        others = state.get("rngs", [state["rng"]])
        if self.ranks.number < len(others):
            _set_rng(others[self.ranks.number], self.device)
        else:  # more ranks than before
            torch.manual_seed(seed + self.ranks.number + (self.step << 16))
        return state["more"]

    def update(self, loss: Tensor) -> None:
        """One optimizer step on a loss."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self._clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self._mean is not None:
            self._mean.update_parameters(self.model)
        self.step += 1

    def end(self) -> None:
        """Leave the running mean of the weights in the model, where there is one."""
        if self._mean is not None:
            with torch.no_grad():
                for parameter, mean in zip(self.model.parameters(), self._mean.module.parameters(), strict=True):
                    parameter.copy_(mean)

    def due(self) -> bool:
        """Whether the next checkpoint is due."""
        return time.monotonic() - self._saved > self._seconds

    def save(self, more: dict[str, Any]) -> None:
        """Write a checkpoint, with whatever else the loop needs to continue."""
        state = {
            "format": FORMAT,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": _rng_state(self.device),
            "step": self.step,
            "more": more,
        }
        if self._mean is not None:
            state["mean"] = self._mean.state_dict()
        rngs = self.ranks.all(state["rng"])
        if len(rngs) > 1:
            state["rngs"] = rngs
        if self.ranks.first:
            _write(self._folder, self.step, state)
        self._saved = time.monotonic()


def _running_mean(model: Classifier, decay: float) -> AveragedModel:
    """The exponential mean of a model's weights, with a smaller decay in its first steps, so that it forgets the start."""

    def mean(averages: list[Tensor], values: list[Tensor], count: Tensor | int) -> None:
        now = min(decay, (1 + float(count)) / (10 + float(count)))
        torch._foreach_lerp_(averages, values, 1 - now)

    return AveragedModel(model, multi_avg_fn=torch.no_grad()(mean))  # type: ignore[arg-type]


def make_optimizer(
    student: Classifier,
    lr_backbone: float,
    lr_heads: float,
    momentum: float,
    weight_decay: float,
    adamw: bool = False,
) -> torch.optim.Optimizer:
    """SGD, or AdamW without decay of biases and norms, with one learning rate for the backbone and one for the heads."""
    parts = (list(student.backbone_parameters()), lr_backbone), (list(student.head_module.parameters()), lr_heads)
    if adamw:
        groups = [
            {"params": some, "lr": lr, "base": lr, "weight_decay": decay}
            for parameters, lr in parts
            for some, decay in (
                ([p for p in parameters if p.ndim > 1], weight_decay),
                ([p for p in parameters if p.ndim <= 1], 0.0),
            )
            if some
        ]
        return torch.optim.AdamW(groups, fused=True)
    groups = [{"params": parameters, "lr": lr, "base": lr} for parameters, lr in parts]
    optimizer = torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay, fused=True)
    # Where a scaler skips the very first step, torch 2.15's fused SGD leaves its buffers uninitialised and uses them.
    for group in optimizer.param_groups if momentum else ():
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_rate(
    optimizer: torch.optim.Optimizer,
    progress: float,
    milestones: tuple[float, ...] = (),
    warm_up: float = 0.0,
    cosine: bool = False,
) -> None:
    """Set each group's learning rate at a share of the run: its base, multiplied by 0.1 for every milestone that is passed;
    in the first `warm_up` of the run by the share of that; and after it, with `cosine`, by half a cosine down to 0."""
    factor = 0.1 ** sum(progress >= milestone for milestone in milestones)
    if progress < warm_up:
        factor *= progress / warm_up
    elif cosine:
        factor *= 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * factor


def compiled(model: nn.Module, mode: str) -> Callable[[Tensor], Tensor]:
    """A network as it is ("none"), by torch.compile ("default"), or that with CUDA graphs ("graphs")."""
    if mode == "none":
        return model
    return torch.compile(model, mode={"default": "default", "graphs": "reduce-overhead"}[mode])


def newest(folder: Path) -> dict[str, Any] | None:
    """The newest readable checkpoint, or None. Only tensors and plain values are ever loaded."""
    for path in reversed(_steps(folder)):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:
            continue
        if state.get("format") == FORMAT:
            return state
    return None


def _write(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write the checkpoint of a step and forget all but the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(folder / f"step-{step:09d}.pt", buffer.getvalue())
    for old in _steps(folder)[:-KEEP]:
        old.unlink()


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.pt") if re.fullmatch(r"step-\d{9}\.pt", path.name))


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    """The random state that dropout draws from: the CPU's and, where it is one, the GPU's."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_rng(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore a state that `_rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
