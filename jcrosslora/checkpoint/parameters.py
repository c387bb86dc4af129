"""The tensors of a model of tunix, read from its parameters on demand, and those that qwix quantised dequantised.

qwix replaces a parameter W by `array.qvalue`, of the shape of W, `array.scale`, and perhaps `array.zero_point`: W is
(qvalue - zero_point) * scale, with one scale for each tile. The numbers of NF4, stored as uint4, are indices into a
table.

Source: qwix 0.1.8, core/qarray.py and core/numerics.py.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jcrosslora.architectures import Family
from jcrosslora.checkpoint.in_memory import DTYPE_CODES, content_digest
from jcrosslora.checkpoint.store import MappedFile
from jcrosslora.checkpoint.tunix import LORA_FACTOR, Source, find_sources
from jcrosslora.errors import CheckpointError

_MARK = ".array."
_RANDOM = "qwix_rngs."  # states of random generators, for dropout
_QVALUE, _SCALE, _ZERO = "qvalue", "scale", "zero_point"
# dtype of qvalue -> what it is called in reports
_FORMATS = {"int4": "INT4", "int8": "INT8", "uint4": "NF4", "float4_e2m1fn": "FP4", "float8_e4m3fn": "F8_E4M3"}
_NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


@dataclass(frozen=True)
class Arrays:
    """Arrays by their keys, joined by dots.

    Attributes:
        kinds: the shape and dtype of each, as attributes.
        read: reads those of some names.
        files: that hold them; none in memory.
    """

    kinds: Mapping[str, Any]
    read: Callable[[Collection[str]], dict[str, np.ndarray]]
    files: tuple[Path, ...] = ()


def live_arrays(tree: Mapping[str, Any]) -> Arrays:
    """Take arrays that a program holds, on any device; they are brought to the host when they are read."""
    kinds = {name: array for name, array in tree.items() if hasattr(array, "shape")}
    return Arrays(kinds, lambda names: {name: np.asarray(kinds[name]) for name in names})


class ParameterStore:
    """A `TensorStore` of a model of tunix, without its LoRA. The parameter that was read last is kept until `release`.

    Raises:
        CheckpointError: a parameter that is not one of tunix's class for the family, or that has another form.
    """

    advice = "give all parameters of the model, and the config.json that belongs to it"

    def __init__(self, arrays: Arrays, family: Family, where: str):
        self._arrays, self._where = arrays, where
        self._parts: dict[str, dict[str, str]] = defaultdict(dict)
        for name in arrays.kinds:
            if LORA_FACTOR.fullmatch(name) is None and _RANDOM not in name:
                parameter, mark, part = name.rpartition(_MARK)
                self._parts[parameter if mark else name][part if mark else ""] = name
        if arrays.kinds and not self._parts:
            msg = f"{where}: holds LoRA alone, where a base model was wanted: give a checkpoint of the whole model"
            raise CheckpointError(msg)
        self._sources = find_sources(self._parts, family, where)
        self._shapes = {source: self._shape_of(source) for source in self._sources.values()}
        self._dtypes = {parameter: self._dtype_of(parameter) for parameter in self._parts}
        self._kept: tuple[str, np.ndarray] | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the checkpoint, none of a model in memory."""
        return self._arrays.files

    def names(self) -> list[str]:
        """Hugging Face names."""
        return list(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, as Hugging Face has it."""
        return self._shapes[self._source(name)]

    def dtype(self, name: str) -> str:
        """The dtype as safetensors names it, e.g. "BF16", or of quantised numbers, e.g. "INT8" or "NF4"."""
        return self._dtypes[self._source(name).parameter]

    def tensor(self, name: str) -> np.ndarray:
        """Read a tensor, float32 if it is quantised."""
        source = self._source(name)
        if self._kept is None or self._kept[0] != source.parameter:
            self._kept = source.parameter, self._read(source.parameter)
        array = source.take(self._kept[1]).view()
        array.flags.writeable = False
        return array

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Read rows of a matrix, as float32 (n, columns); the whole parameter is read for it."""
        return self.tensor(name)[ids].astype(np.float32)

    def release(self) -> None:
        """Forget the parameter that was read last."""
        self._kept = None

    def sha256s(self) -> list[str]:
        """Hex digests of `files`; of a model in memory one of names, dtypes, shapes and numbers."""
        return [MappedFile(path).sha256() for path in self.files] or [content_digest(self)]

    def _source(self, name: str) -> Source:
        if name not in self._sources:
            msg = f"{self._where}: the model has no parameter for {name!r}"
            raise CheckpointError(msg)
        return self._sources[name]

    def _kind(self, parameter: str) -> Any:
        """Return the shape and dtype of a parameter's array, or of its quantised numbers."""
        parts = self._parts[parameter]
        if parts.keys() - {_ZERO} not in ({""}, {_QVALUE, _SCALE}):
            msg = f"{self._where}: parameter {parameter!r} is quantised, but consists of {', '.join(sorted(parts))}: "
            raise CheckpointError(msg + f"give {_QVALUE} and {_SCALE}")
        return self._arrays.kinds[parts.get(_QVALUE, parts.get("", ""))]

    def _shape_of(self, source: Source) -> tuple[int, ...]:
        stored = tuple(self._kind(source.parameter).shape)
        if (shape := source.shape(stored)) is not None:
            return shape
        msg = f"{self._where}: parameter {source.parameter!r} has shape {list(stored)}, which is not that of tunix's "
        raise CheckpointError(msg + "class: give the parameters as tunix has them")

    def _dtype_of(self, parameter: str) -> str:
        name = str(self._kind(parameter).dtype)
        code = _FORMATS.get(name) if _QVALUE in self._parts[parameter] else DTYPE_CODES.get(name)
        if code is None:
            msg = f"{self._where}: parameter {parameter!r} has dtype {name}, which is not supported: use another one"
            raise CheckpointError(msg)
        return code

    def _read(self, parameter: str) -> np.ndarray:
        parts = self._parts[parameter]
        arrays = self._arrays.read(parts.values())
        if "" in parts:
            return arrays[parts[""]]
        try:
            return _dequantise(*(arrays.get(parts.get(part, "")) for part in (_QVALUE, _SCALE, _ZERO)))
        except ValueError as error:
            msg = f"{self._where}: the scale of parameter {parameter!r} does not fit its numbers: {error}"
            raise CheckpointError(msg) from error


def _dequantise(qvalue: Any, scale: Any, zero: Any) -> np.ndarray:
    numbers = _NF4[qvalue.astype(np.uint8)] if qvalue.dtype == ml_dtypes.uint4 else qvalue.astype(np.float32)
    if zero is not None:
        numbers -= _spread(zero, numbers.shape)
    numbers *= _spread(scale, numbers.shape)
    return numbers


def _spread(tiles: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Repeat the numbers of tiles until they can be broadcast to a shape."""
    if tiles.ndim != len(shape) or any(
        not count or size % count for size, count in zip(shape, tiles.shape, strict=True)
    ):
        msg = f"shape {list(tiles.shape)} for {list(shape)}"
        raise ValueError(msg)
    tiles = tiles.astype(np.float32)
    for axis, size in enumerate(shape):
        if tiles.shape[axis] not in (1, size):
            tiles = np.repeat(tiles, size // tiles.shape[axis], axis)
    return tiles
