"""Kill, flip, resume and verify over and over: `python benchmarks/soak.py --minutes 60` prints a tally at the end.

Every round makes a store and a student with processes killed (kill -9) at random moments, compares both with
uninterrupted ones byte by byte, then flips random bits of the store, one at a time: each must be found by verify and
mended to the same bytes by verify --repair. It stops at the first thing that does not hold.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


@click.command()
@click.option("--minutes", type=click.FloatRange(0), default=60.0, help="How long to go on.")
@click.option("--seed", type=int, default=0, help="Seed of moments and bits.")
def main(minutes: float, seed: int) -> None:
    """Loop until the time is up."""
    import conftest
    import faults

    from fastcon.data import rendered
    from fastcon.data.manifest import index
    from fastcon.distill.verify import verify
    from fastcon.errors import FastconError
    from fastcon.machine import Machine

    chance, end = random.Random(seed), time.monotonic() + 60 * minutes
    tally = {"rounds": 0, "kills of precompute": 0, "kills of train": 0, "flips": 0}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rendered.write_proxy(folder / "images", 150)
        models = [
            str(conftest.make_model(folder / "general.safetensors", [f"thing {i}" for i in range(10)], 1)),
            str(conftest.make_model(folder / "letters.safetensors", ["a", "b", "c"], 2, size=40)),
        ]
        manifest, machine = index([str(folder / "images")]), Machine("cpu", "float32")
        make = ("precompute", str(folder / "images"), str(folder / "store"), *models, "20")
        learn = ("train", str(folder / "store"), str(folder / "run"), "20")
        for command, whole in ((make, "whole store"), (learn, "whole run")):
            out = command[2]
            faults.finish(*command)
            shutil.move(out, folder / whole)
            if command is make:
                shutil.copytree(folder / whole, out)
        while time.monotonic() < end:
            shutil.rmtree(folder / "store")
            for command, what, longest in ((make, "kills of precompute", 1.5), (learn, "kills of train", 3.0)):
                while faults.kill(chance.uniform(0, longest), *command) is not None:
                    tally[what] += 1
                faults.finish(*command)
            good = conftest.tree(folder / "whole store")
            assert conftest.tree(folder / "store") == good
            assert conftest.tree(folder / "run") == conftest.tree(folder / "whole run")
            shutil.rmtree(folder / "run")
            for _ in range(20):
                what = faults.flip(folder / "store", chance)
                try:
                    found = not all(check.passed for check in verify(str(folder / "store"), manifest, 0, machine))
                except FastconError:
                    found = True
                assert found, what
                assert all(check.passed for check in verify(str(folder / "store"), manifest, 0, machine, repair=True))
                assert conftest.tree(folder / "store") == good, what
                tally["flips"] += 1
            tally["rounds"] += 1
            click.echo(", ".join(f"{value} {key}" for key, value in tally.items()))


if __name__ == "__main__":
    main()
