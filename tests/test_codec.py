"""Codecs of logits: values against their formulas, KL and argmax, a store of each, what they refuse."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from conftest import BATCH, MACHINE, RECIPE, tree
from fastcon.kernels.multihead_ce import QuantisedLogits, multihead_cross_entropy
from hypothesis import given
from hypothesis import strategies as st

import fastcon
from fastcon.distill.loader import Loader
from fastcon.distill.precompute import Teacher, precompute
from fastcon.distill.train import rough_temperature
from fastcon.distill.verify import verify
from fastcon.errors import FastconError, UsageError
from fastcon.store.codec import codec
from fastcon.store.reader import Store


def decoded(name: str, logits: torch.Tensor) -> np.ndarray:
    chosen = codec(name)
    parts = {part: rows.numpy() for part, rows in chosen.encode(logits).items()}
    described = chosen.parts(logits.shape[1])
    assert {part: (rows.dtype.name, rows.shape[1]) for part, rows in parts.items()} == described
    assert sum(rows[0].nbytes for rows in parts.values()) == chosen.row_bytes(logits.shape[1])
    return chosen.decode(parts, logits.shape[1])


@given(st.integers(1, 300), st.floats(0.01, 40), st.integers(0, 1000))
def test_a_quantised_logit_is_the_nearest_step(classes, spread, seed):
    logits = torch.randn(4, classes, generator=torch.Generator().manual_seed(seed)) * spread
    got = decoded("uint8", logits)
    for row, z in zip(got, logits.numpy(), strict=True):
        steps = z.max() - (z.max() - z.min()) / 255**2 * np.arange(256.0) ** 2
        nearest = np.abs(z[:, None] - steps).min(1)
        assert np.all(np.abs(z - row) <= nearest + 1e-5 * spread)
        assert row[z.argmax()] == row.max() == z.max()


def test_quantised_kl_and_argmax():
    """On rows with a spread of 8 to 30 nats: one byte a class costs less than 1e-4 nats at T = 2."""
    logits = torch.randn(500, 1000, dtype=torch.float64) * torch.linspace(1, 4, 500)[:, None]
    got = torch.from_numpy(decoded("uint8", logits.float())).double()
    p, q = (logits / 2).log_softmax(1), (got / 2).log_softmax(1)
    assert (p.exp() * (p - q)).sum(1).mean() < 1e-4
    assert (logits.argmax(1) == got.argmax(1)).double().mean() > 0.995


@pytest.mark.parametrize("value", [0.0, -7.5])
def test_equal_logits_stay_equal(value):
    assert (decoded("uint8", torch.full((2, 5), value)) == value).all()


@pytest.mark.parametrize("k", [1, 3, 9])
def test_top_k_probabilities_are_exact_at_t_2(k):
    logits = torch.randn(50, 10) * 3
    got = torch.from_numpy(decoded(f"top{k}", logits)).float()
    top = logits.topk(k, 1).indices
    want, have = ((z / 2).softmax(1).gather(1, top) for z in (logits, got))
    torch.testing.assert_close(have, want, rtol=5e-3, atol=1e-4)
    rest = got.scatter(1, top, math.nan)
    assert all(len(set(row[~row.isnan()].tolist())) == 1 for row in rest)  # all others are equal


def test_top_k_of_no_more_classes_keeps_them_all():
    logits = torch.randn(6, 4)
    assert np.array_equal(decoded("top4", logits), logits.half().numpy())
    assert np.array_equal(decoded("top50", logits), logits.half().numpy())


def test_class_numbers_beyond_16_bits():
    logits = torch.zeros(1, 70_000)
    logits[0, 69_999] = 9
    assert decoded("top2", logits).argmax() == 69_999


@pytest.mark.parametrize("name", ["int8", "top", "top0", "top1.5", "float64", ""])
def test_unknown_names(name):
    with pytest.raises(UsageError, match="none of float16, float32, uint8 and topK"):
        codec(name)


@pytest.fixture(scope="module", params=["uint8", "top2", "mixed"])
def coded(request, tmp_path_factory, proxy, teachers):
    """A store of that codec ("mixed": one teacher in bytes, one in float16)."""
    path = str(tmp_path_factory.mktemp("coded") / "store")
    names = ["uint8", "float16"] if request.param == "mixed" else [request.param] * 2
    for teacher, name in zip(teachers, names, strict=True):
        precompute(path, proxy, [teacher], RECIPE, 2, MACHINE, BATCH, name)
    return path


def test_a_store_decodes_to_what_the_codec_says(coded, store_path):
    """Raw rows of the float16 store, through the codec: within its rounding of the rows that are stored."""
    plain, store = Store(store_path), Store(coded)
    for name in store.teachers:
        raw = torch.from_numpy(plain.logits(name, 1, 2)).float()
        want = decoded(store.codec(name).name, raw)
        assert np.abs(store.logits(name, 1, 2).astype(np.float32) - want).max() < 0.05


def test_the_loader_hands_out_what_is_stored(coded):
    store = Store(coded)
    loader = Loader(store, batch_size=16, epochs=3)
    as_bytes = all(store.codec(name).name == "uint8" for name in store.teachers)
    for batch, (view, rows) in zip(loader, loader._rows([(0, 0), (1, 0), (2, 0)]), strict=True):
        assert isinstance(batch.stacked, QuantisedLogits) == as_bytes
        for name, logits in batch.logits.items():
            chunk, inside = np.divmod(rows, store.recipe.chunk_rows)
            want = np.stack([store.logits(name, view, int(c))[i] for c, i in zip(chunk, inside, strict=True)])
            assert np.array_equal(logits.numpy(), want.astype(logits.numpy().dtype))
    student = torch.randn(16, loader.segments.columns)
    for impl in ("torch", "triton"):
        loss = multihead_cross_entropy(student, batch.stacked, loader.segments, impl).total
        dense = torch.cat([logits.float() for logits in batch.logits.values()], 1)
        torch.testing.assert_close(loss, fastcon.loss(student, dense, loader.segments).total, rtol=1e-5, atol=1e-5)


def test_damage_in_any_part_is_found_and_repaired(coded):
    before = tree(Path(coded))
    assert all(check.passed for check in verify(coded, None, 40, MACHINE))
    for part in Store(coded).codec("general").parts(10):
        group = zarr.open_group(coded, mode="r+")
        group[f"teachers/general/{part}"][1, 64:128] = 1  # a whole chunk, checksummed by Zarr, of other rows
        with pytest.raises(FastconError, match=r"view 1, chunk 1 .* holds other rows"):
            Store(coded).logits("general", 1, 1)
        assert all(check.passed for check in verify(coded, None, 4, MACHINE, repair=True))
        assert tree(Path(coded)) == before


def test_top_k_is_exact_at_its_temperature_only(coded):
    store = Store(coded)
    rough = store.codec("letters").name.startswith("top")
    assert rough_temperature(store, ["letters"], 2.0) is None
    assert (rough_temperature(store, ["letters"], 4.0) is not None) == rough


def test_a_multi_label_teacher_has_no_top_k(tmp_path, proxy, teachers):
    head = dataclasses.replace(teachers[1].model.heads[0], kind="sigmoid")
    model = teachers[1].model
    kept, model.heads = model.heads, [head]
    try:
        with pytest.raises(FastconError, match="is multi-label"):
            precompute(str(tmp_path / "s"), proxy, [Teacher("tags", "x", model)], RECIPE, 1, MACHINE, BATCH, "top2")
    finally:
        model.heads = kept


def test_a_teacher_does_not_change_its_codec(coded, proxy, teachers):
    with pytest.raises(FastconError, match=r"letters.*is in .* with logits"):
        precompute(coded, proxy, [teachers[1]], RECIPE, 2, MACHINE, BATCH, "float32")
