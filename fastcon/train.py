"""Store + images → a student: one backbone, one head a teacher, trained on the stored logits.

RUN/student.safetensors is the backbone with head 0 under torchvision's names, RUN/heads.safetensors all heads.
Rerunning resumes from the last checkpoint; a finished run is left alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcon import advice, checkpoint, models, objective
from fastcon.codec import TopK
from fastcon.errors import FastconError, Interrupted, optional_import
from fastcon.kernels.multihead_ce import MultiHeadLoss
from fastcon.loader import Batch, Loader
from fastcon.machine import Cores
from fastcon.manifest import Manifest
from fastcon.models import RUN_HEADS, RUN_WEIGHTS, Classifier, Head
from fastcon.run import Metrics, Run, Waits, stop_signals
from fastcon.store import Store

Untrained = tuple[dict[str, Tensor], dict[str, str]]
"""Weights and metadata of a head 0 that no loss trains."""

LABELS_HEAD = "labels"
METRICS = ("loss", "kl", "agreement")
RESULT = RUN_WEIGHTS[0]
COMPARED = 256
"""Images on which the student is compared with its generalist before the first step."""
ALIKE = 0.9
"""Share of them on which the two name the same class, at least, where they are the same network."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Hyperparameters of a run; the defaults are the paper's."""

    method: str = "consolidate"
    heads: tuple[str, ...] = ()
    views: int | None = None
    student: str | None = None
    balance: tuple[float, float] = (1.0, 1.0)
    temperature: float = 2.0
    labels: bool = False
    epochs: int = 40
    batch_size: int = 32
    lr_backbone: float = 0.001
    lr_heads: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[float, ...] = (0.5, 0.8)
    batch_norm: str = "auto"
    dropout: bool = False
    seed: int = 0
    lanes: int | None = None
    precision: str = "auto"


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where and how to run, which does not change what is trained."""

    device: str = "auto"
    loader: str = "dali"
    threads: int | None = None
    compile: str = "none"
    """Of torch.compile: "none", "default", or "graphs": CUDA graphs, for small batches on a GPU."""
    exact_pixels: bool = False
    log_every: int = 100
    checkpoint_seconds: float = 300.0
    advise_seconds: float = 60.0
    """Runs that take longer measure, when they are done, what would make their steps faster."""
    tensorboard: bool = False


def train(
    store_path: str,
    out: str,
    options: Options,
    machine: Machine | None = None,
    images: list[str] | Manifest | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train a student into the folder `out` and return its last metrics. say gets notes and warnings for the user.

    Raises FastconError for anything that does not fit, Interrupted after a signal (the state is then saved).
    """
    machine = machine or Machine()
    store = Store(store_path)
    device = models.choose_device(machine.device)
    start = _start(store, options.student)
    options = dataclasses.replace(
        options,
        precision=models.choose_precision(options.precision, device, training=True),
        batch_norm=models.choose_batch_norm(options.batch_norm, start),
    )
    names = objective.choose_heads(options.method, list(store.teachers), store.generalist, options.heads)
    config = {"command": "train", "store": _identity(store, names), **dataclasses.asdict(options)}
    run = Run(out, config, machine.threads)
    if run.finished(RESULT):
        say(f"{out} is finished: nothing to do")
        return json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    loader = Loader(
        store,
        images,
        options.batch_size,
        heads=names,
        views=options.views,
        seed=options.seed,
        lanes=options.lanes,
        device=device,
        loader=machine.loader,
        threads=run.threads,
        exact_pixels=machine.exact_pixels,
    )
    if loader.warning:
        say(f"warning: {loader.warning}")
    warning = rough_temperature(store, names, options.temperature)
    if warning:
        say(f"warning: {warning}")
    if loader.schedule.left_out:
        say(
            f"{loader.schedule.left_out} of {store.rows} images are left out of each epoch (batches of {options.batch_size})"
        )

    state = checkpoint.newest(run.checkpoints)
    begun = None
    if state is None and starts_as_generalist(start, store):
        begun = agreement(start, loader, options, run.threads)
        begun.warn(say, options)
    student, untrained = build_student(start, store, names, options, loader, say)
    run.begin()
    student.on(device).learn(options.batch_norm, options.dropout)
    weights = objective.head_weights(names, store.generalist, options.balance)
    widths, kinds = zip(*((len(head.classes), head.kind) for head in student.heads[: len(names)]), strict=True)
    segments = objective.segments(widths, weights, options.temperature, kinds)
    optimizer = make_optimizer(student, options.lr_backbone, options.lr_heads, options.momentum, options.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "float16")
    total = loader.schedule.steps * options.epochs
    tally = _Tally(names + ([LABELS_HEAD] if options.labels else []), device)

    step, position = 0, 0
    if state is not None:
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        set_rng(state["rng"], device)
        tally.load(state["tally"])
        step, position = state["step"], state["metrics"]
        say(f"resuming {out} at step {step} of {total}")
    else:
        torch.manual_seed(options.seed)
    metrics = Metrics(run.path / "metrics.jsonl", position)
    if begun:
        metrics.write(begun.row())
    board = _tensorboard(run, step) if machine.tensorboard else None
    forward = models.compiled(student, machine.compile)

    row: dict[str, Any] = {}
    taken: _Taken | None = None
    logged = time.monotonic()

    def report(wait: bool) -> None:
        """Write the row that was last taken, when its sums have arrived from the device."""
        nonlocal row, taken, logged
        if taken is None or not (wait or taken.arrived()):
            return
        taken.refuse_nan(out)
        row, taken = taken.row(), None
        metrics.write(row)
        now = time.monotonic()
        run.log(f"step {row['step']}/{total} loss {row['loss']:.4f} {row['images'] / (now - logged):.0f} img/s")
        logged = now
        if board:
            _write_board(board, row)

    def save() -> None:
        report(wait=True)
        tally.take({"step": step}, reset=False).refuse_nan(out)
        checkpoint.save(
            run.checkpoints,
            step,
            {
                "student": student.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "rng": rng_state(device),
                "tally": tally.state(),
                "step": step,
                "metrics": metrics.position,
            },
        )

    epoch, done = divmod(step, loader.schedule.steps)
    saved = began = time.monotonic()
    start_step = step
    with Cores(run.threads, device) as cores, stop_signals() as stop:
        waits = Waits(loader.waits, cores)
        for batch in loader.batches(range(epoch, options.epochs), skip=done):
            set_rate(optimizer, step / total, options.milestones)
            with cores.turn():
                with models.precision_context(options.precision, device):
                    logits = forward(batch.pixels)
                result, supervised = _losses(logits, batch, segments, options)
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(result.total if supervised is None else result.total + supervised).backward()
                scaler.step(optimizer)
                scaler.update()
            tally.add(result, weights, supervised)
            step += 1
            housekeeping = time.perf_counter()
            if step % machine.log_every == 0 or step % loader.schedule.steps == 0:
                report(wait=True)
                about = {"step": step, "epoch": (step - 1) // loader.schedule.steps, **_rates(optimizer)}
                taken = tally.take(about)
            report(wait=False)
            if progress:
                progress(step, total)
            if stop or time.monotonic() - saved > machine.checkpoint_seconds or step % loader.schedule.steps == 0:
                save()
                saved = time.monotonic()
            waits.step(time.perf_counter() - housekeeping)
            if stop and step < total:
                metrics.close()
                waits.write(run)
                raise Interrupted(
                    f"stopped by signal {stop[0]} at step {step} of {total}, saved; run the same command to resume"
                )
        report(wait=True)
        metrics.close()
        if board:
            board.close()
        checkpoint.write_atomically(run.path / RUN_HEADS, student.export_heads())
        run.end(RESULT, _export(student, names, untrained))
        long = time.monotonic() - began > machine.advise_seconds and step > start_step
        waits.write(run, advice.measure(student, batch.pixels, options.precision, cores) if long else None)
    return row


def rough_temperature(store: Store, names: list[str], temperature: float) -> str | None:
    """What to say where logits are stored so that another temperature is exact."""
    rough = [n for n in names if isinstance(store.codec(n), TopK) and temperature != TopK.temperature]
    if not rough:
        return None
    return (
        f"teacher {rough[0]!r} is stored as {store.codec(rough[0]).name}, exact at T = {TopK.temperature:g} and rough "
        f"at T = {temperature:g}: store it with --logits float16 or uint8"
    )


def _start(store: Store, student: str | None) -> Classifier:
    """The network that the student starts as: the generalist, from its stored weights, or --student."""
    if student is None and store.generalist is None:
        raise FastconError(
            "the store has no generalist to start from: give --student MODEL (the paper found that a student "
            "that does not start from a generalist loses most of what makes it general)"
        )
    if student is not None:
        start = models.load(student, size=store.recipe.size)
    else:
        start = models.from_bytes(store.weights(str(store.generalist)), f"the generalist of {store.path}")
    start.set_size(store.recipe.size)
    return start


class Agreement(NamedTuple):
    """How far the student, before its first step and as it is trained, is the generalist: means over some images."""

    head: str
    images: int
    loss: float
    kl: float
    agreement: float

    def row(self) -> dict[str, Any]:
        """The first row of the metrics."""
        values = dict(zip(METRICS, (self.loss, self.kl, self.agreement), strict=True))
        return {"step": 0, "epoch": 0, "images": self.images, "loss": self.loss, "heads": {self.head: values}}

    def warn(self, say: Callable[[str], None], options: Options) -> None:
        """Say so where a student that starts with the generalist's head is another network."""
        if self.agreement >= ALIKE:
            return
        modes = {"--batch-norm running": options.batch_norm == "batch", "--no-dropout": options.dropout}
        remedies = [flag for flag, gone in modes.items() if gone]
        say(
            f"warning: the student does not start as its generalist: they agree on {self.agreement:.0%} of {self.images} "
            f"images (KL {self.kl:.2g}): {''.join(f'try {flag}; ' for flag in remedies)}"
            "other weights, size, mean or std are the usual reasons"
        )


def starts_as_generalist(start: Classifier, store: Store) -> bool:
    """Whether a student keeps the head it comes with as head 0."""
    if store.generalist is None:
        return False
    general = store.teachers[store.generalist]
    return (start.architecture, start.heads[0].classes) == (general["architecture"], tuple(general["classes"]))


def agreement(start: Classifier, loader: Loader, options: Options, threads: int) -> Agreement:
    """Compare `start`, in the mode in which it will be trained, with the stored generalist over the first batches.

    Weights, running statistics and random states stay as they are.
    """
    store, device = loader.store, loader.device
    general = str(store.generalist)
    theirs = Loader(
        store,
        loader.manifest,
        options.batch_size,
        heads=[general],
        views=options.views,
        seed=options.seed,
        lanes=options.lanes,
        device=device,
        loader=loader.decoder,
        threads=threads,
        temperature=options.temperature,
    )
    start.on(device).learn(options.batch_norm, options.dropout)
    buffers = [(buffer, buffer.clone()) for buffer in start.buffers()]
    sums, images = torch.zeros(3, dtype=torch.float64), 0
    _, columns = start.head_index(start.heads[0].name)
    batches = theirs.batches(range(1))
    with contextlib.closing(batches), torch.random.fork_rng(), torch.no_grad(), Cores(threads, device) as cores:  # type: ignore[type-var]
        for batch in itertools.islice(batches, -(-COMPARED // options.batch_size)):
            with cores.turn(), models.precision_context(options.precision, device):
                logits = start(batch.pixels)[:, columns]
                result = objective.loss(logits.contiguous(), batch.stacked, theirs.segments)
            sums += torch.stack([result.losses, result.losses - result.entropies, result.agreement]).sum((1, 2)).cpu()
            images += len(batch.pixels)
    for buffer, value in buffers:
        buffer.copy_(value)
    return Agreement(general, images, *(sums / images).tolist())


def build_student(
    student: Classifier,
    store: Store,
    names: list[str],
    options: Options,
    loader: Loader,
    say: Callable[[str], None],
) -> tuple[Classifier, Untrained | None]:
    """`student` with the heads of `names` (and the labels'); and head 0, kept aside where it is not trained."""
    heads = list(loader.heads)
    if options.labels:
        manifest = loader.manifest
        if LABELS_HEAD in store.teachers or manifest is None or not (manifest.labels >= 0).all():
            raise FastconError(
                "--labels needs a class for every proxy image (sub-folders are classes), and no teacher "
                f"named {LABELS_HEAD!r}"
            )
        heads.append(Head(LABELS_HEAD, tuple(manifest.classes)))
    keep: dict[str, int] = {}
    general = store.teachers[store.generalist] if store.generalist else None
    if general and options.student and student.architecture != general["architecture"]:
        say(f"the student is {student.architecture}, the generalist {general['architecture']}: head 0 starts at random")
    elif general and tuple(general["classes"]) == student.heads[0].classes:
        keep = {store.generalist: 0}  # type: ignore[dict-item]
    elif general:
        say("the student's classes are not the generalist's: head 0 starts at random")
    aside = None
    if general and store.generalist not in names:
        first = Head(store.generalist, tuple(general["classes"]), general["kind"])  # type: ignore[arg-type]
        student.replace_heads([first, *heads], keep=keep, seed=options.seed)
        aside = student.head_weights(first.name), student.metadata(first.name)
        student.replace_heads(heads, keep={head.name: k for k, head in enumerate(heads, 1)}, seed=options.seed)
    else:
        student.replace_heads(heads, keep=keep, seed=options.seed)
    return student, aside


def make_optimizer(
    student: Classifier, lr_backbone: float, lr_heads: float, momentum: float, weight_decay: float
) -> torch.optim.SGD:
    """SGD with one learning rate for the backbone and one for the heads."""
    groups = [
        {"params": student.backbone_parameters(), "lr": lr_backbone, "base": lr_backbone},
        {"params": list(student.head_module.parameters()), "lr": lr_heads, "base": lr_heads},
    ]
    optimizer = torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay, fused=True)
    # Where a scaler skips the very first step, torch 2.15's fused SGD leaves its buffers uninitialised and uses them.
    for group in optimizer.param_groups if momentum else ():
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The random state that dropout draws from: the CPU's and, where it is one, the GPU's."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng(state: dict[str, Tensor], device: torch.device) -> None:
    """Go on from a state that `rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def set_rate(optimizer: torch.optim.Optimizer, progress: float, milestones: tuple[float, ...]) -> None:
    """Multiply each group's learning rate by 0.1 for every milestone (a share of the run) that is passed."""
    factor = 0.1 ** sum(progress >= milestone for milestone in milestones)
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * factor


def _losses(logits: Tensor, batch: Batch, segments: Any, options: Options) -> tuple[MultiHeadLoss, Tensor | None]:
    width = segments.columns
    result = objective.loss(logits[:, :width], batch.stacked, segments)
    if not options.labels:
        return result, None
    return result, nn.functional.cross_entropy(logits[:, width:], batch.labels)  # type: ignore[arg-type]


class _Tally:
    """Sums of each head's loss, KL and agreement, on the device, from one row of metrics to the next."""

    def __init__(self, names: list[str], device: torch.device) -> None:
        self._names = names
        self._sums = torch.zeros(3, len(names), dtype=torch.float64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._rows = 0
        self._batches = 0

    def add(self, result: MultiHeadLoss, weights: list[float], supervised: Tensor | None) -> None:
        parts = torch.stack([result.losses, result.losses - result.entropies, result.agreement]).sum(1).detach()
        self._sums[:, : parts.shape[1]] += parts
        self._loss += result.total.detach()
        if supervised is not None:
            self._sums[0, -1] += supervised.detach() * len(result.losses)
            self._loss += supervised.detach()
        self._rows += len(result.losses)
        self._batches += 1

    def take(self, about: dict[str, Any], reset: bool = True) -> _Taken:
        """Send the sums on their way to the host, where nobody waits for them yet; `reset`: begin anew.

        about: what else the row says, its step and epoch among it; to look for NaN in the sums so far the step suffices.
        """
        sums = torch.cat([self._sums.flatten(), self._loss[None]])
        host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=sums.is_cuda)
        host.copy_(sums, non_blocking=True)
        event = torch.cuda.current_stream(sums.device).record_event() if sums.is_cuda else None
        taken = _Taken(about, self._names, host, event, self._rows, self._batches)
        if reset:
            self._sums.zero_()
            self._loss.zero_()
            self._rows = self._batches = 0
        return taken

    def state(self) -> dict[str, Any]:
        return {"sums": self._sums, "loss": self._loss, "rows": self._rows, "batches": self._batches}

    def load(self, state: dict[str, Any]) -> None:
        self._sums.copy_(state["sums"])
        self._loss.copy_(state["loss"])
        self._rows, self._batches = state["rows"], state["batches"]


class _Taken(NamedTuple):
    """The sums of a row of metrics, on their way from the device or arrived."""

    about: dict[str, Any]
    names: list[str]
    sums: Tensor
    event: torch.cuda.Event | None
    images: int
    batches: int

    def arrived(self) -> bool:
        return self.event is None or self.event.query()

    def row(self) -> dict[str, Any]:
        """The row: means over the images and, for the loss, over the batches. Waits where it must."""
        *sums, loss = self._values()
        heads = {}
        for k, name in enumerate(self.names):
            means = [value / self.images for value in sums[k :: len(self.names)]]
            heads[name] = {"loss": means[0]} if name == LABELS_HEAD else dict(zip(METRICS, means, strict=True))
        about = dict(self.about)
        position = {key: about.pop(key) for key in ("step", "epoch")}
        return {**position, "images": self.images, "loss": loss / self.batches, "heads": heads, **about}

    def refuse_nan(self, out: str) -> None:
        """Raise FastconError, naming the head, where a loss has turned NaN or infinite."""
        *sums, loss = self._values()
        if math.isfinite(loss):
            return
        head = next((name for name, value in zip(self.names, sums, strict=False) if not math.isfinite(value)), "?")
        raise FastconError(
            f"the loss is {loss} at step {self.about['step']} (first at head {head!r}); the last good checkpoint is in "
            f"{out}/checkpoints: use another --out with lower learning rates or --precision float32"
        )

    def _values(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        return self.sums.tolist()


def _rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return dict(zip(("lr_backbone", "lr_heads"), (group["lr"] for group in optimizer.param_groups), strict=True))


def _identity(store: Store, names: list[str]) -> dict[str, Any]:
    """What of a store a run depends on."""
    return {
        "recipe": store.recipe.record(),
        "images": store.record["images"]["digest"],
        "views": store.views,
        "generalist": store.generalist,
        "teachers": {name: store.teachers[name]["weights"] for name in names},
    }


def _export(student: Classifier, names: list[str], untrained: Untrained | None) -> bytes:
    """student.safetensors: the backbone with head 0, which traditional distillation leaves as it was."""
    if untrained is None:
        return student.export(names[0])
    tensors, meta = untrained
    state = student.state_for_export(names[0])
    for key, value in tensors.items():
        state[f"{student.head_path}.{key}"] = value
    return models.save_safetensors(state, meta)


def _tensorboard(run: Run, step: int) -> Any:
    optional_import("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run.path / "tensorboard"), purge_step=step)


def _write_board(board: Any, row: dict[str, Any]) -> None:
    board.add_scalar("loss", row["loss"], row["step"])
    for name, head in row["heads"].items():
        for key, value in head.items():
            board.add_scalar(f"{name}/{key}", value, row["step"])
