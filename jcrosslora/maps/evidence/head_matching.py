"""Match attention heads of two layers by the cosine of their circuits, seen through a map of the residual stream."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcrosslora.linalg import dot


@flax.struct.dataclass
class AttentionWeights:
    """The weights of one layer's attention; N query heads and G key heads of D features.

    Attributes:
        q: (N D, H).
        k: (G D, H).
        v: (G D, H).
        o: (H, N D).
        heads: static, N.
        kv_heads: static, G.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    o: jax.Array
    heads: int = flax.struct.field(pytree_node=False)
    kv_heads: int = flax.struct.field(pytree_node=False)


@jax.jit
def circuit_cosines(src: AttentionWeights, tgt: AttentionWeights, stream: jax.Array) -> jax.Array:
    """Compute the cosine of [M'Q'K M, M'V'O'M] of each source head with [Q'K, V'O'] of each target head.

    Key and value heads are repeated for the query heads that they serve. No H x H matrix is formed for a head:
    the inner product of Q_1'K_1 and Q_2'K_2 is the sum of (Q_1 Q_2') * (K_1 K_2').

    Args:
        src: the source's layer.
        tgt: the target's layer.
        stream: M (H_src, H_tgt), maps rows of the source's residual stream to the target's.

    Returns:
        (N_src, N_tgt).
    """
    carried = AttentionWeights(
        dot(src.q, stream), dot(src.k, stream), dot(src.v, stream), dot(stream.T, src.o), src.heads, src.kv_heads
    )
    own_src, own_tgt = (jnp.diagonal(_products(side, side)) for side in (carried, tgt))
    sizes = jnp.sqrt(jnp.maximum(own_src, 0))[:, None] * jnp.sqrt(jnp.maximum(own_tgt, 0))
    return jnp.where(sizes > 0, _products(carried, tgt) / jnp.where(sizes > 0, sizes, 1), 0)


def best_match(cosines: np.ndarray) -> np.ndarray:
    """Pair heads one to one so that the sum of their cosines (N_src, N_tgt) is largest.

    Returns:
        bool (N_tgt, N_src), True for the min(N_src, N_tgt) pairs.
    """
    # Imported here: importing scipy.optimize takes as long as importing the rest of the package.
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cosines, maximize=True)
    match = np.zeros(cosines.shape[::-1], bool)
    match[columns, rows] = True
    return match


def mean_over_groups(match: np.ndarray, groups_tgt: int, groups_src: int) -> np.ndarray:
    """Average a match of query heads (N_tgt, N_src) over the query heads that each key head serves: (G_tgt, G_src)."""
    heads_tgt, heads_src = match.shape
    blocks = match.reshape(groups_tgt, heads_tgt // groups_tgt, groups_src, heads_src // groups_src)
    return blocks.sum(axis=(1, 3)) / (heads_tgt // groups_tgt)


def _products(x: AttentionWeights, y: AttentionWeights) -> jax.Array:
    """Compute <Q_x'K_x, Q_y'K_y> + <V_x'O_x', V_y'O_y'> of each pair of heads, (N_x, N_y)."""
    queries, outputs = _blocks(dot(x.q, y.q.T), x.heads, y.heads), _blocks(dot(x.o.T, y.o), x.heads, y.heads)
    keys, values = (_blocks(dot(a, b.T), x.kv_heads, y.kv_heads) for a, b in ((x.k, y.k), (x.v, y.v)))
    repeats = x.heads // x.kv_heads, y.heads // y.kv_heads

    def paired(by_head: jax.Array, by_group: jax.Array) -> jax.Array:
        split = by_head.reshape(x.kv_heads, repeats[0], by_head.shape[1], y.kv_heads, repeats[1], by_head.shape[3])
        sums = jnp.einsum("gidhje,gdhe->gihj", split, by_group, precision=lax.Precision.HIGHEST)
        return sums.reshape(x.heads, y.heads)

    return paired(queries, keys) + paired(outputs, values)


def _blocks(products: jax.Array, heads_x: int, heads_y: int) -> jax.Array:
    """Reshape (N_x D_x, N_y D_y) to (N_x, D_x, N_y, D_y)."""
    rows, columns = products.shape
    return products.reshape(heads_x, rows // heads_x, heads_y, columns // heads_y)
