"""The tensors of a tunix model, read from its parameters on demand and dequantised if qwix quantised them.

Matrices are stored for x W, with attention heads as an axis, and an einsum's parameter holds several matrices. Norms,
biases, and the order of heads and rows are those of Hugging Face.

qwix replaces a parameter W by `array.qvalue`, of the shape of W, `array.scale`, and perhaps `array.zero_point`: W is
(qvalue - zero_point) * scale, with one scale for each tile. The numbers of NF4, stored as uint4, are indices into a
table.

Sources: tunix 0.1.7, the model and params files of its models; qwix 0.1.8, providers/lora.py, providers/ptq.py,
core/qarray.py and core/numerics.py.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jcrosslora.architectures import Family
from jcrosslora.architectures.blocks import EMBEDDING, HEAD
from jcrosslora.checkpoint.safetensors import DTYPE_CODES
from jcrosslora.checkpoint.store import TensorStore
from jcrosslora.errors import CheckpointError

LORA_FACTOR = re.compile(r"(.+)_lora_([ab])")
_Q, _K, _V, _O = (f"self_attn.{role}_proj" for role in "qkvo")
# Parameter of a layer -> the modules of the layer whose matrices it holds, in order.
Layout = Mapping[str, tuple[str, ...]]
_MLP: Layout = {f"mlp.{role}_proj.kernel": (f"mlp.{role}_proj",) for role in ("gate", "up", "down")}
PROJECTIONS: Layout = {f"attn.{role}_proj.w": (f"self_attn.{role}_proj",) for role in "qkvo"} | _MLP
_EINSUMS: Layout = {"attn.q_einsum.w": (_Q,), "attn.kv_einsum.w": (_K, _V), "attn.attn_vec_einsum.w": (_O,)} | _MLP
_ONE_EINSUM: Layout = {"attn.qkv_einsum.w": (_Q, _K, _V), "attn.attn_vec_einsum.w": (_O,)} | _MLP
MATRICES: Layout = PROJECTIONS | _EINSUMS | _ONE_EINSUM
# Family -> the layout of its class in tunix, and the one where each query head has its own key head.
TUNIX: Mapping[str, tuple[Layout, Layout]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3"), (PROJECTIONS, PROJECTIONS)),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), (_EINSUMS, _ONE_EINSUM)),
}
HEAD_MATRIX = "lm_head.w"
_EMBEDDER = "embedder.input_embedding"
_OUTSIDE = {_EMBEDDER: EMBEDDING, **dict.fromkeys(("final_norm.w", "final_norm.scale"))}  # None: `Family.final_norm`
# The axes of a matrix in the order (out..., in...), and how many of them are output axes. Others have two, swapped.
_AXES: Mapping[str, tuple[tuple[int, ...], int]] = {
    **dict.fromkeys(("attn.q_proj.w", "attn.k_proj.w", "attn.v_proj.w"), ((1, 2, 0), 2)),  # (width, heads, features)
    **dict.fromkeys(("attn.o_proj.w", "attn.attn_vec_einsum.w"), ((2, 0, 1), 1)),  # (heads, features, width)
    **dict.fromkeys(("attn.q_einsum.w", "attn.kv_einsum.w", "attn.qkv_einsum.w"), ((0, 2, 1), 2)),  # (.., width, ..)
}
# Parameter of a layer -> place of the norm in `Family.norms`.
_NORMS: Mapping[str, str] = {
    **{"input_layernorm.w": "attn", "post_attention_layernorm.w": "mlp", "attn.q_norm.w": "q", "attn.k_norm.w": "k"},
    **{"pre_attention_norm.scale": "attn", "pre_ffw_norm.scale": "mlp", "post_ffw_norm.scale": "mlp_post"},
    **dict.fromkeys(("post_attn_norm.scale", "post_attention_norm.scale"), "attn_post"),
    **{"attn._query_norm.scale": "q", "attn._key_norm.scale": "k"},
}
_BIASES: Mapping[str, str] = {f"attn.{role}_bias": f"self_attn.{role}_proj.bias" for role in "qkv"}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Source:
    """Where a tensor is stored.

    Attributes:
        place: index of its matrix in the parameter, and how many matrices the parameter holds.
        axes: axes of the matrix in the order (out..., in...); None for a tensor stored as in Hugging Face.
        rows: how many of the axes are output axes.
    """

    parameter: str
    place: tuple[int, int] = (0, 1)
    axes: tuple[int, ...] | None = None
    rows: int = 1

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape of the tensor in a parameter of this shape, None if the parameter cannot hold it."""
        count = self.place[1]
        if count > 1 and stored[:1] != (count,):
            return None
        shape = stored if count == 1 else stored[1:]
        if self.axes is None:
            return shape
        if len(shape) != len(self.axes):
            return None
        turned = [shape[axis] for axis in self.axes]
        return prod(turned[: self.rows]), prod(turned[self.rows :])

    def take(self, array: np.ndarray) -> np.ndarray:
        """Return the tensor from the parameter's array, which must have a fitting shape; a view if possible."""
        shape = self.shape(array.shape)
        assert shape is not None
        matrix = array if self.place[1] == 1 else array[self.place[0]]
        return matrix if self.axes is None else matrix.transpose(self.axes).reshape(shape)


