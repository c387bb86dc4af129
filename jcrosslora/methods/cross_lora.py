"""Methods that move an update by the truncated SVDs of both bases: Cross-LoRA, LoRA-X, ProLoRA, and their control.

Cross-LoRA (arXiv 2508.05232) is LoRA-Align and LoRA-Shift, in the one reading that its equations allow. As printed,
with W = U S V' truncated to rank r on both sides:

    Eq. 3, 4   P_U = argmin ||P U_s - U_t||_F^2,   P_V = argmin ||P V_s - V_t||_F^2
    Eq. 5, 6   U~_s = P_U U_s,                     V~_s = P_V V_s
    Eq. 7      dW_t = U~_s (U~_s' dW_s V~_s) V~_s'

U_s has orthonormal columns, so Eq. 3 is solved by P_U = U_t U_s' with a minimum of exactly zero, and U~_s = U_t: the
"aligned" basis is that of the target, for any source. With equal shapes Eq. 7 is therefore
U_t U_t' dW_s V_t V_t', which is LoRA-X. With unequal shapes it cannot be evaluated, because
U~_s' and dW_s do not fit. The only reading that fits all shapes applies the maps of Eq. 3 and 4 to the update,

    dW_t = P_U dW_s P_V' = U_t (U_s' dW_s V_s) V_t'

and sends the i-th singular pair of the source to the i-th of the target. Singular pairs are defined up to a joint
sign, so this is U_t D U_s' dW_s V_s D V_t' with a diagonal D of signs that the paper does not mention; `joint_signs`
chooses them from information outside the two matrices.

LoRA-X (arXiv 2501.16559, Eq. 3) projects into the leading singular subspaces of the target. ProLoRA (arXiv 2506.04244)
moves range and null space separately: with the projectors P = U U' (range, rank r) and I - P (null space) of both bases
on both sides,

    dW_t = P_t^out (P_s^out dW_s P_s^in) P_t^in + (I - P_t^out) ((I - P_s^out) dW_s (I - P_s^in)) (I - P_t^in)

The cross terms (range on one side, null space on the other) are dropped, as in the paper. The two terms double the rank
of the update: 2 K. The paper pairs modules by subspace similarity; here the pairing is given. Both need equal shapes.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jcrosslora.linalg import LinearMap, TruncatedSVD, array_module, complement, dot, low_rank
from jcrosslora.maps import DEFAULT_SVD_RANK, Evidence, EvidenceKind, MapMethod, Maps


@dataclass(frozen=True)
class CrossLoRA(MapMethod):
    """The i-th singular pair of the source goes to the i-th of the target."""

    name = "cross-lora"
    summary = "i-th singular pair of the source to the i-th of the target: U_t D U_s' dW V_s D V_t'"
    when = "to compare with the paper"
    reference = "arXiv 2508.05232, Eq. 3-7"
    requires = frozenset({EvidenceKind.SINGULAR_VECTORS, EvidenceKind.SHARED_VOCABULARY})
    measure = "vector ratio"
    single_vectors = True
    takes_numpy = True

    svd_rank: int = DEFAULT_SVD_RANK
    """Truncation rank R of the SVDs. A module whose short side is smaller uses that."""

    def maps(self, evidence: Evidence) -> Maps:
        """Return P_out = U_t D U_s' and P_in = V_t D V_s'."""
        src, tgt = evidence.singular_vectors_src, evidence.singular_vectors_tgt
        signs, ratio = joint_signs(evidence)
        return Maps(((low_rank(tgt.u, src.u, signs), low_rank(tgt.v, src.v, signs)),), ratio)


@dataclass(frozen=True)
class LoRAX(MapMethod):
    """Projection into the leading singular subspaces of the target. The source's SVD serves the diagnostics only."""

    name = "lora-x"
    summary = "projection into the target's singular subspaces: U_t U_t' dW V_t V_t'"
    when = "to compare with the paper"
    reference = "arXiv 2501.16559, Eq. 3"
    requires = frozenset({EvidenceKind.SINGULAR_VECTORS})
    measure = "subspace similarity"
    takes_numpy = True
    equal_shapes = True

    svd_rank: int = DEFAULT_SVD_RANK
    """Truncation rank R of the SVDs. A module whose short side is smaller uses that."""

    def maps(self, evidence: Evidence) -> Maps:
        """Return P_out = U_t U_t' and P_in = V_t V_t'."""
        svd = evidence.singular_vectors_tgt
        return Maps(((low_rank(svd.u, svd.u), low_rank(svd.v, svd.v)),))


@dataclass(frozen=True)
class ProLoRA(LoRAX):
    """Range and null space of source and target, moved separately, which doubles the rank."""

    name = "prolora"
    summary = "range and null space of source and target, moved separately; rank 2 K"
    when = "to compare with the paper"
    reference = "arXiv 2506.04244"

    def maps(self, evidence: Evidence) -> Maps:
        """Return two terms: through both ranges, and through both complements."""
        src, tgt = evidence.singular_vectors_src, evidence.singular_vectors_tgt
        within = (_both_projections(tgt.u, src.u), _both_projections(tgt.v, src.v))
        outside = (complement(tgt.u, src.u), complement(tgt.v, src.v))
        return Maps((within, outside))


