"""Diagnostics of an alignment: how well two bases agree in what a method relies on, independent of any adapter."""

import flax.struct
import jax
import jax.numpy as jnp

from jcrosslora.linalg import TruncatedSVD, dot
from jcrosslora.maps.evidence.records import Evidence, Maps, Vocabulary


@flax.struct.dataclass
class Agreement:
    """Diagnostics of one pair of modules, all scalars; NaN where a figure is undefined or not required.

    Attributes:
        rank: R, the truncation rank of this pair.
        energy_src: share of ||W_src||_F^2 in its top R singular pairs.
        energy_tgt: the same for the target.
        gap_src: (s_R - s_{R+1}) / s_R of the source: a small gap makes the subspace itself arbitrary.
        gap_tgt: the same for the target.
        condition_src: s_1 / s_R of the source.
        condition_tgt: the same for the target.
        error_src: estimated error (radians) of the singular vectors or subspaces of the source that the method uses.
        error_tgt: the same for the target.
        similarity_out: ||U_s' U_t||_F^2 / R over its expectation for random subspaces of the same size, R / O; 1
            is chance. Defined for equal O, and where neither subspace is the whole space. For unequal O on the
            residual stream's side it is measured through the shared vocabulary, see `_similarity_by_tokens`.
        similarity_in: the same for the right singular vectors and I.
        vector_ratio: see `Maps`.
        activation_cosine: see `Maps`.
        weight_cosine: cosine of W_src, mapped if shapes differ, with W_tgt, unless `Maps` replaces it.
    """

    rank: jax.Array
    energy_src: jax.Array
    energy_tgt: jax.Array
    gap_src: jax.Array
    gap_tgt: jax.Array
    condition_src: jax.Array
    condition_tgt: jax.Array
    error_src: jax.Array
    error_tgt: jax.Array
    similarity_out: jax.Array
    similarity_in: jax.Array
    vector_ratio: jax.Array
    activation_cosine: jax.Array
    weight_cosine: jax.Array


def measure(evidence: Evidence, maps: Maps, *, by_coordinates: bool) -> Agreement:
    """Measure the agreement of a pair; with `by_coordinates` the maps are applied to W_src if the shapes differ."""
    src, tgt = evidence.src.svd, evidence.tgt.svd
    nan = jnp.full((), jnp.nan)
    have = src is not None and tgt is not None
    return Agreement(
        rank=jnp.full((), evidence.rank, jnp.int32),
        energy_src=src.energy if src else nan,
        energy_tgt=tgt.energy if tgt else nan,
        gap_src=src.gap if src else nan,
        gap_tgt=tgt.gap if tgt else nan,
        condition_src=src.condition if src else nan,
        condition_tgt=tgt.condition if tgt else nan,
        error_src=src.error if src else nan,
        error_tgt=tgt.error if tgt else nan,
        similarity_out=_similarity(evidence, stream=not evidence.reads) if have else nan,
        similarity_in=_similarity(evidence, stream=evidence.reads) if have else nan,
        vector_ratio=maps.vector_ratio,
        activation_cosine=maps.activation_cosine,
        weight_cosine=_weight_cosine(evidence, maps, by_coordinates),
    )


def _similarity(evidence: Evidence, *, stream: bool) -> jax.Array:
    src, tgt = evidence.singular_vectors_src, evidence.singular_vectors_tgt
    inner = stream == evidence.reads
    x, y = (src.v, tgt.v) if inner else (src.u, tgt.u)
    if x.shape[0] == y.shape[0]:
        return _similarity_by_coordinates(src, tgt, x, y)
    if stream and evidence.vocabulary is not None:
        return _similarity_by_tokens(evidence, evidence.vocabulary)
    return jnp.full((), jnp.nan)


def _similarity_by_coordinates(src: TruncatedSVD, tgt: TruncatedSVD, x: jax.Array, y: jax.Array) -> jax.Array:
    size = x.shape[0]
    ranks = (src.numerical_rank * tgt.numerical_rank).astype(x.dtype)
    informative = (jnp.maximum(src.numerical_rank, tgt.numerical_rank) < size) & (ranks > 0)
    return jnp.where(informative, jnp.sum(dot(x.T, y) ** 2) * size / jnp.maximum(ranks, 1), jnp.nan)


def _similarity_by_tokens(evidence: Evidence, vocabulary: Vocabulary) -> jax.Array:
    """Compute the same similarity through shared tokens, where the two streams have different coordinates.

    With E the centred embeddings (gain folded in), this is the share of covariance that two sets of directions have in
    common, ||(E_s X)'(E_t Y)||_F^2 / (||E_s X||_F^2 ||E_t Y||_F^2), over the same for the two whole streams. For
    equal spaces with E'E a multiple of I it is ||X'Y||_F^2 m / R^2, the similarity by coordinates.
    """
    x, y = evidence.stream_vectors
    part = _common(dot(dot(x.T, vocabulary.cross), y), _spread(x, vocabulary.gram_src), _spread(y, vocabulary.gram_tgt))
    gain_src, gain_tgt = evidence.src.gain, evidence.tgt.gain
    whole = _common(
        gain_src[:, None] * vocabulary.cross * gain_tgt,
        jnp.sum(jnp.diagonal(vocabulary.gram_src) * gain_src**2),
        jnp.sum(jnp.diagonal(vocabulary.gram_tgt) * gain_tgt**2),
    )
    return part / whole


def _spread(vectors: jax.Array, gram: jax.Array) -> jax.Array:
    return jnp.sum(vectors * dot(gram, vectors))


def _common(cross: jax.Array, spread_src: jax.Array, spread_tgt: jax.Array) -> jax.Array:
    return jnp.sum(cross**2) / (spread_src * spread_tgt)


def _weight_cosine(evidence: Evidence, maps: Maps, by_coordinates: bool) -> jax.Array:
    if maps.weight_cosine is not None:
        return maps.weight_cosine
    w_src, w_tgt = evidence.src.weight, evidence.tgt.weight
    if w_src.shape != w_tgt.shape:
        if not by_coordinates:
            return jnp.full((), jnp.nan)
        ((p_out, p_in),) = maps.terms
        w_src = p_in(p_out(w_src).T).T
    norms = jnp.linalg.norm(w_src) * jnp.linalg.norm(w_tgt)
    return jnp.sum(w_src * w_tgt) / jnp.where(norms > 0, norms, 1)
