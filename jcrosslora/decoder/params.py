"""Load the weights of a model as arrays, stacked over the layers for each role, so that the layers can be scanned."""

import dataclasses
import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.experts import expert_tensors
from jcrosslora.checkpoint.families import EMBEDDING, HEAD, HEAD_BIAS, ROLE_PATHS
from jcrosslora.checkpoint.family.names import LAYER_EMBEDDING, LAYER_INPUT_NORM, LAYER_INPUT_PROJECTION
from jcrosslora.checkpoint.family.rules import LayerTensor
from jcrosslora.decoder.filling import fill
from jcrosslora.decoder.layer_inputs import LayerInputWeights
from jcrosslora.decoder.ops import is_packed
from jcrosslora.decoder.settings import settings_of
from jcrosslora.decoder.sharding import weight_sharding, whole
from jcrosslora.decoder.weight_sizes import stack_shapes
from jcrosslora.errors import UsageError

_ROWS = 16_384  # rows of the embedding to read at a time
_F32, _BF16, _BITS = (jnp.dtype(kind) for kind in (jnp.float32, jnp.bfloat16, jnp.uint16))


@flax.struct.dataclass
class Params:
    """The weights of a model; V tokens, H hidden, D head size, L the layers that have an array of the name, in order.

    Attributes:
        embedding: (V, H).
        head: (V, H), or None if the embedding is the head.
        final_norm: float32 (H,), gain of the final norm.
        weights: role -> (L, O, I); packed weights are the bits of bfloat16 as uint16.
        biases: role -> (L, O), for roles with a bias.
        norms: float32 gains, with Gemma's 1 + weight summed, named as in `Family.norms`: "attn" and "mlp" -> (L, H),
            before attention and MLP; "attn_post" and "mlp_post" -> (L, H), after them; "q" and "k" -> (L, D), of query
            and key heads, or (L, heads * D) of all heads together.
        norm_biases: the same of norms that have a bias.
        final_norm_bias: float32 (H,), or None.
        head_bias: float32 (V,), or None.
        activation: float32 (L, 1) each, the trained parameters of the activation, if it has any.
        tensors: name in `Family.tensors` -> (L, ...).
        layer_inputs: of models whose layers have inputs beside the stream, or None.
    """

    embedding: jax.Array
    head: jax.Array | None
    final_norm: jax.Array
    weights: dict[str, jax.Array]
    biases: dict[str, jax.Array]
    norms: dict[str, jax.Array]
    norm_biases: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    final_norm_bias: jax.Array | None = None
    head_bias: jax.Array | None = None
    activation: tuple[jax.Array, ...] = ()
    tensors: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    layer_inputs: LayerInputWeights | None = None

    def with_tokens(self, kept: np.ndarray) -> "Params":
        """Return the weights with the embeddings of these tokens (V,) alone; the head stays as it is."""
        inputs = self.layer_inputs
        if inputs is not None:
            inputs = dataclasses.replace(inputs, embedding=inputs.embedding[kept])
        return dataclasses.replace(self, embedding=self.embedding[kept], layer_inputs=inputs)

    @property
    def packed(self) -> bool:
        """Whether the weights of the layers are stored as bits."""
        return any(map(is_packed, self.weights.values()))

    @property
    def stream_dtype(self) -> jnp.dtype:
        """The dtype of the residual stream: that of the weights, or float32 if they are packed."""
        return _F32 if self.packed else self.embedding.dtype

    @property
    def cache_dtype(self) -> jnp.dtype:
        """The dtype of keys and values while text is written: that of the weights, which may be bits of bfloat16."""
        return _BITS if self.packed else self.embedding.dtype


