"""The package: what a wheel, an sdist and an editable install hold, and that the parts keep their borders."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastcon

ROOT = Path(__file__).parent.parent
MODULES = sorted([*(ROOT / "fastcon").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])


def imported(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize(
    ("library", "home"),
    [
        (
            "click",
            {f"cli/{name}" for name in ("distill", "group", "images", "options", "output", "results", "transfer")},
        ),
        ("zarr", {"store/arrays"}),
        ("fsspec", {"remote"}),
        ("nvidia", {"data/decode"}),
        ("triton", {"multihead_ce_triton"}),
        ("sklearn", {"transfer/solvers", "data/rendered", "bench/probe", "bench/probe_full", "distill/relate"}),
        ("tarfile", {"data/sources", "data/datasets", "store/bake", "bench/growth"}),
    ],
)
def test_only_one_module_knows_a_library(library, home):
    names = {path: path.relative_to(ROOT).with_suffix("").as_posix().partition("/")[2] for path in MODULES}
    assert {names[path] for path in MODULES if library in imported(path)} == home


def test_kernels_import_nothing_from_fastcon():
    for path in (ROOT / "kernels").glob("*.py"):
        for line in path.read_text().splitlines():
            match = re.match(r"\s*(?:from|import) (fastcon[\w.]*)", line)
            assert match is None or match[1].startswith("fastcon.kernels"), f"{path.name}: {line}"


LAYERS = [
    "errors",
    "files",
    "remote",
    "options",
    "cores",
    "machine",
    "ranks",
    "run",
    "trackers",
    "data",
    "models",
    "training",
    "store",
    "distill",
    "transfer",
    "report",
    "export",
    "study",
    "bench",
    "info",
    "demo",
    "api",
    "cli",
]
"""From the ground up: a module imports from its own layer and those before it, and from the kernels."""


def imports_of(path: Path) -> set[str]:
    """The fastcon modules that a module names in imports, wherever in it they stand."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("fastcon.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastcon":
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if module_file(name) else str(node.module) for name in inside}
    return {name for name in found if name != "fastcon" and not name.startswith("fastcon.kernels")}


def module_file(name: str) -> Path | None:
    """Where a module or package of fastcon's lies."""
    place = ROOT / name.replace(".", "/")
    return next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.exists()), None)


def test_imports_go_down_and_never_round():
    graph: dict[str, set[str]] = {}
    for path in (ROOT / "fastcon").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name in ("fastcon", "fastcon.__main__"):
            continue
        graph[name] = imports_of(path) - {name}
        own = LAYERS.index(name.split(".")[1])
        for imported in graph[name]:
            assert LAYERS.index(imported.split(".")[1]) <= own, f"{name} imports {imported}"
    for name in graph:
        seen, reached = set(), set(graph[name])
        while reached - seen:
            [seen.add(step) or reached.update(graph[step]) for step in reached - seen]
        assert name not in seen, f"{name} comes to import itself"


def test_public_names():
    assert [name for name in fastcon.__all__ if getattr(fastcon, name) is None] == []
    assert callable(fastcon.loss)
    assert callable(fastcon.load)
    with pytest.raises(AttributeError):
        fastcon.nothing  # noqa: B018


def test_the_lock_pins_what_setup_cfg_asks_for():
    from packaging.markers import Marker
    from packaging.requirements import Requirement

    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    wanted = config["options"]["install_requires"] + config["options.extras_require"]["dev"]
    locked = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r'[A-Za-z0-9._-]+==[\w.+!]+( ; python_version (==|>=|<) "3\.1\d")?', line), line
            name, _, rest = line.partition("==")
            version, _, marker = rest.partition(" ; ")
            if not marker or Marker(marker).evaluate():
                locked[name.lower().replace("_", "-")] = version
    for line in filter(None, (line.strip() for line in wanted.splitlines())):
        requirement = Requirement(line)
        assert requirement.specifier.contains(locked[requirement.name.lower()]), line


def test_wheel_and_sdist_hold_the_kernels(tmp_path):
    if importlib.util.find_spec("build") is None or importlib.util.find_spec("setuptools") is None:
        pytest.skip("the dev extra (build, setuptools) is not installed")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    [wheel], [sdist] = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "fastcon/kernels/svm.py",
        "fastcon/kernels/multihead_ce.py",
        "fastcon/py.typed",
        "fastcon/cli/main.py",
    } <= names
    assert {"fastcon/study/Snakefile", "fastcon/study/paper/paper.toml", "fastcon/study/paper/small.toml"} <= names
    assert "fastcon/report/paper/table4.csv" in names
    assert not any(name.startswith(("kernels/", "tests/")) for name in names)
    with tarfile.open(sdist) as tar:
        inside = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    assert {"kernels/svm.py", "setup.cfg", "LICENSE", "fastcon/py.typed"} <= inside
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = "import fastcon.kernels.svm as m, fastcon; print(m.__file__)"
    out = subprocess.run([sys.executable, "-c", script], cwd=site, check=True, capture_output=True, text=True).stdout
    assert out.strip() == str(site / "fastcon" / "kernels" / "svm.py")


def test_without_a_gpu_its_tests_are_skipped_and_say_why():
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("FASTCON_TEST_DEVICE", None)
    done = subprocess.run([ROOT / "bin" / "test", "--gpu"], capture_output=True, text=True, env=environment)
    assert done.returncode == 5  # pytest's for: no test ran
    assert "PyTorch sees no GPU here" in done.stdout
    assert "passed" not in done.stdout
