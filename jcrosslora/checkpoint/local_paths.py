"""Replace paths of this machine in what is published."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jcrosslora.checkpoint.hub import public_name


def local_names(*refs: str | None) -> dict[str, str]:
    """Return the paths among references with their public names, for `publish`."""
    found = {}
    for ref in refs:
        name = public_name(ref)
        # A bare name reveals nothing, and replacing it could change unrelated text.
        if ref and name and ref != name and (os.sep in ref or ref.startswith("~")):
            found[ref] = name
            found[str(Path(ref).expanduser().absolute())] = name
    return found


def publish(value: Any, names: Mapping[str, str]) -> Any:
    """Replace the paths in all texts of a JSON value, longer ones first."""
    pattern = re.compile("|".join(re.escape(path) for path in sorted(names, key=len, reverse=True)))

    def replaced(value: Any) -> Any:
        if isinstance(value, str) and names:
            return pattern.sub(lambda match: names[match.group()], value)
        if isinstance(value, Mapping):
            return {key: replaced(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [replaced(item) for item in value]
        return value

    return replaced(value)
