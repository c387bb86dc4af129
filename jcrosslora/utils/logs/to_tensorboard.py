"""TensorBoard: event files below `runs/`, or below the folder that TENSORBOARD_LOGGING_DIR names."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tensorboard.summary.writer.record_writer import RecordWriter

from jcrosslora.utils.logs import Settings

# protobuf makes the classes of these modules when they are imported, so type checkers do not know them.
_EVENTS, _SUMMARIES, _TENSORS, _TYPES = (
    vars(import_module(f"tensorboard.compat.proto.{name}_pb2")) for name in ("event", "summary", "tensor", "types")
)


class TensorBoardLog:
    """A file of events. TensorBoard's own writer would put the name of the machine into the name of the file."""

    def __init__(self, name: str, settings: Settings) -> None:
        """Begin the file in a folder of its own: a second run of a name gets a number."""
        folder = _free(Path(os.environ.get("TENSORBOARD_LOGGING_DIR", "runs")), name)
        self._path, self._empty = folder / f"events.out.tfevents.{time.time():.0f}.jcrosslora", True
        self._writer = RecordWriter(self._path.open("wb"))
        self._add(file_version="brain.Event:2")
        text = "\n".join(f"    {line}" for line in json.dumps(dict(settings), indent=2, default=str).splitlines())
        kind = _SUMMARIES["SummaryMetadata"]
        tensor = _TENSORS["TensorProto"](dtype=_TYPES["DT_STRING"], string_val=[text.encode()])
        metadata = kind(plugin_data=kind.PluginData(plugin_name="text"))
        self._add_values(0, [{"tag": "settings", "metadata": metadata, "tensor": tensor}])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add figures."""
        self._add_values(step, [{"tag": name, "simple_value": value} for name, value in values.items()])
        self._empty = False

    def finish(self, *, failed: bool) -> None:
        """Close the file; one of work that failed before its first figure, as on bad input, is removed."""
        self._writer.close()
        if failed and self._empty:
            self._path.unlink()
            self._path.parent.rmdir()

    def _add_values(self, step: int, values: Sequence[Mapping[str, Any]]) -> None:
        summary = _SUMMARIES["Summary"]
        self._add(step=step, summary=summary(value=[summary.Value(**value) for value in values]))

    def _add(self, **content: Any) -> None:
        self._writer.write(_EVENTS["Event"](wall_time=time.time(), **content).SerializeToString())
        self._writer.flush()


def _free(folder: Path, name: str) -> Path:
    """Make a folder of this name, or with the first number behind it that is free."""
    number = 1
    while True:
        try:
            (made := folder / (name if number == 1 else f"{name}-{number}")).mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return made


start = TensorBoardLog
