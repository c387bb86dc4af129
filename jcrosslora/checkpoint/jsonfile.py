"""Read a JSON object from a file, with one kind of error."""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jcrosslora.errors import CheckpointError
from jcrosslora.utils.reading import read_small_text


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        CheckpointError: the file cannot be read, is not UTF-8 JSON, or holds something other than an object.
    """
    try:
        value = json.loads(read_small_text(path))
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}): check that the file exists and is readable"
        raise CheckpointError(msg) from error
    except (ValueError, RecursionError) as error:
        msg = f"{path}: not valid JSON: download the file again"
        raise CheckpointError(msg) from error
    if not isinstance(value, dict):
        msg = f"{path}: holds {type(value).__name__} where a JSON object was wanted: download the file again"
        raise CheckpointError(msg)
    return value


def refuse_not_finite(values: Mapping[str, Any], where: Path | str, *, but: Collection[str] = ()) -> None:
    """Refuse a configuration with a number that is infinite or NaN, which Python's JSON reads.

    Args:
        values: the configuration.
        where: its file or the name of its model, for errors.
        but: keys that may be infinite.

    Raises:
        CheckpointError: there is such a number; the message names its key.
    """
    stack = [(key, value) for key, value in values.items() if key not in but]
    while stack:
        key, value = stack.pop()
        if isinstance(value, float) and not math.isfinite(value):
            msg = f"{where}: config key {key!r} is {value}, wanted a finite number: mend it, or download the file again"
            raise CheckpointError(msg)
        if isinstance(value, Mapping):
            stack += [(f"{key}.{name}", item) for name, item in value.items()]
        elif isinstance(value, list):
            stack += [(key, item) for item in value]
