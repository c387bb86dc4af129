"""Write and read named arrays in a folder, with Orbax."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

_FOLDER = "arrays"
_FILE_BYTES = 16 * 2**20  # of one file, so that several threads can check the files of an entry

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def write_arrays(folder: Path, arrays: Mapping[str, jax.Array | np.ndarray]) -> Shapes:
    """Write arrays into the folder of an entry.

    Args:
        folder: of the entry.
        arrays: by name.

    Returns:
        name -> (dtype, shape), the argument of `read_arrays`.

    Raises:
        OSError: they cannot be written.
        ValueError: they cannot be written, as Orbax's storage reports it.
    """
    held = {name: np.asarray(array) for name, array in arrays.items()}
    # Orbax does not store arrays without elements; their shape is enough.
    full = {name: array for name, array in held.items() if array.size}
    if full:
        import orbax.checkpoint as ocp

        with _checkpointer() as checkpointer:
            checkpointer.save(
                (folder / _FOLDER).absolute(), args=ocp.args.PyTreeSave(full, ocdbt_target_data_file_size=_FILE_BYTES)
            )
    return _shapes(held)


def read_arrays(folder: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """Read the arrays that `write_arrays` wrote.

    Args:
        folder: of the entry.
        shapes: name -> (dtype, shape), from `write_arrays`.

    Raises:
        OSError: they cannot be read.
        ValueError: they cannot be read, as Orbax's storage reports it, or have other names, dtypes or shapes.
    """
    found = {name: np.zeros(shape, dtype) for name, (dtype, shape) in shapes.items() if 0 in shape}
    full = {name for name in shapes if name not in found}
    if full:
        import orbax.checkpoint as ocp

        wanted = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in full}
        with _checkpointer() as checkpointer:
            path = (folder / _FOLDER).absolute()
            found |= checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=wanted))
    if _shapes(found) != dict(shapes):
        msg = f"{folder}: the names, dtypes or shapes of its arrays differ from its manifest"
        raise ValueError(msg)
    return found


def _shapes(arrays: Mapping[str, np.ndarray]) -> Shapes:
    return {name: (array.dtype.name, array.shape) for name, array in arrays.items()}


def _checkpointer():
    import orbax.checkpoint as ocp

    # This process alone: of several that work together, not all reach this point.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    # Uncompressed: mantissas of singular vectors are noise, and zstd took three times as long to read.
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=True, use_compression=False, multiprocessing_options=alone
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)
