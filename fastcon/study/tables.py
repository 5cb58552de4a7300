"""The tables of a study file, checked: models, data sets, teachers and students by name, and what each name stands for."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from fastcon.data import datasets
from fastcon.data.published import DATASETS, RELATED
from fastcon.data.splits import parse_split as parsed
from fastcon.distill.options import METHODS
from fastcon.errors import FastconError

KEYS = {
    "": "title generalist seeds splits models data stores teachers students evaluations parts options",
    "options": "every teach precompute train probe finetune evaluate",
    "models": "model train options",
    "data": "train test holdout union related",
    "teachers": "data split model name best",
    "students": "teachers method proxy store balance labels name options",
    "evaluations": "command on of name parts options",
    "parts": "title references",
}
KINDS = ("generalist", "teachers", "students")
HOLDOUT = 0.5
"""Share kept aside as the test part where a data set has no official one (the paper does not say)."""
Source = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher of a study: what it is taught on, and from which model."""

    name: str
    data: str
    split: str
    model: str
    seed: int = 0
    """Of the class split."""
    best: str | None = None
    """The row of the best of several teachers, of which it is one."""


@dataclasses.dataclass(frozen=True)
class Student:
    """A student of a study: its teachers, its store, and the arguments of train."""

    name: str
    teachers: tuple[str, ...]
    method: str
    proxy: str
    store: str
    arguments: tuple[str, ...]
    epochs: float
    split_seed: int | None = None
    """Of its teachers' class splits."""


