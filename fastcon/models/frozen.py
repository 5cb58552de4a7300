"""A network for inference only, as it is or compiled by PyTorch's Inductor with its weights frozen in.

Compiled, batch-norms are part of the convolutions before them, weights are cast and packed once, and the rest is
fused. It takes a compiler (on a CPU, one for C++) and, for each network, some ten seconds. Logits differ by rounding
only.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastcon.cores import Cores, cpu_name
from fastcon.errors import FastconError
from fastcon.files import remembered
from fastcon.machine import WORTH, Machine
from fastcon.models.classifier import Classifier

PLAIN, COMPILED = "none", "default"
LEAST = 120.0
"""Least seconds of plain running at which compiling is tried."""
ROUNDS = 5
ENOUGH = 5.0
"""Seconds after which the measurements so far decide."""
GLANCE = 8
"""Images from which the time of a network is estimated."""
LARGEST_NUMBER = 1_000
"""Most compiled networks per process: beyond its own limit PyTorch would run them uncompiled, with a warning."""


class Frozen:
    """A classifier in evaluation mode on a machine: uint8 pixels [B, 3, S, S] → float32 logits [B, C].

    Compiled, it computes batches of one size only; a shorter one is padded, and the padding is dropped.
    """

    def __init__(self, model: Classifier, machine: Machine, batch_size: int, compile: str = PLAIN) -> None:
        """machine: settled. compile: "none" or "default". batch_size: the largest batch to expect."""
        self._model = model.on(machine.target).eval()
        self._machine, self._batch_size, self.size = machine, batch_size, model.size
        self._run: Callable[[Tensor], Tensor] = self._model
        if compile == COMPILED:
            self._run = self._compiled()

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """The logits of a batch, on the machine's device."""
        with self._machine.autocast():
            return self._run(pixels)

    def seconds(self) -> float:
        """Seconds per image of a full batch, measured once."""
        pixels = self._batch()
        started = time.perf_counter()
        self(pixels)
        if pixels.is_cuda:
            torch.cuda.synchronize(pixels.device)
        return (time.perf_counter() - started) / len(pixels)

    def _batch(self) -> Tensor:
        pixels = torch.zeros((self._batch_size, 3, self.size, self.size), dtype=torch.uint8)
        return pixels.to(self._machine.target, memory_format=torch.channels_last)

    @torch.no_grad()
    def _compiled(self) -> Callable[[Tensor], Tensor]:
        """Compile now rather than at the first batch. Raises FastconError where that does not work."""
        full = (
            self._batch()
        )  # always the same tensor: one with other properties would trigger another compilation, without freezing
        network = torch.compile(folded(self._model), dynamic=False)
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # warns that a CPU is not a GPU

        def run(pixels: Tensor) -> Tensor:
            full[: len(pixels)] = pixels
            return network(full)[: len(pixels)]

        try:
            with (
                torch._inductor.config.patch(freezing=True),  # passed as an option of torch.compile it has no effect
                torch._dynamo.config.patch(recompile_limit=LARGEST_NUMBER),
                self._machine.autocast(),
            ):
                run(full)
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise FastconError(
                f"{self._model.architecture} cannot be compiled here ({reason}): `compile` none runs it as it is"
            ) from error
        return run


@torch.no_grad()
def folded(model: Classifier) -> Classifier:
    """A copy whose batch-norms are folded into the convolutions before them.

    In float32, before anything is cast: Inductor alone scales weights that are rounded already, and rounds them again. The
    copy is as it was where logits would change.
    """
    copied = copy.deepcopy(model)
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}

    def remember(module: nn.Conv2d, _: object, out: Tensor) -> None:
        made[id(out)] = module, out

    def pair(module: nn.BatchNorm2d, given: tuple[Tensor, ...]) -> None:
        if id(given[0]) in made:
            pairs.append((made[id(given[0])][0], module))

    convolutions = [module for module in copied.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in copied.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [module.register_forward_hook(remember) for module in convolutions]
    hooks += [module.register_forward_pre_hook(pair) for module in norms]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 3, model.size, model.size), generator=generator, dtype=torch.uint8)
    pixels = pixels.to(next(model.parameters()).device)
    before = copied(pixels)
    for hook in hooks:
        hook.remove()
    for convolution, norm in pairs:
        _fold(convolution, norm)
    same = torch.allclose(copied(pixels), before, rtol=1e-3, atol=1e-3 * float(before.std()))
    return copied if same else copy.deepcopy(model)


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    if norm.running_mean is None or norm.running_var is None or not norm.affine:
        return
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = -norm.running_mean if convolution.bias is None else convolution.bias - norm.running_mean
    convolution.weight.mul_(scale.view(-1, 1, 1, 1))
    convolution.bias = nn.Parameter(bias * scale + norm.bias)
    for value, neutral in ((norm.running_mean, 0), (norm.running_var, 1 - norm.eps), (norm.weight, 1), (norm.bias, 0)):
        value.fill_(neutral)


def choose(model: Classifier, machine: Machine, batch_size: int, rows: int, say: Callable[[str], None]) -> str:
    """How to run a network on `rows` images: "default", compiled, where that pays for itself, else "none".

    The measurement is cached, so that the same work on the same machine is done in the same way.
    """
    case = [model.architecture, model.size, batch_size, machine.device, machine.precision, machine.cores]
    case += [cpu_name(), torch.__version__]

    def glance() -> dict[str, float]:
        with machine.computing() as cores:
            return seconds({PLAIN: Frozen(model, machine, min(GLANCE, batch_size))}, cores, rounds=1)

    def measure() -> dict[str, float]:
        with machine.computing() as cores:
            return seconds({way: Frozen(model, machine, batch_size, way) for way in (PLAIN, COMPILED)}, cores)

    if rows * remembered("plain", case, glance)[PLAIN] < LEAST:
        return PLAIN
    try:
        taken = remembered("compiled", case, measure)
    except FastconError as error:  # no compiler, or a network it cannot compile
        say(str(error))
        return PLAIN
    ratio = taken[PLAIN] / taken[COMPILED]
    how = COMPILED if ratio >= WORTH else PLAIN
    say(
        f"{model.architecture} runs {'compiled' if how == COMPILED else 'as it is'}: compiled is {ratio:.2f} times as fast"
    )
    return how


def seconds(variants: dict[str, Frozen], cores: Cores, rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds per image of each: the minimum over so many interleaved rounds, after one to warm up."""
    best = dict.fromkeys(variants, math.inf)
    begun = time.monotonic()
    for round_ in range(rounds + 1):
        if round_ > 1 and time.monotonic() - begun > ENOUGH:
            break
        for name, run in variants.items():
            with cores.turn():
                taken = run.seconds()
            if round_:
                best[name] = min(best[name], taken)
    return best
