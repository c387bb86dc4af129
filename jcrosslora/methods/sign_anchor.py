"""The joint signs of two sets of singular vectors, which no decomposition fixes.

U diag(s) V' stays the same when u_i and v_i change sign together, so a map that sends the i-th source pair to the
i-th target pair is defined only up to a sign for each i. Information from outside the two matrices has to fix it.
"""

import jax
import jax.numpy as jnp

from jcrosslora.evidence.records import Evidence, Side, stream_vectors
from jcrosslora.linalg import dot

# Pairs of vectors up to this distance from the diagonal estimate chance: near in the spectrum, they have a similar size
# in the vocabulary, but they are different vectors.
NEIGHBOURS = 8


def joint_signs(evidence: Evidence) -> tuple[jax.Array, jax.Array]:
    """Find signs d (R,) such that d_i (u_i, v_i) of the target corresponds to (u_i, v_i) of the source.

    With a shared vocabulary: every module has the residual stream on one side, where the vectors of both bases are
    functions of a token: E_src g_src v_i and E_tgt g_tgt v_i, with E the embeddings of the shared tokens and g the norm
    gain in between. d_i is the sign of their correlation over the tokens. The sign is joint, so it also holds for the
    other side of the module.

    Without a shared vocabulary: the entry of largest magnitude of the vector on the stream's side is made positive in
    each base. This depends on the basis and does not make two bases agree; it only makes the result reproducible.

    Returns:
        d (R,), of +1 and -1, and the ratio () of the mean squared correlation of the pairs (i, i) to that of the
        pairs (i, j) nearby (1 is chance; NaN without a vocabulary).
    """
    if evidence.vocabulary is None:
        return _own_signs(evidence.src, evidence.reads) * _own_signs(evidence.tgt, evidence.reads), jnp.full(
            (), jnp.nan
        )
    correlations = _correlations(evidence)
    diagonal = jnp.diagonal(correlations)
    return jnp.where(diagonal >= 0, 1.0, -1.0), _contrast(correlations**2)


def _own_signs(side: Side, reads: bool) -> jax.Array:
    assert side.svd is not None
    vectors = side.svd.v if reads else side.svd.u
    largest = jnp.take_along_axis(vectors, jnp.argmax(jnp.abs(vectors), axis=0)[None, :], axis=0)[0]
    return jnp.where(largest >= 0, 1.0, -1.0)


def _correlations(evidence: Evidence) -> jax.Array:
    """Compute the correlation (R, R) over the shared tokens of source vector i with target vector j."""
    vocabulary = evidence.vocabulary
    assert vocabulary is not None
    src = stream_vectors(evidence.src, evidence.reads)
    tgt = stream_vectors(evidence.tgt, evidence.reads)
    cross = dot(dot(src.T, vocabulary.cross), tgt)
    return cross * _inverse_spread(src, vocabulary.gram_src)[:, None] * _inverse_spread(tgt, vocabulary.gram_tgt)


def _inverse_spread(vectors: jax.Array, gram: jax.Array) -> jax.Array:
    variance = jnp.sum(vectors * dot(gram, vectors), axis=0)
    return jnp.where(variance > 0, 1 / jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)


def _contrast(squared: jax.Array) -> jax.Array:
    """Divide the mean of the diagonal by the mean of the entries at most NEIGHBOURS places beside it."""
    place = jnp.arange(squared.shape[0])
    apart = jnp.abs(place[:, None] - place[None, :])
    beside = (apart > 0) & (apart <= NEIGHBOURS)
    chance = jnp.sum(jnp.where(beside, squared, 0)) / jnp.maximum(jnp.sum(beside.astype(squared.dtype)), 1)
    return jnp.where(chance > 0, jnp.mean(jnp.diagonal(squared)) / jnp.where(chance > 0, chance, 1), jnp.nan)
