"""Options, declared once: a dataclass field says default, limits and help. The command line makes flags of the fields,
Python callers pass them by name, and both are checked here.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fastcon.errors import UsageError

T = TypeVar("T", bound="Options")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What an option may be, and what its help says."""

    help: str
    low: float | None = None
    high: float | None = None
    above: bool = False
    """Whether `low` itself is excluded."""
    below: bool = False
    """Whether `high` itself is excluded."""
    choices: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None
    """Text of the command line → value; Python callers may pass such text, too. Raises ValueError."""
    text: str | None = None
    """The default as the command line shows it, where it is parsed from text."""
    many: bool = False
    """Whether it may be repeated; each value is parsed."""
    both: bool = False
    """Of a yes or no: whether the command line has a flag for either."""


def option(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field that is an option; `limits` as in `Rule`."""
    return dataclasses.field(default=default, metadata={"rule": Rule(help, **limits)})


def rules(cls: type[Options]) -> dict[str, tuple[dataclasses.Field[Any], Rule]]:
    """Name → field and rule of every option of a class."""
    fields = ((field, field.metadata.get("rule")) for field in dataclasses.fields(cls))
    return {field.name: (field, rule) for field, rule in fields if rule is not None}


@dataclasses.dataclass(frozen=True)
class Options:
    """Base class of options. Raises UsageError, naming the option, for an invalid value."""

    def __post_init__(self) -> None:
        for name, (field, rule) in rules(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, str) and rule.parse is not None and not rule.many:
                value = _parsed(name, value, rule)
                object.__setattr__(self, name, value)
            if rule.many and isinstance(value, str):
                value = (value,)
            if rule.many and isinstance(value, Mapping):
                value = tuple(value.items())
                object.__setattr__(self, name, value)
            if isinstance(value, list | tuple):
                parsed = [_parsed(name, part, rule) if rule.many and isinstance(part, str) else part for part in value]
                value = tuple(parsed)
                object.__setattr__(self, name, value)
            if value is not None or field.default is not None:
                _check(name, value, rule)


def take(cls: type[T], given: dict[str, Any]) -> T:
    """Make a `cls` from those of the `given` options that belong to it; they are removed from the dictionary."""
    return cls(**{name: given.pop(name) for name in rules(cls) if name in given})


def refuse(given: Mapping[str, Any], *classes: type[Options]) -> None:
    """Raise UsageError for options that belong to no class."""
    for name in given:
        close = difflib.get_close_matches(name, [known for cls in classes for known in rules(cls)], 1)
        raise UsageError(f"no option `{name}`" + (f": did you mean `{close[0]}`?" if close else ""))


def names(text: str) -> tuple[str, ...]:
    """ "a,b" → ("a", "b")."""
    return tuple(part for part in text.split(",") if part)


def positive(text: str) -> tuple[float, ...]:
    """ "0.01,0.1" → (0.01, 0.1)."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError("is not numbers separated by commas, as 0.01,0.1") from None
    if not all(0 < value < math.inf for value in values):
        raise ValueError("must have values above 0 only")
    return values


def _parsed(name: str, text: str, rule: Rule) -> Any:
    assert rule.parse is not None
    try:
        return rule.parse(text)
    except ValueError as error:
        raise UsageError(f"`{name}` {text!r} {error}") from None


def _check(name: str, value: Any, rule: Rule) -> None:
    if rule.choices and value not in rule.choices:
        raise UsageError(f"`{name}` {value!r} is none of {', '.join(rule.choices)}")
    for number in value if isinstance(value, tuple) else (value,):
        if rule.low is None and rule.high is None:
            return
        inside = (
            isinstance(number, int | float)
            and number == number  # NaN fails every comparison
            and not (rule.low is not None and (number < rule.low or (rule.above and number == rule.low)))
            and not (rule.high is not None and (number > rule.high or (rule.below and number == rule.high)))
        )
        if not inside:
            raise UsageError(f"`{name}` {number} is outside {_range(rule)}")


def _range(rule: Rule) -> str:
    low = "" if rule.low is None else f"x {'>' if rule.above else '>='} {rule.low:g}"
    high = "" if rule.high is None else f"x {'<' if rule.below else '<='} {rule.high:g}"
    return " and ".join(filter(None, (low, high)))
