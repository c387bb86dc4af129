"""The weights of a model as arrays: one stack over layers for each role, so that the layers can be scanned."""

from collections.abc import Iterator
from functools import partial

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
_F32, _BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


@flax.struct.dataclass
class Params:
    """Weights; L layers, V tokens, H hidden, D head size.

    Attributes:
        embedding: (V, H).
        head: (V, H), or None where the embedding is the head.
        final_norm: float32 (H,), gain of the last norm.
        weights: role -> (L, O, I).
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


def load_params(base: BaseModel, dtype: DTypeLike = jnp.float32) -> Params:
    """Read the weights of a base; the host holds one matrix of one layer at a time.

    Args:
        base: any supported family, GGUF included.
        dtype: float32 or bfloat16, of all but the norms, which are float32.

    Raises:
        UsageError: another dtype.
        CheckpointError: a tensor cannot be read, or the decoder does not support the model (see `settings_of`).
    """
    kind = jnp.dtype(dtype)
    if kind not in (_F32, _BF16):
        msg = f"weights of dtype {kind.name} were asked for, wanted float32 or bfloat16"
        raise UsageError(msg)
    settings = settings_of(base)
    weights = {role: _stack_weights(base, role, kind) for role in ROLES}
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


def _stack_weights(base: BaseModel, role: str, dtype: np.dtype) -> jax.Array:
    names = [f"model.layers.{layer}.{ROLE_PATHS[role]}" for layer in range(base.dims.layers)]
    pieces = (base.weight(name)[None] for name in names)
    return _filled(base, (len(names), *base.modules[names[0]].shape), dtype, pieces)


def _stack_vectors(base: BaseModel, path: str, dtype: np.dtype) -> jax.Array:
    rows = [base.tensor(f"model.layers.{layer}.{path}").astype(dtype) for layer in range(base.dims.layers)]
    return jnp.asarray(np.stack(rows))


def _matrix(base: BaseModel, name: str, dtype: np.dtype) -> jax.Array:
    vocab = base.dims.vocab
    pieces = (base.rows(name, np.arange(start, min(start + _ROWS, vocab))) for start in range(0, vocab, _ROWS))
    return _filled(base, (vocab, base.dims.hidden), dtype, pieces)


def _filled(base: BaseModel, shape: tuple[int, ...], dtype: np.dtype, pieces: Iterator[np.ndarray]) -> jax.Array:
    # Written piece by piece where it stays: to fill a host array first would take twice the memory on a CPU.
    whole, start = jnp.zeros(shape, dtype), 0
    for piece in pieces:
        whole = _written(whole, piece.astype(dtype), np.int32(start))
        start += len(piece)
        base.release()
    return whole


@partial(jax.jit, donate_argnums=0)
def _written(whole: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(whole, piece, start, 0)
