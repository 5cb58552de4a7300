"""Runs a study's jobs in a folder, through Snakemake: on this machine, or wherever its options send them."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastcon.cores import cores
from fastcon.errors import FastconError, Interrupted, optional_import
from fastcon.files import write_json
from fastcon.run import stop_signals
from fastcon.study.plan import Job, Study

PLAN = "jobs.json"


def run(study: Study, out: str, arguments: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Run what is not done yet of a study in the folder `out`; `arguments` go to Snakemake as they are.

    Running it again resumes. Where the study was changed, what changed is run anew, with all that was made from it.
    Raises FastconError where the folder holds another study or results that are none of its own, and with the last line
    of the job that failed; Interrupted where a signal stopped it.
    """
    optional_import("snakemake", "study")
    folder = Path(out)
    _check_folder(folder, study)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "study.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FastconError(f"{out} is being run by another `fastcon study`: wait for it, or stop it") from None
        study = _with_stored_teachers(folder, study)
        _forget_outdated(folder, study)
        _write(folder, study)
        waiting = [job for job in study.jobs if not (folder / job.result).exists()]
        say(f"{len(study.jobs) - len(waiting)} of {len(study.jobs)} commands are done")
        if waiting:
            _snakemake(folder, study, list(arguments), lock.fileno(), say)
    report = study.jobs[-1].name
    return {"out": out, "commands": len(study.jobs), "ran": len(waiting), "report": f"{out}/{report}/index.html"}


def _check_folder(folder: Path, study: Study) -> None:
    plan = _plan(folder)
    if plan is None:
        if folder.exists() and not (folder.is_dir() and all(_ours(file.name) for file in folder.iterdir())):
            raise FastconError(f"{folder} holds other files and no study: give an empty or a new folder as --out")
    elif plan["study"] != study.name:
        raise FastconError(f"{folder} holds the study {plan['study']!r}, this is {study.name!r}: give another --out")


def _ours(name: str) -> bool:
    """Whether a study, also one whose plan was lost, may have made this."""
    made = ("jobs", "runs", "stores", "report", ".snakemake", "study.lock", "snakemake.log")
    return name in made or name.startswith("report-")


def _plan(folder: Path) -> dict[str, Any] | None:
    try:
        plan = json.loads((folder / PLAN).read_text())
        if not isinstance(plan["study"], str) or not isinstance(plan["commands"], dict):
            raise ValueError("it is no plan")
    except OSError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise FastconError(f"{folder / PLAN} is damaged ({error!r}): remove it, the results stay") from error
    return plan


def _forget_outdated(folder: Path, study: Study) -> None:
    """Remove results of commands that the study gives otherwise now, and put aside the runs and stores they made.

    With a command goes what was made from its result. A store that only gains teachers or views stays: precompute adds
    to it. Raises FastconError for a result that no command of this study has made.
    """
    before = (_plan(folder) or {"commands": {}})["commands"]
    anew: set[str] = set()
    for job in study.jobs:
        result, now = folder / job.result, list(job.command)
        made_by = _made_by(result) if result.exists() else before.get(job.name, now)
        if made_by not in (now, before.get(job.name)):
            raise FastconError(
                f"{result} was not made by this study's command ({_shell(job.command)[:200]}): remove it, or give another "
                "--out"
            )
        rests_on_anew = bool(anew & set(job.needs))
        if made_by == now and not rests_on_anew:
            continue
        growth = None if rests_on_anew else _growth(made_by, now)
        if growth is None:
            _put_aside(folder, job)
        if growth != "teachers":  # students of other views are others; of a store with one teacher more they are not
            anew.add(job.name)
        result.unlink(missing_ok=True)
        (folder / "jobs" / f"{job.name}.log").unlink(missing_ok=True)


