"""LoRASuite (arXiv 2505.13515) without its fine-tuning: a map through shared tokens, and heads matched one to one.

In the paper's row convention, with E the embeddings of the tokens that both bases have, not centred,

    W_h = pinv(E_s) E_t                                    the residual stream, (H_src, H_tgt)
    attention, by head   dW_t^j = W_h' dW_s^i (W_s^i)' W_h W_t^j       head j of the target matched with i of the source
    MLP                  W_i = pinv(W_s) W_h W_t,  dW_t = W_h' dW_s W_i

As P_out and P_in, the stream's side is W_h' everywhere. The other side is X_t W_h' X_s' head by head in attention and
X_t W_h' pinv(X_s) in the MLP, where X is a weight with the stream as its columns. Heads are matched by the cosine of
their circuits, [W_h' Q'K W_h, W_h' V'O' W_h] against [Q'K, V'O'], with the largest total (Hungarian method).

- The equations have X_s' instead of the inverse: an attention update is scaled by the squared size of the weights.
- Keys and values that serve several query heads are repeated for each, as published. The update of a target's key or
  value head is the mean over its query heads, with zeros for heads without a match.
- Norm gains and rotary positions are ignored.

The paper leaves some cases open. If the target has fewer heads than the source (the published code stops), heads
without a match are dropped with their updates. If heads differ in size, X_t W_h' X_s' maps between the sizes. gate is
treated as up. The layers are those of `--depth`; the paper's are `--depth similar`. For up and for the outputs of down
the published code has pinv(W_h) where the equations have W_h'; here it is W_h', as for attention: between independently
trained bases the inverse is unbounded (a condition number of 300 on the one pair measured).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jcrosslora.linalg import LinearMap, dot, low_rank
from jcrosslora.maps import Evidence, EvidenceKind, MapMethod, Maps


@dataclass(frozen=True)
class LoRASuite(MapMethod):
    """Map the stream by the embeddings of shared tokens, attention by matched heads. Its fine-tuning is left out."""

    name = "lorasuite"
    summary = "the stream by the embeddings of shared tokens, attention by matched heads; no fine-tuning"
    when = "to compare with the paper"
    reference = "arXiv 2505.13515"
    requires = frozenset({EvidenceKind.EMBEDDING_MAP})
    measure = "head cosine"

    def maps(self, evidence: Evidence) -> Maps:
        """Return W_h' on the stream's side; by head, or through the source's pseudo-inverse, on the other."""
        stream, heads = evidence.embedding_map.T, evidence.heads
        x_src, x_tgt = (side.weight if evidence.reads else side.weight.T for side in (evidence.src, evidence.tgt))
        if heads is None:
            inner, likeness = _through_inverse(x_src, x_tgt, stream), jnp.full((), jnp.nan)
        else:
            inner, likeness = _by_head(x_src, x_tgt, stream, heads.match), heads.cosine
        pair = (inner, _dense(stream)) if evidence.reads else (_dense(stream), inner)
        return Maps((pair,), head_cosine=likeness)


def _through_inverse(x_src: jax.Array, x_tgt: jax.Array, stream: jax.Array) -> LinearMap:
    """Return X_t W_h' pinv(X_s), of inner width H_src or less."""
    u, s, vt = jnp.linalg.svd(x_src, full_matrices=False)
    reached = s > jnp.finfo(s.dtype).eps * max(x_src.shape) * s[0]
    inverse = jnp.where(reached, 1 / jnp.where(reached, s, 1), 0)
    return low_rank(dot(x_tgt, dot(stream, vt.T * inverse)), u)


def _by_head(x_src: jax.Array, x_tgt: jax.Array, stream: jax.Array, match: jax.Array) -> LinearMap:
    """Return X_t W_h' X_s' with its blocks weighted by `match` (N_tgt, N_src)."""
    products = dot(x_tgt, dot(stream, x_src.T))
    sizes = [width // count for width, count in zip(products.shape, match.shape, strict=True)]
    return _dense(products * jnp.repeat(jnp.repeat(match, sizes[0], axis=0), sizes[1], axis=1))


def _dense(matrix: jax.Array) -> LinearMap:
    """Wrap a dense matrix as a map whose inner width is its short side."""
    rows, columns = matrix.shape
    eye = jnp.eye(min(rows, columns), dtype=matrix.dtype)
    return low_rank(eye, matrix.T) if rows < columns else low_rank(matrix, eye)
