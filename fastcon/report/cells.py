"""What a table is made of: representations, and accuracies with the runs, class splits and draws behind them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastcon.errors import FastconError

DRAWS, SEEDS, SPLITS = "draws", "training seeds", "class splits"


@dataclasses.dataclass(frozen=True)
class Taught:
    """A teacher, by what it was taught: a task, on which class split of it, and from which network."""

    task: str
    split: str = "none"
    architecture: str | None = None
    """None: the generalist's, or not known."""


@dataclasses.dataclass(frozen=True)
class Lineage:
    """Where a representation comes from, but for seeds: two runs of one lineage repeat one another."""

    method: str
    teachers: frozenset[Taught] = frozenset()
    proxy: str | None = None
    balance: str | None = None
    labels: bool = False
    recipe: str | None = None
    """Digest of all other options; None: not known."""

    @property
    def plain(self) -> bool:
        """Whether it was trained without extras: equal weights, no labels."""
        return self.balance in (None, "1:1") and not self.labels

    def key(self, network: str | None) -> tuple[Any, ...]:
        """What it shares with its counterpart in another table, which may call networks by other names.

        network: the generalist's architecture; of teachers it only counts whether they have another.
        """
        unknown = network is None and self.recipe is not None  # of a published row nothing but another network is said
        teachers = frozenset(
            (t.task, t.split, not unknown and t.architecture not in (None, network)) for t in self.teachers
        )
        if self.method in ("generalist", "teacher"):
            return self.method, teachers
        return self.method, teachers, self.proxy, self.balance or "1:1", self.labels


@dataclasses.dataclass(frozen=True)
class Representation:
    """A row: what it is called, how it came about, and the task-specific teachers it learned from."""

    label: str
    method: str
    teachers: tuple[str, ...] = ()
    lineage: Lineage | None = None
    architecture: str | None = None
    best_of: tuple[str, ...] = ()
    """The rows among which it was chosen."""

    @property
    def repeatable(self) -> bool:
        """Whether it is known which other runs differ from it in seeds alone."""
        return self.lineage is not None and self.lineage.recipe is not None

    def related(self, task: str, aliases: dict[str, set[str]]) -> bool:
        """Whether a task is one of its teachers' own, or counted as related to it."""
        tasks = {task, task.partition(":")[0]}
        return any(teacher in tasks or tasks & aliases.get(teacher, set()) for teacher in self.teachers)


@dataclasses.dataclass(frozen=True)
class Part:
    """Accuracies in percent of one trained run: over the trials where they are known, else their mean alone."""

    value: float
    trials: tuple[float, ...] = ()
    ci95: float | None = None
    draws: str = ""
    """What the trials were drawn from and how: those of equal draws are paired."""
    split: int = 0
    """Seed of the class split."""
    seed: int = 0
    """Seed of the training."""

    def pairs(self, other: Part) -> bool:
        """Whether the trials of both are of the same draws."""
        return 1 < len(self.trials) == len(other.trials) and self.draws == other.draws


@dataclasses.dataclass(frozen=True)
class Cell:
    """An accuracy in percent: the mean over runs of equal lineage, and half its 95 % interval."""

    parts: tuple[Part, ...]

    @property
    def value(self) -> float:
        """The mean."""
        return _spread([(part.split, part.seed, part.value) for part in self.parts])[0]

    @property
    def trials(self) -> tuple[float, ...]:
        """Of a cell of one run."""
        return self.parts[0].trials if len(self.parts) == 1 else ()

    @property
    def ci95(self) -> float | None:
        """Half the 95 % interval: over draws for one run, else over class splits or training seeds."""
        if len(self.parts) == 1:
            return self.parts[0].ci95
        return _spread([(part.split, part.seed, part.value) for part in self.parts])[1]

    @property
    def over(self) -> str:
        """What the interval covers."""
        if len({part.split for part in self.parts}) > 1:
            return SPLITS
        return SEEDS if len(self.parts) > 1 else DRAWS

    def with_part(self, part: Part) -> Cell:
        """Another run's accuracies, too. Raises ValueError where those of that run are others."""
        same = [p for p in self.parts if (p.split, p.seed) == (part.split, part.seed)]
        if same and same[0] != part:
            raise ValueError(part)
        return self if same else Cell((*self.parts, part))

    def minus(self, base: Cell) -> tuple[float, float | None]:
        """The mean difference in points and half its 95 % interval (None where nothing pairs).

        Within a run over its draws, paired. Of several runs their mean differences are the units (see `_spread`); the
        base's run of the same split and seed counts, else the mean of those with the same draws.
        """
        differences = [(part.split, part.seed, *_difference(part, base)) for part in self.parts]
        if len(differences) == 1:
            return differences[0][2:]
        return _spread([(split, seed, mean) for split, seed, mean, _ in differences])


