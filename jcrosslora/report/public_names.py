"""Names for publication, without local paths."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jcrosslora.checkpoint.hub import is_hub_id, public_name
from jcrosslora.report.record import TransferReport


def source_name(report: TransferReport) -> str | None:
    """Return the name of the source base: the hub id that the adapter's own configuration states, else the file's.

    The `general.name` of a GGUF file is set at training, and often differs from the name of the repository.
    """
    stated = report.adapter.base_name
    return stated if stated and is_hub_id(stated) and not Path(stated).exists() else public_name(report.source.name)


def replacements(report: TransferReport) -> dict[str, str]:
    """Return the local paths in a report with their public names."""
    ends = report.source, report.target
    named = [*(info.ref for info in ends), *(info.name for info in ends)]
    return local_names(report.adapter.name, report.recipe.probe_text, *named)


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