def _made_by(result: Path) -> list[str] | None:
    try:
        return json.loads(result.read_text())["argv"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _with_stored_teachers(folder: Path, study: Study) -> Study:
    """The study, with stores that keep the teachers which they have from another part of it, or from before a change."""
    commands = (_plan(folder) or {"commands": {}})["commands"]

    def grown(job: Job) -> Job:
        before = _made_by(folder / job.result) or commands.get(job.name)
        if job.command[0] != "precompute" or not before or _precompute(before)[1:] != _precompute(job.command)[1:]:
            return job
        joining = [teacher for teacher in _precompute(job.command)[0] if teacher not in _precompute(before)[0]]
        added = [word for teacher in joining for word in ("--teacher", teacher)]
        return dataclasses.replace(job, command=(*before, *added))

    return dataclasses.replace(study, jobs=[grown(job) for job in study.jobs])


def _precompute(command: Sequence[str]) -> tuple[list[str], int, list[str]]:
    """Teachers, views and all else of a precompute command."""
    teachers, views, rest, words = [], 0, [], iter(command)
    for word in words:
        if word == "--teacher":
            teachers.append(next(words))
        elif word == "--views":
            views = int(next(words))
        else:
            rest.append(word)
    return teachers, views, rest


def _growth(before: list[str], now: list[str]) -> str | None:
    """By what a precompute goes on where another stopped: "teachers" alone, or "views"; None: it does not."""
    if before[0] != "precompute":
        return None
    (old_teachers, old_views, old_rest), (new_teachers, new_views, new_rest) = _precompute(before), _precompute(now)
    if not (set(old_teachers) <= set(new_teachers) and old_views <= new_views and old_rest == new_rest):
        return None
    return "teachers" if old_views == new_views else "views"


def _put_aside(folder: Path, job: Job) -> None:
    """Rename the run or store of a job to NAME.old, in place of an earlier one: a run takes no other options."""
    option = {"precompute": "--store", "teach": "--out", "train": "--out", "finetune": "--out"}.get(job.command[0])
    if option is None:
        return
    made = folder / job.command[job.command.index(option) + 1]
    if made.exists():
        old = made.with_name(f"{made.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        made.rename(old)


def _write(folder: Path, study: Study) -> None:
    results = {job.name: job.result for job in study.jobs}
    jobs = [
        {
            "rule": f"job_{number}_{''.join(c if c.isalnum() else '_' for c in job.name)}",
            "needs": [results[name] for name in job.needs],
            "result": job.result,
            "log": f"jobs/{job.name}.log",
            "shell": f"{shlex.quote(sys.executable)} -m fastcon {_shell(job.command)} --json {shlex.quote(job.result)}",
        }
        for number, job in enumerate(study.jobs)
    ]
    commands = (_plan(folder) or {"commands": {}})["commands"] | {job.name: list(job.command) for job in study.jobs}
    (folder / "jobs").mkdir(exist_ok=True)
    plan = {"study": study.name, "title": study.title, "jobs": jobs, "commands": commands}
    write_json(folder / PLAN, plan)


def _shell(command: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in command)


def _snakemake(folder: Path, study: Study, arguments: list[str], lock: int, say: Callable[[str], None]) -> None:
    """Run Snakemake in a process group of its own, which holds the lock as long as it lives, and stop it with us."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(Path(__file__).with_name("Snakefile"))]
    command += ["--rerun-incomplete", "--rerun-triggers", "mtime", "--nolock"]
    if not any(word.split("=")[0] in ("--executor", "-e", "--cores", "-c", "--jobs", "-j") for word in arguments):
        command += ["--cores", str(cores())]
    done = {job.name for job in study.jobs if (folder / job.result).exists()}
    with stop_signals() as stop, open(folder / "snakemake.log", "ab") as log:
        process = subprocess.Popen(
            [*command, *arguments], cwd=folder, stdout=log, stderr=log, start_new_session=True, pass_fds=[lock]
        )
        try:
            while process.poll() is None and not stop:
                time.sleep(0.3)
                _say_done(folder, study, done, say)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                process.wait()
        _say_done(folder, study, done, say)
        if stop:
            raise Interrupted(f"stopped by signal {stop[0]}; run the same command to resume")
    if process.returncode:
        raise FastconError(_what_failed(folder, study))


def _say_done(folder: Path, study: Study, done: set[str], say: Callable[[str], None]) -> None:
    for job in study.jobs:
        if job.name not in done and (folder / job.result).exists():
            done.add(job.name)
            log = folder / "jobs" / f"{job.name}.log"
            say(f"[{len(done)}/{len(study.jobs)}] {job.name}: {_last_line(log, besides='fastcon: ')}")


def _what_failed(folder: Path, study: Study) -> str:
    for job in study.jobs:
        log = folder / "jobs" / f"{job.name}.log"
        if log.exists() and not (folder / job.result).exists():
            return f"{job.name} failed: {_last_line(log).removeprefix('fastcon: ')} ({log})"
    return f"Snakemake failed: {_last_line(folder / 'snakemake.log')} ({folder / 'snakemake.log'})"


def _last_line(path: Path, besides: str | None = None) -> str:
    """The last line of a log; besides: notes that begin so are passed over, as long as there are others."""
    try:
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    lines = [line for line in lines if besides is None or not line.startswith(besides)] or lines
    return lines[-1].strip() if lines else "it said nothing"
