"""Load models with the arrays of each role stacked over the layers, so that the layers can be scanned; cache some.

Weights may be divided over devices. Modules that write to the residual stream are row-parallel, all others
column-parallel, as in Megatron-LM (arXiv 1909.08053): a column-parallel product needs no communication, the
row-parallel product after it needs a sum over the devices. Every expert is divided like an MLP, because a layer runs
its experts one after the other. Norms, biases, routers and small mixer tensors are replicated on each device.

The matrices of the layers may also be streamed: they stay in the host's memory, and each time a layer runs, its
matrices are copied to the device.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jcrosslora.architectures import blocks
from jcrosslora.architectures.blocks import ROLES, WRITERS, LayerInputWeights, Tensor, module_name
from jcrosslora.architectures.settings import DecoderSettings, read_settings
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.layout import expert_tensors
from jcrosslora.decoder.model import Model, Params
from jcrosslora.errors import UsageError
from jcrosslora.utils.cost import check_devices

_ROWS = 16_384  # rows of the embedding to read at a time
_SHARE = 0.5  # share of the free memory that cached weights may take
_F32, _BF16, _BITS = (jnp.dtype(kind) for kind in (jnp.float32, jnp.bfloat16, jnp.uint16))
_EXPERTS = ("gate_up", "down")  # matrices of experts
_LAYERED = 3  # axes of a stack over layers, (L, O, I) or (L, E, O, I); an embedding has two
AXIS = "model"  # of the mesh
# Axes of (O, I) or (V, H), counted from the end: the one to divide, and the one to try if that fails.
_BY_ROWS, _BY_COLUMNS = (-2, -1), (-1, -2)
_AXES = {
    **dict.fromkeys(("embedding", "head", "layer_embedding", "gate_up"), _BY_ROWS),
    "down": _BY_COLUMNS,
    **{role: _BY_COLUMNS if role in WRITERS else _BY_ROWS for role in ROLES},
}


def load_model(
    base: BaseModel,
    dtype: DTypeLike = jnp.float32,
    *,
    packed: bool | None = None,
    mesh: Mesh | None = None,
    streamed: bool = False,
) -> Model:
    """Load a base; the host holds one matrix of one layer at a time, and each device its shard of the weights.

    Args:
        base: a base of any supported family.
        dtype: float32 or bfloat16; norms are always float32.
        packed: whether bfloat16 weights of the layers are stored as bits and only their products are rounded to
            bfloat16, which is faster on a CPU (`tools/bench_decoder.py`) and more exact. Packed weights have no
            gradient. None packs bfloat16.
        mesh: devices to divide the weights over, see above; None puts them whole on the default device.
        streamed: whether the matrices of the layers stay in the host's memory, see above. They have no gradient then.

    Raises:
        UsageError: the dtype is not supported, or float32 was to be packed.
        CheckpointError: a tensor cannot be read, or the decoder does not support the model (see `settings_of`).
    """
    check_devices()
    kind = jnp.dtype(dtype)
    if kind not in (_F32, _BF16):
        raise UsageError(f"dtype is {kind.name}, expected float32 or bfloat16")
    if packed and kind == _F32:
        raise UsageError("float32 weights cannot be packed; use bfloat16, or packed=False")
    if packed is None:
        packed = kind == _BF16
    settings, family, stacks = settings_of(base), base.family, _Stacks(base, mesh, streamed=streamed)
    norms = {place: path for place, (path, _) in base.architecture.norms.items()}
    weights = {role: stacks.weights(role, kind, packed=packed) for role in base.architecture.role_shapes}
    biases = {role: _stack_biases(base, role, kind) for role in settings.biased_roles if role in weights}
    offset = np.float32(family.gain_offset)
    params = Params(
        embedding=stacks.rows("embedding", blocks.EMBEDDING, kind),
        head=None if settings.tied else stacks.rows("head", blocks.HEAD, kind),
        final_norm=jnp.asarray(base.tensor(f"{family.final_norm}.weight").astype(np.float32) + offset),
        weights=weights,
        biases=biases,
        norms={name: _stack_vectors(base, name, f"{norm}.weight") + offset for name, norm in norms.items()},
        norm_biases={name: _stack_vectors(base, name, f"{norm}.bias") for name, norm in norms.items()}
        if family.norm_biases
        else {},
        final_norm_bias=_vector(base, f"{family.final_norm}.bias") if family.norm_biases else None,
        head_bias=_vector(base, blocks.HEAD_BIAS) if family.has_head_bias(base.config) else None,
        activation=tuple(_stack_numbers(base, *item) for item in family.activation_tensors.items()),
        tensors={name: stacks.tensors(name, tensor, kind) for name, tensor in base.architecture.tensors.items()}
        | stacks.experts(kind, packed=packed),
        layer_inputs=_layer_inputs(base, stacks, kind),
    )
    base.release()
    if mesh is not None:
        kept = whole(mesh)
        params = jax.tree.map(lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, kept), params)
    return Model(settings, params)


def settings_of(base: BaseModel) -> DecoderSettings:
    """Read the settings of a base.

    Raises:
        CheckpointError: the decoder does not support a setting.
    """
    return read_settings(base.architecture, base.ref)


@cache
def fast_dtype() -> np.dtype:
    """Return the fastest dtype for passes that need no more than bfloat16.

    On CPUs with AVX512-BF16 or AMX, a forward pass of a small model takes half or a third of the time in bfloat16
    (`tools/bench_decoder.py`); other CPUs have to convert it and get float32. GPUs and TPUs multiply bfloat16 natively,
    and it halves memory: two bases of 8B parameters take 32 GB instead of 64 (computed, not measured).
    """
    if jax.default_backend() != "cpu":
        return _BF16
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return _F32
    return _BF16 if "avx512_bf16" in flags or "amx_bf16" in flags else _F32


class LoadedBases:
    """Loads the weights of bases, and caches those of some dtypes.

    Attributes:
        mesh: devices to divide all weights over; None puts them whole on the default device.
        streamed: the base whose layers stay in the host's memory, if one does.
    """

    def __init__(
        self, kept: Collection[np.dtype] = (), mesh: Mesh | None = None, streamed: BaseModel | None = None
    ) -> None:
        """Cache the weights of the dtypes in `kept` until this object is dropped; by default none."""
        self.kept, self.mesh, self.streamed = frozenset(kept), mesh, streamed
        self._models: dict[tuple[int, np.dtype], tuple[BaseModel, Model]] = {}

    def model(self, base: BaseModel, dtype: DTypeLike = jnp.float32) -> Model:
        """Return a base; for the arguments and errors see `load_model`."""
        kind = jnp.dtype(dtype)
        place = id(base), kind
        if place in self._models:
            return self._models[place][1]
        model = load_model(base, kind, mesh=self.mesh, streamed=base is self.streamed)
        if kind in self.kept:
            self._models[place] = base, model
        return model


def loaded_within(free: int | None, numbers: Sequence[int], mesh: Mesh | None = None) -> LoadedBases:
    """Choose which weights of the bases to cache between a fit and the check of its effect.

    `free` is the free memory in bytes; if it is None (unknown), nothing is cached. `numbers` is the count of numbers
    of each base that a device holds.
    """
    narrow, wide = fast_dtype(), np.dtype(np.float32)
    most = 0 if free is None else _SHARE * free
    fitted, checked = (kind.itemsize * sum(numbers) for kind in (narrow, wide))
    both = checked if narrow == wide else fitted + checked
    if both <= most:
        return LoadedBases((narrow, wide), mesh)
    # The check loads one base at a time on top of the cached weights.
    fits = narrow != wide and fitted + wide.itemsize * max(numbers) <= most
    return LoadedBases((narrow,) if fits else (), mesh)


def _stack_biases(base: BaseModel, role: str, dtype: np.dtype) -> jax.Array:
    names = (module_name(layer, role) for layer in base.layers_with(role))
    return jnp.asarray(np.stack([bias.astype(dtype) for name in names if (bias := base.bias(name)) is not None]))


def _stack_numbers(base: BaseModel, path: str, usual: float | None) -> jax.Array:
    names, stored = [f"model.layers.{layer}.{path}" for layer in range(base.dims.layers)], set(base.store.names())
    numbers = [usual if name not in stored else base.tensor(name).astype(_F32).reshape(()) for name in names]
    return jnp.asarray(np.array(numbers, _F32)[:, None])


def _vector(base: BaseModel, name: str) -> jax.Array:
    return jnp.asarray(base.tensor(name).astype(_F32))


def _stack_vectors(base: BaseModel, norm: str, path: str) -> jax.Array:
    rows = [base.tensor(f"model.layers.{layer}.{path}").astype(_F32) for layer in base.layers_with(norm)]
    return jnp.asarray(np.stack(rows))


def _layer_inputs(base: BaseModel, stacks: "_Stacks", dtype: np.dtype) -> LayerInputWeights | None:
    if not base.architecture.layer_inputs:
        return None
    embedding = stacks.rows("layer_embedding", blocks.LAYER_EMBEDDING, dtype)
    projection = jnp.asarray(base.tensor(blocks.LAYER_INPUT_PROJECTION).astype(dtype))
    return LayerInputWeights(embedding, projection, _vector(base, blocks.LAYER_INPUT_NORM))


class _Stacks:
    """Reads the large arrays of a base, piece by piece."""

    def __init__(self, base: BaseModel, mesh: Mesh | None, *, streamed: bool) -> None:
        self._base, self._mesh, self._shapes = base, mesh, stack_shapes(base)
        self._streamed = streamed

    def weights(self, role: str, dtype: np.dtype, *, packed: bool) -> jax.Array:
        """Stack the matrices of a role, (L, O, I)."""
        names = (module_name(layer, role) for layer in self._base.layers_with(role))
        kept = _BITS if packed else dtype
        pieces = (self._base.weight(name)[None].astype(dtype, copy=False).view(kept) for name in names)
        return self._fill(role, self._shapes[role], kept, pieces)

    def tensors(self, name: str, tensor: Tensor, dtype: np.dtype) -> jax.Array:
        """Stack the tensors of a name, (L, ...)."""
        base = self._base
        kept, layers = _F32 if tensor.exact else dtype, base.layers_with(name)
        pieces = (base.tensor(f"model.layers.{layer}.{tensor.path}")[None].astype(kept) for layer in layers)
        return self._fill(name, (len(layers), *tensor.shape), kept, pieces)

    def experts(self, dtype: np.dtype, *, packed: bool) -> dict[str, jax.Array]:
        """Stack the tensors of experts: matrices (L, E, O, I) as other weights, the rest as float32."""
        experts, layers = self._base.family.experts, self._base.layers_with("router")
        if experts is None or not layers:
            return {}
        found = {}
        for name in expert_tensors(experts):
            kept = dtype if name in ("gate_up", "down") else _F32
            stored = _BITS if packed and kept == dtype else kept
            pieces = (self._base.experts.tensor(layer, name)[None].astype(kept, copy=False) for layer in layers)
            first = next(pieces)
            pieces = (piece.view(stored) for piece in itertools.chain((first,), pieces))
            found[name] = self._fill(name, (len(layers), *first.shape[1:]), stored, pieces)
        return found

    def rows(self, name: str, tensor: str, dtype: np.dtype) -> jax.Array:
        """Read an embedding or the head, (V, columns)."""
        vocab = self._base.dims.vocab
        parts = (np.arange(start, min(start + _ROWS, vocab)) for start in range(0, vocab, _ROWS))
        pieces = (self._base.rows(tensor, part).astype(dtype, copy=False) for part in parts)
        return self._fill(name, self._shapes[name], dtype, pieces)

    def _fill(self, name: str, shape: tuple[int, ...], dtype: np.dtype, pieces: Iterator[np.ndarray]) -> jax.Array:
        sharding = None if self._mesh is None else weight_sharding(self._mesh, name, shape)
        if not (self._streamed and _is_streamed(name, self._shapes)):
            return fill(shape, dtype, self._released(pieces), sharding)
        held, start = np.empty(shape, dtype), 0
        for piece in self._released(pieces):
            held[start : start + len(piece)] = piece
            start += len(piece)
        where = jnp.zeros(()).sharding if sharding is None else sharding
        return jax.device_put(held, where.with_memory_kind("pinned_host"))

    def _released(self, pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for piece in pieces:
            yield piece
            self._base.release()


def mesh_of(devices: int) -> Mesh:
    """Return a one-axis mesh of the first `devices` local devices."""
    return Mesh(np.array(jax.local_devices()[:devices]), (AXIS,))


def divided_axis(name: str, shape: Sequence[int], devices: int) -> int | None:
    """Return the axis of a weight that is divided over devices, None if it is replicated.

    Args:
        name: a role; "gate_up" or "down" of experts; "embedding", "head", or "layer_embedding", the embedding of the
            per-layer inputs. Weights with other names are replicated.
        shape: (L, O, I) of a role's stack, (L, E, O, I) of experts, or (V, H) of an embedding.
    """
    axes = [] if devices == 1 else [axis for axis in _AXES.get(name, ()) if shape[axis] % devices == 0]
    return len(shape) + axes[0] if axes else None


def weight_sharding(mesh: Mesh | AbstractMesh, name: str, shape: Sequence[int]) -> NamedSharding:
    """Return the sharding of a weight over a mesh; for the arguments see `divided_axis`."""
    axis = divided_axis(name, shape, mesh.size)
    return NamedSharding(mesh, PartitionSpec(*() if axis is None else (*(None,) * axis, AXIS)))


def whole(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the sharding that replicates an array on every device of a mesh."""
    return NamedSharding(mesh, PartitionSpec())


