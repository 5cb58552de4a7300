"""Object storage against a folder, for training and for precompute: `python benchmarks/remote.py`, about 30 minutes.

A store in four parts of 6,000 rendered images, 2 baked views of 64 px, a generalist of 1,000 classes and a teacher of 500 (ResNet18, random
weights, float16), trained on for two epochs from a folder and from an S3 server on loopback (moto, a process of its own) that takes
50 ms to answer and fails 5 % of the requests. Three rounds in turn, each with an empty cache. Prints img/s from the first batch asked for
to the last step, their ratio, and the requests.

Then such a store is made, of two parts and 30 views, without baked ones: from the images in eight tars there and written there, or both in folders. Prints rows/s of
all of it, from indexing the images to the last part.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

LATENCY, FAILING, ROUNDS = 0.05, 0.05, 3
VIEWS = 30


def serve(pipe: Any, folder: str) -> None:
    """The server: says its environment, and on each message how many requests were answered and failed since the last."""
    import logging
    import os

    from bucket import serving

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with serving() as bucket:
        bucket.put(f"{folder}/store", "store")
        bucket.put(f"{folder}/tars", "tars")
        bucket.latency, bucket.failing = LATENCY, FAILING
        bucket.asked.clear()
        pipe.send({key: value for key, value in os.environ.items() if key.startswith("AWS_")})
        while pipe.recv():
            pipe.send((len(bucket.asked), sum("/logits/c/" in name for name in bucket.asked), bucket.failed))
            bucket.asked.clear()
            bucket.failed = 0


def made(images: str, store: str, teachers: list[Any]) -> float:
    """Rows/s of making a store in parts."""
    from fastcon.data.manifest import ImageSet
    from fastcon.distill import parts
    from fastcon.distill.options import PrecomputeOptions
    from fastcon.machine import Machine

    start = time.perf_counter()
    options = PrecomputeOptions(size=64, parts=2, compile="none")
    return parts.make(store, ImageSet([images]), teachers, options, VIEWS, Machine("cpu")) / (
        time.perf_counter() - start
    )


def rate(store: str, out: Path) -> float:
    """img/s of a run."""
    from fastcon.distill.options import TrainOptions, Upkeep
    from fastcon.distill.train import train
    from fastcon.machine import Machine

    train(store, str(out), TrainOptions(epochs=2), Machine("cpu"), Upkeep(advise_seconds=1e9))
    waits = json.loads((out / "waits.log").read_text().splitlines()[-1])
    return waits["steps"] * 32 / waits["seconds"]


def main() -> None:
    """Measure and print."""
    import os

    from fastcon.data import rendered
    from fastcon.data.manifest import ImageSet
    from fastcon.distill import parts
    from fastcon.distill.options import PrecomputeOptions
    from fastcon.distill.precompute import Teacher
    from fastcon.machine import Machine
    from fastcon.models.load import load

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rendered.write_proxy(folder / "images", 6000)
        teachers = []
        for name, classes in (("general", 1000), ("teacher", 500)):
            spec = "torchvision:resnet18@random?size=64"
            model = load(spec, classes=[f"class {k}" for k in range(classes)])
            teachers.append(Teacher(name, spec, model, generalist=name == "general"))
        options = PrecomputeOptions(size=64, bake=True, parts=4)
        store = str(folder / "store")
        parts.make(store, ImageSet([str(folder / "images")]), teachers, options, 2, Machine("cpu"))
        (folder / "tars").mkdir()
        for k in range(8):
            with tarfile.open(folder / f"tars/{k}.tar", "w") as tar:
                for image in sorted((folder / "images").rglob("*.*"))[k::8]:
                    tar.add(image, image.name)
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, scratch), daemon=True)
        server.start()
        os.environ |= ours.recv()
        ratios: list[float] = []
        for round_ in range(ROUNDS):
            os.environ["FASTCON_CACHE"] = str(folder / f"cache-{round_}")
            local = rate(store, folder / f"local-{round_}")
            remote = rate("s3://bucket/store", folder / f"remote-{round_}")
            ours.send(True)
            answered, chunks, failed = ours.recv()
            ratios.append(remote / local)
            print(
                f"{remote:.0f} against {local:.0f} img/s, {ratios[-1]:.3f}; {answered} requests answered, {chunks} of them for "
                f"chunks of logits, {failed} failed",
                flush=True,
            )
            shutil.rmtree(os.environ["FASTCON_CACHE"])
        print(f"median of the ratios: {statistics.median(ratios):.3f}")
        ratios = []
        for round_ in range(ROUNDS):
            os.environ["FASTCON_CACHE"] = str(folder / f"cache-{round_}")
            local = made(str(folder / "tars/{0..7}.tar"), str(folder / f"made-{round_}"), teachers)
            remote = made("s3://bucket/tars/{0..7}.tar", f"s3://bucket/made-{round_}", teachers)
            ours.send(True)
            answered, _, failed = ours.recv()
            ratios.append(remote / local)
            print(
                f"{remote:.0f} against {local:.0f} rows/s, {ratios[-1]:.3f}; {answered} fetched, {failed} requests failed",
                flush=True,
            )
            shutil.rmtree(os.environ["FASTCON_CACHE"])
        print(f"median of the ratios: {statistics.median(ratios):.3f}")
        ours.send(False)


if __name__ == "__main__":
    main()
