"""The command that repeats a recipe, and adds what recipes leave out: folders of files and the address of a server.

A recipe may come from somebody else. It names files without folders: paths are removed when it is written, and refused
when it is read.
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from jcrosslora.checkpoint.hub import home_of, is_hub_id
from jcrosslora.errors import UsageError
from jcrosslora.report.record import AGAIN
from jcrosslora.report.usage import quoted

RECIPE = "recipe.toml"
SERVED = "source_model"  # a recipe with this setting queried a server
_ON_HUB = ("adapter", "source", "source_tokenizer", "target")
# Settings that name a file or a folder to read; the `_ON_HUB` ones may be hub ids.
FILES = (*_ON_HUB, "source_template", "target_template", "prompts", "examples")


def repeat_command(recipe_toml: str) -> tuple[str, str]:
    """Return the command that repeats a recipe, and how to fill it in (the end of a sentence, or "").

    Raises UsageError if the recipe is not TOML, as a report from somebody else may hold any text.
    """
    lines = [line for line in recipe_toml.splitlines() if line.partition(" = ")[0] in (*FILES, SERVED)]
    try:
        settings = tomllib.loads("\n".join(lines))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"the recipe in the report is not TOML ({error}): {AGAIN}") from None
    files, served = _local_files(settings), SERVED in settings
    blanks = ["the folder of each file in place of PATH"] * bool(files)
    blanks += ["the address of the server in place of URL"] * served
    given = [*_with_folders(files), *["--source-url URL"] * served, f"--recipe {RECIPE}"]
    return " ".join(["jcrosslora transfer", *given]), f", with {' and '.join(blanks)}" if blanks else ""


def find_files(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the settings of a recipe, with paths for the files that are in the recipe's folder.

    Other files keep their names, which refer to the current folder. Raises UsageError if a file or `out` is a path.
    """
    for name in (*FILES, "out"):
        value = settings.get(name)
        if value is not None and not (_is_name(value) or (name in _ON_HUB and is_hub_id(value))):
            given = "ADAPTER" if name == "adapter" else _flag(name)
            msg = f"recipe {path} sets {name} to {value!r}; it must be a name without a folder: leave it out there, "
            raise UsageError(msg + f"and add {given} to the command")
    beside = {name: str(path.parent / value) for name, value in _local_files(settings).items()}
    return {**settings, **{name: place for name, place in beside.items() if os.path.exists(place)}}


def check_found(settings: Mapping[str, Any], given: Mapping[str, Any], path: Path) -> None:
    """Check the files that a transfer takes from a recipe, but not files that the user named.

    Args:
        settings: the recipe's settings, from `find_files`.
        given: the transfer's settings.
        path: the recipe's path.

    Raises:
        UsageError: a file is neither in the recipe's folder nor in the current folder; a file is a link that leads out
            of the recipe's folder; or a hub id is also a path in the current folder, which a recipe may not choose.
    """
    taken = {name: value for name in FILES if isinstance(value := settings.get(name), str) and given.get(name) == value}
    for name, value in taken.items():
        beside = path.parent / Path(value).name
        if name in _ON_HUB and is_hub_id(value) and os.path.exists(value) and Path(value) != beside:
            msg = f"recipe {path} names {value} on the hub, and the current folder has a path of this name: add "
            raise UsageError(msg + f"{_with_folders({name: value})[0]} for the one here, or run it in another folder")
        if Path(value) == beside and not beside.resolve().is_relative_to(home_of(path.parent)):
            flag = "" if name == "adapter" else f"{_flag(name)} "
            msg = (
                f"recipe {path} names {beside.name}, a link that leads out of its folder: if you mean the file there, "
            )
            raise UsageError(msg + f"add {flag}{quoted(str(beside.resolve()))} to the command")
    if missing := {name: value for name, value in _local_files(taken).items() if not os.path.exists(value)}:
        whose = "its folder" if len(missing) == 1 else "their folders"
        msg = f"recipe {path} names {', '.join(missing.values())} without {whose}: add "
        raise UsageError(msg + " ".join(_with_folders(missing)))


def _local_files(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that name a local file or folder."""
    named = {name: value for name in FILES if isinstance(value := settings.get(name), str)}
    return {name: value for name, value in named.items() if not (name in _ON_HUB and is_hub_id(value))}


def _is_name(path: str) -> bool:
    """Return whether a path is a name without a folder, on any system."""
    return PureWindowsPath(path).name == path and path not in ("", "..") and not path.startswith("~")


def _with_folders(files: Mapping[str, str]) -> list[str]:
    paths = {name: quoted(f"PATH/{value}") for name, value in files.items()}
    return [path if name == "adapter" else f"{_flag(name)} {path}" for name, path in paths.items()]


def _flag(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"
