"""The control: random orthonormal bases in place of the singular ones, and the norm of the update kept."""

import jax
import jax.numpy as jnp

from jcrosslora.evidence.records import Evidence, Fit
from jcrosslora.linalg import LinearMap, low_rank


def fit(evidence: Evidence) -> Fit:
    """P_out = Q_t Q_s', P_in = R_t R_s' with Q and R uniformly random, of inner width R."""
    (o_src, i_src), (o_tgt, i_tgt) = evidence.src.weight.shape, evidence.tgt.weight.shape
    assert evidence.key is not None
    out_key, in_key = jax.random.split(evidence.key)
    return Fit(((_random(out_key, o_src, o_tgt, evidence.rank), _random(in_key, i_src, i_tgt, evidence.rank)),))


def _random(key: jax.Array, size_src: int, size_tgt: int, rank: int) -> LinearMap:
    src, tgt = jax.random.split(key)
    return low_rank(_orthonormal(tgt, size_tgt, rank), _orthonormal(src, size_src, rank))


def _orthonormal(key: jax.Array, size: int, rank: int) -> jax.Array:
    """(size, rank) with orthonormal columns, uniform: QR of a normal matrix with the signs of R's diagonal undone."""
    q, r = jnp.linalg.qr(jax.random.normal(key, (size, rank)))
    return q * jnp.where(jnp.diagonal(r) >= 0, 1.0, -1.0)
