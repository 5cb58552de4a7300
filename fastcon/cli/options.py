"""Classes of options → flags, each group of which reaches its command as one object."""

from __future__ import annotations

import functools
import tomllib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fastcon.options import Options, Rule, rules


def group(key: str, cls: type[Options], *, leave: tuple[str, ...] = (), **defaults: Any) -> Callable:
    """The flags of a class of options; the command gets them as `key`, made and checked.

    leave: options that this command does not have. defaults: those that differ from the class's.
    """
    hints = typing.get_type_hints(cls)
    shown = {name: found for name, found in rules(cls).items() if name not in leave}

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def collected(**given: Any) -> Any:
            values = {name: given.pop(name) for name in shown}
            values = {name: value for name, value in values.items() if value is not None}  # else its own default
            return function(**given, **{key: cls(**values)})

        for name, (field, rule) in reversed(shown.items()):
            default = defaults.get(name, field.default)
            collected = _flag(name, hints[name], rule, default)(collected)
        return collected

    return decorate


def _flag(name: str, hint: Any, rule: Rule, default: Any) -> Callable:
    flag = f"--{name.replace('_', '-')}"
    settings: dict[str, Any] = {"help": rule.help, "show_default": default is not None}
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    if bool in kinds:
        names = f"{flag}/--no-{name.replace('_', '-')}" if rule.both else flag
        return click.option(names, name, is_flag=True, default=default, help=rule.help, show_default=rule.both)
    if rule.choices:
        return click.option(flag, name, type=click.Choice(rule.choices), default=default, **settings)
    if rule.many:
        return click.option(flag, name, multiple=True, default=(), help=rule.help)
    if rule.parse is not None:
        default, settings["show_default"] = rule.text, rule.text is not None
        return click.option(flag, name, default=default, **settings)
    if hint == tuple[str, ...]:
        return click.option(flag, name, multiple=True, help=rule.help)
    if typing.get_origin(hint) is tuple:
        return click.option(flag, name, nargs=len(kinds), type=_number(kinds[0], rule), default=default, **settings)
    return click.option(flag, name, type=_number(kinds[0], rule), default=default, **settings)


def _number(kind: type, rule: Rule) -> Any:
    if kind is int:
        return click.IntRange(rule.low, rule.high)  # type: ignore[arg-type]
    if kind is float:
        return click.FloatRange(rule.low, rule.high, min_open=rule.above, max_open=rule.below)
    return kind


def together(*decorators: Callable) -> Callable:
    """Several decorators as one."""

    def apply(function: Callable) -> Callable:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def _from_file(ctx: click.Context, _: click.Parameter, path: str | None) -> None:
    if path is None:
        return
    try:
        values = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise click.BadParameter(f"{path}: {error}") from error
    parameters = {name.lstrip("-"): p.name for p in ctx.command.params for name in p.opts}
    unknown = [key for key in values if key not in parameters]
    if unknown:
        raise click.BadParameter(f"{path}: {unknown[0]!r} is no option of {ctx.command.name}")
    ctx.default_map = {**(ctx.default_map or {}), **{parameters[key]: value for key, value in values.items()}}


def _writable(ctx: click.Context, param: click.Parameter, path: str | None) -> str | None:
    """Refuse a place for the result before hours of work rather than after."""
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise click.BadParameter(f"{path}: there is no folder {Path(path).absolute().parent}")
    return path


class NamedModel(click.ParamType):
    """NAME=MODEL."""

    name = "NAME=MODEL"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, str]:
        """The text as a pair."""
        if isinstance(value, tuple):
            return value
        name, equals, model = value.partition("=")
        if not (name and equals and model):
            self.fail(f"{value!r} is not NAME=MODEL, as birds=runs/birds", param, ctx)
        return name, model


common = together(
    click.option(
        "--config",
        type=click.Path(),
        is_eager=True,
        expose_value=False,
        callback=_from_file,
        help="TOML file with any of these options; flags win.",
    ),
    click.option(
        "--json",
        "json_file",
        type=click.Path(dir_okay=False),
        default=None,
        callback=_writable,
        help="Also write the result to this file.",
    ),
)
dry_run = click.option("--dry-run", is_flag=True, help="Print what would be done and what it would cost.")
