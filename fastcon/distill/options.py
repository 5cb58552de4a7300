"""Options of precompute and train. Importing this module imports nothing heavy."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from fastcon.errors import UsageError
from fastcon.options import Options, names, option

if TYPE_CHECKING:
    from fastcon.store.format import Recipe

METHODS = ("consolidate", "traditional", "soft-label")
"""All heads, the paper's method; the teachers' heads alone; the generalist's alone."""
BATCH_NORMS = ("auto", "running", "batch")
"""Which statistics batch-norms are trained on: see `models.classifier.Classifier.learn`."""
AUTO = "auto"
"""The weight of teachers that is found by `reliability`."""
TRACKERS = ("tensorboard", "wandb", "mlflow")
"""See `trackers`."""


def parse_balance(text: str) -> tuple[float, float]:
    """ "OLD:NEW" → two positive numbers. Raises ValueError."""
    try:
        old, new = (float(part) for part in text.split(":"))
    except ValueError:
        raise ValueError("is not OLD:NEW, as 1:3") from None
    if not (0 < old < math.inf and 0 < new < math.inf):
        raise ValueError("must have both sides above 0 (`method` leaves a side out)")
    return old, new


def parse_weight(text: str) -> tuple[str, float] | str:
    """ "NAME=λ" → the head and its weight; "auto" stays. Raises ValueError."""
    if text == AUTO:
        return text
    name, _, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not name or not 0 < weight < math.inf:
        raise ValueError("is neither NAME=λ with λ above 0, as birds=0.5, nor auto")
    return name, weight


def parse_trackers(text: str) -> tuple[str, ...]:
    """ "wandb,tensorboard" → their names. Raises ValueError."""
    chosen = names(text)
    if not chosen or not set(chosen) <= set(TRACKERS):
        raise ValueError(f"is none of {', '.join(TRACKERS)}, nor several separated by commas")
    return tuple(dict.fromkeys(chosen))


def parse_part(text: str) -> tuple[int, ...]:
    """ "K" or "A-B" → the numbers of parts. Raises ValueError."""
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
        raise ValueError("is not a number or a range, as 0-3")
    return tuple(range(int(first), int(last or first) + 1))


@dataclasses.dataclass(frozen=True)
class PrecomputeOptions(Options):
    """How views are made, and how logits are computed and stored."""

    seed: int = option(0, "Seed of crops, flips and order.", low=0, high=2**64 - 1)
    size: int = option(224, "Side of the views, in pixels.", low=8, high=4096)
    scale: tuple[float, float] = option((0.08, 1.0), "Range of the crop's area.", low=0, high=1, above=True)
    logits: str = option("float16", "How logits are stored: float16, float32, uint8 or topK, as top32.")
    bake: bool = option(False, "Keep every view as a JPEG in the store, to train without the photos.")
    bake_quality: int | None = option(None, "JPEG quality of baked views (default: 90).", low=1, high=100)
    batch_size: int = option(128, "Images per batch.", low=1)
    compile: str = option(
        "auto",
        "Run teachers compiled (default) or as they are (none); auto: whichever is faster overall.",
        choices=("auto", "none", "default"),
    )
    parts: int | None = option(None, "Make a store of so many parts, which processes can share.", low=1, high=100_000)
    part: tuple[int, ...] = option((), "Make this part alone, or these, as 0-3 (default: all).", parse=parse_part)
    add: bool = option(False, "Add these IMAGES to a store in parts, as further parts (--parts: how many; default: 1).")

    def __post_init__(self) -> None:
        from fastcon.store.codec import codec

        super().__post_init__()
        if isinstance(self.part, int):
            object.__setattr__(self, "part", (self.part,))
        codec(self.logits)
        if self.scale[0] > self.scale[1]:
            low, high = self.scale
            raise UsageError(f"`scale` {low} {high}: the smaller share of the area comes first")
        if self.bake_quality and not self.bake:
            raise UsageError("`bake_quality` says how to bake views: give `bake`, too")

    @property
    def recipe(self) -> Recipe:
        """How the store's views are made."""
        from fastcon.store.format import Recipe

        quality = (self.bake_quality or 90) if self.bake else None
        return Recipe(self.seed, self.size, self.scale, bake=quality)


@dataclasses.dataclass(frozen=True)
class Optimisation:
    """How a student is optimised: what `recipe` stands for."""

    batch_size: int
    lr_backbone: float
    lr_heads: float
    weight_decay: float
    scale_lr: bool
    """Whether the learning rates are those of a batch of this size, and grow with it (Goyal et al. 2017)."""
    adamw: bool = False
    """AdamW (Loshchilov & Hutter 2019), biases and norms without decay, instead of SGD with momentum."""
    milestones: tuple[float, ...] = ()
    """Shares of the run after which the learning rates are divided by 10."""
    warm_up: float = 0.0
    """Share of the run in which the learning rates rise to their values."""
    cosine: bool = False
    """Whether they then fall to zero along half a cosine."""
    clip: float | None = None
    """Largest norm of the gradient."""
    ema: float | None = None
    """Decay of the running mean of the weights, which is what the run leaves."""


