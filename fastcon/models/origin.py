"""What a MODEL is called in results, how it came about, from which teachers, and which runs repeat one another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fastcon.data.splits import task_name

_APART = ("seed", "lineage", "threads", "versions", "heads", "weight", "store", "data")
_LATER = ("sync_bn", "recipe", "scale_lr", "warm_up")
"""Options that older runs do not have; None is what those did."""
_OF_A_SPLIT = ("train", "test", "train_images", "test_images", "classes")


def origin(spec: str) -> dict[str, Any]:
    """Of a MODEL: what to call it ("name"), how it came about ("method") and from which task-specific "teachers".

    Of a RUN also its "lineage": its seed, what each teacher was taught, the proxy, balance and labels, and the digest of all
    other options ("recipe"). Runs whose lineages differ in seeds alone repeat one another.
    """
    path = Path(spec.split("?")[0])
    facts = {"name": path.name or spec, "method": "generalist", "teachers": []}
    config = _config(path)
    if config is None:
        return facts | {"name": spec.split("/")[-1] or spec}
    if config.get("command") == "train":
        store = config["store"]
        teachers = [name for name in store["teachers"] if name != store["generalist"]]
        method = {"consolidate": "consolidated"}.get(config["method"], config["method"])
        return facts | {"method": method, "teachers": teachers} | _student_lineage(config, teachers)
    if config.get("command") in ("teach", "finetune"):
        task = config["data"].get("task") or task_name(config["data"]["train"])
        lineage = {"seed": config.get("seed", 0), "teachers": [taught(spec)], "recipe": _recipe(config)}
        return facts | {"method": "teacher", "teachers": [task], "lineage": lineage}
    return facts


def taught(spec: str) -> dict[str, Any]:
    """The task, class split and its seed of a RUN of `teach`; empty for any other MODEL."""
    config = _config(Path(spec.split("?")[0])) or {}
    data = config.get("data")
    if config.get("command") != "teach" or not isinstance(data, dict):
        return {}
    task = data.get("task") or task_name(data["train"])
    return {"task": task.partition(":")[0], "split": data["split"], "split_seed": data["split_seed"]}


def _student_lineage(config: dict[str, Any], teachers: list[str]) -> dict[str, Any]:
    lineage = config.get("lineage")  # runs of earlier versions have none
    if lineage is None:
        return {}
    return {
        "lineage": {
            "seed": config["seed"],
            "teachers": [lineage["teachers"][name] for name in teachers],
            "proxy": lineage["proxy"],
            "balance": ":".join(f"{share:g}" for share in config["balance"]),
            "labels": config["labels"],
            "recipe": _recipe(config),
        }
    }


def _recipe(config: dict[str, Any]) -> str:
    """Digest of the options of a run, but for its seeds and what follows from them."""
    options = {key: value for key, value in config.items() if key not in _APART + _OF_A_SPLIT}
    options = {key: value for key, value in options.items() if value is not None or key not in _LATER}
    if "store" in config:
        options["store"] = [config["store"]["recipe"], config["store"]["views"]]
        given = config.get("weight") or []
        options["weight"] = "auto" if "auto" in given else [weight for _, weight in given]
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]


def _config(path: Path) -> dict[str, Any] | None:
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def is_random(spec: str | Path) -> bool:
    """Whether a MODEL is a network with random weights, as far as its spec says."""
    path = str(spec).partition("?")[0]
    architecture, _, weights = path.partition("@")
    return architecture.startswith(("torchvision:", "timm:")) and weights in ("", "random")
