"""Probes on a GPU and on the CPU: the same C, the same accuracies, certified; and how far cuML stays above the optimum."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from device import DEVICE
from fastcon.kernels import svm, svm_primal

from fastcon.bench.probe import features_like_resnets, objective
from fastcon.transfer.few_shot import C_GRID, few_shot
from fastcon.transfer.solvers import LinearSVM, cuml_model


@pytest.mark.parametrize(("classes", "width"), [(2, 64), (20, 512), (98, 256)])
def test_the_same_c_and_accuracies_on_both(classes, width):
    data = (*features_like_resnets(classes, 10, width), *features_like_resnets(classes, 10, width, seed=1))
    ours, theirs = (few_shot(*data, trials=4, device=device) for device in (DEVICE, "cpu"))
    assert ours.chosen_c == theirs.chosen_c
    assert ours.accuracies == pytest.approx(theirs.accuracies, abs=0.5 / len(data[3]))
    assert max(gap for gap in ours.gaps if gap is not None) < 1e-3


@pytest.mark.parametrize("cost", C_GRID)
def test_solutions_are_the_same_dual_and_primal(cost):
    x, y = features_like_resnets(10, 40, 20)  # more rows than features: not separable, as what the primal is for
    rows = torch.from_numpy(x).double()
    signs = torch.from_numpy(np.where(y == np.arange(10)[:, None], 1.0, -1.0))
    found = {}
    for device in (DEVICE, "cpu"):
        here, wanted = rows.to(device), signs.to(device)
        gram = svm.Gram.of(here @ here.T + 1)
        beta, gap = svm.solve(gram, wanted, cost)
        primal, primal_gap = svm_primal.solve(here, wanted, cost)
        assert max(gap.max().item(), primal_gap.max().item()) < 1e-3
        found[device] = svm.objective(wanted, cost, beta, beta @ gram.matrix).cpu(), (primal[:, :-1] @ here.T).cpu()
    for gpu, cpu in zip(found[DEVICE], found["cpu"], strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("cuml") is None, reason="cuml is not installed")
def test_cuml_is_above_the_certified_optimum_by_a_little():
    if not torch.cuda.is_available():
        pytest.skip("cuML needs a GPU")
    x, y = features_like_resnets(4, 10, 128)
    for cost in (0.001, 1.0, 1000.0):
        for label in range(2):
            own = np.where(y == label, 1, -1)
            best = objective(LinearSVM(cost).fit(x, own), x, own, cost)
            excess = objective(cuml_model(cost).fit(x, own), x, own, cost) / best - 1
            print(f"C = {cost:g}: {excess:.1e} above the optimum")
            assert -1e-4 < excess < 0.1
