"""Build command-line flags from dataclasses: the strings below the fields are the help texts.

A command may define

    GROUPS: ClassVar = {"expert": ("seed", ...)}    fields in a separate box, "expert options"
    SHORT: ClassVar = ("out", ...)                  the fields that --help shows; --help-all shows all of them
    DOCS: ClassVar = {"seed": "..."}                help for fields that have no string below them
    choices(cls) -> {"method": ("auto", ...)}       suggested values of a field, for help and shell completion
    defaults(cls, arguments) -> {"rank": 8}         defaults that depend on the arguments, such as those of a recipe
"""

import ast
import inspect
import io
import logging
import os
import re
import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import MISSING, Field, field, fields, make_dataclass
from functools import cache
from itertools import pairwise, takewhile
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from jcrosslora.errors import UsageError, suggestion

COMMON = ("--quiet", "--verbose", "--token")  # options of every command, which it does not read itself
_HELP, _HELP_ALL = ("-h", "--help"), "--help-all"
_COMPLETION = ("--tyro-write-completion", "--tyro-print-completion")
# What stands for a value, by the field's name or its last word; else that word, or N and X for numbers.
_METAVARS = {
    **dict.fromkeys(("source", "target", "base", "tokenizer", "draft"), "BASE"),
    **dict.fromkeys(("prompts", "examples", "recipe", "template", "data"), "FILE"),
    **dict.fromkeys(("html", "answers", "unrelated"), "FILE"),
    **dict.fromkeys(("models", "checkpoints", "shelf", "folder", "include_path"), "DIR"),
    **{
        "out": "PATH",
        "out_rank": "RULE",
        "method": "NAME",
        "tasks": "NAME,...",
        "by": "NAME",
        **dict.fromkeys(("start", "trained"), "ADAPTER"),
        "push_to": "OWNER/NAME",
    },
    **{"ray": "HOST:PORT", "source_base_model": "NAME", "source_model": "NAME"},
}


def apply_common(arguments: list[str]) -> tuple[list[str], bool]:
    """Apply the options of every command, up to a `--`; return the other arguments, and whether it is to be quiet.

    Raises UsageError if --token has no value.
    """
    own = list(takewhile(lambda one: one != "--", arguments))
    behind, kept, token, rest = arguments[len(own) :], [], None, iter(own)
    for one in rest:
        if one.partition("=")[0] == "--token":
            token = one.partition("=")[2] or next(rest, "")
        elif one not in COMMON:
            kept.append(one)
    if "--verbose" in own:
        logging.basicConfig(level=logging.INFO)
    if token is not None:
        if not token or token.startswith("-"):
            raise UsageError("--token is given without a token: give one of the hub, such as --token hf_...")
        os.environ["HF_TOKEN"] = token
    return kept + behind, "--quiet" in own


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
    """Read the arguments of a command; tyro prints the help, and exits with 0.

    Args:
        prog: the words before the arguments, for usage lines.

    Raises:
        UsageError: an argument is unknown or missing, or its value is of another type.
    """
    own = list(takewhile(lambda one: one != "--", arguments))
    short = getattr(command, "SHORT", ()) if _HELP_ALL not in own and not {*_HELP}.isdisjoint(own) else ()
    if _HELP_ALL in own:
        arguments = ("--help",)
    defaults = getattr(command, "defaults", lambda _: {})(arguments)
    _check_flags(command, own, defaults, prog)
    kind, printed = flags_type(command, defaults, short=short), io.StringIO()
    description = inspect.cleandoc(command.__doc__ or "")
    try:
        with redirect_stderr(printed):
            parsed: Any = tyro.cli(
                kind, args=arguments, prog=prog, description=description, config=(tyro.conf.DisallowNone,)
            )
    except SystemExit as end:
        if end.code:
            raise UsageError(f"{_reason(printed.getvalue())}; {prog} --help lists the options") from None
        print(f"{', '.join(COMMON)}: of every command, see `jcrosslora --help`")
        if short:
            print(f"{prog} {_HELP_ALL} lists all {len(fields(command))} options")  # type: ignore[arg-type]
        raise
    sys.stderr.write(printed.getvalue())
    return command(**{name: value for group in vars(parsed).values() for name, value in vars(group).items()})


def _check_flags(command: type, given: Sequence[str], defaults: Mapping[str, Any], prog: str) -> None:
    """Refuse unknown flags, and flags of positional arguments."""
    hints = get_type_hints(command, include_extras=True)
    known, alone = {*_HELP, _HELP_ALL, *_COMPLETION, *COMMON}, {}
    for one in fields(command):
        flag = _flag(one.name)
        if tyro.conf.Positional in get_args(hints[one.name]):
            alone[f"--{flag}"] = _metavar(one.name, hints[one.name])
        else:
            known.add(f"--no-{flag}" if _default(one, defaults) is True else f"--{flag}")
    for text in given:
        flag = text.partition("=")[0].replace("_", "-")
        if flag in alone:
            raise UsageError(f"{flag} is not an option: give its value alone, as in '{prog} {alone[flag]}'")
        if re.match("--?[a-zA-Z]", flag) and flag not in known and flag.lower() not in ("-inf", "-nan"):
            near = suggestion(flag, known).replace("'", "")
            raise UsageError(f"{flag} is unknown{near}; {prog} --help lists the options")


