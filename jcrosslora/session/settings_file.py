"""Settings in TOML files: recipes of one transfer, and plans of many."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jcrosslora.errors import UsageError
from jcrosslora.methods import setting_fields
from jcrosslora.session.settings import OWN_FIELDS


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
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"{what} {path} cannot be read ({error.strerror}); name an existing TOML file"
        raise UsageError(msg) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        msg = f"{what} {path} is not TOML ({error}); write lines such as {example}"
        raise UsageError(msg) from None


def check_settings(settings: Mapping[str, Any], place: str) -> None:
    """Check the names and types of a transfer's settings from a TOML file.

    Args:
        settings: values by the names of `TransferSettings` or of hyper-parameters of a method.
        place: their location, for errors.

    Raises:
        UsageError: a name is unknown, or a value has the wrong type.
    """
    types: dict[str, Any] = {name: field.type for name, field in OWN_FIELDS.items()} | {"method": str}
    for name, by_method in setting_fields().items():
        types.setdefault(name, next(iter(by_method.values())).type)
    for key, value in settings.items():
        if key not in types:
            msg = f"{place} has an unknown setting {key!r}; the settings are {', '.join(types)}"
            raise UsageError(msg)
        _check_type(place, key, value, types[key])


def _check_type(place: str, key: str, value: Any, annotation: Any) -> None:
    allowed = getattr(annotation, "__args__", (annotation,))
    choices = [item for item in allowed if isinstance(item, str)]
    nested = [item for option in allowed for item in getattr(option, "__args__", ()) if isinstance(item, str)]
    types = tuple(item for item in allowed if isinstance(item, type) and item is not type(None))
    if value in choices + nested or type(value) in types:
        return
    named = ", ".join(map(repr, choices + nested))
    wanted = " or ".join([*(item.__name__ for item in types), *([named] if named else [])])
    msg = f"{place} sets {key} to {value!r}; it must be {wanted}"
    raise UsageError(msg)
