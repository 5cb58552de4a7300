"""What a MODEL is called in results, how it came about, and from which teachers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastcon.data.splits import task_name


def origin(spec: str) -> dict[str, Any]:
    """Of a MODEL: what to call it ("name"), how it came about ("method") and from which task-specific "teachers"."""
    path = Path(spec.split("?")[0])
    known = {"name": path.name or spec, "method": "generalist", "teachers": []}
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return known | {"name": spec.split("/")[-1] or spec}
    if config.get("command") == "train":
        store = config["store"]
        teachers = [name for name in store["teachers"] if name != store["generalist"]]
        return known | {
            "method": {"consolidate": "consolidated"}.get(config["method"], config["method"]),
            "teachers": teachers,
        }
    if config.get("command") in ("teach", "finetune"):
        return known | {
            "method": "teacher",
            "teachers": [config["data"].get("task") or task_name(config["data"]["train"])],
        }
    return known


def is_random(spec: str | Path) -> bool:
    """Whether a MODEL is a network with random weights, as far as its spec says."""
    path = str(spec).partition("?")[0]
    architecture, _, weights = path.partition("@")
    return architecture.startswith(("torchvision:", "timm:")) and weights in ("", "random")
