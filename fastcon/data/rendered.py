"""Rendered image data sets for the demo and the tests: fine classes of glyphs, textures and shapes, as JPEG files.

Every class has a prototype (strokes, a weave, an outline) drawn from its seed; its images differ in position, size,
rotation, colours, light and noise. scikit-learn's digits come along as real images of another kind.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 56
Random = np.random.Generator


def glyph(prototype: Random, instance: Random) -> Image.Image:
    """Pen strokes through a few random points."""
    strokes = [
        prototype.uniform(-0.8, 0.8, (int(prototype.integers(2, 5)), 2)) for _ in range(int(prototype.integers(2, 4)))
    ]
    image, pen = _ground(instance)
    width = instance.uniform(3, 6)
    for points in strokes:
        placed = _placed(points + instance.normal(0, 0.05, points.shape), instance)
        ImageDraw.Draw(image).line([tuple(p) for p in placed], fill=pen, width=round(width), joint="curve")
    return _finished(image, instance)


def shape(prototype: Random, instance: Random) -> Image.Image:
    """A filled outline: a polygon whose radius oscillates by class, with a hole in some classes."""
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    waves = sum(
        prototype.uniform(0.05, 0.3) * np.cos(k * angles + prototype.uniform(0, 6))
        for k in prototype.choice(np.arange(2, 8), 2, replace=False)
    )
    hole = prototype.uniform(0.2, 0.45) if prototype.random() < 0.5 else 0
    radius = 0.65 + waves + instance.normal(0, 0.01, angles.shape)
    image, pen = _ground(instance)
    outline = np.stack([radius * np.cos(angles), radius * np.sin(angles)], 1)
    placed = _placed(np.concatenate([outline, outline * hole]), instance)
    draw = ImageDraw.Draw(image)
    draw.polygon([tuple(p) for p in placed[:60]], fill=pen)
    if hole:
        draw.polygon([tuple(p) for p in placed[60:]], fill=_inverse(pen))
    return _finished(image, instance)


def texture(prototype: Random, instance: Random) -> Image.Image:
    """Two waves woven together; frequency, angle and sharpness are the class's, colours and phase the image's."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE * 2 * np.pi
    turn, zoom = instance.normal(0, 0.08), instance.uniform(0.9, 1.1)
    field = np.zeros((SIDE, SIDE))
    for _ in range(2):
        angle, frequency = prototype.uniform(0, np.pi) + turn, prototype.uniform(2, 8) * zoom
        wave = np.sin(frequency * (x * np.cos(angle) + y * np.sin(angle)) + instance.uniform(0, 6))
        field += np.tanh(wave * prototype.uniform(0.5, 4)) * prototype.uniform(0.4, 1)
    share = ((field - field.min()) / np.ptp(field))[..., None]
    colours = _colours(instance)
    return _finished(Image.fromarray((share * colours[0] + (1 - share) * colours[1]).astype(np.uint8)), instance)


DOMAINS: dict[str, Callable[[Random, Random], Image.Image]] = {"glyphs": glyph, "shapes": shape, "textures": texture}


def write_classes(root: Path, domain: str, classes: range, images: int, prefix: str | None = None) -> None:
    """Write `images` JPEGs of every class number in `classes` to root/CLASS/NNNN.jpg."""
    for number in classes:
        name = f"{prefix or domain[:-1]}-{number:03d}"
        (root / name).mkdir(parents=True, exist_ok=True)
        for k in range(images):
            make(domain, number, k).save(root / name / f"{k:04d}.jpg", quality=92)


def write_proxy(root: Path, images: int) -> None:
    """Write unlabelled images of every domain, of classes that no other set uses."""
    root.mkdir(parents=True, exist_ok=True)
    domains = list(DOMAINS)
    for k in range(images):
        make(domains[k % len(domains)], 1000 + k // 10, k).save(root / f"{k:06d}.jpg", quality=92)


def write_pairs(root: Path, classes: range, images: int) -> None:
    """Write images that show one or two glyphs side by side, and labels.txt: each image's path and its glyphs."""
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for k in range(images):
        chosen = sorted(np.random.default_rng([classes.start, k, 7]).choice(np.array(classes), 2).tolist())
        image = Image.new("RGB", (2 * SIDE, SIDE))
        for place, number in enumerate(chosen):
            image.paste(make("glyphs", number, k), (place * SIDE, 0))
        image.save(root / f"{k:06d}.jpg", quality=92)
        lines.append("\t".join([f"{k:06d}.jpg", *(f"glyph-{number:03d}" for number in dict.fromkeys(chosen))]))
    (root / "labels.txt").write_text("\n".join(lines) + "\n")


def write_digits(root: Path) -> None:
    """Write scikit-learn's 1,797 scanned digits to root/CLASS/NNNN.jpg, enlarged from 8 x 8."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    for k, (pixels, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        folder = root / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((255 - pixels * 15.9).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.save(folder / f"{k:04d}.jpg", quality=92)


def make(domain: str, number: int, image: int) -> Image.Image:
    """One image of a class, a pure function of its numbers."""
    code = list(DOMAINS).index(domain)
    return DOMAINS[domain](np.random.default_rng([code, number]), np.random.default_rng([code, number, image, 1]))


def _ground(instance: Random) -> tuple[Image.Image, tuple[int, ...]]:
    ground, pen = _colours(instance)
    canvas = np.broadcast_to(ground, (SIDE, SIDE, 3)) + instance.normal(0, 6, (SIDE, SIDE, 1))
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)), tuple(int(c) for c in pen)


def _colours(instance: Random) -> np.ndarray:
    """Two contrasting colours."""
    first = instance.uniform(0, 255, 3)
    second = instance.uniform(0, 255, 3)
    while abs(first.mean() - second.mean()) < 70:
        second = instance.uniform(0, 255, 3)
    return np.stack([first, second])


def _inverse(pen: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(255 - c for c in pen)


def _placed(points: np.ndarray, instance: Random) -> np.ndarray:
    """Points in -1 … 1, rotated, scaled and moved into the picture."""
    angle, scale = instance.normal(0, 0.15), instance.uniform(0.75, 1.05)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * scale
    return (points @ turn.T + instance.uniform(-0.15, 0.15, 2)) * SIDE * 0.42 + SIDE / 2


def _finished(image: Image.Image, instance: Random) -> Image.Image:
    blurred = image.filter(ImageFilter.GaussianBlur(float(instance.uniform(0, 0.8))))
    noisy = np.asarray(blurred, np.float64) * instance.uniform(0.8, 1.2) + instance.normal(0, 5, (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
