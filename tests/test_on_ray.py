"""precompute as tasks of a local Ray cluster."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import tree

from fastcon.store import parts

pytest.importorskip("ray")
CLUSTER = """
import ray
ray.init(include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
assert ray.get(ray.remote(lambda: 3).remote()) == 3
"""


@pytest.fixture(scope="module", autouse=True)
def _a_cluster_starts_here():
    """Ray needs shared memory and processes of its own, which not every sandbox gives it."""
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    try:
        subprocess.run([sys.executable, "-c", CLUSTER], check=True, capture_output=True, timeout=120, env=environment)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"Ray itself starts no cluster here ({type(error).__name__})")


def run(*arguments, check=True):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "fastcon", "precompute", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=check, env=environment)


def test_the_same_bytes_as_one_process(tmp_path, proxy_folder, generalist_file, teacher_file):
    command = [proxy_folder, "--views", 1, "--size", 32, "--precision", "float32", "--parts", 3, "--device", "cpu"]
    command += ["--generalist", f"general={generalist_file}", "--teacher", f"letters={teacher_file}"]
    run(*command, "--store", tmp_path / "one")
    made = run(*command, "--store", tmp_path / "ray", "--ray", "local")
    assert "150 rows computed" in made.stdout
    assert tree(tmp_path / "one") == tree(tmp_path / "ray")
    assert parts.opened(tmp_path / "ray").rows == 150


def test_what_fails_on_a_worker_is_said_in_one_line(tmp_path, proxy_folder, generalist_file):
    command = [
        proxy_folder,
        "--views",
        1,
        "--size",
        32,
        "--generalist",
        f"general={generalist_file}",
        "--store",
        tmp_path / "s",
    ]
    failed = run(*command, "--parts", 5000, "--ray", "local", check=False)
    assert failed.returncode == 1
    [line] = [line for line in failed.stderr.splitlines() if "no readable image in share" in line]
    assert line.startswith("fastcon: no readable image")
    assert line.endswith("choose fewer --parts")
    failed = run(*command, "--ray", "local", check=False)  # without a cluster: it knows before
    assert "has no parts yet: say with --parts how many there are to be" in failed.stderr