def load_params(
    base: BaseModel, dtype: DTypeLike = jnp.float32, *, packed: bool | None = None, mesh: Mesh | None = None
) -> Params:
    """Load the weights of a base; the host holds one matrix of one layer at a time, and a device its own part of all.

    Args:
        base: a base of any supported family.
        dtype: float32 or bfloat16; norms are always float32.
        packed: whether bfloat16 weights of the layers are stored as bits and only their products are rounded to
            bfloat16, which is faster on a CPU (`tools/bench_decoder.py`) and more exact. Packed weights have no
            gradient. None packs bfloat16.
        mesh: of the devices that the weights are divided over, see `jcrosslora.decoder.sharding`; None puts them whole
            on the default device.

    Raises:
        UsageError: the dtype is not supported, or float32 was to be packed.
        CheckpointError: a tensor cannot be read, or the decoder does not support the model (see `settings_of`).
    """
    kind = jnp.dtype(dtype)
    if kind not in (_F32, _BF16):
        msg = f"dtype is {kind.name}, wanted float32 or bfloat16"
        raise UsageError(msg)
    if packed and kind == _F32:
        msg = "float32 weights cannot be packed; use bfloat16, or packed=False"
        raise UsageError(msg)
    if packed is None:
        packed = kind == _BF16
    settings, family, stacks = settings_of(base), base.family, _Stacks(base, mesh)
    norms = {name: norm for name, norm in family.layer_norms(base.config).items() if base.layers_with(name)}
    weights = {role: stacks.weights(role, kind, packed=packed) for role in family.roles if base.layers_with(role)}
    biases = {role: _stack_biases(base, role, kind) for role in settings.biased_roles if role in weights}
    offset = np.float32(family.gain_offset)
    params = Params(
        embedding=stacks.rows("embedding", EMBEDDING, kind),
        head=None if settings.tied else stacks.rows("head", HEAD, kind),
        final_norm=jnp.asarray(base.tensor(f"{family.final_norm}.weight").astype(np.float32) + offset),
        weights=weights,
        biases=biases,
        norms={name: _stack_vectors(base, name, f"{norm}.weight") + offset for name, norm in norms.items()},
        norm_biases={name: _stack_vectors(base, name, f"{norm}.bias") for name, norm in norms.items()}
        if family.norm_biases
        else {},
        final_norm_bias=_vector(base, f"{family.final_norm}.bias") if family.norm_biases else None,
        head_bias=_vector(base, HEAD_BIAS) if family.has_head_bias(base.config) else None,
        activation=tuple(_stack_numbers(base, *item) for item in family.activation_tensors.items()),
        tensors={
            name: stacks.tensors(name, tensor, kind)
            for name, tensor in family.layer_tensors(base.config).items()
            if base.layers_with(name)
        }
        | stacks.experts(kind, packed=packed),
        layer_inputs=_layer_inputs(base, stacks, kind),
    )
    base.release()
    if mesh is None:
        return params
    kept = whole(mesh)
    return jax.tree.map(lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, kept), params)


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


def _stack_biases(base: BaseModel, role: str, dtype: np.dtype) -> jax.Array:
    names = (f"model.layers.{layer}.{ROLE_PATHS[role]}" for layer in base.layers_with(role))
    return jnp.asarray(np.stack([bias.astype(dtype) for name in names if (bias := base.bias(name)) is not None]))


def _stack_numbers(base: BaseModel, path: str, usual: float | None) -> jax.Array:
    names, stored = [f"model.layers.{layer}.{path}" for layer in range(base.dims.layers)], set(base.tensor_names())
    numbers = [usual if name not in stored else base.tensor(name).astype(_F32).reshape(()) for name in names]
    return jnp.asarray(np.array(numbers, _F32)[:, None])


def _vector(base: BaseModel, name: str) -> jax.Array:
    return jnp.asarray(base.tensor(name).astype(_F32))


def _stack_vectors(base: BaseModel, norm: str, path: str) -> jax.Array:
    rows = [base.tensor(f"model.layers.{layer}.{path}").astype(_F32) for layer in base.layers_with(norm)]
    return jnp.asarray(np.stack(rows))


def _layer_inputs(base: BaseModel, stacks: "_Stacks", dtype: np.dtype) -> LayerInputWeights | None:
    if not base.family.layer_inputs(base.config):
        return None
    embedding = stacks.rows("layer_embedding", LAYER_EMBEDDING, dtype)
    projection = jnp.asarray(base.tensor(LAYER_INPUT_PROJECTION).astype(dtype))
    return LayerInputWeights(embedding, projection, _vector(base, LAYER_INPUT_NORM))


class _Stacks:
    """Reads the large arrays of a base, piece by piece."""

    def __init__(self, base: BaseModel, mesh: Mesh | None) -> None:
        self._base, self._mesh, self._shapes = base, mesh, stack_shapes(base)

    def weights(self, role: str, dtype: np.dtype, *, packed: bool) -> jax.Array:
        """Stack the matrices of a role, (L, O, I)."""
        names = (f"model.layers.{layer}.{ROLE_PATHS[role]}" for layer in self._base.layers_with(role))
        kept = _BITS if packed else dtype
        pieces = (self._base.weight(name)[None].astype(dtype, copy=False).view(kept) for name in names)
        return self._fill(role, self._shapes[role], kept, pieces)

    def tensors(self, name: str, tensor: LayerTensor, dtype: np.dtype) -> jax.Array:
        """Stack the tensors of a name in `Family.tensors`, (L, ...)."""
        base = self._base
        kept, layers = _F32 if tensor.exact else dtype, base.layers_with(name)
        pieces = (base.tensor(f"model.layers.{layer}.{tensor.path}")[None].astype(kept) for layer in layers)
        return self._fill(name, (len(layers), *tensor.shape(base.dims, base.config)), kept, pieces)

    def experts(self, dtype: np.dtype, *, packed: bool) -> dict[str, jax.Array]:
        """Stack the tensors of experts: matrices (L, E, O, I) as other weights, the rest as float32."""
        experts, layers = self._base.family.experts, self._base.layers_with("router")
        if experts is None or not layers:
            return {}
        found = {}
        for name in expert_tensors(experts):
            kept = dtype if name in ("gate_up", "down") else _F32
            stored = _BITS if packed and kept == dtype else kept
            pieces = (self._base.expert_tensor(layer, name)[None].astype(kept, copy=False) for layer in layers)
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
        return fill(shape, dtype, self._released(pieces), sharding)

    def _released(self, pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for piece in pieces:
            yield piece
            self._base.release()