def _reason(box: str) -> str:
    """Return what tyro says in a box on one line: the arguments that are missing, or the first paragraph."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box).replace("│", " ")
    parts = re.split(r"(?m)^.*[─-]{8,}.*$", plain)  # title, reason, and further advice
    lines = [line.rstrip() for line in parts[1 if len(parts) > 1 else 0].strip("\n").splitlines()]
    if missing := [line.split()[0] for line in lines if re.match(r" {6}\S", line)]:
        return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    return " ".join(" ".join(takewhile(bool, lines)).split()).removesuffix(".")


def flags_type(
    command: type,
    defaults: Mapping[str, Any] | None = None,
    *,
    completing: bool = False,
    short: Collection[str] = (),
) -> Any:
    """Build the nested dataclass that tyro reads: one inner dataclass for each group of a command's fields.

    Args:
        defaults: values instead of the fields' own defaults.
        completing: whether it is for a completion script, which lists `choices` and accepts nothing else.
        short: the fields to take, each with the first sentence of its help; none for all of them in full.
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
            if short and name not in short:
                continue
            text = docs.get(name, "")
            text = re.split(r"(?<=\.) |(?<=[^.]): (?=\w+:)", text)[0] if short else text
            default = _default(every[name], defaults or {})
            hint = _annotated(name, hints[name], text, () if short else choices.get(name, ()), default, completing)
            inner.append((name, hint) if default is MISSING else (name, hint, field(default=default)))
        if not inner:
            continue
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
    """Add to a field's type what tyro shows: help, default, and a placeholder for its value."""
    metavar = _metavar(name, hint)
    if choices and completing:
        hint = Literal[tuple(choices)]  # type: ignore[valid-type]
    elif choices:
        text, metavar = f"{text} One of {', '.join(choices)}.", "NAME"
    config = tyro.conf.arg(
        name=_flag(name) if name.endswith("_") else None, help=text, help_behavior_hint=_shown(default), metavar=metavar
    )
    return Annotated[(hint, config, tyro.conf.FlagCreatePairsOff)]


def _flag(name: str) -> str:
    """Return the flag of a field; a field with the name of a method ends in _."""
    return name.removesuffix("_").replace("_", "-")


def _metavar(name: str, hint: Any) -> str | None:
    """Return the placeholder for a field's value; None for switches, and for choices, which tyro lists."""
    kinds, several = set(_kinds(hint)), " ..." if "..." in str(hint) else ""
    if kinds == {bool} or (not all(isinstance(kind, type) for kind in kinds) and name not in _METAVARS):
        return None
    last = name.rpartition("_")[2]
    if tyro.conf.Positional in get_args(hint):
        return f"{last.upper()}{several}"
    usual = "N" if kinds == {int} else "X" if kinds == {float} else last.upper()
    found = _METAVARS.get(name) or (usual if kinds & {int, float} else _METAVARS.get(last, usual))
    return f"{found}{several}"


def _kinds(hint: Any) -> Iterator[Any]:
    """Yield the types that a value, or a part of one, may have; None aside."""
    if get_origin(hint) is Annotated:
        yield from _kinds(get_args(hint)[0])
    elif get_origin(hint) is Literal or not get_args(hint):
        yield from () if hint in (NoneType, ...) else (hint,)
    else:
        for part in get_args(hint):
            yield from _kinds(part)


def _shown(default: Any) -> str:
    """Show a default as a value; nothing if it is off, empty or not set."""
    if isinstance(default, bool) or default in (None, (), "") or default is MISSING:
        return ""
    return f"(default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"


def actions_help(name: str, summary: str, actions: Mapping[str, type]) -> str:
    """Return the help of a command that has actions."""
    indent = " " * (max(map(len, actions)) + 4)
    lines = [
        textwrap.fill(" ".join((kind.__doc__ or "").split()), 80, initial_indent=first, subsequent_indent=indent)
        for first, kind in ((f"  {one}".ljust(len(indent)), kind) for one, kind in actions.items())
    ]
    usage = f"usage: jcrosslora {name} ACTION ...\n\n{summary}\n\nactions:"
    return "\n".join([usage, *lines, "", f"jcrosslora {name} ACTION --help   the options of an action"])


def find_action(name: str, given: str, actions: Mapping[str, type]) -> type:
    """Return the action of a command by its name, "" if none was given; raise UsageError if no action has it."""
    if given not in actions:
        said = f"{name} {given!r} is unknown{suggestion(given, actions)}" if given else f"{name} needs an action"
        raise UsageError(f"{said}; use one of {', '.join(actions)}")
    return actions[given]


def subcommands(commands: Mapping[str, type | dict[str, type]]) -> Any:
    """Join commands to a union of tyro's subcommands, for a completion script."""
    options: Any = None
    for name, found in commands.items():
        if isinstance(found, dict):
            kind = make_dataclass(name, [("action", Annotated[subcommands({**found}), tyro.conf.arg(name="")])])
        else:
            kind = flags_type(found, completing=True)
        entry = Annotated[kind, tyro.conf.subcommand(name)]
        options = entry if options is None else options | entry
    return options
