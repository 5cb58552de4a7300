"""How IMAGES are indexed, and what makes a labelled task of them. Importing this module imports nothing heavy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastcon.errors import UsageError
from fastcon.options import Options, option

if TYPE_CHECKING:
    from fastcon.data.manifest import Manifest
    from fastcon.data.splits import Subset

Index = Callable[[Sequence[str]], "Manifest"]
"""IMAGES → manifest: `data.manifest.index`, or the command line's with its progress bar."""


@dataclasses.dataclass(frozen=True)
class Indexing(Options):
    """How images are checked when they are indexed."""

    trust_images: bool = option(False, "Read headers only, do not decode every image once.")
    strict: bool = option(False, "Stop if any image cannot be used, instead of leaving it out.")


@dataclasses.dataclass(frozen=True)
class Task(Options):
    """IMAGES that train, and those that test: others, or a part of every class that is held out."""

    train: tuple[str, ...] = option((), "Labelled training IMAGES (repeatable).")
    test: tuple[str, ...] = option((), "Labelled test IMAGES.")
    holdout: float | None = option(
        None,
        "Instead of --test: this share of every class is kept aside as the test part.",
        low=0,
        high=1,
        above=True,
        below=True,
    )
    split: str = option("none", "All classes, one random half (t or d), or a part of one (t2/5).")
    split_seed: int = option(0, "Seed of hold-out and class split.", low=0)
    task: str | None = option(None, "Name of the task in reports (default: after the IMAGES).")

    def __post_init__(self) -> None:
        from fastcon.data.splits import parse_split

        super().__post_init__()
        parse_split(self.split)

    @property
    def name(self) -> str:
        """What the task is called."""
        from fastcon.data.splits import task_name

        return self.task or task_name(list(self.train or self.test))

    def parts(self, index: Index) -> tuple[Subset, Subset]:
        """Training and test images. Raises FastconError where there are no labels, classes or test part."""
        from fastcon.data.splits import labelled

        if not self.train:
            raise UsageError("no labelled training images given: `train` IMAGES")
        if bool(self.test) == (self.holdout is not None):
            raise UsageError("give the test part either as `test` IMAGES or as `holdout`, a fraction of `train`")
        train = index(self.train)
        test = index(self.test) if self.test else None
        return labelled(train, test, self.holdout, self.split, self.split_seed)

    def held_out(self, index: Index) -> Subset:
        """Of the `test` images all, or the part that training with the same `holdout` kept aside."""
        from fastcon.data.splits import labelled

        manifest = index(self.test)
        return labelled(
            manifest, manifest if self.holdout is None else None, self.holdout, self.split, self.split_seed
        )[1]

    def record(self) -> dict[str, Any]:
        """As it is written into results."""
        return {
            "task": self.name,
            "train": list(self.train),
            "test": list(self.test),
            "holdout": self.holdout,
            "split": self.split,
            "split_seed": self.split_seed,
        }
