"""Flags from dataclasses: help from the strings below the fields, groups, defaults shown as values.

A command may have

    GROUPS: ClassVar = {"expert": ("seed", ...)}    fields that stand in a box of their own, "expert options"
    DOCS: ClassVar = {"seed": "..."}                help for fields that have no string below them
    choices(cls) -> {"method": ("auto", ...)}       values for help and completion of a field that takes others as well
    defaults(cls, arguments) -> {"rank": 8}         defaults that come from the arguments, such as those of a recipe
"""

import ast
import inspect
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, make_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from jcrosslora.errors import UsageError


@cache
def attribute_docs(cls: type) -> dict[str, str]:
    """Return the docstring beneath each annotated attribute of a class and its bases, on one line each.

    A class whose source cannot be read gives nothing.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = tree.body[0].body if tree.body and isinstance(tree.body[0], ast.ClassDef) else []
        for statement in pairwise(body):
            match statement:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))) if text:
                    found[name] = " ".join(text.split())
    return found


C = TypeVar("C")


def parse(command: type[C], arguments: Sequence[str], *, prog: str) -> C:
    """Read the arguments of a command; tyro prints help and errors, and exits with 0 or 2.

    Args:
        prog: what stands in front of the arguments, for usage lines.

    Raises:
        UsageError: what has no flag was given by one.
    """
    _check_flags(command, arguments, prog)
    kind = flags_type(command, getattr(command, "defaults", lambda _: {})(arguments))
    description = inspect.cleandoc(command.__doc__ or "")
    parsed: Any = tyro.cli(kind, args=arguments, prog=prog, description=description, config=(tyro.conf.DisallowNone,))
    return command(**{name: value for group in vars(parsed).values() for name, value in vars(group).items()})


def _check_flags(command: type, arguments: Sequence[str], prog: str) -> None:
    """Refuse a flag for an argument that has none, of which tyro only says that its value is missing."""
    given = {one.partition("=")[0] for one in arguments}
    for name, hint in get_type_hints(command, include_extras=True).items():
        flag = "--" + name.replace("_", "-")
        if flag in given and tyro.conf.Positional in get_args(hint):
            msg = f"{flag} is not an option: give its value alone, as in '{prog} {name.rpartition('_')[2].upper()}'"
            raise UsageError(msg)


def flags_type(command: type, defaults: Mapping[str, Any] | None = None, *, completing: bool = False) -> Any:
    """Build the nested dataclass that tyro reads: one inner dataclass for each group of a command's fields.

    Args:
        defaults: values in place of the fields' own defaults.
        completing: whether it is for a completion script, which lists `choices` and accepts nothing else.
    """
    hints, docs = get_type_hints(command, include_extras=True), attribute_docs(command) | getattr(command, "DOCS", {})
    choices = getattr(command, "choices", dict)()
    groups: dict[str, tuple[str, ...]] = getattr(command, "GROUPS", {})
    grouped = {name for names in groups.values() for name in names}
    boxes = {"": tuple(one.name for one in fields(command) if one.name not in grouped), **groups}
    every = {one.name: one for one in fields(command)}
    outer: list[Any] = []
    for title, names in boxes.items():
        inner = []
        for name in names:
            default = _default(every[name], defaults or {})
            hint = _annotated(name, hints[name], docs.get(name, ""), choices.get(name, ()), default, completing)
            inner.append((name, hint) if default is MISSING else (name, hint, field(default=default)))
        kind = make_dataclass(title or "flags", inner, kw_only=True)
        kind.__doc__ = ""
        config = tyro.conf.arg(name="") if not title else tyro.conf.arg()
        outer.append((title or "flags", Annotated[kind, tyro.conf.OmitArgPrefixes, config]))
    found = make_dataclass(command.__name__, outer)
    found.__doc__ = command.__doc__
    return found


def settings_of(command: Any, kind: type[C]) -> C:
    """Take the settings of a dataclass out of a command that has all its fields."""
    return kind(**{one.name: getattr(command, one.name) for one in fields(kind)})  # type: ignore[arg-type]


def _default(one: Field[Any], defaults: Mapping[str, Any]) -> Any:
    if one.name in defaults:
        return defaults[one.name]
    return one.default if one.default_factory is MISSING else one.default_factory()


def _annotated(name: str, hint: Any, text: str, choices: Collection[str], default: Any, completing: bool) -> Any:
    """Add to a field's type what tyro shows: help, default, and what stands for its value."""
    several = " ..." if "..." in str(hint) else ""
    metavar = name.rpartition("_")[2].upper() + several if _is_text(hint) else None
    if choices and completing:
        hint = Literal[tuple(choices)]  # type: ignore[valid-type]
    elif choices:
        text, metavar = f"{text} One of {', '.join(choices)}.", "NAME"
    config = tyro.conf.arg(help=text, help_behavior_hint=_shown(default), metavar=metavar)
    return Annotated[(hint, config, tyro.conf.FlagCreatePairsOff)]


def _is_text(hint: Any) -> bool:
    """Whether a type holds nothing but text and paths, for which tyro's STR says less than the field's name."""
    if get_origin(hint) is Annotated:
        return _is_text(get_args(hint)[0])
    parts = get_args(hint)
    return all(map(_is_text, parts)) if parts else hint in (str, Path, type(None), ...)


def _shown(default: Any) -> str:
    """Show a default as a value; nothing where it is off, empty or not set, which says no more than no flag."""
    if isinstance(default, bool) or default in (None, ()) or default is MISSING:
        return ""
    return f"(default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
