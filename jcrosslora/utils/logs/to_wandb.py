"""Weights & Biases. Its environment variables decide where a run goes: WANDB_MODE=offline, WANDB_PROJECT, WANDB_DIR."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import wandb

from jcrosslora.utils.logs import Settings

# What wandb would tell of the machine and of the folder that it runs in.
_UNTOLD: dict[str, Any] = {
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "disable_git": True,
    "disable_code": True,
    "console": "off",
    "host": "",
}


class WandbLog:
    """A run of Weights & Biases."""

    def __init__(self, name: str, settings: Settings) -> None:
        """Begin it; the user is asked to log in where wandb does so."""
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "jcrosslora"),
            name=name,
            config=dict(settings),
            settings=wandb.Settings(**_UNTOLD),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add figures."""
        self._run.log(dict(values), step=step)

    def finish(self, *, failed: bool) -> None:
        """Send what is not sent yet."""
        self._run.finish(exit_code=int(failed))


start = WandbLog
