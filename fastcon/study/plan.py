"""A study as the user writes it (TOML, with overlays) → the commands it comes down to, and which needs which.

What can be shared is: one store for all students of a proxy, one training of each teacher, one probe command for all
representations of a task. The keys of a study file are described in the README.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from fastcon.data import datasets
from fastcon.distill.options import METHODS
from fastcon.errors import FastconError
from fastcon.models.origin import origin

PAPER = Path(__file__).parent / "paper"
KEYS = {
    "": "title generalist seeds splits models data stores teachers students evaluations options",
    "options": "every teach precompute train probe finetune evaluate",
    "models": "model train options",
    "data": "train test holdout union related",
    "teachers": "data split model name",
    "students": "teachers method proxy store balance labels name options",
    "evaluations": "command on of name options",
}
COMMANDS = ("probe", "finetune", "evaluate")
KINDS = ("generalist", "teachers", "students")
Source = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """One command of a study. Its result is jobs/NAME.json in the study's folder, where the command is run."""

    name: str
    command: tuple[str, ...]
    """Arguments of `fastcon`, without --json."""
    needs: tuple[str, ...] = ()
    """Names of jobs that must be done before."""
    forward: tuple[tuple[str, str, float], ...] = ()
    """(MODEL, IMAGES set, passes over a set) that are computed without gradients; for the estimate of the cost."""
    trained: tuple[tuple[str, str, float], ...] = ()
    """Likewise, with gradients."""

    @property
    def result(self) -> str:
        """The file that says it is done."""
        return f"jobs/{self.name}.json"


@dataclasses.dataclass(frozen=True)
class Study:
    """A study's title and its jobs, each after what it needs, and how many images its sets have where that is known."""

    name: str
    title: str
    jobs: list[Job]
    images: dict[str, tuple[list[str], float]]
    """Set of images ("cars196:t train") → its sources, and the share of them that takes part; without sources: how many."""
    size: int

    @property
    def missing_data(self) -> str | None:
        """A data set whose folder was not given, if there is one."""
        words = (word for job in self.jobs for word in job.command)
        return next((word.partition("?")[0] for word in words if word.startswith("data:") and "=DATA/" in word), None)


def shipped() -> dict[str, str]:
    """Names and titles of the studies that come with fastcon."""
    return {path.stem: _read(path).get("title", "") for path in sorted(PAPER.glob("*.toml")) if path.stem != "small"}


def load(file: str, overlays: Sequence[str] = (), data: str | None = None) -> Study:
    """Read a study file, or a shipped study by name; the values of `overlays` replace its own.

    data: the folder where each official data set lies under its name (None: left open, as for a dry run). Raises
    FastconError, naming the key or name at fault.
    """
    found = _read(_path(file))
    for overlay in overlays:
        found = _merged(found, _read(_path(overlay)))
    name = "-".join([Path(file).stem, *(Path(overlay).stem for overlay in overlays)])
    return planned(name, found, data)


def planned(name: str, found: dict[str, Any], data: str | None = None) -> Study:
    """A study of which the TOML is read already. Raises FastconError."""
    try:
        return _Planner(name, found, data).study()
    except (AttributeError, TypeError, ValueError, KeyError, RecursionError) as error:
        raise FastconError(f"{name}: a value is of another kind than it should be ({error}): see the README") from error


def _path(file: str) -> Path:
    path = Path(file)
    if not path.exists() and path.suffix == "" and (PAPER / f"{file}.toml").exists():
        return PAPER / f"{file}.toml"
    if not path.is_file():
        raise FastconError(f"no study {file!r}: a TOML file, or one of {', '.join(shipped())}")
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FastconError(f"{path} is no study ({error})") from error


