"""Names for publication, without local paths."""

from __future__ import annotations

from pathlib import Path

from jcrosslora.checkpoint.hub import is_hub_id, local_names, public_name
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
