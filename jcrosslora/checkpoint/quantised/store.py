"""The tensors of a checkpoint with quantised weights, as if they were not: dequantised to float32 on demand."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.checkpoint.quantised.format import Format, Packed
from jcrosslora.checkpoint.quantised.parts import Parts
from jcrosslora.checkpoint.quantised.registry import formats_in, settings_of
from jcrosslora.checkpoint.store import TensorStore

_WEIGHT = ".weight"
_NUMBERS_AT_ONCE = 1 << 20  # Dequantising needs several times the memory of its result.


def with_weights(store: TensorStore, config: Mapping[str, Any], where: str) -> TensorStore:
    """The store itself, or one that dequantises its weights if it holds quantised ones.

    Args:
        store: the tensors as they are stored.
        config: the model's configuration, checked by `check_quantization`.
        where: the folder, named in errors.

    Raises:
        CheckpointError: tensors that are packed in a way that the configuration should tell, and does not.
    """
    formats = formats_in(config, store.names(), where)
    return QuantisedStore(store, formats, config, where) if formats else store


class QuantisedStore:
    """Tensors by their Hugging Face names; the parts of quantised weights are not among them.

    Args:
        store: the tensors as they are stored.
        formats: those that may occur.
        config: the model's configuration.
        where: the folder, named in errors.
    """

    def __init__(self, store: TensorStore, formats: tuple[Format, ...], config: Mapping[str, Any], where: str):
        self._store, self._formats, self._where = store, formats, where
        self._settings = settings_of(config)
        self._stored = frozenset(store.names())
        self._packed: dict[str, Packed | None] = {}

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, in index order."""
        return self._store.files

    def names(self) -> list[str]:
        """Names of the tensors, each quantised weight in the place of the tensor that holds its numbers."""
        holders = tuple(form.holder for form in self._formats if form.holder != _WEIGHT)
        parts = tuple(part for form in self._formats for part in form.parts)
        names = []
        for name in self._store.names():
            if name.endswith(holders):
                names.append(name[: name.rindex(".")] + _WEIGHT)
            elif not name.endswith(parts):
                names.append(name)
        return names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        packed = self._open(name)
        return self._store.shape(name) if packed is None else packed.shape

    def dtype(self, name: str) -> str:
        """Storage dtype, e.g. "BF16", "NF4" or "GPTQ 4-bit"."""
        packed = self._open(name)
        return self._store.dtype(name) if packed is None else packed.dtype

    def tensor(self, name: str) -> np.ndarray:
        """float32 of a quantised weight, else a view in the stored dtype.

        Raises:
            CheckpointError: no such tensor, or parts of a weight that do not fit together.
        """
        packed = self._open(name)
        return self._store.tensor(name) if packed is None else _dequantise(packed, np.arange(packed.shape[0]))

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """float32 (n, columns): only these rows are dequantised."""
        packed = self._open(name)
        return self._store.rows(name, ids) if packed is None else _dequantise(packed, ids)

    def release(self) -> None:
        """Give resident pages back."""
        self._store.release()

    def sha256s(self) -> list[str]:
        """Hex digests of `files`, in their order."""
        return self._store.sha256s()

    def _open(self, name: str) -> Packed | None:
        if name not in self._packed:
            self._packed[name] = self._opened(name) if name.endswith(_WEIGHT) else None
        return self._packed[name]

    def _opened(self, name: str) -> Packed | None:
        parts = Parts(self._store, self._stored, name.removesuffix(_WEIGHT), self._where)
        with _quiet():
            candidates = (form.open(parts, self._settings) for form in self._formats)
            return next((packed for packed in candidates if packed is not None), None)


def _dequantise(packed: Packed, ids: np.ndarray) -> np.ndarray:
    out = np.empty((len(ids), packed.shape[1]), np.float32)
    step = max(_NUMBERS_AT_ONCE // max(packed.shape[1], 1), 1)
    with _quiet():
        for start in range(0, len(ids), step):
            piece = slice(start, start + step)
            out[piece] = packed.rows(ids[piece])
    return out


def _quiet() -> AbstractContextManager[None]:
    # Whoever uses a weight refuses NaN and infinity, and says where they are.
    return np.errstate(over="ignore", invalid="ignore")
