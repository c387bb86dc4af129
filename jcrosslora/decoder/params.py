"""The weights of a model as arrays: one stack over layers for each role, so that the layers can be scanned."""

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jcrosslora.checkpoint import ROLES, BaseModel
from jcrosslora.checkpoint.families import EMBEDDING, FINAL_NORM, HEAD, ROLE_PATHS
from jcrosslora.decoder.settings import settings_of
from jcrosslora.errors import UsageError

_ROWS = 16_384  # of the embedding, read at a time
_F32, _BF16, _BITS = (jnp.dtype(kind) for kind in (jnp.float32, jnp.bfloat16, jnp.uint16))


@flax.struct.dataclass
class Params:
    """Weights; L layers, V tokens, H hidden, D head size.

    Attributes:
        embedding: (V, H).
        head: (V, H), or None where the embedding is the head.
        final_norm: float32 (H,), gain of the last norm.
        weights: role -> (L, O, I); of packed ones the bits of bfloat16, uint16.
        biases: role -> (L, O), of those roles that have one.
        norms: float32 gains, Gemma's 1 + weight already summed: "attn" and "mlp" -> (L, H), in front of attention and
            MLP; "attn_post" and "mlp_post" -> (L, H), behind them, where the family has them; "q" and "k" -> (L, D),
            of the heads of queries and keys, where it has them.
    """

    embedding: jax.Array
    head: jax.Array | None
    final_norm: jax.Array
    weights: dict[str, jax.Array]
    biases: dict[str, jax.Array]
    norms: dict[str, jax.Array]

    @property
    def packed(self) -> bool:
        """Whether the weights of the layers are kept as bits."""
        return any(weight.dtype == jnp.uint16 for weight in self.weights.values())

    @property
    def stream_dtype(self) -> jnp.dtype:
        """Of what flows between the modules, and of the cache: that of the weights, but float32 where they are bits."""
        return _F32 if self.packed else self.embedding.dtype


def load_params(base: BaseModel, dtype: DTypeLike = jnp.float32, *, packed: bool | None = None) -> Params:
    """Read the weights of a base; the host holds one matrix of one layer at a time.

    Args:
        base: any supported family, GGUF included.
        dtype: float32 or bfloat16, of all but the norms, which are float32.
        packed: of bfloat16, whether the layers' weights are kept as bits and all but the products with them is done in
            float32, which is faster on a CPU (`tools/bench_decoder.py`) and more exact. None packs all bfloat16. The
            layers' weights have no gradient then.

    Raises:
        UsageError: another dtype, or float32 to be packed.
        CheckpointError: a tensor cannot be read, or the decoder does not support the model (see `settings_of`).
    """
    kind = jnp.dtype(dtype)
    if kind not in (_F32, _BF16):
        msg = f"weights of dtype {kind.name} were asked for, wanted float32 or bfloat16"
        raise UsageError(msg)
    if packed and kind == _F32:
        msg = "float32 weights were asked for packed: only bfloat16 is kept as bits"
        raise UsageError(msg)
    if packed is None:
        packed = kind == _BF16
    settings = settings_of(base)
    weights = {role: _stack_weights(base, role, kind, packed=packed) for role in ROLES}
    biases = {role: _stack_vectors(base, f"{ROLE_PATHS[role]}.bias", kind) for role in settings.biased}
    offset = np.float32(base.family.gain_offset)
    norms = {name: _stack_vectors(base, f"{norm}.weight", _F32) + offset for name, norm in _norm_names(base).items()}
    params = Params(
        embedding=_matrix(base, EMBEDDING, kind),
        head=None if settings.tied else _matrix(base, HEAD, kind),
        final_norm=jnp.asarray(base.tensor(FINAL_NORM).astype(np.float32) + offset),
        weights=weights,
        biases=biases,
        norms=norms,
    )
    base.release()
    return params


@cache
def fast_dtype() -> np.dtype:
    """The dtype for passes that need no more than bfloat16: float32 only where that is no slower.

    On CPUs with AVX512-BF16 or AMX a forward pass of a small model in bfloat16 takes a half or a third of the time that
    it takes in float32 (`tools/bench_decoder.py`); other CPUs have to convert it. GPUs and TPUs have units for products
    of it, and there memory is what bounds the size of a model: two bases of 8B parameters take 32 GB instead of 64.
    That was not measured.
    """
    if jax.default_backend() != "cpu":
        return _BF16
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return _F32
    return _BF16 if "avx512_bf16" in flags or "amx_bf16" in flags else _F32


def _norm_names(base: BaseModel) -> dict[str, str]:
    family = base.family
    names = {
        "attn": family.norm_in["q_proj"],
        "mlp": family.norm_in["gate_proj"],
        "attn_post": family.norm_out.get("o_proj"),
        "mlp_post": family.norm_out.get("down_proj"),
    }
    names |= {norm.removeprefix("self_attn.")[0]: norm for norm in family.head_norms}
    return {name: norm for name, norm in names.items() if norm is not None}


def _stack_weights(base: BaseModel, role: str, dtype: np.dtype, *, packed: bool) -> jax.Array:
    names = [f"model.layers.{layer}.{ROLE_PATHS[role]}" for layer in range(base.dims.layers)]
    kept = _BITS if packed else dtype
    pieces = (base.weight(name)[None].astype(dtype, copy=False).view(kept) for name in names)
    return _filled(base, (len(names), *base.modules[names[0]].shape), kept, pieces)


def _stack_vectors(base: BaseModel, path: str, dtype: np.dtype) -> jax.Array:
    rows = [base.tensor(f"model.layers.{layer}.{path}").astype(dtype) for layer in range(base.dims.layers)]
    return jnp.asarray(np.stack(rows))


def _matrix(base: BaseModel, name: str, dtype: np.dtype) -> jax.Array:
    vocab = base.dims.vocab
    parts = (np.arange(start, min(start + _ROWS, vocab)) for start in range(0, vocab, _ROWS))
    pieces = (base.rows(name, part).astype(dtype, copy=False) for part in parts)
    return _filled(base, (vocab, base.dims.hidden), dtype, pieces)


def _filled(base: BaseModel, shape: tuple[int, ...], dtype: np.dtype, pieces: Iterator[np.ndarray]) -> jax.Array:
    # Written piece by piece where it stays: to fill a host array first would take twice the memory on a CPU.
    whole, start = jnp.zeros(shape, dtype), 0
    for piece in pieces:
        whole = _written(whole, piece, np.int32(start))
        start += len(piece)
        base.release()
    return whole


@partial(jax.jit, donate_argnums=0)
def _written(whole: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(whole, piece, start, 0)
