"""Tensors of a GGUF file in the Hugging Face convention: row order of q and k, norm offsets, dequantised on demand."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np

from jcrosslora.checkpoint.families import EMBEDDING
from jcrosslora.checkpoint.gguf_header import GGUFHeader, TensorInfo
from jcrosslora.checkpoint.gguf_vocabulary import gguf_vocabulary
from jcrosslora.checkpoint.mapped import MappedFile
from jcrosslora.checkpoint.vocabulary import Vocabulary
from jcrosslora.errors import CheckpointError

_ROWS_AT_ONCE = 4096
# Types that numpy holds as they are; every other type is dequantised to float32.
_NATIVE = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class GGUFStore:
    """The tensors of a GGUF file by their Hugging Face names.

    llama.cpp's converter changes two things, which are undone here: for architecture "llama" the rows of q and k are
    reordered for its rotary layout, and for Gemma every norm is stored as 1 + weight.

    Args:
        file: the mapped file.
        header: its checked header.
        gguf: the gguf package.
        names: Hugging Face name -> GGUF name.
        heads: (query heads, key heads) where rows of q and k were reordered, else None.
        norm_offset: what was added to every norm.
    """

    def __init__(
        self,
        file: MappedFile,
        header: GGUFHeader,
        gguf: ModuleType,
        names: Mapping[str, str],
        heads: tuple[int, int] | None,
        norm_offset: float,
    ):
        self._file, self._header, self._gguf = file, header, gguf
        self._names, self._heads, self._norm_offset = names, heads, norm_offset

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
        """Hugging Face names, in file order."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._info(name).shape

    def dtype(self, name: str) -> str:
        """Name of the ggml type, e.g. "Q4_K"."""
        return self._gguf.GGMLQuantizationType(self._info(name).kind).name

    def tensor(self, name: str) -> np.ndarray:
        """A view for float types stored as they are; otherwise a float32 or reordered copy."""
        return self._read(name, self._row_order(name))

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """float32 (n, columns): only these rows are dequantised."""
        order = self._row_order(name)
        places = ids if order is None else order[ids]
        out = np.empty((len(ids), self.shape(name)[1]), np.float32)
        # In pieces, because dequantising needs several times the memory of its result.
        for start in range(0, len(ids), _ROWS_AT_ONCE):
            piece = slice(start, start + _ROWS_AT_ONCE)
            out[piece] = self._read(name, places[piece])
        return out

    def _read(self, name: str, rows: np.ndarray | None) -> np.ndarray:
        info = self._info(name)
        stored = stored_rows(self._file, info, self._gguf)
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
        """The tokens, from the metadata."""
        return gguf_vocabulary(self._header.metadata, self.shape(EMBEDDING)[0])

    def release(self) -> None:
        """Give resident pages back."""
        self._file.release()

    def sha256s(self) -> list[str]:
        """Hex digest of the file."""
        return [self._file.sha256()]


def unpermuted_rows(rows: int, heads: int) -> np.ndarray:
    """For each row of the Hugging Face order, the row of the GGUF file that holds it.

    Within a head of size D, Hugging Face pairs row j with row j + D/2 for the rotation; GGUF puts each pair side by
    side, at rows 2j and 2j + 1.

    Args:
        rows: rows of the matrix, a multiple of 2 * heads.
        heads: number of heads.

    Returns:
        (rows,) integers.
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)


def stored_rows(file: MappedFile, info: TensorInfo, gguf: ModuleType) -> np.ndarray:
    """The tensor as stored: (..., columns) in its dtype, or (..., bytes of a row) for block types."""
    native = _NATIVE.get(gguf.GGMLQuantizationType(info.kind).name)
    if native is not None:
        return file.array(native, info.shape, info.start)
    elements, size = gguf.GGML_QUANT_SIZES[info.kind]
    return file.array(np.uint8, (*info.shape[:-1], info.shape[-1] // elements * size), info.start)


def float_type(kind: int, gguf: ModuleType) -> str:
    """Name of the type that `to_float` gives for a ggml type: itself if numpy holds it, else F32."""
    name = gguf.GGMLQuantizationType(kind).name
    return name if name in _NATIVE else "F32"


def to_float(stored: np.ndarray, kind: int, gguf: ModuleType, path: Path | None = None) -> np.ndarray:
    """Rows as `stored_rows` gives them, dequantised to float32; types that numpy holds stay as they are.

    Args:
        stored: (..., columns or bytes).
        kind: number of the ggml type.
        gguf: the gguf package.
        path: named in the error.

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
        # Whoever uses a weight refuses NaN and infinity, and says where they are.
        with np.errstate(over="ignore", invalid="ignore"):
            return gguf.quants.dequantize(np.ascontiguousarray(stored), quant)
    except NotImplementedError as error:
        msg = f"{path}: ggml type {quant.name} cannot be dequantised by the gguf package: use another quantisation"
        raise CheckpointError(msg) from error
