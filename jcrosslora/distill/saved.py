"""The states of fits on their way, each in a folder of its own, from which the same fit continues after a stop."""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from jcrosslora.cache.keys import digest_of
from jcrosslora.training.checkpoints import Checkpoints

_ABANDONED_SECONDS = 30 * 86400.0


@contextmanager
def kept_states(parent: Path, run: Mapping[str, Any]) -> Iterator[Checkpoints]:
    """Open the folder of a fit, and remove it when the block ends without an exception.

    Folders that did not change for 30 days are removed as well.

    Args:
        parent: of the folders of all fits.
        run: what the numbers of this one depend on.

    Raises:
        OutputError: the folder cannot be made or written to.
        CheckpointError: a state in it cannot be read.
    """
    folder = parent / digest_of(run)[:24]
    if parent.is_dir():
        for other in parent.iterdir():
            with suppress(OSError):
                if other != folder and time.time() - other.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(other)
    with closing(Checkpoints(folder, run)) as found:
        yield found
    shutil.rmtree(folder, ignore_errors=True)