def _merged(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


@dataclasses.dataclass(frozen=True)
class _Teacher:
    name: str
    data: str
    split: str
    model: str
    seed: int = 0
    """Of the class split."""


@dataclasses.dataclass(frozen=True)
class _Student:
    name: str
    teachers: tuple[str, ...]
    method: str
    proxy: str
    store: str
    arguments: tuple[str, ...]
    epochs: float
    split_seed: int | None = None
    """Of its teachers' class splits."""


class _Planner:
    """Turns the tables of a study into jobs, checking every name on the way."""

    def __init__(self, name: str, found: dict[str, Any], data: str | None) -> None:
        self._name, self._found, self._folder = name, found, data
        _check_keys("", found, "the study")
        self._options = _table(found, "options")
        _check_keys("options", self._options, "[options]")
        self._models = {key: _table(found["models"], key) for key in _table(found, "models")}
        for key, value in self._models.items():
            _check_keys("models", value, f"[models.{key}]")
        self._seeds = _each(found.get("seeds", 0))
        self._split_seeds = _each(found.get("splits", 0))
        self._stores = {key: _table(_table(found, "stores"), key) for key in _table(found, "stores")}
        self._sets: dict[str, tuple[list[str], float]] = {}
        self._jobs: list[Job] = []
        self._splits: dict[str, list[str]] = {}
        for entry in _list(found, "evaluations"):
            for task in _each(entry.get("on", [])):
                data, split = _task(task)
                if split not in self._splits.setdefault(data, []):
                    self._splits[data].append(split)
        self._generalist = self._model(str(found.get("generalist", "")), "generalist")

    def study(self) -> Study:
        """Everything, in an order in which it could be run."""
        teachers: dict[str, _Teacher] = {}
        for teacher in self._teachers():
            if teachers.setdefault(teacher.name, teacher) is not teacher:
                raise FastconError(f"{self._name}: two teachers are called {teacher.name!r}: name them apart")
        students = list(self._students(teachers))
        for model in dict.fromkeys([self._generalist, *(teacher.model for teacher in teachers.values())]):
            self._train_model(model)
        for teacher in teachers.values():
            self._teach(teacher)
        for name in (*self._models, *teachers, *(s.name for s in students), *(s.store for s in students)):
            _check_name(name, self._name)
        for store in dict.fromkeys(student.store for student in students):
            self._precompute(store, [s for s in students if s.store == store], teachers)
        for student in students:
            self._train(student)
        for entry in _list(self._found, "evaluations"):
            self._evaluate(entry, teachers, students)
        self._report(teachers)
        names = [job.name for job in self._jobs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise FastconError(f"{self._name}: two jobs are called {twice!r}: give one a name of its own")
        title = str(self._found.get("title", self._name))
        return Study(self._name, title, self._jobs, self._sets, int(self._of("precompute").get("size", 224)))

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
        return f"{scheme}{at}{_absolute(path)}{question}{options}" if path and Path(path).exists() else spec

    def _data(self, name: str) -> Source:
        """A data set: train, test, holdout, related. The study's own, else the official one."""
        own = _table(self._found, "data").get(name)
        if own is not None:
            _check_keys("data", own, f"[data.{name}]")
            holdout = own.get("holdout")
            if "union" in own:
                members = [source for member in _each(own["union"]) for source in self._data(member)["train"]]
                return {"train": members, "test": [], "holdout": holdout, "related": []}
            return {
                "train": _sources(own.get("train", []), f"data.{name}.train"),
                "test": _sources(own.get("test", []), f"data.{name}.test"),
                "holdout": holdout,
                "related": own.get("related", RELATED.get(name, [])),
            }
        try:
            known = datasets.dataset(name)
        except FastconError:
            raise FastconError(
                f"{self._name}: unknown data set {name!r}: describe it in [data.{name}], or use one of "
                f"{', '.join(datasets.DATASETS)}"
            ) from None
        folder = "DATA" if self._folder is None else str(Path(self._folder).expanduser().absolute())
        root = quote(f"{folder}/{name.partition('-')[0] if known.group else name}")
        spec = f"data:{name}?root={root}&part="
        test = [] if known.test is None else [spec + known.test]
        return {
            "train": [spec + known.train],
            "test": test,
            "holdout": None if test else HOLDOUT,
            "related": RELATED.get(name, []),
        }

    def _labelled(self, name: str, split: str, seed: int = 0, test_only: bool = False) -> list[str]:
        """Arguments that say where a task's images are and which take part; notes how many those are."""
        data = self._data(name)
        if not data["train"] or bool(data["test"]) == (data["holdout"] is not None):
            raise FastconError(f"{self._name}: [data.{name}] needs train, and either test or holdout")
        _check_name(name, self._name)
        share = _share(split)
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
        return [*arguments, "--task", name if test_only else self._label(name, split, seed)]

    def _label(self, data: str, split: str, seed: int = 0) -> str:
        """What a task is called in reports: its data set, and its split where the study looks at several."""
        several = len(self._splits.get(data, [])) > 1 and split in self._splits[data]
        return (f"{data}:{split}" if several else data) + self._drawn(split, seed)

    def _drawn(self, split: str, seed: int) -> str:
        """How names tell class splits of different seeds apart, where the study has several."""
        return f"-split{seed}" if len(self._split_seeds) > 1 and split != "none" else ""

    def _draws(self, split: str) -> list[int]:
        """Seeds of a class split: one for what is not split."""
        return self._split_seeds if split != "none" else self._split_seeds[:1]

    def _of(self, command: str) -> dict[str, Any]:
        """Options of a command: every command's, then its own."""
        return _table(self._options, "every") | _table(self._options, command)

    # tables → teachers, students, jobs

    def _teachers(self) -> Iterator[_Teacher]:
        for entry in _list(self._found, "teachers"):
            _check_keys("teachers", entry, "[[teachers]]")
            models = entry.get("model", self._found.get("generalist"))
            for data, split, model in itertools.product(
                _each(entry.get("data")), _each(entry.get("split", "t")), _each(models)
            ):
                self._data(data)
                _, part, parts = _parse_split(split, self._name)
                name = data + (f"-{part}of{parts}" if parts > 1 else "")
                name += f"-{model}" if len(_each(models)) > 1 else ""
                name = entry.get("name", name)
                for seed in self._draws(split):
                    drawn = name + self._drawn(split, seed)
                    yield _Teacher(drawn, data, split, self._model(model, f"teacher {name!r}"), seed)

    def _students(self, teachers: dict[str, _Teacher]) -> Iterator[_Student]:
        for entry in _list(self._found, "students"):
            _check_keys("students", entry, "[[students]]")
            lists = entry.get("teachers", [])
            lists = [lists] if not lists or isinstance(lists[0], str) else lists
            choices = [_each(entry.get(key)) for key in ("method", "proxy", "store", "balance", "labels")]
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
    ) -> _Student:
        """options: of `train`, where a study lists several: balance, labels, seed."""
        balance, labels, seed = options["balance"], options["labels"], options["seed"]
        if store is not None and store not in self._stores:
            raise FastconError(
                f"{self._name}: [[students]] names the store {store!r}; [stores] has {', '.join(self._stores) or 'none'}"
            )
        parts = [method, entry.get("name") or "+".join(teachers)]
        parts += [f"split{draw}"] if entry.get("name") and draw is not None and len(self._split_seeds) > 1 else []
        parts += [proxy] if len(_each(entry.get("proxy"))) > 1 else []
        parts += [store] if store and len(_each(entry.get("store"))) > 1 else []
        parts += [balance.replace(":", "to")] if balance else []
        parts += ["labels"] if labels else []
        parts += [f"seed{seed or 0}"] if len(self._seeds) > 1 else []
        extra = _table(entry, "options")
        arguments = ["--method", method]
        arguments += ["--heads", ",".join(teachers)] if teachers else []
        arguments += ["--balance", balance] if balance else []
        arguments += ["--labels"] if labels else []
        arguments += ["--seed", str(seed)] if seed else []
        arguments += _flags(self._of("train") | extra)
        epochs = float((self._of("train") | extra).get("epochs", 40))
        if method != "soft-label" and not teachers:
            raise FastconError(f"{self._name}: a student by {method} has no teachers: teachers = [['birds'], …]")
        self._data(proxy)
        name = "-".join(part for part in parts if part)
        where = f"{proxy}-{store}" if store else proxy
        return _Student(name, teachers, method, proxy, where, tuple(arguments), epochs, draw)

    def _add(self, name: str, command: list[str], needs: Sequence[str] = (), **cost: Any) -> None:
        self._jobs.append(Job(name, tuple(command), tuple(dict.fromkeys(needs)), **cost))

    def _train_model(self, model: str) -> None:
        """A model that the study trains from scratch first, in place of one that is downloaded."""
        entry = self._models[model]
        if "model" not in entry:
            raise FastconError(f"{self._name}: [models.{model}] says no model")
        if "train" not in entry:
            return
        command = ["teach", *self._labelled(entry["train"], "none"), "--init", self._init(model)]
        options = self._of("teach") | _table(entry, "options")
        command += _flags(options)
        self._add(
            f"teach-{model}",
            [*command, "--out", f"runs/{model}"],
            trained=((self._init(model), f"{entry['train']}:none train", _passes(options, 120)),),
        )

    def _of_model(self, model: str) -> list[str]:
        return [f"teach-{model}"] if "train" in self._models[model] else []

    def _teach(self, teacher: _Teacher) -> None:
        command = [
            "teach",
            *self._labelled(teacher.data, teacher.split, teacher.seed),
            "--init",
            self._spec(teacher.model),
        ]
        options = self._of("teach")
        self._add(
            f"teach-{teacher.name}",
            [*command, *_flags(options), "--out", f"runs/{teacher.name}"],
            self._of_model(teacher.model),
            trained=((self._init(teacher.model), f"{teacher.data}:{teacher.split} train", _passes(options, 120)),),
        )

    def _precompute(self, store: str, students: list[_Student], teachers: dict[str, _Teacher]) -> None:
        proxy = students[0].proxy
        sources = self._data(proxy)["train"]
        self._sets[f"{proxy} proxy"] = (sources, 1.0)
        used = list(dict.fromkeys(name for student in students for name in student.teachers))
        options = {"views": 4} | self._of("precompute") | self._stores.get(store.removeprefix(f"{proxy}-"), {})
        views = int(options["views"])
        command = ["precompute", *sources, "--store", f"stores/{store}", *_flags(options)]
        command += ["--generalist", f"{self._generalist}={self._spec(self._generalist)}"]
        for name in used:
            command += ["--teacher", f"{name}=runs/{name}"]
        models = [self._generalist, *(teachers[name].model for name in used)]
        self._add(
            f"precompute-{store}",
            command,
            [*self._of_model(self._generalist), *(f"teach-{name}" for name in used)],
            forward=tuple((self._init(model), f"{proxy} proxy", float(views)) for model in models),
        )

    def _train(self, student: _Student) -> None:
        command = ["train", "--store", f"stores/{student.store}", *student.arguments, "--out", f"runs/{student.name}"]
        cost = (self._init(self._generalist), f"{student.proxy} proxy", student.epochs)
        self._add(f"train-{student.name}", command, [f"precompute-{student.store}"], trained=(cost,))

    def _evaluate(self, entry: Source, teachers: dict[str, _Teacher], students: list[_Student]) -> None:
        _check_keys("evaluations", entry, "[[evaluations]]")
        command, chosen = entry.get("command"), self._chosen(entry, teachers, students)
        if command not in COMMANDS:
            raise FastconError(
                f"{self._name}: [[evaluations]] has the command {command!r}: one of {', '.join(COMMANDS)}"
            )
        options = self._of(str(command)) | _table(entry, "options")
        if command == "finetune" and "shots" not in options:
            options.pop("trials", None)  # they count draws, and all images are no draw
        flags = _flags(options)
        if command == "evaluate":
            self._upstream(chosen, flags, teachers, students)
            return
        if not entry.get("on"):
            raise FastconError(f"{self._name}: [[evaluations]] {command} says no tasks: on = ['cars196:d', …]")
        drawn = {t.name: t.seed if t.split != "none" else None for t in teachers.values()}
        drawn |= {student.name: student.split_seed for student in students}
        for task in _each(entry["on"]):
            name, split = _task(task)
            _parse_split(split, self._name)
            if entry.get("name"):
                _check_name(entry["name"], self._name)
            for seed in self._draws(split):
                where = self._labelled(name, split, seed)
                suffix = self._label(name, split, seed).replace(":", "-").replace("/", "of")
                suffix += f"-{entry['name']}" if entry.get("name") else ""
                of = [row for row in chosen if split == "none" or drawn.get(row[0], seed) in (seed, None)]
                if command == "probe":
                    self._probe(suffix, f"{name}:{split}", of, [*where, *flags])
                else:
                    for label, spec, job in of:
                        self._finetune(suffix, f"{name}:{split}", label, spec, job, [*where, *flags], options)

    def _probe(self, suffix: str, task: str, chosen: list[tuple[str, str, str]], flags: list[str]) -> None:
        backbone = self._init(self._generalist)
        self._add(
            f"probe-{suffix}",
            ["probe", *(spec for _, spec, _ in chosen), *flags],
            [job for _, _, job in chosen if job],
            forward=((backbone, f"{task.partition(':')[0]} whole", float(len(chosen))),),
        )

    def _finetune(
        self, suffix: str, task: str, label: str, spec: str, job: str, flags: list[str], options: dict[str, Any]
    ) -> None:
        name = f"finetune-{suffix}-{label}"
        passes, images = _passes(options, 50), f"{task} train"
        known = datasets.DATASETS.get(task.partition(":")[0])
        if "shots" in options:
            passes *= float(options.get("trials", 5))
            if known is not None:  # the classes of other sets are not known without looking: all images are counted
                classes = 1.0 if known.group else known.classes * _share(_task(task)[1])
                images = f"{task} {options['shots']} shots"
                self._sets[images] = ([], float(options["shots"]) * classes)
        self._add(
            name,
            ["finetune", spec, *flags, "--out", f"runs/{name}"],
            [job] if job else [],
            trained=((self._init(self._generalist), images, passes),),
        )

    def _chosen(
        self, entry: Source, teachers: dict[str, _Teacher], students: list[_Student]
    ) -> list[tuple[str, str, str]]:
        """(label, MODEL, the job that makes it or "") of the representations that an evaluation is of."""
        job = f"teach-{self._generalist}" if self._of_model(self._generalist) else ""
        known = {"generalist": [(self._generalist, self._spec(self._generalist), job)]}
        known["teachers"] = [(name, f"runs/{name}", f"teach-{name}") for name in teachers]
        known["students"] = [(s.name, f"runs/{s.name}", f"train-{s.name}") for s in students]
        for row in known["teachers"] + known["students"]:
            known.setdefault(row[0], [row])
        rows = []
        for name in _each(entry.get("of", list(KINDS))):
            if name not in known:
                raise FastconError(f"{self._name}: [[evaluations]] is of {name!r}: there are {', '.join(known)}")
            rows += known[name]
        return list(dict.fromkeys(rows))

    def _upstream(
        self,
        chosen: list[tuple[str, str, str]],
        flags: list[str],
        teachers: dict[str, _Teacher],
        students: list[_Student],
    ) -> None:
        heads = {student.name: student.teachers for student in students} | {name: (name,) for name in teachers}
        for label, spec, job in chosen:
            for teacher in heads.get(label, ()):
                known = teachers[teacher]
                where = self._labelled(known.data, known.split, known.seed, test_only=True)
                head = "task" if label in teachers else teacher
                task = f"{teachers[teacher].data}:{teachers[teacher].split} test"
                self._add(
                    f"evaluate-{label}" + (f"-{teacher}" if label not in teachers else ""),
                    ["evaluate", spec, "--head", head, *where, *flags],
                    [job],
                    forward=((self._init(teachers[teacher].model), task, 1.0),),
                )

    def _report(self, teachers: dict[str, _Teacher]) -> None:
        results = [job for job in self._jobs if job.command[0] in COMMANDS]
        trained = [job for job in self._jobs if job.command[0] == "train"]
        command = ["report", *(job.result for job in results), *(f"runs/{job.name[6:]}" for job in trained)]
        base = self._spec(self._generalist)
        if any(job.command[0] in ("probe", "finetune") and base in job.command for job in results):
            command += ["--generalist", origin(base)["name"]]
        pairs: list[str] = []
        for teacher in teachers.values():
            for data in [teacher.data, *self._data(teacher.data)["related"]]:
                seeds = [teacher.seed] if teacher.split != "none" else self._split_seeds
                splits = self._splits.get(data, [])
                labels = [self._label(data, split, seed) for split in splits for seed in seeds] or [data]
                for name in dict.fromkeys((teacher.name, teacher.data)):  # students name it, its own row names its data
                    pairs += [f"{name}={label}" for label in labels]
        for pair in dict.fromkeys(pairs):
            command += ["--related", pair]
        command += ["--title", str(self._found.get("title", self._name))]
        self._add("report", [*command, "--out", "report"], [job.name for job in results + trained])


RELATED = {"ifood": ["food101"], "inaturalist": ["flowers", "cub"], "ifashion-category": ["ifashion-sleeve"]}
"""Tasks that the paper counts as related to a teacher of a data set, besides the data set itself."""
HOLDOUT = 0.5
"""Share kept aside as the test part where a data set has no official one (the paper does not say)."""


def _passes(options: dict[str, Any], epochs: float) -> float:
    """Passes over the training images of a fine-tuning with its grid."""
    grid = len(str(options.get("lr-grid", "0.001,0.01,0.1")).split(","))
    return float(options.get("epochs", epochs)) * (1 + (0.9 * grid if grid > 1 else 0))


def _flags(options: dict[str, Any]) -> list[str]:
    """A table of options → arguments: true is a flag, a list an option of several values."""
    arguments = []
    for key, value in options.items():
        if value is False:
            continue
        arguments.append(f"--{key}")
        if value is not True:
            arguments += [str(v) for v in _each(value)]
    return arguments


def _parse_split(text: str, study: str) -> tuple[str | None, int, int]:
    from fastcon.data.splits import parse_split

    try:
        return parse_split(text)
    except FastconError as error:
        raise FastconError(f"{study}: {str(error).removeprefix('--')}") from None


def _each(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _sources(value: Any, where: str) -> list[str]:
    """IMAGES, absolute: commands run in the study's folder."""
    found = _each(value)
    if not all(isinstance(item, str) for item in found):
        raise FastconError(f"{where} is a list of IMAGES, not {value!r}")
    return [_rooted(item) if datasets.has_scheme(item) else _absolute(item) for item in found]


def _rooted(source: str) -> str:
    """A named data set with its root absolute."""
    return re.sub(r"(?<=[?&]root=)[^&]*", lambda found: quote(_absolute(unquote(found[0]))), source)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _task(text: str) -> tuple[str, str]:
    """ "cars196:d" → its data set and its split."""
    data, _, split = text.partition(":")
    return data, split or "none"


def _share(split: str) -> float:
    """Which part of the classes a split holds."""
    return (1.0 if split == "none" else 0.5) / int(split.partition("/")[2] or 1)


def _check_name(name: str, study: str) -> None:
    """Names become files, folders and labels."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise FastconError(f"{study}: the name {name!r} is not letters, digits, '_', '.', '+' and '-'")


def _table(found: dict[str, Any], key: str) -> dict[str, Any]:
    value = found.get(key, {})
    if not isinstance(value, dict):
        raise FastconError(f"{key} of a study is a table, not {value!r}")
    return value


def _list(found: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = found.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise FastconError(f"{key} of a study is a list of tables: [[{key}]]")
    return value


def _check_keys(kind: str, found: Any, where: str) -> None:
    known = KEYS[kind].split()
    unknown = next((key for key in found if key not in known), None) if isinstance(found, dict) else ""
    if unknown is not None:
        raise FastconError(f"{where} has no key {unknown!r}: there are {', '.join(known)}")
