"""Options declared once: checked by name, parsed from text, and the same for Python and the command line."""

from __future__ import annotations

import dataclasses

import pytest

from fastcon.cli.main import main
from fastcon.distill.options import PrecomputeOptions, TrainOptions, Upkeep
from fastcon.errors import UsageError
from fastcon.machine import Machine
from fastcon.options import Options, option, refuse, rules, take
from fastcon.transfer.options import FinetuneOptions, ProbeOptions, TuneOptions

GROUPS = {
    "precompute": (PrecomputeOptions, Machine),
    "train": (TrainOptions, Upkeep, Machine),
    "probe": (ProbeOptions, Machine),
    "teach": (TuneOptions, Machine),
    "finetune": (FinetuneOptions, Machine),
}


@pytest.mark.parametrize("command", GROUPS)
def test_flags_and_fields_have_the_same_names_and_defaults(command):
    context = main.commands[command].make_context(command, [], resilient_parsing=True)
    flags = {parameter.name: parameter for parameter in main.commands[command].params}
    for cls in GROUPS[command]:
        values = {}
        for name in rules(cls):
            if (command, name) == ("finetune", "head"):
                continue
            assert flags[name].opts[0] == f"--{name.replace('_', '-')}"
            value = flags[name].get_default(context)
            values |= {} if value is None else {name: value}
        assert cls(**values) == cls()


@dataclasses.dataclass(frozen=True)
class Some(Options):
    share: float = option(0.5, "A share.", low=0, high=1, above=True, below=True)
    pair: tuple[float, ...] = option((1.0, 2.0), "Two.", low=0, high=3)
    kind: str = option("a", "A kind.", choices=("a", "b"))
    count: int | None = option(None, "How many.", low=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"share": 0}, "`share` 0 is outside x > 0 and x < 1"),
        ({"share": 1.0}, "`share` 1.0 is outside"),
        ({"share": "much"}, "`share` much is outside"),
        ({"share": float("nan")}, "`share` nan is outside"),
        ({"pair": [0, 4]}, "`pair` 4 is outside x >= 0 and x <= 3"),
        ({"kind": "c"}, "`kind` 'c' is none of a, b"),
        ({"count": 0}, "`count` 0 is outside x >= 1"),
        ({"share": None}, "`share` None is outside"),
    ],
)
def test_values_that_cannot_be_are_named(wrong, message):
    with pytest.raises(UsageError, match=message):
        Some(**wrong)


def test_what_is_none_by_default_may_be_none_and_lists_become_tuples():
    assert Some(count=None, pair=[1, 2]).pair == (1, 2)


def test_options_are_taken_by_class_and_the_rest_refused():
    given = {"epochs": 3, "device": "cpu", "epoch": 4}
    assert take(TrainOptions, given).epochs == 3
    assert take(Machine, given).device == "cpu"
    with pytest.raises(UsageError, match="no option `epoch`: did you mean `epochs`"):
        refuse(given, TrainOptions, Machine)


def test_text_is_parsed_for_python_callers_too():
    assert TrainOptions(balance="1:3", heads="a,b").balance == (1, 3)
    for given in (["a=0.5", "b=2"], {"a": 0.5, "b": 2.0}, (("a", 0.5), ("b", 2.0))):
        assert TrainOptions(weight=given).weight == (("a", 0.5), ("b", 2.0))
    for wrong in ("a", "a=", "=1", "a=0", "a=-1", "a=nan", "a=much"):
        with pytest.raises(UsageError, match=r"`weight` .* is neither NAME=λ with λ above 0"):
            TrainOptions(weight=[wrong])
    assert TrainOptions(heads="a,b").heads == ("a", "b")
    assert TuneOptions(lr_grid="0.1,0.2").lr_grid == (0.1, 0.2)
    for text in ("0.1,x", "0", "-1", "inf"):
        with pytest.raises(UsageError, match="`lr_grid`"):
            TuneOptions(lr_grid=text)
