"""`jcrosslora export`: write an adapter again in another form."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import tyro
from rich.console import Console

from jcrosslora.adapter.export import ExportSettings, export_adapter
from jcrosslora.cli.flags import settings_of
from jcrosslora.cli.output import ASKED_FOR, FailOnLoss, say


@dataclass(frozen=True)
class Export(ExportSettings):
    """Write an adapter again for the base that it has: for another engine, at another rank, or several as their sum."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"expert": ("keep_dora", "dtype", "base_revision")}

    adapter: tyro.conf.Positional[tuple[str, ...]]
    fail_on: FailOnLoss = "never"
    """loss: exit with code 3 if something of the adapters is lost or not written; the rest is written all the same."""

    def run(self, console: Console) -> int:
        """Export, then say what was lost."""
        exported = export_adapter(settings_of(self, ExportSettings))
        for sentence in exported.losses:
            say(console, f"lost: {sentence}")
        if exported.truncation is not None:
            say(console, f"truncation: {exported.truncation.sentence}")
        if exported.magnitudes is not None:
            say(console, f"kept: a DoRA, with the magnitudes of its {len(exported.magnitudes)} modules")
        for sentence in exported.adapter.info.ignored:
            say(console, f"not written: {sentence}")
        lost = bool(exported.losses or exported.adapter.info.ignored)
        say(console, f"written: {self.out}{' (without parts of the adapter, see above)' if lost else ''}")
        return ASKED_FOR if self.fail_on == "loss" and lost else 0
