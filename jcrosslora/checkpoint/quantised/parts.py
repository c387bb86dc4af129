"""The tensors of one quantised weight, checked when read."""

from typing import NoReturn

import numpy as np

from jcrosslora.checkpoint.store import TensorStore
from jcrosslora.errors import CheckpointError

FLOATS = ("F32", "F16", "BF16", "F64")


class Parts:
    """The tensors of one module.

    Args:
        store: the tensors as stored.
        names: their names.
        module: e.g. "model.layers.0.self_attn.q_proj".
        where: the folder or base, for errors.
    """

    def __init__(self, store: TensorStore, names: frozenset[str], module: str, where: str):
        self._store, self._names = store, names
        self.module, self.where = module, where

    def __contains__(self, ending: str) -> bool:
        return self.module + ending in self._names

    def dtype(self, ending: str) -> str:
        """Return the storage dtype of an existing part."""
        return self._store.dtype(self.module + ending)

    def array(self, ending: str, dtypes: tuple[str, ...], ndim: int | None = None) -> np.ndarray:
        """Read a part.

        Args:
            ending: its suffix to the name of the module.
            dtypes: accepted dtypes.
            ndim: required number of dimensions, None for any.

        Raises:
            CheckpointError: it is missing, or has another dtype or number of dimensions.
        """
        name = self.module + ending
        if name not in self._names:
            self.refuse(f"tensor {name!r} is missing")
        dtype, shape = self._store.dtype(name), self._store.shape(name)
        if dtype not in dtypes:
            self.refuse(f"tensor {name!r} has dtype {dtype}, wanted {' or '.join(dtypes)}")
        if ndim is not None and len(shape) != ndim:
            self.refuse(f"tensor {name!r} has shape {list(shape)}, wanted {ndim} dimensions")
        return self._store.tensor(name)

    def matrix(self, ending: str, *dtypes: str) -> np.ndarray:
        """Read a part of two dimensions, see `array`."""
        return self.array(ending, dtypes, 2)

    def refuse(self, what: str) -> NoReturn:
        """Refuse the weight.

        Raises:
            CheckpointError: always, with the reason `what`.
        """
        msg = f"{self.where}: the quantised weight of {self.module} cannot be read: {what}"
        msg += "; download it again, or use the unquantised checkpoint"
        raise CheckpointError(msg)


def group_of_each(parts: Parts, inputs: int, groups: int) -> np.ndarray:
    """Return the group of each input (I,), for groups of equal size in order.

    Raises:
        CheckpointError: the inputs do not split evenly.
    """
    if groups == 0 or inputs % groups:
        parts.refuse(f"{inputs} inputs do not split into {groups} groups of scales")
    return np.arange(inputs) // max(inputs // groups, 1)


def checked_groups(parts: Parts, ending: str, inputs: int, groups: int) -> np.ndarray:
    """Return the group of each input (I,) from the list in part `ending`.

    Raises:
        CheckpointError: not one entry per input, or a group that does not exist.
    """
    listed = parts.array(ending, ("I32", "I64"), 1)
    if listed.shape != (inputs,) or (inputs and not 0 <= int(listed.min()) <= int(listed.max()) < groups):
        parts.refuse(f"{ending.lstrip('.')} does not name one of {groups} groups for each of {inputs} inputs")
    return listed.astype(np.int64)
