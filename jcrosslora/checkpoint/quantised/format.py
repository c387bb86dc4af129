"""A format of quantised weights: how to recognise it, and how to open a weight from its checked tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from jcrosslora.checkpoint.store import TensorStore
from jcrosslora.errors import CheckpointError

Settings = Mapping[str, Any]  # the quantization_config of a config.json, {} if there is none
FLOATS = ("F32", "F16", "BF16", "F64")
WORD = 32  # bits


class Parts:
    """The tensors of one module."""

    def __init__(self, store: TensorStore, names: frozenset[str], module: str, where: str):
        self._store, self._names = store, names
        self.module, self.where = module, where

    def __contains__(self, ending: str) -> bool:
        return self.module + ending in self._names

    def dtype(self, ending: str) -> str:
        """Return the storage dtype of an existing part."""
        return self._store.dtype(self.module + ending)

    def array(self, ending: str, dtypes: tuple[str, ...], ndim: int | None = None) -> np.ndarray:
        """Read the part that has the module's name with this ending.

        Raises CheckpointError if it is missing, or has another dtype or number of dimensions.
        """
        name = self.module + ending
        if name not in self._names:
            self.refuse(f"tensor {name!r} is missing")
        dtype, shape = self._store.dtype(name), self._store.shape(name)
        if dtype not in dtypes:
            self.refuse(f"tensor {name!r} has dtype {dtype}, expected {' or '.join(dtypes)}")
        if ndim is not None and len(shape) != ndim:
            self.refuse(f"tensor {name!r} has shape {list(shape)}, expected {ndim} dimensions")
        return self._store.tensor(name)

    def matrix(self, ending: str, *dtypes: str) -> np.ndarray:
        """Read a part of two dimensions, see `array`."""
        return self.array(ending, dtypes, 2)

    def even_groups(self, inputs: int, groups: int) -> np.ndarray:
        """Return the group of each input (I,) for groups of equal size in order; refuse inputs that do not split."""
        if groups == 0 or inputs % groups:
            self.refuse(f"{inputs} inputs do not split into {groups} groups of scales")
        return np.arange(inputs) // max(inputs // groups, 1)

    def listed_groups(self, ending: str, inputs: int, groups: int) -> np.ndarray:
        """Return the group of each input (I,), as listed in a part; refuse a list with wrong length or groups."""
        listed = self.array(ending, ("I32", "I64"), 1)
        if listed.shape != (inputs,) or (inputs and not 0 <= int(listed.min()) <= int(listed.max()) < groups):
            self.refuse(f"{ending.lstrip('.')} does not name one of {groups} groups for each of {inputs} inputs")
        return listed.astype(np.int64)

    def refuse(self, what: str) -> NoReturn:
        """Raise a `CheckpointError` with the reason why the weight cannot be read."""
        msg = f"{self.where}: the quantised weight of {self.module} cannot be read: {what}; download it again, or use "
        raise CheckpointError(msg + "the unquantised checkpoint")


@dataclass(frozen=True)
class Packed:
    """One quantised matrix, or a stack of them, whose parts are checked to fit together.

    Attributes:
        shape: (O, I), or (E, O, I).
        dtype: storage dtype for reports, e.g. "NF4" or "F8_E4M3".
        rows: dequantises rows: (n,) row numbers, which count through all matrices -> float32 (n, I).
    """

    shape: tuple[int, ...]
    dtype: str
    rows: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Format:
    """One format of quantised weights.

    Attributes:
        methods: values of `quant_method` that may stand for this format.
        open: opens one weight; None if its tensors are not in this format.
        holder: suffix of the tensor that holds the numbers of a module, e.g. ".qweight".
        parts: suffixes of tensors that belong to a quantised weight and are no tensors of the model.
        marks: suffixes that only this format has and that identify it without settings; if empty, settings are needed.
        obstacle: why a checkpoint with settings of this format cannot be read, None if it can.
        ending: suffix that replaces `holder` in the name of the weight.
    """

    name: str
    methods: tuple[str, ...]
    open: Callable[[Parts, Settings], Packed | None]
    holder: str
    parts: tuple[str, ...]
    marks: tuple[str, ...] = ()
    obstacle: Callable[[Settings], str | None] = lambda _: None
    ending: str = ".weight"

    def claims(self, settings: Settings) -> bool:
        """Whether the settings name this format."""
        return settings.get("quant_method") in self.methods


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Unpack `count` numbers of 1 to 8 bits along the last axis; a number may span two words, as with 3 bits.

    From integers of 32 bits (..., W), with W * 32 >= count * bits, to uint8 (..., count).
    """
    words = np.ascontiguousarray(words).view(np.uint32)
    if WORD % bits == 0:
        shifts = np.arange(0, WORD, bits, dtype=np.uint32)
        numbers = (words[..., None] >> shifts) & np.uint32(2**bits - 1)
        return numbers.astype(np.uint8).reshape(*words.shape[:-1], -1)[..., :count]
    first = np.arange(count) * bits
    place, shift = first // WORD, (first % WORD).astype(np.uint64)
    wide = np.concatenate([words, np.zeros_like(words[..., :1])], axis=-1).astype(np.uint64)
    numbers = wide[..., place] >> shift | wide[..., place + 1] << (np.uint64(WORD) - shift)
    return (numbers & np.uint64(2**bits - 1)).astype(np.uint8)


Rows = Callable[[np.ndarray], np.ndarray]


def scale_rows(values: np.ndarray, shape: tuple[int, int], block: tuple[int, int] | None = None) -> Rows | None:
    """Return a function that gives the scales of rows.

    Args:
        values: one number, (O,), (O, 1), or (ceil(O / block rows), ceil(I / block columns)).
        shape: (O, I) of the matrix.
        block: rows and columns of a block; the default is the ratio of the shapes.

    Returns:
        A function (n,) row numbers -> float32 that broadcasts to (n, I); None if the values fit none of these layouts.
    """
    if values.size == 1:
        return lambda _: values.reshape(1, 1).astype(np.float32)
    if values.shape in ((shape[0],), (shape[0], 1)):
        return lambda ids: values.reshape(-1, 1)[ids].astype(np.float32)
    size = (block or _ratio(shape, values.shape)) if values.ndim == 2 else None
    if size is None or values.shape != tuple(-(-n // step) for n, step in zip(shape, size, strict=True)):
        return None
    rows, columns = size[0], np.arange(shape[1]) // size[1]
    # Converted on demand: float32 scales of small groups, kept for a whole model, take an eighth of a byte per number.
    return lambda ids: values[ids // rows].astype(np.float32)[:, columns]


def _ratio(shape: tuple[int, int], blocks: tuple[int, ...]) -> tuple[int, int] | None:
    if any(count == 0 or n % count for n, count in zip(shape, blocks, strict=True)):
        return None
    return max(shape[0] // blocks[0], 1), max(shape[1] // blocks[1], 1)
