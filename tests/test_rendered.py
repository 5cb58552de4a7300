"""Rendered images: the same for the same numbers, different between classes, readable by the index."""

from __future__ import annotations

import numpy as np
import pytest

from fastcon.data import rendered
from fastcon.data.manifest import index


@pytest.mark.parametrize("domain", rendered.DOMAINS)
def test_an_image_is_a_pure_function_of_its_numbers(domain):
    first, again, other, another = (np.asarray(rendered.make(domain, *n)) for n in ((3, 4), (3, 4), (3, 5), (4, 4)))
    assert first.shape == (rendered.SIDE, rendered.SIDE, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, another)


def test_data_sets_are_what_they_say(tmp_path):
    rendered.write_classes(tmp_path / "glyphs", "glyphs", range(2, 5), 3)
    rendered.write_proxy(tmp_path / "proxy", 7)
    glyphs, proxy = index([tmp_path / "glyphs"]), index([tmp_path / "proxy"])
    assert glyphs.classes == ["glyph-002", "glyph-003", "glyph-004"]
    assert np.bincount(glyphs.labels).tolist() == [3, 3, 3]
    assert (len(proxy), proxy.classes) == (7, [])


def test_digits(tmp_path):
    rendered.write_digits(tmp_path)
    digits = index([tmp_path])
    assert len(digits) == 1797
    assert digits.classes == list("0123456789")
