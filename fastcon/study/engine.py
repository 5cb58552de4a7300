"""Runs a study's jobs in a folder, through Snakemake: on this machine, or wherever its options send them."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastcon.checkpoint import write_atomically
from fastcon.errors import FastconError, Interrupted, optional_import
from fastcon.run import stop_signals
from fastcon.study.plan import Job, Study

PLAN = "jobs.json"


def run(study: Study, out: str, arguments: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Run what is not done yet of a study in the folder `out`; `arguments` go to Snakemake as they are.

    Raises FastconError where the folder holds another study or results that are none of its own, and with the last line
    of the job that failed; Interrupted where a signal stopped it. Running it again resumes.
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
        for job in _outdated(folder, study):
            (folder / job.result).unlink()
        _write(folder, study)
        waiting = [job for job in study.jobs if not (folder / job.result).exists()]
        say(f"{len(study.jobs) - len(waiting)} of {len(study.jobs)} commands are done")
        if waiting:
            _snakemake(folder, study, list(arguments), say)
    return {"out": out, "commands": len(study.jobs), "ran": len(waiting), "report": f"{out}/report/index.html"}


def _check_folder(folder: Path, study: Study) -> None:
    plan = _plan(folder)
    if plan is None:
        if folder.exists() and (not folder.is_dir() or any(f.name != "study.lock" for f in folder.iterdir())):
            raise FastconError(f"{folder} holds other files and no study: give an empty or a new folder as --out")
    elif plan["study"] != study.name:
        raise FastconError(f"{folder} holds the study {plan['study']!r}, this is {study.name!r}: give another --out")


def _plan(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / PLAN).read_text())
    except OSError:
        return None
    except ValueError as error:
        raise FastconError(f"{folder / PLAN} is damaged ({error}): remove it, the results stay") from error


def _outdated(folder: Path, study: Study) -> list[Job]:
    """Jobs whose results are of this study as it was before it was changed. Raises FastconError for foreign results."""
    plan = _plan(folder) or {"jobs": []}
    before = {job["name"]: job["command"] for job in plan["jobs"]}
    found = []
    for job in study.jobs:
        file = folder / job.result
        if not file.exists():
            continue
        try:
            made_by = json.loads(file.read_text())["argv"]
        except (ValueError, KeyError, TypeError):
            made_by = None
        if made_by == list(job.command):
            continue
        if made_by is None or made_by != before.get(job.name):
            raise FastconError(
                f"{file} was not made by this study's command ({_shell(job.command)[:200]}): remove it, or give another "
                "--out"
            )
        found.append(job)
    return found


def _write(folder: Path, study: Study) -> None:
    results = {job.name: job.result for job in study.jobs}
    jobs = [
        {
            "name": job.name,
            "rule": f"job_{number}_{''.join(c if c.isalnum() else '_' for c in job.name)}",
            "command": list(job.command),
            "needs": [results[name] for name in job.needs],
            "result": job.result,
            "log": f"jobs/{job.name}.log",
            "shell": f"{shlex.quote(sys.executable)} -m fastcon {_shell(job.command)} --json {shlex.quote(job.result)}",
        }
        for number, job in enumerate(study.jobs)
    ]
    (folder / "jobs").mkdir(exist_ok=True)
    data = json.dumps({"study": study.name, "title": study.title, "jobs": jobs}, indent=1) + "\n"
    write_atomically(folder / PLAN, data.encode())


def _shell(command: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in command)


def _snakemake(folder: Path, study: Study, arguments: list[str], say: Callable[[str], None]) -> None:
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(Path(__file__).with_name("Snakefile"))]
    command += ["--rerun-incomplete", "--rerun-triggers", "mtime", "--nolock"]
    if not any(word.split("=")[0] in ("--executor", "-e", "--cores", "-c", "--jobs", "-j") for word in arguments):
        command += ["--cores", str(len(os.sched_getaffinity(0)))]
    done = {job.name for job in study.jobs if (folder / job.result).exists()}
    with stop_signals() as stop, open(folder / "snakemake.log", "ab") as log:
        process = subprocess.Popen([*command, *arguments], cwd=folder, stdout=log, stderr=log, start_new_session=True)
        stopped = False
        while process.poll() is None:
            if stop and not stopped:
                os.killpg(process.pid, signal.SIGINT)
                stopped = True
            time.sleep(0.3)
            _say_done(folder, study, done, say)
        _say_done(folder, study, done, say)
        if stop:
            raise Interrupted(f"stopped by signal {stop[0]}; run the same command to resume")
    if process.returncode:
        raise FastconError(_what_failed(folder, study, done))


def _say_done(folder: Path, study: Study, done: set[str], say: Callable[[str], None]) -> None:
    for job in study.jobs:
        if job.name not in done and (folder / job.result).exists():
            done.add(job.name)
            say(f"[{len(done)}/{len(study.jobs)}] {job.name}: {_last_line(folder / 'jobs' / f'{job.name}.log')}")


def _what_failed(folder: Path, study: Study, done: set[str]) -> str:
    for job in study.jobs:
        log = folder / "jobs" / f"{job.name}.log"
        if job.name not in done and log.exists():
            return f"{job.name} failed: {_last_line(log).removeprefix('fastcon: ')} ({log})"
    return f"Snakemake failed: {_last_line(folder / 'snakemake.log')} ({folder / 'snakemake.log'})"


def _last_line(path: Path) -> str:
    try:
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return lines[-1].strip() if lines else "it said nothing"
