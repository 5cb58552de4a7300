"""Files that are whole or not there, and derived ones that are made once."""

from __future__ import annotations

import json
import threading

import pytest

from fastcon import files
from fastcon.errors import FastconError
from fastcon.files import derived, write_atomically, write_json


def test_an_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_atomically(path, b"old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(FastconError, match=r"cannot be written .No space left on device.: free space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_json_is_indented_and_ends_with_a_newline(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1]})
    assert (tmp_path / "a.json").read_text() == json.dumps({"x": [1]}, indent=2) + "\n"


def test_a_derived_file_is_made_once(tmp_path):
    made = []

    def make(partial):
        made.append(partial)
        partial.write_text("derived")

    path = tmp_path / "cache" / "x"
    assert derived(path, make) == derived(path, make) == path
    assert path.read_text() == "derived"
    assert len(made) == 1


def test_a_derived_file_that_fails_leaves_nothing(tmp_path):
    def make(partial):
        partial.mkdir()
        (partial / "half").write_text("")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        derived(tmp_path / "x", make)
    assert not list(tmp_path.iterdir())


def test_whoever_is_first_wins(tmp_path):
    together = threading.Barrier(2)

    def make(partial):
        partial.mkdir(exist_ok=True)
        (partial / "file").write_text("x")
        together.wait(10)

    def other(partial):
        partial = partial.with_name("of another process")
        make(partial)
        partial.rename(tmp_path / "x")

    threads = [threading.Thread(target=lambda make=make: derived(tmp_path / "x", make)) for make in (make, other)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert (tmp_path / "x" / "file").read_text() == "x"


def test_where_caches_lie(monkeypatch):
    monkeypatch.setenv("FASTCON_CACHE", "/a")
    assert str(files.cache_folder("features")) == "/a/features"
    monkeypatch.delenv("FASTCON_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert str(files.cache_folder("features")) == "/b/fastcon/features"