def _difference(part: Part, base: Cell) -> tuple[float, float | None]:
    same = [p for p in base.parts if part.pairs(p)]
    exact = [p for p in same or base.parts if (p.split, p.seed) == (part.split, part.seed)]
    partners = exact or same or list(base.parts)
    if not same:
        return part.value - float(np.mean([p.value for p in partners])), None
    paired = np.subtract(part.trials, np.mean([p.trials for p in partners], axis=0))
    return float(paired.mean()), float(1.96 * paired.std(ddof=1) / len(paired) ** 0.5)


def _spread(units: Sequence[tuple[int, int, float]]) -> tuple[float, float | None]:
    """Mean over (class split, training seed, value), and half its 95 % interval.

    Seeds are nested in class splits, as each split has teachers of its own, and draws in seeds. In a balanced nested design
    the means of the outermost units are independent and alike distributed, so that Student's t over them is exact whatever
    the variances further in (Searle, Casella & McCulloch, Variance Components, 1992): over splits, with one split over seeds.
    """
    splits = {split: [value for s, _, value in units if s == split] for split, *_ in units}
    means = [float(np.mean(values)) for values in splits.values()]
    values = means if len(means) > 1 else [value for *_, value in units]
    if len(values) < 2:
        return float(np.mean(values)), None
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values)), float(half)


