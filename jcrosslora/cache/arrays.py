"""Named arrays in a folder, by Orbax."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

_FOLDER = "arrays"
# Of one file, so that several threads can check an entry's.
_FILE_BYTES = 16 * 2**20


def write_arrays(folder: Path, arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Write arrays into an entry's folder.

    Args:
        folder: of the entry.
        arrays: by name.

    Returns:
        name -> (dtype, shape), which `read_arrays` asks for.

    Raises:
        OSError: it cannot be written.
        ValueError: likewise, as Orbax's storage reports it.
    """
    held = {name: np.asarray(array) for name, array in arrays.items()}
    # Orbax does not store arrays without elements: they are known by their shape.
    full = {name: array for name, array in held.items() if array.size}
    if full:
        import orbax.checkpoint as ocp

        with _checkpointer() as checkpointer:
            checkpointer.save(
                (folder / _FOLDER).absolute(), args=ocp.args.PyTreeSave(full, ocdbt_target_data_file_size=_FILE_BYTES)
            )
    return {name: (array.dtype.name, array.shape) for name, array in held.items()}


def read_arrays(folder: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """Read what `write_arrays` wrote.

    Args:
        folder: of the entry.
        shapes: name -> (dtype, shape), as it was returned.

    Raises:
        OSError: it cannot be read.
        ValueError: likewise, as Orbax's storage reports it, or another dtype or shape.
    """
    found = {name: np.zeros(shape, dtype) for name, (dtype, shape) in shapes.items() if 0 in shape}
    full = {name for name in shapes if name not in found}
    if full:
        import orbax.checkpoint as ocp

        wanted = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in full}
        with _checkpointer() as checkpointer:
            path = (folder / _FOLDER).absolute()
            found |= checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=wanted))
    if {name: (array.dtype.name, array.shape) for name, array in found.items()} != dict(shapes):
        msg = f"{folder}: holds arrays of other names, dtypes or shapes than its manifest says"
        raise ValueError(msg)
    return found


def _checkpointer():
    import orbax.checkpoint as ocp

    # This process alone, also where several work together, for these are not all at this point.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    # Uncompressed: the mantissas of singular vectors are noise, and zstd took three times as long to read.
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=True, use_compression=False, multiprocessing_options=alone
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)
