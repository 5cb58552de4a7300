"""A study as the user writes it (TOML, with overlays) → the commands it comes down to, and which needs which.

What can be shared is: one store for all students of a proxy, one training of each teacher, one probe command for all
representations of a task. The keys of a study file are described in docs/paper.md.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastcon.data.published import DATASETS
from fastcon.data.splits import MULTI_LABEL_SHOTS, SHOTS
from fastcon.errors import FastconError
from fastcon.models.origin import origin
from fastcon.study.tables import (
    KINDS,
    Source,
    Student,
    Tables,
    Teacher,
    check_keys,
    check_name,
    each,
    entries,
    flags_of,
    parse_split,
    share_of,
    table,
    task_of,
)
from fastcon.transfer.options import FEW, TRIALS

PAPER = Path(__file__).parent / "paper"
SMALL = "small"
"""The overlay that makes small twins; all other files there are studies."""
COMMANDS = ("probe", "finetune", "evaluate")


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
    heads: tuple[tuple[str | tuple[str, ...], float], ...] = ()
    """Whose logits a store gets: a MODEL, or the IMAGES and the share of their classes that a teacher is taught."""
    keeps: str | None = None
    """MODEL of whose size the run is that it leaves behind."""

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
    """Names and titles of the studies that come with fastcon, and of their parts, which are studies of their own."""
    titles = {}
    for path in sorted(PAPER.glob("*.toml")):
        if path.stem != SMALL:
            tables = _read(path)
            titles[path.stem] = tables["title"]
            titles |= {name: part["title"] for name, part in tables.get("parts", {}).items()}
    return titles


def load(file: str, overlays: Sequence[str] = (), data: str | None = None, only: Sequence[str] = ()) -> Study:
    """Read a study file, or a shipped study by name; the values of `overlays` replace its own.

    data: the folder where each official data set lies under its name (None: left open, as for a dry run). only: the parts
    to be run, with what they need. Raises FastconError, naming the key or name at fault.
    """
    path, part = _place(file)
    tables = _read(path)
    for overlay in overlays:
        tables = _merged(tables, _read(_place(overlay)[0]))
    name = "-".join([path.stem, *(Path(overlay).stem for overlay in overlays)])
    return planned(name, tables, data, [*part, *only])


def planned(name: str, tables: dict[str, Any], data: str | None = None, only: Sequence[str] = ()) -> Study:
    """A study of which the TOML is read already. Raises FastconError."""
    try:
        return _Planner(name, tables, data, only).study()
    except (AttributeError, TypeError, ValueError, KeyError, RecursionError) as error:
        raise FastconError(
            f"{name}: a value is of another kind than it should be ({error}): see docs/paper.md"
        ) from error


def _place(file: str) -> tuple[Path, list[str]]:
    """A study's file, or that of a shipped one; and the part that is meant, if it is the name of one."""
    path = Path(file)
    if path.is_file():
        return path, []
    if (PAPER / f"{file}.toml").is_file():
        return PAPER / f"{file}.toml", []
    for shipped_path in sorted(PAPER.glob("*.toml")):
        if file in _read(shipped_path).get("parts", {}):
            return shipped_path, [file]
    raise FastconError(f"no study {file!r}: a TOML file, or one of {', '.join(shipped())}")


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FastconError(f"{path} is no study ({error})") from error


