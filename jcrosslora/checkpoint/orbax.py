"""Orbax checkpoints: find one in a folder, list its arrays, and read some of them; errors of one that is written.

A checkpoint is a folder of one item; `CheckpointManager` keeps it in the folder of a step, next to other steps. Its
arrays are the leaves of nested mappings; `restore` reads the requested ones in the current process.
"""

import gc
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.checkpoint.in_memory import array_name, named_arrays
from jcrosslora.checkpoint.tunix import Arrays
from jcrosslora.errors import CheckpointError

ITEM = "model_params"  # tunix's name of the item with the weights
_MARK = "_METADATA"  # in the folder of an item
_ERRNO = re.compile(r"os_error_code='([0-9]+)'")  # in what its storage reports as a ValueError
_STEP = re.compile(r"(?:ckpt_)?([0-9]+)")  # Kauldron's trainer writes ckpt_100, the others 100
Entries = Mapping[tuple[str, ...], Any]  # the keys that lead to an array -> its shape and dtype


def find_checkpoint(folder: Path) -> Path | None:
    """Return the folder of the weights in a checkpoint, a step, or the latest of several steps; None elsewhere.

    Of a step's items it is tunix's `model_params`, or the only one.
    """
    if (folder / _MARK).is_file():
        return folder
    steps = {one: int(step[1]) for one in folder.glob("*/") if (step := _STEP.fullmatch(one.name))}
    items = {mark.parent for mark in max(steps, key=lambda one: steps[one], default=folder).glob(f"*/{_MARK}")}
    named = {item for item in items if item.name == ITEM} or items
    return named.pop() if len(named) == 1 else None


def nearest_file(name: str, checkpoint: Path, folder: Path) -> Path | None:
    """Return the file of this name nearest to a checkpoint, in it or in a folder up to the one that was given."""
    around = [one for one in (checkpoint, *checkpoint.parents) if one.is_relative_to(folder)]
    return next((path for one in around if (path := one / name).is_file()), None)


def read_entries(checkpoint: Path) -> Entries:
    """Read which arrays a checkpoint holds.

    Raises CheckpointError if the checkpoint cannot be read.
    """
    from etils import epath
    from flax.traverse_util import flatten_dict

    with _readable(checkpoint):
        tree = handler().metadata(epath.Path(checkpoint.absolute())).tree
    return flatten_dict(tree) if isinstance(tree, dict) else {}


def restore(checkpoint: Path, entries: Entries) -> dict[str, np.ndarray]:
    """Read these arrays, and no others, by their keys, joined by dots; raises as `read_entries`."""
    import orbax.checkpoint as ocp
    from flax.traverse_util import unflatten_dict

    if not entries:
        return {}
    as_numpy = unflatten_dict({path: ocp.RestoreArgs(restore_type=np.ndarray) for path in entries})
    args = ocp.args.PyTreeRestore(unflatten_dict(entries), restore_args=as_numpy, partial_restore=True)
    with _readable(checkpoint), ocp.Checkpointer(handler(), multiprocessing_options=alone()) as checkpointer:
        return named_arrays(checkpointer.restore(checkpoint.absolute(), args=args))


def checkpoint_arrays(checkpoint: Path) -> Arrays:
    """Return the arrays of a checkpoint, which are read on access; raises as `read_entries`."""
    entries = {path: entry for path, entry in read_entries(checkpoint).items() if hasattr(entry, "shape")}
    others = {path for path in checkpoint.iterdir() if path.name not in (_MARK, "manifest.ocdbt")}  # as config.json
    files = tuple(sorted(path for path in checkpoint.rglob("*") if path.is_file() and path not in others))

    def read(names: Collection[str]) -> dict[str, np.ndarray]:
        return restore(checkpoint, {path: entry for path, entry in entries.items() if array_name(path) in names})

    return Arrays({array_name(path): entry for path, entry in entries.items()}, read, files)


def clear_marks(folder: Path) -> None:
    """Remove paths from the files by whose presence alone Orbax knows that a checkpoint is whole."""
    for mark in folder.rglob("commit_success.txt"):
        mark.write_text("Checkpoint commit was successful\n", encoding="utf-8")


def alone() -> Any:
    """Let this process read or write alone: of several that work together, not all reach this point."""
    import jax
    import orbax.checkpoint as ocp

    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})


def handler() -> Any:
    """Return what reads and writes a tree of arrays in this process alone."""
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointHandler(multiprocessing_options=alone())


@contextmanager
def writing() -> Iterator[None]:
    """Raise an OSError for what the storage raises in a block that writes: it reports its errors as a ValueError."""
    with quiet():
        try:
            yield
        except OSError:
            raise
        except ValueError as error:
            code = _ERRNO.search(str(error))
            reason = os.strerror(int(code[1])) if code else " ".join(str(error).split())[:120]
            traceback.clear_frames(error.__traceback__)  # they hold other writes, which report when they are freed
            time.sleep(0.5)  # until those have failed as well
            gc.collect()
            raise OSError(int(code[1]) if code else 0, reason) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep off stderr what Orbax, which raises errors as well, and its abandoned tasks report of them."""
    logs, hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
    for log in logs:
        log.addFilter(_is_no_error)
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for log in logs:
            log.removeFilter(_is_no_error)


def _is_no_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


@contextmanager
def _readable(checkpoint: Path) -> Iterator[None]:
    try:
        with quiet():
            yield
    except Exception as error:  # of damaged files Orbax raises anything
        reason = " ".join(str(error).split())[:120]
        msg = f"{checkpoint}: is not a readable checkpoint of Orbax ({reason}): give a complete one"
        raise CheckpointError(msg) from error
