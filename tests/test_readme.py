"""The README and docs/ are true: their Python runs, their commands parse, their links lead somewhere, their trees are whole."""

from __future__ import annotations

import collections
import configparser
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import BATCH, MACHINE, RECIPE, make_model

from fastcon import study
from fastcon.cli.main import main
from fastcon.data.manifest import index
from fastcon.data.rendered import write_proxy
from fastcon.distill.precompute import Teacher, precompute
from fastcon.models.load import load

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md"))]
PYTHON = {
    f"{page.stem} {number}": code
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
}
PRINTED = {
    "README 0": r"\{'broad': [\d.]+, 'glyphs': [\d.]+\}\ntorch.Size\(\[32, 3, 48, 48\]\) .*'glyphs'.*\[32, 1024\]",
    "guide 0": r"^0 \{'broad': [\d.e-]+, 'glyphs': [\d.e-]+\}",
    "store 0": r"150 images, 1 views, \['broad', 'glyphs'\]\n000\d+\.jpg \[\s*\d+",
}


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory, proxy_folder) -> Path:
    """What the documentation's code finds after bin/demo, in small."""
    root = tmp_path_factory.mktemp("readme")
    demo = root / "demo"
    for name, classes, seed in (("generalist", [f"thing {k}" for k in range(9)], 1), ("teacher", ["x", "y"], 2)):
        (demo / name).mkdir(parents=True)
        make_model(demo / name / "model.safetensors", classes, seed, size=48)
    write_proxy(demo / "images" / "proxy", 64)
    teachers = [
        Teacher("broad", "demo/generalist", load(demo / "generalist"), generalist=True),
        Teacher("glyphs", "demo/teacher", load(demo / "teacher")),
    ]
    precompute(str(demo / "store"), index([proxy_folder]), teachers, RECIPE, 1, MACHINE, BATCH)
    return root


def test_the_readme_is_short_and_so_are_its_programs():
    assert len((ROOT / "README.md").read_text().split()) <= 1500
    assert set(PYTHON) == set(PRINTED)
    assert len([line for line in PYTHON["README 0"].splitlines() if line]) <= 10
    assert len([line for line in PYTHON["guide 0"].splitlines() if line]) <= 20


def test_the_install_line_for_cuda_12_names_all_that_is_required():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    needed = {re.match(r"[\w-]+", line)[0] for line in setup["options"]["install_requires"].split("\n") if line}
    needed = needed - {"nvidia-dali-cuda130", "triton"} | {"nvidia-dali-cuda120"}  # Triton comes with PyTorch
    line = re.search(r"`pip install (torch [^`]*)`", (ROOT / "docs" / "guide.md").read_text())[1]
    assert set(line.split()) == needed


@pytest.mark.parametrize("name", PRINTED)
def test_the_python_runs(name, demo_folder, monkeypatch, capsys):
    monkeypatch.chdir(demo_folder)
    exec(compile(PYTHON[name], name, "exec"), {})
    assert re.search(PRINTED[name], capsys.readouterr().out)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_parses(page):
    shell = "\n".join(re.findall(r"```(?:sh|console|bash)\n(.*?)```", page.read_text(), re.S)).replace("\\\n", " ")
    lines = [
        line.removeprefix("$ ").removesuffix(" &").replace("$SLURM_ARRAY_TASK_ID", "7") for line in shell.splitlines()
    ]
    lines = [re.sub(r"^torchrun .* -m fastcon ", "fastcon ", line) for line in lines]
    for line in [line for line in lines if line.startswith("fastcon ")]:
        words = shlex.split(line, comments=True)[1:]
        main.commands[words[0]].make_context(words[0], words[1:])


def test_the_slurm_job_saves_and_queues_itself_again(tmp_path):
    """Its signals, with stand-ins for torchrun and scontrol that write down what they were told."""
    array, job = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.S)
    assert subprocess.run(["bash", "-n"], input=array, text=True, check=False).returncode == 0
    (tmp_path / "torchrun").write_text(
        "#!/bin/bash\ntrap 'sleep 0.2; echo saved; exit 75' TERM\necho began\nsleep 60 > /dev/null & wait\n"
    )
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "scontrol $@"\n')
    for name in ("torchrun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12"}
    (tmp_path / "job").write_text(job)
    with subprocess.Popen(
        ["bash", str(tmp_path / "job")], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "began\n"
        process.terminate()
        assert process.communicate(timeout=30)[0] == "saved\nscontrol requeue 12\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place) if place else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, target


def test_the_trees_are_whole():
    modules = [*(ROOT / "fastcon").rglob("*.py"), *(ROOT / "kernels").glob("*.py"), *(ROOT / "bin").iterdir()]
    names = {path.relative_to(ROOT).as_posix().removeprefix("fastcon/").removeprefix("kernels/") for path in modules}
    names -= {name for name in names if Path(name).name in ("__init__.py", "__main__.py")}
    tree = (ROOT / "docs" / "tree.md").read_text()
    listed = set(re.findall(r"[\w/]+\.py|bin/\w+", tree))
    assert names <= listed, sorted(names - listed)
    written = {name for name in listed if not name.startswith(("benchmarks/", "test_"))} - {"test_cli.py"}
    assert written <= names, sorted(written - names)
    readme = (ROOT / "README.md").read_text()
    assert [path.name for path in (ROOT / "fastcon").iterdir() if path.is_dir() and path.name not in readme] == [
        name for name in ("__pycache__",) if (ROOT / "fastcon" / name).exists()
    ]


def test_the_study_file_is_what_it_says(tmp_path):
    [toml] = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "paper.md").read_text(), re.S)
    (tmp_path / "own.toml").write_text(toml)
    planned = study.load(str(tmp_path / "own.toml"), data="/data")
    found = collections.Counter(job.command[0] for job in planned.jobs)
    assert found == {"teach": 4, "precompute": 1, "train": 24, "probe": 5, "report": 1}


def test_the_table_of_experiments_counts_right():
    rows = re.findall(r"^\|[^|]*\| `fastcon study (\w+)` \| ([^|]*) \|", (ROOT / "docs" / "paper.md").read_text(), re.M)
    assert {name for name, _ in rows} == set(study.shipped())
    for name, text in rows:
        found = collections.Counter(job.command[0] for job in study.load(name).jobs)
        assert text == ", ".join(f"{count} {command}" for command, count in found.items() if command != "report")
