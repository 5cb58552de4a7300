"""Heads, weights and temperature: the paper's Eq. 1 and 2 by value."""

from __future__ import annotations

import math

import pytest
import torch

import fastcon
from fastcon.distill import loss as objective
from fastcon.distill.options import TrainOptions
from fastcon.errors import FastconError


@pytest.mark.parametrize(
    ("heads", "balance", "expected"),
    [
        (["g", "a"], (1, 1), [1, 1]),
        (["g", "a", "b"], (1, 1), [1, 1 / 2, 1 / 2]),
        (["g", "a", "b", "c"], (1, 3), [1 / 2, 1 / 2, 1 / 2, 1 / 2]),
        (["g", "a"], (1, 3), [1 / 2, 3 / 2]),
        (["g", "a"], (3, 1), [3 / 2, 1 / 2]),
        (["a", "b"], (1, 3), [1 / 2, 1 / 2]),
        (["g"], (1, 3), [1]),
    ],
)
def test_weights(heads, balance, expected):
    assert objective.head_weights(heads, "g", balance) == pytest.approx(expected)


def test_weights_of_single_heads():
    assert objective.head_weights(["g", "a", "b"], "g", (1, 1), [("a", 0.2), ("g", 3)]) == [3, 0.2, 0.5]
    with pytest.raises(FastconError, match="`weight` names 'z', and this student's heads are g, a"):
        objective.head_weights(["g", "a"], "g", (1, 1), [("z", 1)])
    with pytest.raises(FastconError, match="two weights"):
        objective.head_weights(["g", "a"], "g", (1, 1), [("a", 1), ("a", 2)])


def test_methods_choose_their_heads():
    teachers = ["g", "a", "b"]
    assert objective.choose_heads("consolidate", teachers, "g") == ["g", "a", "b"]
    assert objective.choose_heads("traditional", teachers, "g") == ["a", "b"]
    assert objective.choose_heads("soft-label", teachers, "g") == ["g"]
    assert objective.choose_heads("consolidate", teachers, "g", ["b"]) == ["g", "b"]
    with pytest.raises(FastconError, match="no teacher 'z' in the store: it has g, a, b"):
        objective.choose_heads("consolidate", teachers, "g", ["z"])
    with pytest.raises(FastconError, match="needs a generalist"):
        objective.choose_heads("consolidate", ["a"], None)
    with pytest.raises(FastconError, match="needs a task-specific teacher"):
        objective.choose_heads("consolidate", ["g"], "g")


def test_the_loss_by_hand():
    student = {"g": torch.tensor([[2.0, 0.0]]), "a": torch.tensor([[0.0, 0.0, 0.0]])}
    teacher = {"g": torch.tensor([[0.0, 2.0]]), "a": torch.tensor([[9.0, 0.0, 0.0]])}
    result = fastcon.loss(student, teacher, {"g": 1.0, "a": 0.5}, temperature=2.0)
    p = 1 / (1 + math.e)  # softmax of (0, 1): the T = 2 probability of the first class
    first = -(p * math.log(1 - p) + (1 - p) * math.log(p))
    assert result.losses[0].tolist() == pytest.approx([first, math.log(3)])
    assert result.total.item() == pytest.approx(first + 0.5 * math.log(3))


def test_side_by_side_equals_by_name():
    torch.manual_seed(0)
    student, teacher = ({name: torch.randn(5, width) for name, width in (("g", 7), ("a", 3))} for _ in range(2))
    table = objective.segments([7, 3], [1.0, 0.5], 2.0)
    named = fastcon.loss(student, teacher, {"g": 1.0, "a": 0.5})
    stacked = fastcon.loss(torch.cat(list(student.values()), 1), torch.cat(list(teacher.values()), 1), table)
    assert named.total.item() == stacked.total.item()


def test_mistakes_are_named():
    x = {"a": torch.zeros(1, 2)}
    with pytest.raises(FastconError, match="come alike"):
        fastcon.loss(x, torch.zeros(1, 2))
    with pytest.raises(FastconError, match="segment table"):
        fastcon.loss(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(FastconError, match="the student has a, the teachers b"):
        fastcon.loss(x, {"b": torch.zeros(1, 2)})


@pytest.mark.parametrize("text", ["1", "1:0", "a:b", "1:2:3", "-1:1"])
def test_a_balance_that_is_none(text):
    with pytest.raises(FastconError, match="`balance`"):
        TrainOptions(balance=text)
