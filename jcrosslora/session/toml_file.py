"""Recipes and batch plans: reading TOML files, and checking keys and types of their tables."""

import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from msgspec import Meta, ValidationError, convert

from jcrosslora.errors import UsageError, suggestion
from jcrosslora.utils.reading import read_small_text


def read_toml(path: Path, what: str, example: str) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: the file.
        what: its kind, for errors: "recipe" or "plan".
        example: a valid line, for errors.

    Raises:
        UsageError: the file cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(read_small_text(path))
    except OSError as error:
        msg = f"{what} {path} cannot be read ({error.strerror}); name an existing TOML file"
        raise UsageError(msg) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        msg = f"{what} {path} is not TOML ({error}); write lines such as {example}"
        raise UsageError(msg) from None


def read_table(
    values: Mapping[str, Any], kinds: Mapping[str, Any], place: str, required: Collection[str] = ()
) -> dict[str, Any]:
    """Check the keys of a table, and convert its values to their types: 2 to 2.0, a list to a tuple.

    Args:
        values: the table.
        kinds: type of each key that it may have; the description of a `Meta` names one in errors.
        place: its location, for errors.
        required: keys that it must have.

    Raises:
        UsageError: a key is unknown or missing, or a value has the wrong type.
    """
    found = {}
    for key, value in values.items():
        if key not in kinds:
            known = ", ".join(kinds) or "none"
            msg = f"{place} has an unknown key {key!r}{suggestion(key, kinds)}; it may have {known}"
            raise UsageError(msg)
        try:
            found[key] = convert(value, kinds[key])
        except ValidationError:
            msg = f"{place} sets {key} to {value!r}; it must be {_wanted(kinds[key])}"
            raise UsageError(msg) from None
    for key in required:
        if key not in values:
            msg = f"{place} has no {key}; give it {_wanted(kinds[key])}"
            raise UsageError(msg)
    return found


def _wanted(kind: Any) -> str:
    """Name a type in words; what msgspec says has neither the value that came nor the choices."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        described = (one.description for one in parts[1:] if isinstance(one, Meta) and one.description)
        return next(described, None) or _wanted(parts[0])
    if origin is Literal:
        return ", ".join(map(repr, parts))
    if origin in (list, tuple):
        return f"a list of {_wanted(parts[0])}"
    if origin in (Union, UnionType):
        return " or ".join(_wanted(one) for one in parts if one is not NoneType)
    return {str: "text", dict: "a table"}.get(kind) or getattr(kind, "__name__", str(kind))
