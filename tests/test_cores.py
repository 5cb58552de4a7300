"""Cores and turns: who may compute when several processes want the same cores."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fastcon import cores as module
from fastcon.cores import Cores, workers

COUNT = """
import os, sys, time
from fastcon.cores import Cores
folder, log, seconds = sys.argv[1:]
end = time.monotonic() + float(seconds)
with Cores(len(os.sched_getaffinity(0)), folder=folder) as cores, open(log, "a", buffering=1) as file:
    print("ready", flush=True)
    while time.monotonic() < end:
        with cores.turn():
            file.write(f"{os.getpid()} in {time.monotonic_ns()}\\n")
            time.sleep(0.01)
            file.write(f"{os.getpid()} out {time.monotonic_ns()}\\n")
"""


def _processes(folder: Path, log: Path, count: int, seconds: float) -> list[subprocess.Popen]:
    command = [sys.executable, "-c", COUNT, str(folder), str(log), str(seconds)]
    return [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]


def test_processes_take_turns_and_none_starves(tmp_path):
    running = _processes(tmp_path / "locks", tmp_path / "log", 3, 6)
    assert [process.wait() for process in running] == [0, 0, 0]
    for process in running:
        process.stdout.close()
    lines = sorted(
        (line.split() for line in (tmp_path / "log").read_text().splitlines()), key=lambda line: int(line[2])
    )
    assert [what for _, what, _ in lines] == ["in", "out"] * (len(lines) // 2)  # never two inside at a time
    third = lines[len(lines) // 3 : len(lines) // 3 * 2]  # while all three are there
    turns = [sum(pid == str(process.pid) for pid, what, _ in third if what == "in") for process in running]
    assert min(turns) > 0.5 * sum(turns) / 3, turns


def test_nobody_waits_for_ever_for_one_that_is_suspended(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    with Cores(folder=str(tmp_path)) as suspended, Cores(folder=str(tmp_path)) as other, suspended.turn():
        started = time.monotonic()
        with other.turn():
            assert 0.2 <= time.monotonic() - started < 2
        started = time.monotonic()
        for _ in range(20):  # once is enough: 20 steps do not wait for it 20 times
            with other.turn():
                pass
        assert time.monotonic() - started < 0.2
    with Cores(folder=str(tmp_path)) as back, Cores(folder=str(tmp_path)) as other:
        with back.turn(), other.turn():
            pass
        with other.turn():  # it let go, so there is a turn to take and to wait for again
            pass
        started = time.monotonic()
        with back.turn(), other.turn():
            assert 0.2 <= time.monotonic() - started < 2


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_half_the_cores_each_do_not_meet(tmp_path):
    there = sorted(os.sched_getaffinity(0))
    with Cores(1, folder=str(tmp_path)):
        first = os.sched_getaffinity(0)
        os.sched_setaffinity(0, there)  # as another process would find them
        with Cores(1, folder=str(tmp_path)):
            second = os.sched_getaffinity(0)
    assert first == {there[0]}
    assert second == {there[1]}


def test_afterwards_everything_is_as_it_was(tmp_path):
    before = os.sched_getaffinity(0), torch.get_num_threads()
    files = len(os.listdir("/proc/self/fd"))
    with Cores(1, folder=str(tmp_path)) as cores, cores.turn():
        assert torch.get_num_threads() == 1
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == before
    assert len(os.listdir("/proc/self/fd")) == files


def test_on_a_gpu_nobody_waits(tmp_path):
    with Cores(device=torch.device("cuda"), folder=str(tmp_path / "locks")) as cores, cores.turn():
        pass
    assert not (tmp_path / "locks").exists()


def test_a_place_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    with Cores(folder=str(tmp_path / "file" / "locks")) as cores, cores.turn():
        pass


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, float("inf")),
        ({"cpu.max": "max 100000"}, float("inf")),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"a/cpu.max": "50000 100000"}, 0.5),
        ({"cpu.max": "400000 100000", "a/b/cpu.max": "200000 100000"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
        ({"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 3.0),
    ],
)
def test_the_quota_is_the_least_of_a_cgroup_and_those_it_is_in(tmp_path, files, limit):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "own").write_text("0::/a/b\n")
    assert module.quota(str(tmp_path), str(tmp_path / "own")) == limit


def test_threads_follow_quota_affinity_and_the_environment(monkeypatch):
    there = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(module, "quota", lambda: float("inf"))
    assert module.default_threads() == module.cores() == there
    monkeypatch.setattr(module, "quota", lambda: 0.3)
    assert module.default_threads() == 1
    monkeypatch.setattr(module, "quota", lambda: float("inf"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert module.default_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    assert module.default_threads() == there
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert module.default_threads() == there


def test_every_worker_computes_on_one_core_and_the_caller_on_all():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = threading.Barrier(3)

        def look(_: int) -> tuple[int, str]:
            together.wait(10)
            return torch.get_num_threads(), threading.current_thread().name

        with workers(3) as pool:
            seen = list(pool.map(look, range(3)))
            assert torch.get_num_threads() == 2
        assert [count for count, _ in seen] == [1, 1, 1]
        assert len({name for _, name in seen}) == 3
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [2]  # threads that start afterwards get the caller's number
    finally:
        torch.set_num_threads(before)


def test_an_error_at_once_leaves_no_noise(caplog):
    for _ in range(60):
        with pytest.raises(ValueError, match="at once"), workers(3):
            raise ValueError("at once")
    assert not caplog.records
