"""Views as the teachers saw them, with their predictions: the quickest check that a store is sane."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcon.store.parts import opened
from fastcon.store.reader import Store

SHOWN, TOP, TEMPERATURE = 24, 3, 2.0


def views(path: str) -> str:
    """Figures of up to 24 sample views of view 0, each teacher's top 3 classes below, with probabilities at T = 2."""
    store = opened(path).part(0)
    rows, pixels = store.samples()
    chosen = np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).round().astype(int)
    view = store.view(0)
    shown = []
    for k in chosen:
        says = "".join(f"<div>{_says(store, name, int(rows[k]))}</div>" for name in store.teachers)
        name = html.escape(store.image_name(int(view.order[rows[k]])))
        shown.append(
            f'<figure><img src="{_data(pixels[k])}" alt="{name}"><figcaption>{name}{says}</figcaption></figure>'
        )
    return (
        f'<p>Top {TOP} classes with probabilities at T = {TEMPERATURE:g}.</p><div class="views">{"".join(shown)}</div>'
    )


def _says(store: Store, name: str, row: int) -> str:
    chunk, inside = divmod(row, store.recipe.chunk_rows)
    teacher = store.teachers[name]
    if not store.done(name)[0, chunk]:
        return f"<b>{html.escape(name)}</b>: not computed yet"
    if teacher.kind == "embedding":
        return f"<b>{html.escape(name)}</b>: {len(teacher.classes):,} features"
    classes, probabilities = top(store.logits(name, 0, chunk)[inside], teacher.kind)
    words = ", ".join(f"{html.escape(teacher.classes[c])} {p:.0%}" for c, p in zip(classes, probabilities, strict=True))
    return f"<b>{html.escape(name)}</b>: {words}"


def top(logits: NDArray[Any], kind: str) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The most likely classes of a row [C] and their probabilities at T = 2: softmax, or each label's sigmoid."""
    z = logits.astype(np.float64) / TEMPERATURE
    p = 1 / (1 + np.exp(-z)) if kind == "sigmoid" else np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    classes = np.argsort(-p, kind="stable")[:TOP]
    return classes, p[classes]


def _data(pixels: NDArray[np.uint8]) -> str:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
