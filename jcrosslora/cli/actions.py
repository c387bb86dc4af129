"""Commands that have actions, such as `shelf add`: their help, the chosen action, and their completion."""

import textwrap
from collections.abc import Mapping
from dataclasses import make_dataclass
from typing import Annotated, Any

import tyro

from jcrosslora.cli.flags import flags_type
from jcrosslora.errors import UsageError, suggestion

_WIDTH = 80


def actions_help(name: str, summary: str, actions: Mapping[str, type]) -> str:
    """Return the help of a command that has actions."""
    indent = " " * (max(map(len, actions)) + 4)
    lines = [
        textwrap.fill(" ".join((kind.__doc__ or "").split()), _WIDTH, initial_indent=first, subsequent_indent=indent)
        for first, kind in ((f"  {one}".ljust(len(indent)), kind) for one, kind in actions.items())
    ]
    usage = f"usage: jcrosslora {name} ACTION ...\n\n{summary}\n\nactions:"
    return "\n".join([usage, *lines, "", f"jcrosslora {name} ACTION --help   the options of an action"])


def find_action(name: str, given: str, actions: Mapping[str, type]) -> type:
    """Return the action of a command by its name, "" if none was given.

    Raises:
        UsageError: no action has this name.
    """
    if given not in actions:
        said = f"{name} {given!r} is unknown{suggestion(given, actions)}" if given else f"{name} needs an action"
        msg = f"{said}; use one of {', '.join(actions)}"
        raise UsageError(msg)
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
