"""Tensors of a GGUF file in the Hugging Face convention, dequantised when read."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import ModuleType

import numpy as np

from jcrosslora.checkpoint.families import EMBEDDING
from jcrosslora.checkpoint.gguf_header import GGUFHeader, TensorInfo
from jcrosslora.checkpoint.gguf_metadata import gguf_vocabulary
from jcrosslora.checkpoint.mapped import MappedFile
from jcrosslora.checkpoint.safetensors import DTYPES
from jcrosslora.checkpoint.vocabulary import Vocabulary
from jcrosslora.errors import CheckpointError

_ROWS_AT_ONCE = 4096
# Types that numpy can hold; all others are dequantised to float32.
_NATIVE = {name: DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}


class GGUFStore:
    """The tensors of a GGUF file by their Hugging Face names.

    Two changes of llama.cpp's converter are undone: for Llama and families like it it reorders the rows of q and k for
    its rotary layout, and for Gemma and Nemotron it stores norms as 1 + weight.

    Args:
        file: the mapped file.
        header: its checked header.
        gguf: the gguf package.
        names: Hugging Face name -> GGUF name.
        heads: (query heads, key heads) if rows of q and k are reordered, else None.
        norm_offset: number added to every norm.
        stated: float32 tensors that the file states in its metadata, by Hugging Face name.
    """

    def __init__(
        self,
        file: MappedFile,
        header: GGUFHeader,
        gguf: ModuleType,
        names: Mapping[str, str],
        heads: tuple[int, int] | None,
        norm_offset: float,
        stated: Mapping[str, np.ndarray],
    ):
        self._file, self._header, self._gguf = file, header, gguf
        self._names, self._heads, self._norm_offset = names, heads, norm_offset
        self._stated = stated

    def _info(self, name: str) -> TensorInfo:
        if name not in self._names:
            msg = f"{self._file.path}: the file has no tensor for {name!r}"
            raise CheckpointError(msg)
        return self._header.tensors[self._names[name]]

    @property
    def files(self) -> tuple[Path, ...]:
        """The one file."""
        return (self._file.path,)

    def names(self) -> list[str]:
        """Hugging Face names, in file order, those of the metadata last."""
        return [*self._names, *self._stated]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._stated[name].shape if name in self._stated else self._info(name).shape

    def dtype(self, name: str) -> str:
        """The ggml type, e.g. "Q4_K"."""
        if name in self._stated:
            return "F32"
        return self._gguf.GGMLQuantizationType(self._info(name).kind).name

    def tensor(self, name: str) -> np.ndarray:
        """Read a tensor: a view of a float type, a float32 or reordered copy of others."""
        return self._stated[name] if name in self._stated else self._read(name, self._row_order(name))

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Read and dequantise only these rows of a matrix or of a stack of them, as float32 (n, columns)."""
        order = self._row_order(name)
        places = ids if order is None else order[ids]
        out = np.empty((len(ids), self.shape(name)[-1]), np.float32)
        # In pieces, because dequantising takes several times the memory of its result.
        for start in range(0, len(ids), _ROWS_AT_ONCE):
            piece = slice(start, start + _ROWS_AT_ONCE)
            out[piece] = self._read(name, places[piece])
        return out

    def _read(self, name: str, rows: np.ndarray | None) -> np.ndarray:
        info = self._info(name)
        stored = stored_rows(self._file, info, self._gguf)
        stored = stored.reshape(-1, stored.shape[-1]) if rows is not None and stored.ndim > 2 else stored
        array = to_float(stored if rows is None else stored[rows], info.kind, self._gguf)
        if self._norm_offset and name.endswith("norm.weight"):
            return array.astype(np.float32) - np.float32(self._norm_offset)
        return array

    def _row_order(self, name: str) -> np.ndarray | None:
        if self._heads is None or ".self_attn." not in name:
            return None
        module = name.split(".")[-2]
        heads = {"q_proj": self._heads[0], "k_proj": self._heads[1]}.get(module)
        return None if heads is None else unpermuted_rows(self._info(name).shape[0], heads)

    def vocabulary(self) -> Vocabulary:
        """Return the tokens of the metadata."""
        return gguf_vocabulary(self._header.metadata, self.shape(EMBEDDING)[0])

    def release(self) -> None:
        """Give the resident pages back to the system."""
        self._file.release()

    def sha256s(self) -> list[str]:
        """Hex digest of the file."""
        return [self._file.sha256()]


def unpermuted_rows(rows: int, heads: int) -> np.ndarray:
    """Return the row of the GGUF file for each row in Hugging Face order.

    Within a head of size D, Hugging Face pairs row j with row j + D/2 for the rotation; GGUF stores each pair at rows
    2j and 2j + 1.

    Args:
        rows: number of rows of the matrix, a multiple of 2 * heads.
        heads: number of heads.

    Returns:
        (rows,) integers.
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)


def stored_rows(file: MappedFile, info: TensorInfo, gguf: ModuleType) -> np.ndarray:
    """Return a tensor as stored: (..., columns) in its dtype, or (..., bytes of a row) for block types."""
    native = _NATIVE.get(gguf.GGMLQuantizationType(info.kind).name)
    if native is not None:
        return file.array(native, info.shape, info.start)
    elements, size = gguf.GGML_QUANT_SIZES[info.kind]
    return file.array(np.uint8, (*info.shape[:-1], info.shape[-1] // elements * size), info.start)


def float_type(kind: int, gguf: ModuleType) -> str:
    """Return the name of the dtype of `to_float` for a ggml type: itself if numpy can hold it, else F32."""
    name = gguf.GGMLQuantizationType(kind).name
    return name if name in _NATIVE else "F32"


def to_float(stored: np.ndarray, kind: int, gguf: ModuleType, path: Path | None = None) -> np.ndarray:
    """Dequantise rows from `stored_rows` to float32; types that numpy can hold are returned as they are.

    Args:
        stored: (..., columns or bytes).
        kind: number of the ggml type.
        gguf: the gguf package.
        path: the file, for the error.

    Raises:
        CheckpointError: the package cannot dequantise the type.
    """
    quant = gguf.GGMLQuantizationType(kind)
    if quant.name in _NATIVE:
        return stored
    if prod(stored.shape) == 0:
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        return np.empty((*stored.shape[:-1], stored.shape[-1] // size * elements), np.float32)
    try:
        # Callers check weights for NaN and infinity.
        with np.errstate(over="ignore", invalid="ignore"):
            return gguf.quants.dequantize(np.ascontiguousarray(stored), quant)
    except NotImplementedError as error:
        msg = f"{path}: ggml type {quant.name} cannot be dequantised by the gguf package: use another quantisation"
        raise CheckpointError(msg) from error
