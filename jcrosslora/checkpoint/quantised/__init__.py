"""Quantised weights: choose the formats of a checkpoint, and dequantise its tensors to float32 when they are read."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from math import prod
from typing import Any

import numpy as np

from jcrosslora.checkpoint.quantised.format import Format, Packed, Parts, Settings
from jcrosslora.checkpoint.quantised.integers import AWQ, BITSANDBYTES4, BITSANDBYTES8, GPTQ
from jcrosslora.checkpoint.quantised.scaled import DTYPES as FP8_DTYPES
from jcrosslora.checkpoint.quantised.scaled import FP8, INT8, MXFP4, PACK_QUANTIZED
from jcrosslora.checkpoint.store import TensorStore
from jcrosslora.errors import CheckpointError

# A checkpoint may mix the formats that claim its settings; the first that recognises the tensors of a weight opens it.
FORMATS: tuple[Format, ...] = (BITSANDBYTES4, BITSANDBYTES8, GPTQ, AWQ, PACK_QUANTIZED, FP8, INT8, MXFP4)


def settings_of(config: Mapping[str, Any]) -> Settings:
    """Return the `quantization_config` of a configuration, {} without one; a string is taken as the method."""
    settings = config.get("quantization_config") or config.get("compression_config") or {}
    return settings if isinstance(settings, dict) else {"quant_method": settings}


def check_quantization(config: Mapping[str, Any]) -> None:
    """Refuse a quantised checkpoint that no format can read, by name.

    Raises CheckpointError for an unknown quantisation, or an unsupported variant.
    """
    settings = settings_of(config)
    if not settings:
        return
    claiming = [form for form in FORMATS if form.claims(settings)]
    reasons = (form.obstacle(settings) for form in claiming)
    reason = next((reason for reason in reasons if reason is not None), None)
    if claiming and reason is None:
        return
    known = ", ".join(form.name for form in FORMATS)
    raise CheckpointError(
        f"weights quantised with {str(settings.get('quant_method'))[:60]!r} are not supported"
        f"{f' where {reason}' if reason else ''} (supported: {known}): use the unquantised checkpoint, or one in GGUF"
    )


_NUMBERS_AT_ONCE = 1 << 20  # dequantising takes several times the memory of its result


def dequantised(store: TensorStore, config: Mapping[str, Any], where: str) -> TensorStore:
    """Wrap a store of quantised weights in one that dequantises them; return any other store unchanged.

    The formats that may occur follow from the settings, or from the tensors where there are none. The configuration has
    passed `check_quantization`.

    Raises CheckpointError for packed tensors that cannot be read without settings in the configuration.
    """
    settings, names = settings_of(config), store.names()
    if settings:
        formats = [form for form in FORMATS if form.claims(settings)]
    elif (packed := next((name for name in names if name.endswith((GPTQ.holder, AWQ.holder))), None)) is not None:
        raise CheckpointError(
            f"{where}: tensor {packed!r} is packed as GPTQ and AWQ do, but config.json has no quantization_config: "
            "copy that of the model's page, or the content of quantize_config.json, into it"
        )
    else:
        formats = [form for form in FORMATS if form.marks and any(name.endswith(form.marks) for name in names)]
    return QuantisedStore(store, formats, settings, where) if formats else store


class QuantisedStore(TensorStore):
    """Dequantised weights; the parts of quantised weights are not among its tensors."""

    def __init__(self, store: TensorStore, formats: Sequence[Format], settings: Settings, where: str):
        self._store, self._formats, self._settings, self._where = store, formats, settings, where
        self._stored = frozenset(store.names())
        self.advice, self.files = store.advice, store.files
        self._packed: dict[str, Packed | None] = {}

    def names(self) -> list[str]:
        """Names of the tensors; a quantised weight takes the place of the tensor that holds its numbers."""
        holders = {form.holder: form.ending for form in self._formats}
        parts = tuple(part for form in self._formats for part in form.parts)
        names = []
        for name in self._store.names():
            if (holder := next(filter(name.endswith, holders), None)) is not None:
                names.append(name.removesuffix(holder) + holders[holder])
            elif not name.endswith(parts):
                names.append(name)
        return names

    def shape(self, name: str) -> tuple[int, ...]:
        packed = self._open(name)
        return self._store.shape(name) if packed is None else packed.shape

    def dtype(self, name: str) -> str:
        """Storage dtype, e.g. "BF16", "NF4" or "GPTQ 4-bit"."""
        packed = self._open(name)
        return self._store.dtype(name) if packed is None else packed.dtype

    def tensor(self, name: str) -> np.ndarray:
        """Read a tensor: float32 if it is quantised, else a read-only view in the stored dtype.

        Raises CheckpointError if there is no such tensor, or the parts of a quantised weight do not fit together.
        """
        packed = self._open(name)
        if packed is None:
            return self._store.tensor(name)
        return _dequantise(packed, np.arange(prod(packed.shape[:-1]))).reshape(packed.shape)

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        packed = self._open(name)
        return self._store.rows(name, ids) if packed is None else _dequantise(packed, ids)

    def release(self) -> None:
        self._store.release()

    def sha256s(self) -> list[str]:
        return self._store.sha256s()

    def _open(self, name: str) -> Packed | None:
        if name not in self._packed:
            self._packed[name] = self._opened(name)
        return self._packed[name]

    def _opened(self, name: str) -> Packed | None:
        formats = [form for form in self._formats if name.endswith(form.ending)]
        found = None
        if formats:
            parts = Parts(self._store, self._stored, name.removesuffix(formats[0].ending), self._where)
            with _quiet():
                candidates = (form.open(parts, self._settings) for form in formats)
                found = next((packed for packed in candidates if packed is not None), None)
        if found is None and self._settings and name in self._stored and self._store.dtype(name) in FP8_DTYPES:
            msg = f"{self._where}: {name!r} is FP8, and has no scale that a supported format describes: use "
            raise CheckpointError(msg + "the unquantised checkpoint")
        return found


def _dequantise(packed: Packed, ids: np.ndarray) -> np.ndarray:
    out = np.empty((len(ids), packed.shape[-1]), np.float32)
    step = max(_NUMBERS_AT_ONCE // max(packed.shape[-1], 1), 1)
    with _quiet():
        for start in range(0, len(ids), step):
            piece = slice(start, start + step)
            out[piece] = packed.rows(ids[piece])
    return out


def _quiet() -> AbstractContextManager[None]:
    # Callers check weights for NaN and infinity.
    return np.errstate(over="ignore", invalid="ignore")
