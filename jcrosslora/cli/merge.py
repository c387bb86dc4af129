"""`jcrosslora merge`: a base with an adapter in its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import tyro
from rich.console import Console

from jcrosslora.adapter.merge import MergeSettings, merge
from jcrosslora.cli.flags import settings_of
from jcrosslora.cli.output import ASKED_FOR, FailOnLoss, say


@dataclass(frozen=True)
class Merge(MergeSettings):
    """Merge an adapter into its base: a checkpoint of its own, for engines that take no adapters."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"expert": ("dtype", "base_revision", "adapter_revision")}

    base: tyro.conf.Positional[str]
    adapter: tyro.conf.Positional[str]
    fail_on: FailOnLoss = "never"
    """loss: exit with code 3 if something of the adapter is not merged; the rest is written all the same."""

    def run(self, console: Console) -> int:
        """Merge, then say what the checkpoint lacks."""
        merged = merge(settings_of(self, MergeSettings))
        for sentence in merged.notes:
            say(console, sentence)
        left = ", without parts of the adapter, see above" if merged.lost else ""
        say(console, f"written: {merged.folder} ({merged.modules} modules changed{left})")
        return ASKED_FOR if self.fail_on == "loss" and merged.lost else 0
