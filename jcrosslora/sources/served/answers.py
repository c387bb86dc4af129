"""Answers of a server on disk, by digests of their requests, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from jcrosslora.cache.keys import digest_of
from jcrosslora.utils.files import write_whole

_ABANDONED_SECONDS = 30 * 86400.0
_SAMPLE = "sample.json"
_MOST_APART = 0.1  # nats; batches of other sizes move log-probabilities in half precision by a few hundredths


class Answers:
    """Answers of one model on one server. Without a folder nothing is kept; the state of the disk raises no error."""

    def __init__(self, parent: Path | None, identity: Any) -> None:
        """Use the folder of a model below `parent`; folders that did not change for 30 days are removed.

        Args:
            parent: the folder of all models, or None.
            identity: names the model, as a JSON value.
        """
        self._folder = None if parent is None else parent / digest_of(identity)[:24]
        if parent is not None and parent.is_dir():
            for other in parent.iterdir():
                with suppress(OSError):
                    if other != self._folder and time.time() - other.stat().st_mtime > _ABANDONED_SECONDS:
                        shutil.rmtree(other)

    def renew(self, sample: list[list[float]]) -> None:
        """Drop all answers of another model under the same name.

        Args:
            sample: log-probabilities of the same tokens in every run, -inf not among them.
        """
        if self._folder is None:
            return
        with suppress(OSError, ValueError):
            kept = json.loads((self._folder / _SAMPLE).read_text(encoding="utf-8"))
            if _near(kept, sample):
                return
        with suppress(OSError):
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / _SAMPLE, json.dumps(sample).encode())

    def find(self, key: str) -> Any:
        """Return an answer; None if there is none."""
        if self._folder is None:
            return None
        with suppress(OSError, ValueError):
            return json.loads(self._path(key).read_text(encoding="utf-8"))
        return None

    def keep(self, key: str, answer: Any) -> None:
        """Keep an answer, a JSON value."""
        if self._folder is None:
            return
        with suppress(OSError):
            path = self._path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(answer).encode())

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key[2:24]}.json"


def _near(kept: Any, sample: list[list[float]]) -> bool:
    try:
        pairs = [(a, b) for one, other in zip(kept, sample, strict=True) for a, b in zip(one, other, strict=True)]
    except (TypeError, ValueError):
        return False
    return all(abs(a - b) <= _MOST_APART for a, b in pairs)
