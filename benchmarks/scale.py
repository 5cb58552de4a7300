"""Writes scale.md: what large stores take, from the format's sizes and from rates. Run from anywhere: python scale.py.

Sizes follow from the format. Rates are of one GPU; as none has been at hand, they are estimates, and said to be.
"""

from __future__ import annotations

import math
from pathlib import Path

CHUNK, PART = 1024, 200_000
VIEW_BYTES = 4 + 16 + 1
"""Order, box and flip of a row."""
IMAGE_BYTES = 8 + 16 + 8 + 30
"""Id, digest, end of its name, and a name of 30 bytes."""
BOUND_BYTES = 190
"""Of a part in parts.json, measured with two teachers."""
FORWARD, TRAINED, DECODED = 18_000, 4_000, 10_000
"""Estimates for an H100 with 16 cores, not measured: ResNet50 forward passes/s of 224 px, compiled; images/s trained at batches
of 256; photos/s of a quarter megapixel decoded."""
PHOTO, BAKED = 0.57 * 250_000, 16_500
"""Bytes of a photo of a quarter megapixel, and of a baked view of 224 px: measured."""
READ = 4e6
"""Rows/s of 1,500 classes that one process reads from a local disk's cache, checked: measured."""
CASES = [  # what, images, views, teachers, classes of all of them
    ("ImageNet-1k × 40 views, 11 teachers", 1_281_167, 40, 11, 2_110),
    ("ImageNet-21k × 90 views, 11 teachers", 14_197_122, 90, 11, 2_110),
    ("10⁹ images × 10 views, 11 teachers", 1_000_000_000, 10, 11, 2_110),
]
GPUS = (1, 8, 64, 512)


def page() -> str:
    """The page as Markdown."""
    lines = [
        "# What large stores take",
        "",
        "Made by `python benchmarks/scale.py`. Bytes, files and requests follow from the format; hours are **estimates** for GPUs of "
        f"{FORWARD:,} ResNet50 forward passes/s, {TRAINED:,} images/s in training and {DECODED:,} decoded photos/s each (H100 with 16 "
        "cores, 224 px): no GPU has measured them yet. Logits in float16, 11 teachers with 2,110 classes together, parts of "
        f"{PART:,} images.",
        "",
        "| | logits | views, images | files | parts | parts.json | requests an epoch |",
        "|---|---|---|---|---|---|---|",
    ]
    for what, images, views, teachers, classes in CASES:
        parts = math.ceil(images / PART)
        chunks = parts * math.ceil(min(images, PART) / CHUNK)
        logits, rest = images * views * classes * 2, images * (views * VIEW_BYTES + IMAGE_BYTES)
        files = chunks * views * teachers + parts * (views * (3 + teachers) + 4 * math.ceil(PART / (1 << 20)))
        requests = chunks * teachers + parts * (3 + teachers)
        lines.append(
            f"| {what} | {_bytes(logits)} | {_bytes(rest)} | {_count(files)} | {parts:,} | {_bytes(parts * BOUND_BYTES)} | "
            f"{_count(requests)} |"
        )
    head = " | ".join(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS)
    lines += ["", f"| hours: precompute; training of one epoch a view | {head} |", "|---|" + "---|" * len(GPUS)]
    for what, images, views, teachers, _ in CASES:
        rows = images * views
        each = max(rows * teachers / FORWARD, rows / DECODED), rows / TRAINED
        cells = [" ; ".join(_hours(seconds / gpus / 3600) for seconds in each) for gpus in GPUS]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    logits, photos, views = TRAINED * 2_110 * 2, TRAINED * PHOTO, TRAINED * BAKED
    lines += [
        "",
        "Where it bends:",
        "",
        "- **Teachers.** Decoding is the limit of precompute with one teacher; with more the teachers are, and the hours grow with "
        "their number.",
        f"- **Reading.** Training at {TRAINED:,} images/s reads {_bytes(logits)}/s of logits, and {_bytes(photos)}/s of photos of "
        f"a quarter megapixel, or {_bytes(views)}/s of baked views: the photos are the load, eight times that a node. One process reads "
        f"and checks {READ / 1e6:.0f} million rows/s of 1,500 classes from a disk's cache.",
        "- **Parts.** A store wants several parts a process, or the last ones leave GPUs idle: ImageNet-1k in parts of "
        f"{PART:,} has {math.ceil(1_281_167 / PART)}, so 64 GPUs take `--parts 640`.",
        "- **One record.** parts.json is rewritten whenever a part is made: of 5,000 parts it is about a megabyte, and a part takes "
        "minutes to make.",
        "- **Listing.** Every process lists all images, though it reads its share alone: 47 s for a million tar members "
        "(`bench growth`, headers), so a billion images want to be many sources, added one after another (`--add`).",
        "",
    ]
    return "\n".join(lines)


def _bytes(count: float) -> str:
    power = min(int(math.log10(max(count, 1)) // 3), 5)
    return f"{count / 1000**power:.3g} {('B', 'KB', 'MB', 'GB', 'TB', 'PB')[power]}"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < 1e5 else f"{number / 1e6:.3g} million"


def _hours(hours: float) -> str:
    return f"{hours:.2g}" if hours < 100 else f"{hours:,.0f}"


if __name__ == "__main__":
    Path(__file__).with_name("scale.md").write_text(page())
