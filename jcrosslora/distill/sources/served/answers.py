"""Answers of a server on disk, by digests of their requests, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from jcrosslora.cache.keys import digest_of
from jcrosslora.distill.sources.served.replies import DamagedError, read_reply
from jcrosslora.utils.files import write_whole

_ABANDONED_SECONDS = 30 * 86400.0
_SAMPLE = "sample.json"
T = TypeVar("T")


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

    def renew(self, sample: T, is_of: Callable[[T], bool]) -> None:
        """Drop all answers of another model under the same name.

        Args:
            sample: what the model answers to the same questions in every run.
            is_of: whether a sample of an earlier run is of this model.
        """
        if self._folder is None:
            return
        kept = self._read(self._folder / _SAMPLE, type(sample))
        if kept is not None and is_of(kept):
            return
        with suppress(OSError):
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / _SAMPLE, msgspec.json.encode(sample))

    def find(self, key: str, kind: type[T]) -> T | None:
        """Return an answer of a type; None if there is none."""
        return None if self._folder is None else self._read(self._path(key), kind)

    def keep(self, key: str, answer: Any) -> None:
        """Keep an answer."""
        if self._folder is None:
            return
        with suppress(OSError):
            path = self._path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, msgspec.json.encode(answer))

    @staticmethod
    def _read(path: Path, kind: type[T]) -> T | None:
        with suppress(OSError, DamagedError):
            return read_reply(path.read_bytes(), kind)
        return None

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key[2:24]}.json"