def stack_shapes(base: BaseModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the stacked matrices and embeddings in `Params`, by the names of `divided_axis`.

    Returns:
        Role -> (L, O, I) for the L layers that have it; "gate_up" and "down" of experts -> (L, E, O, I); "embedding",
        "head" of a model that is not tied, and "layer_embedding" -> (V, columns).
    """
    dims, family, experts = base.dims, base.family, len(base.layers_with("router"))
    found: dict[str, tuple[int, ...]] = {"embedding": (dims.vocab, dims.hidden)}
    if not base.tied:
        found["head"] = (dims.vocab, dims.hidden)
    if features := base.architecture.layer_inputs:
        found["layer_embedding"] = (dims.vocab, dims.layers * features)
    for role, shape in base.architecture.role_shapes.items():
        found[role] = (len(base.layers_with(role)), *shape)
    if family.experts is not None and experts:
        found |= {name: (experts, *base.experts.shape(name)) for name in _EXPERTS}
    return found


def _is_streamed(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether the array `name` stays in the host's memory when a base is streamed."""
    return len(shapes.get(name, ())) >= _LAYERED


def streamed_numbers(base: BaseModel) -> int:
    """Count the numbers of a base's weights that stay in the host's memory when it is streamed."""
    shapes = stack_shapes(base)
    return sum(prod(shape) for name, shape in shapes.items() if _is_streamed(name, shapes))


def held_numbers(base: BaseModel, devices: int = 1, *, streamed: bool = False) -> int:
    """Count the numbers of a base's weights that each device holds.

    If the base is streamed, two layers are on the device at a time: the one that runs and the next.
    """
    shapes = stack_shapes(base)
    small = sum(map(prod, base.tensor_shapes().values())) - sum(map(prod, shapes.values()))
    parts = {
        name: prod(shape) // (1 if divided_axis(name, shape, devices) is None else devices)
        for name, shape in shapes.items()
    }
    if streamed:
        layered = [name for name in parts if _is_streamed(name, shapes)]
        parts |= {name: parts[name] * min(2, shapes[name][0]) // shapes[name][0] for name in layered}
    return small + sum(parts.values())


def fill(
    shape: tuple[int, ...], dtype: np.dtype, pieces: Iterable[np.ndarray], sharding: NamedSharding | None = None
) -> jax.Array:
    """Assemble an array from pieces; the host holds one piece at a time, and each device only its shard.

    The pieces are rows (n, ...) of the array, in order. Without a sharding the whole array is on the default device.
    """
    places: Mapping[Any, Any] = {None: (slice(None),) * len(shape)}
    if sharding is not None:
        places = sharding.addressable_devices_indices_map(shape)
    # Pieces go straight to the device: a host array of the whole would double the memory on a CPU.
    parts = {device: jnp.zeros(_size(shape, index), dtype, device=device) for device, index in places.items()}
    start = 0
    for piece in pieces:
        for device, index in places.items():
            first, last, _ = index[0].indices(shape[0])
            low, high = max(first, start), min(last, start + len(piece))
            if low < high:
                own = piece[(slice(low - start, high - start), *index[1:])]
                parts[device] = _write(parts[device], own, np.int32(low - first))
        start += len(piece)
    if sharding is None:
        return parts[None]
    return jax.make_array_from_single_device_arrays(shape, sharding, list(parts.values()))


def _size(shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(len(range(*part.indices(size))) for size, part in zip(shape, index, strict=True))


@partial(jax.jit, donate_argnums=0)
def _write(whole: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(whole, piece, start, 0)