class Tables:
    """The tables of a study. Raises FastconError, naming the key or name at fault."""

    def __init__(self, name: str, tables: dict[str, Any], data: str | None) -> None:
        self._name, self._found, self._folder = name, tables, data
        check_keys("", tables, "the study")
        self._options = table(tables, "options")
        check_keys("options", self._options, "[options]")
        self._models = {key: table(tables["models"], key) for key in table(tables, "models")}
        for key, value in self._models.items():
            check_keys("models", value, f"[models.{key}]")
        self._seeds = each(tables.get("seeds", 0))
        self._split_seeds = each(tables.get("splits", 0))
        self._stores = {key: table(table(tables, "stores"), key) for key in table(tables, "stores")}
        self._sets: dict[str, tuple[list[str], float]] = {}
        self._splits: dict[str, list[str]] = {}
        for entry in entries(tables, "evaluations"):
            for task in each(entry.get("on", [])):
                data, split = task_of(task)
                if split not in self._splits.setdefault(data, []):
                    self._splits[data].append(split)
        self._generalist = self._model(str(tables.get("generalist", "")), "generalist")

    # names → what they stand for

    def _model(self, name: str, where: str) -> str:
        if name not in self._models:
            raise FastconError(
                f"{self._name}: {where} names the model {name!r}; [models] has {', '.join(self._models) or 'none'}"
            )
        return name

    def _spec(self, model: str) -> str:
        """The MODEL that a model's name stands for: its own run where the study trains it."""
        return f"runs/{model}" if "train" in self._models[model] else self._init(model)

    def _init(self, model: str) -> str:
        spec = str(self._models[model]["model"])
        place, question, options = spec.partition("?")
        scheme, at, path = place.partition("@")
        if Path(place).exists():
            scheme, at, path = "", "", place
        return f"{scheme}{at}{absolute(path)}{question}{options}" if path and Path(path).exists() else spec

    def _data(self, name: str) -> Source:
        """A data set: train, test, holdout, related. The study's own, else the official one."""
        described = table(self._found, "data").get(name)
        if described is not None:
            check_keys("data", described, f"[data.{name}]")
            holdout = described.get("holdout")
            if "union" in described:
                members = [source for member in each(described["union"]) for source in self._data(member)["train"]]
                return {"train": members, "test": [], "holdout": holdout, "related": []}
            return {
                "train": _sources(described.get("train", []), f"data.{name}.train"),
                "test": _sources(described.get("test", []), f"data.{name}.test"),
                "holdout": holdout,
                "related": described.get("related", RELATED.get(name, [])),
            }
        try:
            published = datasets.dataset(name)
        except FastconError:
            raise FastconError(
                f"{self._name}: unknown data set {name!r}: describe it in [data.{name}], or use one of "
                f"{', '.join(DATASETS)}"
            ) from None
        folder = "DATA" if self._folder is None else str(Path(self._folder).expanduser().absolute())
        root = quote(f"{folder}/{name.partition('-')[0] if published.group else name}")
        spec = f"data:{name}?root={root}&part="
        test = [] if published.test is None else [spec + published.test]
        return {
            "train": [spec + published.train],
            "test": test,
            "holdout": None if test else HOLDOUT,
            "related": RELATED.get(name, []),
        }

    def _labelled(self, name: str, split: str, seed: int = 0, test_only: bool = False) -> list[str]:
        """Arguments that say where a task's images are and which take part; notes how many those are."""
        data = self._data(name)
        if not data["train"] or bool(data["test"]) == (data["holdout"] is not None):
            raise FastconError(f"{self._name}: [data.{name}] needs train, and either test or holdout")
        check_name(name, self._name)
        share = share_of(split)
        held = float(data["holdout"] or 0.0)
        self._sets[f"{name}:{split} train"] = (data["train"], share * (1 - held))
        self._sets[f"{name}:{split} test"] = (data["test"] or data["train"], share * (held or 1.0))
        self._sets[f"{name} whole"] = (data["train"] + data["test"], 1.0)
        arguments = []
        for source in [] if test_only else data["train"]:
            arguments += ["--train", source]
        for source in data["test"] or (data["train"] if test_only else []):
            arguments += ["--test", source]
        if data["holdout"] is not None:
            arguments += ["--holdout", f"{data['holdout']:g}"]
        arguments += ["--split", split, *(["--split-seed", str(seed)] if seed else [])]
        return [*arguments, "--task", name if test_only else self._label(name, split)]

    def _label(self, data: str, split: str) -> str:
        """What a task is called in reports: its data set, and its split where the study looks at several."""
        several = len(self._splits.get(data, [])) > 1 and split in self._splits[data]
        return f"{data}:{split}" if several else data

    def _drawn(self, split: str, seed: int) -> str:
        """How names tell class splits of different seeds apart, where the study has several."""
        return f"-split{seed}" if len(self._split_seeds) > 1 and split != "none" else ""

    def _draws(self, split: str) -> list[int]:
        """Seeds of a class split: one for what is not split."""
        return self._split_seeds if split != "none" else self._split_seeds[:1]

    def _of(self, command: str) -> dict[str, Any]:
        """Options of a command: every command's, then its own."""
        return table(self._options, "every") | table(self._options, command)

    # tables → teachers, students, jobs

    def _teachers(self) -> Iterator[Teacher]:
        for entry in entries(self._found, "teachers"):
            check_keys("teachers", entry, "[[teachers]]")
            models = entry.get("model", self._found.get("generalist"))
            for data, split, model in itertools.product(
                each(entry.get("data")), each(entry.get("split", "t")), each(models)
            ):
                self._data(data)
                _, part, parts = parse_split(split, self._name)
                name = data + (f"-{part}of{parts}" if parts > 1 else "")
                network = f"-{model}" if len(each(models)) > 1 else ""
                name = entry.get("name", name + network)
                best = f"{data}-best{network}" if entry.get("best") else None
                for seed in self._draws(split):
                    drawn = name + self._drawn(split, seed)
                    yield Teacher(drawn, data, split, self._model(model, f"teacher {name!r}"), seed, best)

    def _students(self, teachers: dict[str, Teacher]) -> Iterator[Student]:
        for entry in entries(self._found, "students"):
            check_keys("students", entry, "[[students]]")
            lists = entry.get("teachers", [])
            lists = [lists] if not lists or isinstance(lists[0], str) else lists
            choices = [each(entry.get(key)) for key in ("method", "proxy", "store", "balance", "labels")]
            draws = self._split_seeds if any(lists) else [None]
            for names, method, proxy, store, balance, labels, draw, seed in itertools.product(
                lists, *choices, draws, self._seeds
            ):
                drawn = [name if name in teachers else f"{name}-split{draw}" for name in names]
                unknown = next((name for name, found in zip(names, drawn, strict=True) if found not in teachers), None)
                if unknown:
                    raise FastconError(
                        f"{self._name}: [[students]] names the teacher {unknown!r}; there are "
                        f"{', '.join(teachers) or 'none'}"
                    )
                if method not in METHODS:
                    raise FastconError(f"{self._name}: method {method!r} is none of {', '.join(METHODS)}")
                options = {"balance": balance, "labels": bool(labels), "seed": seed or None}
                yield self._student(entry, tuple(drawn), method, str(proxy), store, draw, options)

    def _student(
        self,
        entry: Source,
        teachers: tuple[str, ...],
        method: str,
        proxy: str,
        store: str | None,
        draw: int | None,
        options: dict[str, Any],
    ) -> Student:
        """options: of `train`, where a study lists several: balance, labels, seed."""
        balance, labels, seed = options["balance"], options["labels"], options["seed"]
        if store is not None and store not in self._stores:
            raise FastconError(
                f"{self._name}: [[students]] names the store {store!r}; [stores] has {', '.join(self._stores) or 'none'}"
            )
        parts = [method, entry.get("name") or "+".join(teachers)]
        parts += [f"split{draw}"] if entry.get("name") and draw is not None and len(self._split_seeds) > 1 else []
        parts += [proxy] if len(each(entry.get("proxy"))) > 1 else []
        parts += [store] if store and len(each(entry.get("store"))) > 1 else []
        parts += [balance.replace(":", "to")] if balance else []
        parts += ["labels"] if labels else []
        parts += [f"seed{seed or 0}"] if len(self._seeds) > 1 else []
        extra = table(entry, "options")
        arguments = ["--method", method]
        arguments += ["--heads", ",".join(teachers)] if teachers else []
        arguments += ["--balance", balance] if balance else []
        arguments += ["--labels"] if labels else []
        arguments += ["--seed", str(seed)] if seed else []
        arguments += flags_of(self._of("train") | extra)
        epochs = float((self._of("train") | extra).get("epochs", 40))
        if method != "soft-label" and not teachers:
            raise FastconError(f"{self._name}: a student by {method} has no teachers: teachers = [['birds'], …]")
        self._data(proxy)
        name = "-".join(part for part in parts if part)
        where = f"{proxy}-{store}" if store else proxy
        return Student(name, teachers, method, proxy, where, tuple(arguments), epochs, draw)


