"""Which MODEL to take for a task, before training: LogME of all of them, and the probe of the most promising."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastcon.data.options import Index, Task
from fastcon.machine import Machine
from fastcon.models.load import load
from fastcon.models.origin import origin
from fastcon.ranks import join
from fastcon.transfer.features import features
from fastcon.transfer.logme import logme
from fastcon.transfer.options import ProbeOptions
from fastcon.transfer.probe import Bar, common_size, probe


def rank(
    models: Sequence[str],
    task: Task,
    options: ProbeOptions,
    machine: Machine,
    index: Index,
    top: int = 10,
    bar: Bar = lambda what, unit: lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Order MODELs by LogME on the task's training images, and the `top` of them by their probe.

    The rows of "results" come best first: the probed ones by accuracy, then the others by LogME. "agreement" is Kendall's
    tau of both orders among the probed ones; None for fewer than three. Raises FastconError.
    """
    machine = machine.settled()
    ranks = join(machine.target)
    if not ranks.first:
        bar = lambda what, unit: lambda done, total: None  # noqa: E731
    with ranks.agreeing(in_turn=True):
        train, _ = task.parts(index)
        size = options.size or common_size({spec: load(spec).size for spec in models})
    rows: dict[str, dict[str, Any]] = {}
    for spec in models:  # one at a time: there may be hundreds
        model = load(spec).on(machine.target)
        progress = bar(f"features {spec}", "images")
        every = features(model, train.manifest, machine, size, options.batch_size, progress, ranks)
        rows[spec] = {"backbone": spec, **origin(spec), "logme": logme(every[train.indices], train.labels)}
    by_logme = sorted(rows, key=lambda spec: -rows[spec]["logme"])
    chosen = by_logme[:top]
    probed = probe(chosen, task, options, machine, index, bar, say) if chosen else {"results": []}
    for row in probed["results"]:
        rows[row["backbone"]] |= {key: row[key] for key in ("accuracy", "ci95", "accuracies")}
    by_accuracy = sorted(chosen, key=lambda spec: -rows[spec]["accuracy"])
    results = [rows[spec] for spec in [*by_accuracy, *by_logme[len(chosen) :]]]
    about = {key: value for key, value in probed.items() if key not in ("command", "backbones", "results")}
    agreement = kendall([rows[s]["logme"] for s in chosen], [rows[s]["accuracy"] for s in chosen])
    return {"command": "rank", "backbones": list(models), **about, "results": results, "agreement": agreement}


def kendall(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's tau of two orders; None for fewer than three entries, or where one is the same throughout."""
    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    from scipy.stats import kendalltau

    return float(kendalltau(a, b).statistic)