def is_tunix(names: Iterable[str]) -> bool:
    """Tell whether array names (keys joined by dots) are from a tunix model."""
    return any(name.startswith(_EMBEDDER) for name in names)


def find_sources(parameters: Iterable[str], family: Family, where: str) -> dict[str, Source]:
    """Return where each tensor of a model is stored, by its Hugging Face name.

    Raises CheckpointError if tunix has no class for the family, or its class has no such parameter.
    """
    if family.name not in TUNIX:
        msg = f"{where}: tunix has a class for {', '.join(TUNIX)}, and the configuration is of {family.name}: give the "
        raise CheckpointError(msg + "config.json of this model")
    sources: dict[str, Source] = {}
    for parameter in parameters:
        found = _sources_in(parameter, family)
        if not found:
            msg = f"{where}: parameter {parameter!r} is not known for {family.name}: give the config.json of this "
            raise CheckpointError(msg + "model; experts and vision towers are not read")
        sources |= found
    return sources


def _sources_in(parameter: str, family: Family) -> dict[str, Source]:
    """Return the tensors that a parameter holds; empty if it is unknown."""
    if parameter in _OUTSIDE:
        return {_OUTSIDE[parameter] or f"{family.final_norm}.weight": Source(parameter)}
    if parameter == HEAD_MATRIX:
        return {HEAD: Source(parameter, axes=(1, 0))}
    match = _LAYER.fullmatch(parameter)
    if match is None:
        return {}
    prefix, name = f"model.layers.{match[1]}.", match[2]
    if name in _BIASES:
        return {prefix + _BIASES[name]: Source(parameter)}
    if (norm := family.norms.get(_NORMS.get(name, ""))) is not None:
        return {f"{prefix}{norm}.weight": Source(parameter)}
    modules = {**TUNIX[family.name][0], **TUNIX[family.name][1]}.get(name, ())
    axes, rows = _AXES.get(name, ((1, 0), 1))
    return {
        f"{prefix}{module}.weight": Source(parameter, (place, len(modules)), axes, rows)
        for place, module in enumerate(modules)
    }


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
        kinds: an object with shape and dtype for each.
        read: reads the arrays with the given names.
        files: the files that hold them; none in memory.
    """

    kinds: Mapping[str, Any]
    read: Callable[[Collection[str]], dict[str, np.ndarray]]
    files: tuple[Path, ...] = ()


def live_arrays(tree: Mapping[str, Any]) -> Arrays:
    """Wrap in-memory arrays on any device; they are copied to the host when they are read."""
    kinds = {name: array for name, array in tree.items() if hasattr(array, "shape")}
    return Arrays(kinds, lambda names: {name: np.asarray(kinds[name]) for name in names})


class ParameterStore(TensorStore):
    """The tensors of a tunix model, without its LoRA. The last parameter read is cached until `release`.

    Raises CheckpointError for a parameter that tunix's class for the family lacks, or that has another form.
    """

    advice = "give all parameters of the model, and the config.json that belongs to it"

    def __init__(self, arrays: Arrays, family: Family, where: str):
        self._arrays, self._where, self.files = arrays, where, arrays.files
        self._parts: dict[str, dict[str, str]] = defaultdict(dict)
        for name in arrays.kinds:
            if LORA_FACTOR.fullmatch(name) is None and _RANDOM not in name:
                parameter, mark, part = name.rpartition(_MARK)
                self._parts[parameter if mark else name][part if mark else ""] = name
        if arrays.kinds and not self._parts:
            msg = f"{where}: holds LoRA alone, where a base model was expected: give a checkpoint of the whole model"
            raise CheckpointError(msg)
        self._sources = find_sources(self._parts, family, where)
        self._shapes = {source: self._shape_of(source) for source in self._sources.values()}
        self._dtypes = {parameter: self._dtype_of(parameter) for parameter in self._parts}
        self._kept: tuple[str, np.ndarray] | None = None

    def names(self) -> list[str]:
        return list(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[self._source(name)]

    def dtype(self, name: str) -> str:
        """The safetensors dtype, e.g. "BF16", or the quantised format, e.g. "INT8" or "NF4"."""
        return self._dtypes[self._source(name).parameter]

    def tensor(self, name: str) -> np.ndarray:
        """Read a tensor, float32 if it is quantised."""
        source = self._source(name)
        if self._kept is None or self._kept[0] != source.parameter:
            self._kept = source.parameter, self._read(source.parameter)
        array = source.take(self._kept[1]).view()
        array.flags.writeable = False
        return array

    def release(self) -> None:
        """Drop the cached parameter."""
        self._kept = None

    def _source(self, name: str) -> Source:
        if name not in self._sources:
            raise CheckpointError(f"{self._where}: the model has no parameter for {name!r}")
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
    """Repeat per-tile numbers so that they broadcast to a shape; raise ValueError if they do not fit."""
    if tiles.ndim != len(shape) or any(
        not count or size % count for size, count in zip(shape, tiles.shape, strict=True)
    ):
        raise ValueError(f"shape {list(tiles.shape)} for {list(shape)}")
    tiles = tiles.astype(np.float32)
    for axis, size in enumerate(shape):
        if tiles.shape[axis] not in (1, size):
            tiles = np.repeat(tiles, size // tiles.shape[axis], axis)
    return tiles