@dataclasses.dataclass
class Table:
    """Accuracies of one protocol: rows in order, tasks in order, what is known of them."""

    title: str
    rows: dict[str, Representation] = dataclasses.field(default_factory=dict)
    tasks: list[str] = dataclasses.field(default_factory=list)
    cells: dict[tuple[str, str], Cell] = dataclasses.field(default_factory=dict)
    splits: dict[str, str] = dataclasses.field(default_factory=dict)
    """Which classes of a task take part."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """What a reader should know of it."""

    def add(self, row: Representation, task: str, part: Part, source: str, split: str = "none") -> None:
        """Put a cell; raises FastconError where it is taken by another value, or by a row of another kind."""
        present = self.rows.setdefault(row.label, row)
        if present != row:
            raise FastconError(
                f"{source}: {row.label!r} is {row.method}, another result says {present.method}: name them apart"
            )
        self._put(row, task, part, source)
        self.tasks += [task] if task not in self.tasks else []
        if self.splits.setdefault(task, split) != split:
            raise FastconError(f"{source}: {task!r} is of the split {split}, in another result of {self.splits[task]}")

    def _put(self, row: Representation, task: str, part: Part, source: str) -> None:
        held = self.cells.get((row.label, task), Cell(()))
        try:
            self.cells[row.label, task] = held.with_part(part)
        except ValueError:
            if not row.repeatable:
                raise FastconError(
                    f"{source}: {row.label!r} on {task!r} has another accuracy in another result of this protocol"
                ) from None
            self._note_twice(row.label)

    def _note_twice(self, label: str) -> None:
        """A student that two studies trained, which no GPU does twice alike."""
        note = f"{label} was trained twice with the same options and seed: of tasks that both have, the first is shown"
        self.notes += [note] if note not in self.notes else []

    @property
    def generalist(self) -> str | None:
        """The row that others are compared with."""
        return next((label for label, row in self.rows.items() if row.method == "generalist"), None)

    @property
    def network(self) -> str | None:
        """The generalist's architecture."""
        return self.rows[self.generalist].architecture if self.generalist is not None else None

    def difference(self, label: str, task: str, base: str | None = None) -> tuple[float, float | None] | None:
        """Points above another row (default: the generalist), and half the 95 % interval where draws are paired."""
        base = base or self.generalist
        ours, theirs = self.cells.get((label, task)), self.cells.get((base or "", task))
        return None if ours is None or theirs is None or label == base else ours.minus(theirs)

    def task_key(self, task: str) -> tuple[str, str]:
        """What a task shares with its counterpart in another table: the data set, and which of its classes."""
        name, _, split = task.partition(":")
        return name, split or self.splits.get(task, "none")

    def merge_repetitions(self) -> None:
        """Make one row of runs that differ in seeds alone. Raises FastconError where a cell lacks some of them."""
        families: dict[tuple[Any, ...], list[Representation]] = {}
        for row in self.rows.values():
            families.setdefault((row.lineage,) if row.repeatable else (row.label,), []).append(row)
        rows, cells = {}, {}
        for family in families.values():
            row = _merged(family)
            if row.label in rows:
                raise FastconError(f"two kinds of runs would both be called {row.label!r}: name them apart")
            rows[row.label] = row
            for task in self.tasks:
                parts = [part for r in family for part in self.cells.get((r.label, task), Cell(())).parts]
                if parts:
                    cells[row.label, task] = self._cell(row, task, parts)
        self.rows, self.cells = rows, cells
        self._check_designs()

    def _check_designs(self) -> None:
        """Raise FastconError where one row is repeated over class splits and another over training seeds."""
        kinds: dict[str, str] = {}
        for (label, task), cell in self.cells.items():
            lineage = self.rows[label].lineage
            teachers = lineage.teachers if lineage else ()
            if len(cell.parts) > 1 and any(teacher.split != "none" for teacher in teachers):
                other = kinds.setdefault(cell.over, label)
                mixed = next((kind for kind in kinds if kind != cell.over), None)
                if mixed:
                    raise FastconError(
                        f"{self.title}: {other!r} is repeated over {cell.over}, {kinds[mixed]!r} over {mixed} (on {task!r}): "
                        "their intervals mean different things, report them apart"
                    )

    def _cell(self, row: Representation, task: str, parts: list[Part]) -> Cell:
        """A cell of all combinations of its splits and seeds. Raises FastconError where one is missing."""
        cell = Cell(())
        for part in parts:
            try:
                cell = cell.with_part(part)
            except ValueError:
                self._note_twice(row.label)
        splits, seeds = ({getattr(part, key) for part in cell.parts} for key in ("split", "seed"))
        missing = set(itertools.product(splits, seeds)) - {(part.split, part.seed) for part in cell.parts}
        if missing:
            split, seed = min(missing)
            raise FastconError(
                f"{row.label!r} on {task!r} has no result of training seed {seed} in class split {split}, which others "
                "have: run it, or leave results of that seed or split out"
            )
        return cell

    def best(self, name: str, among: Sequence[str], aliases: dict[str, set[str]]) -> str:
        """Of some rows, that of the highest mean accuracy over its related tasks. Raises FastconError, naming `name`."""

        def score(label: str) -> float:
            values = [
                self.cells[label, task].value
                for task in self.tasks
                if (label, task) in self.cells and self.rows[label].related(task, aliases)
            ]
            if not values:
                raise FastconError(f"{name!r}: no accuracy of {label!r} on a task that is related to its teacher")
            return float(np.mean(values))

        return max(among, key=score)

    def add_best(self, name: str, among: Sequence[str], aliases: dict[str, set[str]]) -> None:
        """Add the best of some rows as a row of its own. Raises FastconError."""
        if name in self.rows:
            raise FastconError(f"{name!r} is a representation already: call the best of {len(among)} otherwise")
        chosen = self.best(name, among, aliases)
        self.rows[name] = dataclasses.replace(self.rows[chosen], label=name, best_of=tuple(among))
        self.cells |= {(name, task): cell for (label, task), cell in self.cells.items() if label == chosen}


def _merged(family: list[Representation]) -> Representation:
    if len(family) == 1:
        return family[0]
    label = "-".join(_shared([row.label.split("-") for row in family])) or "+".join(row.label for row in family)
    teachers = tuple(dict.fromkeys(name for row in family for name in row.teachers))
    return dataclasses.replace(family[0], label=label, teachers=teachers)


def _shared(labels: list[list[str]]) -> list[str]:
    """The words that all have, in order: consolidate-birds of consolidate-birds-seed0 and consolidate-birds-seed1."""
    words = labels[0]
    for other in labels[1:]:
        rest = iter(other)
        words = [word for word in words if word in other and any(word == w for w in rest)]
    return words
