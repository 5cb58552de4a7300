"""The README is true: its Python runs, its options exist."""

from __future__ import annotations

import collections
import re
import shlex
from pathlib import Path

import pytest
from conftest import BATCH, MACHINE, RECIPE, make_model

from fastcon import study
from fastcon.cli.main import main
from fastcon.data.manifest import index
from fastcon.distill.precompute import Teacher, precompute
from fastcon.models.load import load

TEXT = (Path(__file__).parent.parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory, proxy_folder) -> Path:
    """What the README's code finds after bin/demo, in small."""
    root = tmp_path_factory.mktemp("readme")
    demo = root / "demo"
    (demo / "generalist").mkdir(parents=True)
    make_model(demo / "generalist" / "model.safetensors", [f"thing {k}" for k in range(9)], 1)
    glyphs = make_model(root / "glyphs.safetensors", ["x", "y"], 2)
    teachers = [
        Teacher("broad", "demo/generalist", load(demo / "generalist"), generalist=True),
        Teacher("glyphs", str(glyphs), load(glyphs)),
    ]
    precompute(str(demo / "store"), index([proxy_folder]), teachers, RECIPE, 1, MACHINE, BATCH)
    return root


def test_there_are_two_programs():
    assert len(PYTHON) == 2
    assert len([line for line in PYTHON[0].splitlines() if line]) <= 20


@pytest.mark.parametrize("number", [0, 1])
def test_the_python_runs(number, demo_folder, monkeypatch, capsys):
    monkeypatch.chdir(demo_folder)
    exec(compile(PYTHON[number], f"README.md, block {number}", "exec"), {})
    printed = capsys.readouterr().out
    if number == 0:
        assert re.match(r"0 \{'broad': [\d.e-]+, 'glyphs': [\d.e-]+\}", printed)
        assert (demo_folder / "student.pt").exists()
    else:
        assert "150 images, 1 views, ['broad', 'glyphs']" in printed
        assert re.search(r"000\d+\.jpg \[\s*\d+", printed)


def test_every_command_in_the_readme_parses():
    shell = "\n".join(re.findall(r"```(?:sh|console)\n(.*?)```", TEXT, re.S)).replace("\\\n", " ")
    commands = [
        line.removeprefix("$ ") for line in shell.splitlines() if line.removeprefix("$ ").startswith("fastcon ")
    ]
    assert len(commands) >= 6
    for line in commands:
        words = shlex.split(line, comments=True)[1:]
        main.commands[words[0]].make_context(words[0], words[1:])


def test_the_study_of_the_readme_is_what_it_says(tmp_path):
    [toml] = re.findall(r"```toml\n(.*?)```", TEXT, re.S)
    (tmp_path / "own.toml").write_text(toml)
    planned = study.load(str(tmp_path / "own.toml"), data="/data")
    found = collections.Counter(job.command[0] for job in planned.jobs)
    assert found == {"teach": 2, "precompute": 1, "train": 6, "probe": 3, "report": 1}


def test_the_table_of_experiments_counts_right():
    rows = re.findall(r"^\|[^|]*\| `fastcon study (\w+)` \| ([^|]*) \|", TEXT, re.M)
    assert {name for name, _ in rows} == set(study.shipped())
    for name, text in rows:
        found = collections.Counter(job.command[0] for job in study.load(name).jobs)
        assert text == ", ".join(f"{count} {command}" for command, count in found.items() if command != "report")
