"""Trackio. Its environment variables decide where a run goes: TRACKIO_DIR on this machine, or TRACKIO_SPACE_ID."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout

import trackio

from jcrosslora.utils.logs import Settings


class TrackioLog:
    """A run of Trackio. What it prints goes to standard error: standard output is for the command's own."""

    def __init__(self, name: str, settings: Settings) -> None:
        """Begin it, without the figures that Trackio would take of the machine."""
        with redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", "jcrosslora"),
                name=name,
                config=dict(settings),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add figures."""
        self._run.log(dict(values), step=step)

    def finish(self, *, failed: bool) -> None:
        """Write what is not written yet; Trackio keeps no outcome of a run."""
        del failed
        with redirect_stdout(sys.stderr):
            trackio.finish()


start = TrackioLog