@dataclass(frozen=True)
class Random(MapMethod):
    """Uniformly random orthonormal bases instead of singular vectors."""

    name = "random"
    summary = "control: random orthonormal bases, norm of the update kept"
    when = "to compare any method with chance"
    reference = "control"
    requires = frozenset({EvidenceKind.RANDOM_KEY})
    is_control = True

    svd_rank: int = DEFAULT_SVD_RANK
    """Truncation rank R of the SVDs. A module whose short side is smaller uses that."""

    def maps(self, evidence: Evidence) -> Maps:
        """Return P_out = Q_t Q_s' and P_in = R_t R_s', uniformly random with inner width R."""
        (o_src, i_src), (o_tgt, i_tgt) = evidence.src.weight.shape, evidence.tgt.weight.shape
        out_key, in_key = jax.random.split(evidence.random_key)
        return Maps(((_random(out_key, o_src, o_tgt, evidence.rank), _random(in_key, i_src, i_tgt, evidence.rank)),))


# Pairs (i, j) up to this distance from the diagonal estimate chance: they are different vectors, but close in the
# spectrum, so that their size in the vocabulary is similar.
NEIGHBOURS = 8


def joint_signs(evidence: Evidence) -> tuple[jax.Array, jax.Array]:
    """Find signs d (R,) such that d_i (u_i, v_i) of the target corresponds to (u_i, v_i) of the source.

    With a shared vocabulary: every module has the residual stream on one side, where the vectors of both bases are
    functions of a token: E_src g_src v_i and E_tgt g_tgt v_i, with E the embeddings of the shared tokens and g the norm
    gain in between. d_i is the sign of their correlation over the tokens. The sign is joint, so it also holds for the
    other side of the module.

    Without a shared vocabulary: the entry of largest magnitude of the vector on the stream's side is made positive in
    each base. This depends on the basis and does not make two bases agree; it only makes the result reproducible.

    Returns d, and the ratio () of the mean squared correlation of the pairs (i, i) to the mean of nearby pairs (i, j);
    1 is chance, NaN without a vocabulary.
    """
    xp = array_module(evidence.singular_vectors_src.u)
    if evidence.vocabulary is None:
        src, tgt = evidence.singular_vectors_src, evidence.singular_vectors_tgt
        return _own_signs(src, evidence.reads) * _own_signs(tgt, evidence.reads), xp.full((), xp.nan, xp.float32)
    # (R, R), over the shared tokens, of source vector i with target vector j.
    cross, spread_src, spread_tgt = evidence.token_covariances
    correlations = cross * _inverse_spread(spread_src)[:, None] * _inverse_spread(spread_tgt)
    diagonal = xp.diagonal(correlations)
    return xp.where(diagonal >= 0, 1.0, -1.0).astype(diagonal.dtype), _contrast(correlations**2)


def _own_signs(svd: TruncatedSVD, reads: bool) -> jax.Array:
    vectors = svd.v if reads else svd.u
    xp = array_module(vectors)
    largest = xp.take_along_axis(vectors, xp.argmax(xp.abs(vectors), axis=0)[None, :], axis=0)[0]
    return xp.where(largest >= 0, 1.0, -1.0).astype(largest.dtype)


def _inverse_spread(variance: jax.Array) -> jax.Array:
    xp = array_module(variance)
    return xp.where(variance > 0, 1 / xp.sqrt(xp.where(variance > 0, variance, 1)), 0)


def _contrast(squared: jax.Array) -> jax.Array:
    """Divide the mean of the diagonal by the mean of the entries at most NEIGHBOURS columns from it."""
    xp = array_module(squared)
    index = xp.arange(squared.shape[0])
    apart = xp.abs(index[:, None] - index[None, :])
    near = (apart > 0) & (apart <= NEIGHBOURS)
    chance = xp.sum(xp.where(near, squared, 0)) / xp.maximum(xp.sum(near.astype(squared.dtype)), 1)
    return xp.where(chance > 0, xp.mean(xp.diagonal(squared)) / xp.where(chance > 0, chance, 1), xp.nan)


def _both_projections(first: jax.Array, second: jax.Array) -> LinearMap:
    """Return F F' S S'."""
    return low_rank(dot(first, dot(first.T, second)), second)


def _random(key: jax.Array, size_src: int, size_tgt: int, rank: int) -> LinearMap:
    src, tgt = jax.random.split(key)
    return low_rank(_orthonormal(tgt, size_tgt, rank), _orthonormal(src, size_src, rank))


def _orthonormal(key: jax.Array, size: int, rank: int) -> jax.Array:
    """Draw a uniformly random (size, rank) with orthonormal columns: QR of a normal matrix, R's diagonal positive."""
    q, r = jnp.linalg.qr(jax.random.normal(key, (size, rank)))
    return q * jnp.where(jnp.diagonal(r) >= 0, 1.0, -1.0)
