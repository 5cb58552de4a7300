"""Views are pure: known answers, independence of company, torchvision's semantics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcon.data import views

KNOWN = [  # Random123's known-answer file for philox4x32-10: key, counter, result
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN)
def test_philox_gives_the_published_answers(key, counter, expected):
    assert tuple(views.philox(key, np.array([counter], dtype=np.uint64))[0]) == expected


def test_known_answers_of_a_view():
    ids = np.array([0, 1, 2**63 + 5], dtype=np.uint64)
    sizes = np.array([500, 80, 33], dtype=np.int32), np.array([375, 80, 200], dtype=np.int32)
    assert views.boxes(7, ids, 2, *sizes).tolist() == KNOWN_BOXES
    assert views.flips(7, ids, 2).tolist() == KNOWN_FLIPS
    assert views.order(7, np.arange(8, dtype=np.uint64), 1).tolist() == KNOWN_ORDER


@given(st.integers(0, 2**64 - 1), st.integers(0, 1000), st.data())
def test_a_view_does_not_depend_on_its_company(seed, view, data):
    n = data.draw(st.integers(1, 60))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    ids = random.integers(0, 2**64, n, dtype=np.uint64)
    widths, heights = random.integers(1, 700, (2, n)).astype(np.int32)
    boxes, flips = views.boxes(seed, ids, view, widths, heights), views.flips(seed, ids, view)
    chosen = random.permutation(n)[: random.integers(1, n + 1)]
    assert np.array_equal(views.boxes(seed, ids[chosen], view, widths[chosen], heights[chosen]), boxes[chosen])
    assert np.array_equal(views.flips(seed, ids[chosen], view), flips[chosen])
    inside = (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > 0).all()
    assert inside
    assert (boxes[:, 0] + boxes[:, 2] <= heights).all()
    assert (boxes[:, 1] + boxes[:, 3] <= widths).all()


def test_blocks_do_not_show(monkeypatch):
    ids = np.arange(1000, dtype=np.uint64)
    widths = np.full(1000, 300, np.int32)
    whole = views.boxes(1, ids, 0, widths, widths), views.order(1, ids, 0)
    monkeypatch.setattr(views, "_BLOCK", 7)
    assert np.array_equal(views.boxes(1, ids, 0, widths, widths), whole[0])
    assert np.array_equal(views.order(1, ids, 0), whole[1])


def _torchvision_box(words, width, height, scale, ratio):
    """RandomResizedCrop.get_params, one image at a time, fed with the given words (each 0 … 1)."""
    for area_word, ratio_word, top_word, left_word in words:
        area = height * width * (scale[0] + area_word * (scale[1] - scale[0]))
        aspect = math.exp(math.log(ratio[0]) + ratio_word * (math.log(ratio[1]) - math.log(ratio[0])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(top_word * (height - h + 1)), int(left_word * (width - w + 1)), h, w
    if width / height < min(ratio):
        w, h = width, round(width / min(ratio))
    elif width / height > max(ratio):
        h, w = height, round(height * max(ratio))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("shape", [(500, 375), (40, 600), (900, 30), (64, 64), (3, 2)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
def test_boxes_are_torchvisions(shape, scale):
    ids = np.arange(200, dtype=np.uint64)
    width, height = shape
    boxes = views.boxes(5, ids, 1, np.full(200, width, np.int32), np.full(200, height, np.int32), scale)
    for i in range(200):
        words = [views.words(5, ids[i : i + 1], 1, attempt)[0] / 2**32 for attempt in range(views.TRIES)]
        assert tuple(boxes[i]) == _torchvision_box(words, width, height, scale, (3 / 4, 4 / 3))


def test_box_statistics_match_torchvision():
    import torch
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.empty(1, 375, 500)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    ours = views.boxes(
        0, np.arange(4000, dtype=np.uint64), 0, np.full(4000, 500, np.int32), np.full(4000, 375, np.int32)
    )
    standard_error = theirs.std(0) / 4000**0.5
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 5 * standard_error).all()


def test_order_is_a_permutation_that_changes_with_view_and_seed():
    ids = np.arange(500, dtype=np.uint64) * 977
    orders = [views.order(seed, ids, view).tolist() for seed in (0, 1, 2**40) for view in (0, 1)]
    assert all(sorted(order) == list(range(500)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6


def test_half_of_the_views_are_flipped():
    assert abs(views.flips(1, np.arange(10_000, dtype=np.uint64), 0).mean() - 0.5) < 0.02


def test_centre_crop_is_the_evaluation_crop():
    box = views.center_boxes(np.array([500, 256]), np.array([375, 300]))
    assert box.tolist() == [[23, 86, 328, 328], [38, 16, 224, 224]]


KNOWN_BOXES = [[130, 67, 202, 223], [6, 14, 27, 32], [78, 0, 44, 33]]
KNOWN_FLIPS = [1, 0, 0]
KNOWN_ORDER = [3, 4, 0, 1, 6, 5, 7, 2]
