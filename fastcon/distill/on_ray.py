"""precompute on a Ray cluster: one task a part, on a GPU each where there are any. The only module that knows Ray."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from fastcon.data.manifest import ImageSet
from fastcon.data.options import Indexing
from fastcon.distill import parts as distilled
from fastcon.distill.options import PrecomputeOptions
from fastcon.distill.precompute import Progress, load_teachers
from fastcon.errors import FastconError, one_line, optional_import
from fastcon.machine import Machine

RETRIES = 3
"""How often a part is begun again after its worker died."""
Named = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a worker needs to make a part; it loads the teachers itself."""

    store: str
    images: Sequence[str]
    generalist: Named | None
    teachers: Sequence[Named]
    options: PrecomputeOptions
    views: int
    machine: Machine
    indexing: Indexing
    folder: str
    """Where relative paths begin."""

    def run(self, part: int) -> int:
        """Make a part; the number of rows that were computed."""
        os.chdir(self.folder)
        images = ImageSet(self.images, trust=self.indexing.trust_images, strict=self.indexing.strict)
        loaded = load_teachers(self.generalist, self.teachers, self.options.size)
        options = dataclasses.replace(self.options, part=(part,))
        return distilled.make(self.store, images, loaded, options, self.views, self.machine)


def precompute(address: str, task: Task, progress: Progress | None = None) -> int:
    """Make the parts of a store on the cluster at `address`; the number of rows computed. progress gets (parts, of all).

    address: of a running cluster, "auto" to find it, or "local" for one on this machine that ends with this call. Raises
    FastconError where a part fails; those that are finished stay.
    """
    ray: Any = optional_import("ray", "ray")
    chosen = distilled.planned(task.store, ImageSet(task.images), task.options)
    where: dict[str, Any] = {"address": address}
    if address == "local":
        where = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        context = ray.init(**where, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError) as error:
        raise FastconError(f"no Ray cluster at {address} ({one_line(error)}): start one, or use `ray` local") from error
    with context:
        needs: dict[str, float] = {"num_cpus": task.machine.threads or 1}
        if task.machine.device != "cpu" and ray.cluster_resources().get("GPU"):
            needs["num_gpus"] = 1
        remote = ray.remote(max_retries=RETRIES, **needs)(Task.run)
        waiting, rows = [remote.remote(task, part) for part in chosen], 0
        while waiting:
            [done], waiting = ray.wait(waiting)
            try:
                rows += ray.get(done)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause if isinstance(error.cause, FastconError) else error
                raise FastconError(one_line(cause, 1000)) from error
            except ray.exceptions.RayError as error:
                raise FastconError(f"a worker died {RETRIES + 1} times ({one_line(error)})") from error
            if progress:
                progress(len(chosen) - len(waiting), len(chosen))
    return rows
