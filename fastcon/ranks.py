"""The processes that torchrun started, as ranks that do one job: who they are, and what they tell each other.

Without torchrun there is one rank, and nothing here does anything. Gradients go through DistributedDataParallel (NCCL
between GPUs, else Gloo); everything else, a few numbers a step, through Gloo. A rank that dies closes its connections,
so the others notice at once.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import inspect
import os
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from fastcon.errors import FastconError
from fastcon.machine import rank

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=1)
"""How long a rank waits for another one that lives: the first may be indexing the images."""
_LOST = re.compile(r"gloo|nccl|connection|broken pipe|processgroup|timed? ?out|socket", re.IGNORECASE)


class Told(FastconError):
    """An error that another rank reports."""


class Ranks:
    """This process among those that work together; made by `join`."""

    def __init__(self, number: int, count: int, group: Any = None) -> None:
        self.number, self.count, self._group = number, count, group

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.number == 0

    def same(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on all of them; so is its FastconError."""
        if self.count == 1:
            return make()
        import torch.distributed as dist

        outcome: list[Any] = [None]
        if self.first:
            try:
                outcome = [(make(), None)]
            except FastconError as error:
                outcome = [(None, error)]
        with self.lost():
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        value, failed = outcome[0]
        if failed is not None:
            raise failed if self.first else Told(str(failed))
        return value

    def all(self, value: T) -> list[T]:
        """The values of all ranks, on each of them."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        with self.lost():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def most(self, *numbers: int) -> list[int]:
        """The largest of each number over all ranks."""
        if self.count == 1:
            return list(numbers)
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(numbers)
        with self.lost():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return tensor.tolist()

    def total(self, tensor: Tensor) -> Tensor:
        """A tensor's sum over all ranks."""
        if self.count == 1:
            return tensor
        import torch.distributed as dist

        tensor = tensor.clone()
        with self.lost():
            dist.all_reduce(tensor)
        return tensor

    def share(self, count: int) -> range:
        """Which of `count` things this rank does: consecutive ones, those of all ranks in their order."""
        return range(self.number * count // self.count, (self.number + 1) * count // self.count)

    def error(self, text: str) -> FastconError:
        """An error that all ranks come to by themselves, to be said by the first."""
        return FastconError(text) if self.first else Told(text)

    def align(self, module: nn.Module) -> None:
        """Give all ranks the buffers of the first."""
        if self.count == 1:
            return
        import torch.distributed as dist

        with self.lost():
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    @contextlib.contextmanager
    def agreeing(self, in_turn: bool = False) -> Iterator[None]:
        """What every rank does by itself; if one of them fails, all do, and the error is said once.

        in_turn: the first rank does it before the others, which then find in the cache what takes long.
        """
        if self.count == 1:
            yield
            return
        if in_turn and not self.first:
            self.same(lambda: None)
        error: FastconError | None = None
        try:
            yield
        except FastconError as caught:
            error = caught
        if in_turn and self.first:
            self.same(lambda: _raised(error))
        errors = self.all(None if error is None else str(error))
        failed = [(number, text) for number, text in enumerate(errors) if text is not None]
        if failed:
            number, text = failed[0]
            where = "" if len(failed) == self.count else f"rank {number} of {self.count}: "
            raise (FastconError if self.first else Told)(where + text)

    def require_same(self, what: str, value: Any) -> None:
        """Raise FastconError where the ranks have different values."""
        values = self.all(value)
        other = next((number for number, one in enumerate(values) if one != values[0]), None)
        if other is not None:
            keys = sorted(key for key in values[0] if values[0][key] != values[other].get(key))
            text = f"rank {other} has {what} than rank 0: {keys[0] if keys else 'others'} differ"
            raise self.error(text)

    def parallel(self, model: nn.Module, buffers: bool) -> nn.Module:
        """The model with its gradients averaged over all ranks; buffers: whether training changes buffers."""
        if self.count == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        known = inspect.signature(DistributedDataParallel).parameters
        copied = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
        options: dict[str, Any] = {"static_graph": True, "gradient_as_bucket_view": True, copied: buffers}
        with self.lost():
            return DistributedDataParallel(model, **options)

    @contextlib.contextmanager
    def lost(self, way: str = "") -> Iterator[None]:
        """Say in one line that another rank is gone, where PyTorch says it in its own way."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _LOST.search(str(error)):
                raise
            kind = FastconError if self.first else Told
            raise kind(f"one of the {self.count} ranks is gone, and so the others end{way}") from error


ALONE = Ranks(0, 1)
"""The one rank there is without torchrun."""


def join(device: torch.device) -> Ranks:
    """Join the other ranks that torchrun started; at the end of the process they part. Raises FastconError."""
    number, count = rank()
    if count == 1:
        return Ranks(0, 1)
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        if device.type == "cuda":
            here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", count)), torch.cuda.device_count()
            if here > gpus:
                kind = Told if number else FastconError
                raise kind(f"{here} ranks here, and PyTorch sees {gpus} GPUs: use `torchrun --nproc-per-node {gpus}`")
            torch.cuda.set_device(device)
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise FastconError(
                f"the {count} ranks do not find each other ({error}): start them with torchrun"
            ) from error
        atexit.register(_part)
    group = dist.new_group(backend="gloo", timeout=PATIENCE) if device.type == "cuda" else None
    return Ranks(number, count, group)


def _part() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _raised(error: FastconError | None) -> None:
    if error is not None:
        raise error
