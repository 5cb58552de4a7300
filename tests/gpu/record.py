"""A plugin of pytest: writes what a machine's GPU passed, failed and skipped to benchmarks/results/tests-cuda.json."""

from __future__ import annotations

import os

import pytest

from fastcon import bench
from fastcon.files import write_json

RANK = {"passed": 0, "skipped": 1, "failed": 2}


class Outcomes:
    """The outcome of each test: the worst of its set-up, its call and its tear-down, with the reason of a skip."""

    def __init__(self) -> None:
        self.tests: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called thrice a test."""
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Called for each file: a whole one may be skipped, or fail."""
        if report.outcome != "passed":
            self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        name = report.nodeid.removeprefix("tests/gpu/")
        if RANK[report.outcome] >= RANK[self.tests.get(name, "passed")]:
            self.tests[name] = report.outcome
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            self.reasons[name] = report.longrepr[2].removeprefix("Skipped: ")

    def pytest_sessionfinish(self) -> None:
        """The record, where a GPU was there and there is a checkout to keep it in."""
        folder = bench.results_folder()
        if folder is None or not os.environ.get("FASTCON_TEST_DEVICE", "").startswith("cuda"):
            return
        if "passed" in self.tests.values() or "failed" in self.tests.values():
            folder.mkdir(exist_ok=True)
            about = bench.record([]) | {"command": "bin/test --gpu"}
            write_json(folder / "tests-cuda.json", about | {"tests": self.tests, "skipped": self.reasons})


def pytest_configure(config: pytest.Config) -> None:
    """Register it."""
    config.pluginmanager.register(Outcomes())
