"""The states of a long fit in the cache, from which a stopped fit continues."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from jcrosslora.errors import CheckpointError, OutputError, UsageError
from jcrosslora.training.checkpoints import Checkpoints, State, Stepped
from jcrosslora.utils.digests import digest_of
from jcrosslora.utils.unfinished import remove_unchanged

_LOG = logging.getLogger(__name__)


class FitStates:
    """The newest states of a fit, in a folder of the cache: without them the fit goes on, after one warning."""

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Take the folder, which `restore` opens or makes; `run` is as for `Checkpoints`."""
        self._folder, self._run = folder, run
        self._kept: Checkpoints | None = None

    def restore(self, like: State) -> tuple[State, dict[str, Any]]:
        """Return the newest state and its notes, or `like` and nothing if there is none, or it cannot be read."""
        with self._optional():
            self._kept = Checkpoints(self._folder, self._run)
            try:
                return self._kept.restore(like)
            except CheckpointError as error:
                _LOG.warning("the state of a stopped fit is damaged, so the fit begins again: %s", error)
            except UsageError as error:
                _LOG.warning("the state of a stopped fit is of another one, so the fit begins again: %s", error)
            self.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._kept = Checkpoints(self._folder, self._run)
        return like, {}

    def save(self, state: Stepped, notes: Mapping[str, Any]) -> None:
        """Keep a state with notes, which JSON can hold."""
        with self._optional():
            if self._kept is not None:
                self._kept.save(state, notes)

    def close(self) -> None:
        """Close the folder."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    @contextmanager
    def _optional(self) -> Iterator[None]:
        try:
            yield
        except OutputError as error:
            self.close()
            reason = getattr(error.__cause__, "strerror", None) or error
            _LOG.warning("%s: the states of the fit cannot be kept (%s); going on without them", self._folder, reason)


@contextmanager
def kept_states(parent: Path, run: Mapping[str, Any]) -> Iterator[FitStates]:
    """Keep the states of a fit in a folder named by what it depends on, until the block ends without an exception.

    Folders that did not change for 30 days are removed as well.
    """
    folder = parent / digest_of(run)[:24]
    remove_unchanged(parent, folder)
    with closing(FitStates(folder, run)) as states:
        yield states
    shutil.rmtree(folder, ignore_errors=True)
