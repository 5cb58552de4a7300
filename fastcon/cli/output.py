"""Output of commands: notes and progress on stderr, results on stdout and as JSON."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastcon.data.options import Indexing

if TYPE_CHECKING:
    from fastcon.data.manifest import ImageSet, Manifest


def flags(text: str) -> str:
    """A message with the parameters it names, as `batch_size`, replaced by the flags of the command line."""
    group = click.get_current_context().find_root().command
    assert isinstance(group, click.Group)
    flag_of = {
        p.name: p.opts[0] for command in group.commands.values() for p in command.params if p.opts[0][:2] == "--"
    }
    return re.sub(r"`([a-z_]+)`", lambda found: flag_of.get(found[1], found[0]), text)


quiet = False
"""Whether this process leaves notes, progress and results to the first of torchrun's."""


def note(line: str) -> None:
    """A line for the user, on stderr."""
    if quiet:
        return
    click.echo(f"fastcon: {flags(line)}", err=True)


def finish(result: Any, json_file: str | None, text: str = "") -> None:
    """Print a command's results, and write them to the file of --json."""
    if Bar._open is not None:
        Bar._open.close()
    if quiet:
        return
    if text:
        click.echo(flags(text))
    if json_file:
        from fastcon.files import write_json

        if isinstance(result, dict):
            result = result | {"argv": _made_by(click.get_current_context().find_root().obj)}
        write_json(Path(json_file), result)


def _made_by(argv: list[str]) -> list[str]:
    """The command without its --json FILE, so that equal commands are equal wherever their results go."""
    kept, words = [], iter(argv)
    for word in words:
        if word == "--json":
            next(words)
        elif not word.startswith("--json="):
            kept.append(word)
    return kept


class Bar:
    """Progress(done, total): a bar on a terminal, a plain line now and then elsewhere."""

    _open: Bar | None = None

    def __init__(self, what: str, unit: str) -> None:
        Bar.end()  # a new bar ends the last one
        Bar._open = self
        self._what, self._unit = what, unit
        self._bar: Any = None
        self._start = self._said = time.monotonic()
        self.seconds = 0.0

    @classmethod
    def end(cls) -> None:
        """Close the bar that is open."""
        if cls._open is not None:
            cls._open.close()

    def __call__(self, done: int, total: int) -> None:
        """Report that `done` of `total` are done."""
        if quiet:
            return
        now = time.monotonic()
        if sys.stderr.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=total, desc=self._what, unit=f" {self._unit}", leave=False)
            self._bar.n = done
            self._bar.update(0)
        elif now - self._said > 20:
            self._said = now
            click.echo(f"{self._what}: {done:,} of {total:,} {self._unit}, {now - self._start:.0f} s", err=True)

    def close(self) -> None:
        """Remove the bar; `seconds` says how long it ran."""
        self.seconds = time.monotonic() - self._start
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def image_set(indexing: Indexing, images: Sequence[str]) -> ImageSet:
    """IMAGES to be indexed with a progress bar; what is left out is reported."""
    from fastcon.data.manifest import ImageSet

    trust, strict = indexing.trust_images, indexing.strict
    return ImageSet(images, trust=trust, strict=strict, progress=Bar("index", "images"), say=note)


def indexer(indexing: Indexing) -> Callable[[Sequence[str]], Manifest]:
    """Index IMAGES, as `image_set` does."""

    def indexed(images: Sequence[str]) -> Manifest:
        manifest = image_set(indexing, images).manifest()
        Bar.end()
        return manifest

    return indexed


def in_bytes(count: float) -> str:
    """1,234,567 → 1.2 MB."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def in_time(seconds: float) -> str:
    """Seconds, minutes or hours, whichever fits."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def counted(number: int, what: str) -> str:
    """1 trial, 2 trials."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
