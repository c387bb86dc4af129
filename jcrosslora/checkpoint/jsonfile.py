"""Read a JSON object from a file, with one kind of error."""

import json
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
