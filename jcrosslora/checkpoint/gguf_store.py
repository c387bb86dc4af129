"""Tensors of a GGUF file in the Hugging Face convention, dequantised when read."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import ModuleType

import numpy as np

from jcrosslora.architectures.names import EMBEDDING
from jcrosslora.checkpoint.gguf_header import GGUFHeader, TensorInfo
from jcrosslora.checkpoint.gguf_metadata import gguf_vocabulary
from jcrosslora.checkpoint.gguf_tensors import Source
from jcrosslora.checkpoint.safetensors import DTYPES
from jcrosslora.checkpoint.store import MappedFile
from jcrosslora.checkpoint.vocabulary import Vocabulary
from jcrosslora.errors import CheckpointError

_ROWS_AT_ONCE = 4096
# Types that numpy can hold; all others are dequantised to float32.
_NATIVE = {name: DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}


class GGUFStore:
    """The tensors of a GGUF file by their Hugging Face names, with the changes of llama.cpp's converter undone.

    Args:
        file: the mapped file.
        header: its checked header.
        gguf: the gguf package.
        sources: where each tensor is, by Hugging Face name.
        stated: float32 tensors that the file states in its metadata, by Hugging Face name.
    """

    def __init__(
        self,
        file: MappedFile,
        header: GGUFHeader,
        gguf: ModuleType,
        sources: Mapping[str, Source],
        stated: Mapping[str, np.ndarray],
    ):
        self._file, self._header, self._gguf = file, header, gguf
        self._sources, self._stated = sources, stated

    def _source(self, name: str) -> Source:
        if name not in self._sources:
            msg = f"{self._file.path}: the file has no tensor for {name!r}"
            raise CheckpointError(msg)
        return self._sources[name]

    @property
    def files(self) -> tuple[Path, ...]:
        """The one file."""
        return (self._file.path,)

    def names(self) -> list[str]:
        """Hugging Face names, in file order, those of the metadata last."""
        return [*self._sources, *self._stated]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._stated[name].shape if name in self._stated else self._source(name).shape

    def dtype(self, name: str) -> str:
        """The ggml type, e.g. "Q4_K"."""
        if name in self._stated:
            return "F32"
        return self._gguf.GGMLQuantizationType(self._header.tensors[self._source(name).stored[0]].kind).name

    def tensor(self, name: str) -> np.ndarray:
        """Read a tensor: a view of a float type, a float32 or reordered copy of others."""
        if name in self._stated:
            return self._stated[name]
        source = self._source(name)
        if source.form == "latent":
            return self._latent(source)
        arrays = [self._read(stored, None) for stored in source.stored]
        array = arrays[0] if len(arrays) == 1 else np.concatenate([one.astype(np.float32) for one in arrays])
        if source.form == "log":
            with np.errstate(divide="ignore", invalid="ignore"):  # Callers check weights for NaN and infinity.
                array = np.log(-array.astype(np.float32).reshape(-1))
        if source.rows is not None:
            array = array[source.rows]
        if source.columns is not None:
            array = array[:, source.columns]
        if source.offset:
            return array.astype(np.float32) - np.float32(source.offset)
        return array.reshape(source.shape)

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Read and dequantise only these rows of a matrix or of a stack of them, as float32 (n, columns)."""
        if name in self._stated or self._source(name).form is not None:
            return self.tensor(name)[ids].astype(np.float32)
        source = self._source(name)
        places = ids if source.rows is None else source.rows[ids]
        out = np.empty((len(ids), source.shape[-1]), np.float32)
        # In pieces, because dequantising takes several times the memory of its result.
        for start in range(0, len(ids), _ROWS_AT_ONCE):
            piece = slice(start, start + _ROWS_AT_ONCE)
            found = self._rows_of(source, places[piece])
            out[piece] = found if source.columns is None else found[:, source.columns]
        return out

    def _rows_of(self, source: Source, places: np.ndarray) -> np.ndarray:
        if len(source.stored) == 1:
            return self._read(source.stored[0], places)
        out, first = np.empty((len(places), source.shape[-1]), np.float32), 0
        for stored in source.stored:
            count = self._header.tensors[stored].shape[0]
            here = (places >= first) & (places < first + count)
            out[here] = self._read(stored, places[here] - first)
            first += count
        return out

    def _latent(self, source: Source) -> np.ndarray:
        keys, values = (self._read(stored, None).astype(np.float32) for stored in source.stored)
        return np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(source.shape)

    def _read(self, stored: str, rows: np.ndarray | None) -> np.ndarray:
        info = self._header.tensors[stored]
        array = stored_rows(self._file, info, self._gguf)
        array = array.reshape(-1, array.shape[-1]) if rows is not None and array.ndim > 2 else array
        return to_float(array if rows is None else array[rows], info.kind, self._gguf)

    def vocabulary(self) -> Vocabulary:
        """Return the tokens of the metadata."""
        return gguf_vocabulary(self._header.metadata, self.shape(EMBEDDING)[0])

    def release(self) -> None:
        """Give the resident pages back to the system."""
        self._file.release()

    def sha256s(self) -> list[str]:
        """Hex digest of the file."""
        return [self._file.sha256()]


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