def flags_of(options: dict[str, Any]) -> list[str]:
    """A table of options → arguments: true is a flag, a list an option of several values."""
    arguments = []
    for key, value in options.items():
        if value is False:
            continue
        arguments.append(f"--{key}")
        if value is not True:
            arguments += [str(v) for v in each(value)]
    return arguments


def parse_split(text: str, study: str) -> tuple[str | None, int, int]:
    """As `data.splits.parse_split`, naming the study."""
    try:
        return parsed(text)
    except FastconError as error:
        raise FastconError(f"{study}: {str(error).replace('`split`', 'split')}") from None


def each(value: Any) -> list[Any]:
    """A list of values, or the one value there is."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _sources(value: Any, where: str) -> list[str]:
    """IMAGES, absolute: commands run in the study's folder."""
    sources = each(value)
    if not all(isinstance(item, str) for item in sources):
        raise FastconError(f"{where} is a list of IMAGES, not {value!r}")
    return [_rooted(item) if datasets.has_scheme(item) else absolute(item) for item in sources]


def _rooted(source: str) -> str:
    """A named data set with its root absolute."""
    return re.sub(r"(?<=[?&]root=)[^&]*", lambda found: quote(absolute(unquote(found[0]))), source)


def absolute(path: str) -> str:
    """A path as it is from anywhere."""
    return str(Path(path).expanduser().absolute())


def task_of(text: str) -> tuple[str, str]:
    """ "cars196:d" → its data set and its split."""
    data, _, split = text.partition(":")
    return data, split or "none"


def share_of(split: str) -> float:
    """Which part of the classes a split holds."""
    return (1.0 if split == "none" else 0.5) / int(split.partition("/")[2] or 1)


def check_name(name: str, study: str) -> None:
    """Names become files, folders and labels."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise FastconError(f"{study}: the name {name!r} is not letters, digits, '_', '.', '+' and '-'")


def table(parent: dict[str, Any], key: str) -> dict[str, Any]:
    """A table of a study; empty where there is none."""
    value = parent.get(key, {})
    if not isinstance(value, dict):
        raise FastconError(f"{key if key.isprintable() else repr(key)} of a study is a table, not {value!r}")
    return value


def entries(parent: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of tables of a study."""
    value = parent.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise FastconError(f"{key} of a study is a list of tables: [[{key}]]")
    return value


def check_keys(kind: str, value: Any, where: str) -> None:
    """Refuse a table with unknown keys."""
    allowed = KEYS[kind].split()
    unknown = next((key for key in value if key not in allowed), None) if isinstance(value, dict) else ""
    if unknown is not None:
        raise FastconError(f"{where} has no key {unknown!r}: there are {', '.join(allowed)}")
