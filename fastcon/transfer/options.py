"""Options of teach, finetune and probe. Importing this module imports nothing heavy."""

from __future__ import annotations

import dataclasses

from fastcon.distill.options import BATCH_NORMS
from fastcon.errors import UsageError
from fastcon.options import Options, option, positive

TRIALS = 50
"""The paper's number of draws."""
FEW = 10
"""Features of a whole set are computed and cached, unless a probe needs under 1 image in 10."""
C_GRID = tuple(10.0**k for k in range(-3, 4))
SOLVERS = ("auto", "batched", "sklearn", "cuml")


@dataclasses.dataclass(frozen=True)
class ProbeOptions(Options):
    """The protocol; the defaults are the paper's (section 3)."""

    shots: int | None = option(
        None,
        "Training images per class in each trial, by default 5; of a multi-label task images in all, by default 1000.",
        low=1,
    )
    full: bool = option(False, "Train once on all images instead.")
    trials: int | None = option(None, "Draws of training images (default: 50).", low=1)
    folds: int = option(5, "Cross-validation folds that choose C.", low=2)
    c_grid: tuple[float, ...] = option(C_GRID, "Values of C.", parse=positive, text="0.001,0.01,0.1,1,10,100,1000")
    solver: str = option(
        "auto", "SVM solver; batched is certified, sklearn slow, cuml (a GPU) approximate.", choices=SOLVERS
    )
    scale_features: str = option("none", "Scaling of features (the paper: none).", choices=("none", "l2"))
    size: int | None = option(None, "Input size (default: the backbones').", low=8, high=4096)
    batch_size: int = option(128, "Images per batch.", low=1)
    seed: int = option(0, "Seed of draws and folds: the same for every backbone.", low=0, high=2**64 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.full and (self.shots is not None or self.trials is not None):
            raise UsageError("`full` trains once on all images: leave out `shots` and `trials`")


@dataclasses.dataclass(frozen=True)
class TuneOptions(Options):
    """Hyperparameters; the defaults are the paper's for teachers (120 epochs, x 0.1 at 70 and 100)."""

    head: str = option("task", "Name of the head.")
    lr_grid: tuple[float, ...] = option(
        (0.001, 0.01, 0.1), "Learning rates; a held-out tenth chooses.", parse=positive, text="0.001,0.01,0.1"
    )
    epochs: int = option(120, "Passes over the training images.", low=1)
    milestones: tuple[float, ...] = (70 / 120, 100 / 120)
    batch_size: int = option(32, "Images per step.", low=1)
    momentum: float = 0.9
    weight_decay: float = 1e-4
    size: int | None = option(None, "Input size (default: the MODEL's).", low=8, high=4096)
    scale: tuple[float, float] = option((0.08, 1.0), "Range of the crop's area.", low=0, high=1, above=True)
    batch_norm: str = option(
        "batch",
        "Train on each batch's statistics, or on the running ones, which stay as they are; auto: running, if any.",
        choices=BATCH_NORMS,
    )
    dropout: bool = option(True, "With dropout and stochastic depth, where the network has them.", both=True)
    seed: int = option(0, "Seed of views, order and the new head.", low=0, high=2**64 - 1)


@dataclasses.dataclass(frozen=True)
class FinetuneOptions(TuneOptions):
    """Of downstream fine-tuning; the defaults are the paper's (50 epochs, x 0.1 at half of them and at 0.8)."""

    epochs: int = option(50, "Passes over the training images.", low=1)
    milestones: tuple[float, ...] = (0.5, 0.8)
    shots: int | None = option(
        None, "Training images per class (multi-label: in all) in each trial; default: all images, once.", low=1
    )
    trials: int | None = option(None, "Draws of training images (with --shots; default: 5).", low=1)
    seed: int = option(0, "Seed of draws, views, order and the new head.", low=0, high=2**64 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trials is not None and self.shots is None:
            raise UsageError("`trials` counts draws of `shots` images per class: give `shots`, too")

    @property
    def draws(self) -> int:
        """Number of training sets drawn."""
        return 1 if self.shots is None else self.trials or 5