def _merged(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


class _Planner(Tables):
    """Turns the tables into jobs."""

    def __init__(self, name: str, tables: dict[str, Any], data: str | None, only: Sequence[str]) -> None:
        super().__init__(name, tables, data)
        self._jobs: list[Job] = []
        self._parts = {key: table(table(tables, "parts"), key) for key in table(tables, "parts")}
        for key, part in self._parts.items():
            check_keys("parts", part, f"[parts.{key}]")
        self._only = list(dict.fromkeys(only))
        self._evaluations = [entry for entry in entries(tables, "evaluations") if self._takes_part(entry)]

    def _takes_part(self, entry: Source) -> bool:
        """Whether an evaluation is to be made."""
        check_keys("evaluations", entry, "[[evaluations]]")
        parts = each(entry.get("parts", []))
        unknown = next((name for name in [*parts, *self._only] if name not in self._parts), None)
        if unknown is not None:
            raise FastconError(f"{self._name} has no part {unknown!r}: there are {', '.join(self._parts) or 'none'}")
        return not self._only or bool(set(parts) & set(self._only))

    def study(self) -> Study:
        """Everything, in an order in which it could be run."""
        teachers: dict[str, Teacher] = {}
        for teacher in self._teachers():
            if teachers.setdefault(teacher.name, teacher) is not teacher:
                raise FastconError(f"{self._name}: two teachers are called {teacher.name!r}: name them apart")
        students = list(self._students(teachers))
        for name in (*self._models, *teachers, *(s.name for s in students), *(s.store for s in students)):
            check_name(name, self._name)
        if self._only:
            teachers, students = self._needed(teachers, students)
        for model in dict.fromkeys([self._generalist, *(teacher.model for teacher in teachers.values())]):
            self._train_model(model)
        for teacher in teachers.values():
            self._teach(teacher)
        for store in dict.fromkeys(student.store for student in students):
            self._precompute(store, [s for s in students if s.store == store], teachers)
        for student in students:
            self._train(student)
        for entry in self._evaluations:
            self._evaluate(entry, teachers, students)
        self._report(teachers)
        names = [job.name for job in self._jobs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise FastconError(f"{self._name}: two jobs are called {twice!r}: give one a name of its own")
        return Study(self._name, self._title(), self._jobs, self._sets, int(self._of("precompute").get("size", 224)))

    def _title(self) -> str:
        titles = [str(self._parts[name].get("title", name)) for name in self._only]
        return "; ".join(titles) or str(self._found.get("title", self._name))

    def _needed(
        self, teachers: dict[str, Teacher], students: list[Student]
    ) -> tuple[dict[str, Teacher], list[Student]]:
        """The teachers and students that the evaluations to be made are of, and the students' teachers."""
        labels = {row[0] for entry in self._evaluations for row in self._chosen(entry, teachers, students)}
        kept = [student for student in students if student.name in labels]
        used = labels | {name for student in kept for name in student.teachers}
        return {name: teacher for name, teacher in teachers.items() if name in used}, kept

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
        options = self._of("teach") | table(entry, "options")
        command += flags_of(options)
        self._add(
            f"teach-{model}",
            [*command, "--out", f"runs/{model}"],
            trained=((self._init(model), f"{entry['train']}:none train", _passes(options, 120)),),
        )

    def _of_model(self, model: str) -> list[str]:
        return [f"teach-{model}"] if "train" in self._models[model] else []

    def _teach(self, teacher: Teacher) -> None:
        command = [
            "teach",
            *self._labelled(teacher.data, teacher.split, teacher.seed),
            "--init",
            self._spec(teacher.model),
        ]
        options = self._of("teach")
        self._add(
            f"teach-{teacher.name}",
            [*command, *flags_of(options), "--out", f"runs/{teacher.name}"],
            self._of_model(teacher.model),
            trained=((self._init(teacher.model), f"{teacher.data}:{teacher.split} train", _passes(options, 120)),),
            keeps=self._init(teacher.model),
        )

    def _precompute(self, store: str, students: list[Student], teachers: dict[str, Teacher]) -> None:
        proxy = students[0].proxy
        sources = self._data(proxy)["train"]
        self._sets[f"{proxy} proxy"] = (sources, 1.0)
        used = list(dict.fromkeys(name for student in students for name in student.teachers))
        options = {"views": 4} | self._of("precompute") | self._stores.get(store.removeprefix(f"{proxy}-"), {})
        views = int(options["views"])
        command = ["precompute", *sources, "--store", f"stores/{store}", *flags_of(options)]
        command += ["--generalist", f"{self._generalist}={self._spec(self._generalist)}"]
        for name in used:
            command += ["--teacher", f"{name}=runs/{name}"]
        models = [self._generalist, *(teachers[name].model for name in used)]
        taught = [(tuple(self._data(teachers[name].data)["train"]), share_of(teachers[name].split)) for name in used]
        self._add(
            f"precompute-{store}",
            command,
            [*self._of_model(self._generalist), *(f"teach-{name}" for name in used)],
            forward=tuple((self._init(model), f"{proxy} proxy", float(views)) for model in models),
            heads=((self._init(self._generalist), 1.0), *taught),
        )

    def _train(self, student: Student) -> None:
        command = ["train", "--store", f"stores/{student.store}", *student.arguments, "--out", f"runs/{student.name}"]
        cost = (self._init(self._generalist), f"{student.proxy} proxy", student.epochs)
        self._add(f"train-{student.name}", command, [f"precompute-{student.store}"], trained=(cost,), keeps=cost[0])

    def _evaluate(self, entry: Source, teachers: dict[str, Teacher], students: list[Student]) -> None:
        command, chosen = entry.get("command"), self._chosen(entry, teachers, students)
        if command not in COMMANDS:
            raise FastconError(
                f"{self._name}: [[evaluations]] has the command {command!r}: one of {', '.join(COMMANDS)}"
            )
        options = self._of(str(command)) | table(entry, "options")
        if command == "finetune" and "shots" not in options:
            options.pop("trials", None)  # they count draws, and all images are no draw
        flags = flags_of(options)
        if command == "evaluate":
            self._upstream(chosen, flags, teachers, students)
            return
        if not entry.get("on"):
            raise FastconError(f"{self._name}: [[evaluations]] {command} says no tasks: on = ['cars196:d', …]")
        drawn = {t.name: t.seed if t.split != "none" else None for t in teachers.values()}
        drawn |= {student.name: student.split_seed for student in students}
        for task in each(entry["on"]):
            name, split = task_of(task)
            parse_split(split, self._name)
            if entry.get("name"):
                check_name(entry["name"], self._name)
            for seed in self._draws(split):
                where = self._labelled(name, split, seed)
                suffix = self._label(name, split).replace(":", "-").replace("/", "of") + self._drawn(split, seed)
                suffix += f"-{entry['name']}" if entry.get("name") else ""
                of = [row for row in chosen if split == "none" or drawn.get(row[0], seed) in (seed, None)]
                if command == "probe":
                    self._probe(suffix, self._looked_at(name, split, options), of, [*where, *flags])
                else:
                    for label, spec, job in of:
                        self._finetune(suffix, f"{name}:{split}", label, spec, job, [*where, *flags], options)

    def _looked_at(self, name: str, split: str, options: dict[str, Any]) -> str:
        """The set of images that a probe computes features of: all, or of a much larger published set those that are drawn."""
        published = DATASETS.get(name)
        if published is None or name in table(self._found, "data") or options.get("full"):
            return f"{name} whole"
        usual, strata = (MULTI_LABEL_SHOTS, 1.0) if published.group else (SHOTS, published.classes * share_of(split))
        drawn = float(options.get("shots", usual)) * strata * float(options.get("trials", TRIALS))
        if FEW * drawn >= published.parts[published.train]:
            return f"{name} whole"
        images = f"{name}:{split} drawn"
        self._sets[images] = ([], drawn + (published.parts[published.test] if published.test else 0))
        return images

    def _probe(self, suffix: str, images: str, chosen: list[tuple[str, str, str]], flags: list[str]) -> None:
        backbone = self._init(self._generalist)
        self._add(
            f"probe-{suffix}",
            ["probe", *(spec for _, spec, _ in chosen), *flags],
            [job for _, _, job in chosen if job],
            forward=((backbone, images, float(len(chosen))),),
        )

    def _finetune(
        self, suffix: str, task: str, label: str, spec: str, job: str, flags: list[str], options: dict[str, Any]
    ) -> None:
        name = f"finetune-{suffix}-{label}"
        passes, images = _passes(options, 50), f"{task} train"
        published = DATASETS.get(task.partition(":")[0])
        if "shots" in options:
            passes *= float(options.get("trials", 5))
            if published is not None:  # the classes of other sets are not known without looking: all images are counted
                classes = 1.0 if published.group else published.classes * share_of(task_of(task)[1])
                images = f"{task} {options['shots']} shots"
                self._sets[images] = ([], float(options["shots"]) * classes)
        self._add(
            name,
            ["finetune", spec, *flags, "--out", f"runs/{name}"],
            [job] if job else [],
            trained=((self._init(self._generalist), images, passes),),
        )

    def _chosen(
        self, entry: Source, teachers: dict[str, Teacher], students: list[Student]
    ) -> list[tuple[str, str, str]]:
        """(label, MODEL, the job that makes it or "") of the representations that an evaluation is of."""
        job = f"teach-{self._generalist}" if self._of_model(self._generalist) else ""
        rows_of = {"generalist": [(self._generalist, self._spec(self._generalist), job)]}
        rows_of["teachers"] = [(name, f"runs/{name}", f"teach-{name}") for name in teachers]
        rows_of["students"] = [(s.name, f"runs/{s.name}", f"train-{s.name}") for s in students]
        for row in rows_of["teachers"] + rows_of["students"]:
            rows_of.setdefault(row[0], [row])
        rows = []
        for name in each(entry.get("of", list(KINDS))):
            matching = [name] if name in rows_of else [other for other in rows_of if fnmatch.fnmatchcase(other, name)]
            if not matching:
                raise FastconError(f"{self._name}: [[evaluations]] is of {name!r}: there are {', '.join(rows_of)}")
            rows += [row for match in matching for row in rows_of[match]]
        return list(dict.fromkeys(rows))

    def _upstream(
        self,
        chosen: list[tuple[str, str, str]],
        flags: list[str],
        teachers: dict[str, Teacher],
        students: list[Student],
    ) -> None:
        heads = {student.name: student.teachers for student in students} | {name: (name,) for name in teachers}
        for label, spec, job in chosen:
            for teacher in heads.get(label, ()):
                taught_as = teachers[teacher]
                where = self._labelled(taught_as.data, taught_as.split, taught_as.seed, test_only=True)
                head = "task" if label in teachers else teacher
                task = f"{teachers[teacher].data}:{teachers[teacher].split} test"
                self._add(
                    f"evaluate-{label}" + (f"-{teacher}" if label not in teachers else ""),
                    ["evaluate", spec, "--head", head, *where, *flags],
                    [job],
                    forward=((self._init(teachers[teacher].model), task, 1.0),),
                )

    def _report(self, teachers: dict[str, Teacher]) -> None:
        results = [job for job in self._jobs if job.command[0] in COMMANDS]
        trained = [job for job in self._jobs if job.command[0] == "train"]
        command = ["report", *(job.result for job in results), *(f"runs/{job.name[6:]}" for job in trained)]
        base = self._spec(self._generalist)
        if any(job.command[0] in ("probe", "finetune") and base in job.command for job in results):
            command += ["--generalist", origin(base)["name"]]
        for pair in self._related(teachers):
            command += ["--related", pair]
        for name in dict.fromkeys(teacher.best for teacher in teachers.values() if teacher.best):
            command += ["--best", f"{name}={','.join(self._rivals(name, teachers))}"]
        for reference in self._references():
            command += ["--reference", reference]
        name = "-".join(["report", *self._only])
        command += ["--title", self._title(), "--out", name]
        self._add(name, command, [job.name for job in results + trained])

    def _related(self, teachers: dict[str, Teacher]) -> list[str]:
        """TEACHER=TASK of each teacher's own task and of those related to it."""
        pairs = []
        for teacher in teachers.values():
            for data in [teacher.data, *self._data(teacher.data)["related"]]:
                for name in (teacher.name, teacher.data):  # students name it, its own row names its data
                    pairs.append(f"{name}={data}")
        return [pair for pair in dict.fromkeys(pairs) if len(set(pair.split("="))) > 1]

    def _rivals(self, best: str, teachers: dict[str, Teacher]) -> list[str]:
        """The rows that the best is chosen from: repetitions over class splits make one row."""
        names = [
            teacher.name.removesuffix(self._drawn(teacher.split, teacher.seed))
            for teacher in teachers.values()
            if teacher.best == best
        ]
        return list(dict.fromkeys(names))

    def _references(self) -> list[str]:
        parts = [self._parts[name] for name in self._only or self._parts]
        return list(dict.fromkeys(name for part in parts for name in each(part.get("references", []))))


def _passes(options: dict[str, Any], epochs: float) -> float:
    """Passes over the training images of a fine-tuning with its grid."""
    grid = len(str(options.get("lr-grid", "0.001,0.01,0.1")).split(","))
    return float(options.get("epochs", epochs)) * (1 + (0.9 * grid if grid > 1 else 0))