RECIPES = {
    "paper": Optimisation(32, 0.001, 0.01, 1e-4, scale_lr=False, milestones=(0.5, 0.8)),
    "modern": Optimisation(
        256, 5e-4, 1e-3, 0.05, scale_lr=True, adamw=True, warm_up=0.05, cosine=True, clip=1.0, ema=0.999
    ),
}


@dataclasses.dataclass(frozen=True)
class TrainOptions(Options):
    """Hyperparameters of a student; the defaults are the paper's (section 3)."""

    student: str | None = option(None, "MODEL to start from (default: the store's generalist).")
    method: str = option("consolidate", "All heads; the teachers' alone; the generalist's alone.", choices=METHODS)
    heads: tuple[str, ...] = option((), "NAME,… of the teachers to use (default: all).", parse=names)
    views: int | None = option(None, "Use the first so many views of the store (default: all).", low=1)
    balance: tuple[float, float] = option(
        (1.0, 1.0), "OLD:NEW weight of the generalist against the teachers.", parse=parse_balance, text="1:1"
    )
    weight: tuple[tuple[str, float] | str, ...] = option(
        (),
        "NAME=λ, the weight of one head, instead of what --balance gives it (repeatable); auto: by how reliable teachers are.",
        parse=parse_weight,
        many=True,
    )
    temperature: float = option(2.0, "T of the softmax.", low=0, above=True)
    labels: bool = option(False, "Add a supervised head where the proxy has classes.")
    epochs: int = option(40, "Passes over the images.", low=1)
    recipe: str = option(
        "paper",
        "The paper's SGD, or modern: AdamW, warm-up and cosine, clipping, a running mean of the weights.",
        choices=tuple(RECIPES),
    )
    batch_size: int = option(None, "Images per step (default: 32; modern: 256).", low=1)
    lr_backbone: float = option(None, "Learning rate of the backbone (default: 0.001; modern: 0.0005).", low=0)
    lr_heads: float = option(None, "Learning rate of the heads (default: 0.01; modern: 0.001).", low=0)
    scale_lr: bool = option(
        None,
        "Take the learning rates for the recipe's batch size, and scale them with --batch-size; modern does.",
        both=True,
    )
    warm_up: float | None = option(
        None, "Share of the run in which learning rates rise (default: 0; modern: 0.05).", low=0, high=1, below=True
    )
    momentum: float = option(0.9, "Momentum of SGD.", low=0, high=1)
    weight_decay: float = option(None, "Weight decay (default: 0.0001; modern: 0.05).", low=0)
    batch_norm: str = option(
        "auto",
        "Train on the running statistics, which stay as they are, or on each batch's; auto: running, if there are any.",
        choices=BATCH_NORMS,
    )
    sync_bn: bool = option(
        False, "Of several ranks: batch-norms on the statistics of the whole batch, not of a rank's share."
    )
    dropout: bool = option(False, "With dropout and stochastic depth, where the network has them.", both=True)
    seed: int = option(0, "Seed of new heads and of the order.", low=0, high=2**64 - 1)
    lanes: int | None = option(None, "Runs that a batch is drawn from (default: 8, 4, 2 or 1).", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        recipe = RECIPES[self.recipe]
        for name in ("batch_size", "lr_backbone", "lr_heads", "scale_lr", "weight_decay"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(recipe, name))

    @property
    def optimisation(self) -> Optimisation:
        """The recipe with what was chosen instead, learning rates scaled."""
        recipe = RECIPES[self.recipe]
        scale = self.batch_size / recipe.batch_size if self.scale_lr else 1.0
        return dataclasses.replace(
            recipe,
            batch_size=self.batch_size,
            lr_backbone=self.lr_backbone * scale,
            lr_heads=self.lr_heads * scale,
            weight_decay=self.weight_decay,
            warm_up=recipe.warm_up if self.warm_up is None else self.warm_up,
        )

    def record(self) -> dict[str, Any]:
        """As a run writes them down: what earlier versions did not have only where it is not as it was then."""
        values: dict[str, Any] = {**dataclasses.asdict(self), "milestones": self.optimisation.milestones}
        values |= {"weight": self.weight or None, "sync_bn": self.sync_bn or None, "warm_up": self.warm_up or None}
        values["recipe"] = None if self.recipe == "paper" else self.recipe
        values["scale_lr"] = None if self.scale_lr == RECIPES[self.recipe].scale_lr else self.scale_lr
        return values


@dataclasses.dataclass(frozen=True)
class Upkeep(Options):
    """Housekeeping of a run, which does not change what is trained."""

    compile: str = option(
        "none",
        "torch.compile; graphs: with CUDA graphs, for small batches on a GPU.",
        choices=("none", "default", "graphs"),
    )
    exact_pixels: bool = option(False, "Refuse images that decode to any other pixel than recorded.")
    log_every: int = option(100, "Steps between rows of metrics.jsonl.", low=1)
    checkpoint_minutes: float = option(5.0, "Time between checkpoints.", low=0)
    track: tuple[str, ...] = option(
        (), "Send metrics to tensorboard, wandb or mlflow, too (extras; NAME,… for several).", parse=parse_trackers
    )
    cache: float | None = option(
        None, "GB of stores in object storage that are kept on this machine (default: 50).", low=0, above=True
    )
    advise_seconds: float = 60.0
    """Runs that take longer end by measuring what would make their steps faster."""
