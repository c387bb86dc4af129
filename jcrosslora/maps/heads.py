"""A map of the residual stream by the embeddings of shared tokens, and attention heads matched through it."""

import dataclasses
from collections.abc import Iterable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcrosslora.architectures.blocks import ATTENTION, BY_HEAD, module_name
from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import MethodError
from jcrosslora.linalg import dot
from jcrosslora.maps.base_pair import BasePair
from jcrosslora.maps.evidence import Evidence, HeadMatch, Vocabulary
from jcrosslora.maps.task import AddEvidence, AlignmentTask, ModuleStack
from jcrosslora.relation.pairing import Pair

# The moments are sums in float32: directions of the embeddings weaker than their rounding are noise.
_ROUNDING = 10 * float(np.finfo(np.float32).eps)


@flax.struct.dataclass
class AttentionWeights:
    """The weights of one layer's attention: q (N D, H), k and v (G D, H), o (H, N D).

    N query heads and G key heads have D features; `heads` N and `kv_heads` G are static.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    o: jax.Array
    heads: int = flax.struct.field(pytree_node=False)
    kv_heads: int = flax.struct.field(pytree_node=False)


def collect_embedding_map(task: AlignmentTask) -> AddEvidence:
    """Solve for the map of the residual stream, and match the heads of every pair of layers."""
    found = task.pair.vocabulary[0]
    assert found is not None
    stream = embedding_map(found)
    vocabulary = dataclasses.replace(found, stream=stream)
    heads = match_heads(task.pair, task.modules, stream)

    def add(evidence: Evidence, stack: ModuleStack) -> Evidence:
        evidence = dataclasses.replace(evidence, vocabulary=vocabulary)
        if stack.pairs[0].target not in heads:
            return evidence
        matches = stack.filled([heads[pair.target] for pair in stack.pairs])
        return dataclasses.replace(evidence, heads=jax.tree.map(lambda *leaves: jnp.stack(leaves), *matches))

    return add


def check_shared_tokens(task: AlignmentTask) -> None:
    """Raise `MethodError` for bases whose vocabularies share too few tokens, or cannot be read."""
    count, reason = task.pair.shared_tokens
    if not count:
        name = (task.method.map_method or task.method).name
        msg = f"method {name} needs tokens that both bases have: {reason}; use another method"
        raise MethodError(msg)


def embedding_map(vocabulary: Vocabulary) -> jax.Array:
    """Solve E_src W = E_tgt for the least-squares W (H_src, H_tgt) of smallest norm, in float64 on the host."""
    mean_src, mean_tgt = np.asarray(vocabulary.mean_src, np.float64), np.asarray(vocabulary.mean_tgt, np.float64)
    gram = np.asarray(vocabulary.gram_src, np.float64) + np.outer(mean_src, mean_src)
    cross = np.asarray(vocabulary.cross, np.float64) + np.outer(mean_src, mean_tgt)
    return jnp.asarray(np.linalg.pinv(gram, rcond=_ROUNDING, hermitian=True) @ cross, jnp.float32)


def match_heads(pair: BasePair, modules: Iterable[Pair], stream: jax.Array) -> dict[str, HeadMatch]:
    """Match the attention heads of every pair of attention modules; the result is by the target's name.

    The match uses all four attention modules of a layer, whichever of them are paired, and reads a layer at a time. A
    role is skipped that is also in layers without all four, such as o_proj where layers read the keys of others.
    `stream` (H_src, H_tgt) maps rows of the source's residual stream to those of the target. Raises CheckpointError if
    a weight cannot be read.
    """
    by_layers: dict[tuple[int, int], tuple[np.ndarray, float]] = {}
    found, skipped, attention = {}, set(), [one for one in modules if one.role in BY_HEAD]
    for one in attention:
        for base, name in zip(pair, (one.source, one.target), strict=True):
            if not base.modules.keys() >= {*_names(base.modules[name].layer)}:
                skipped.add(one.role)
    for one in attention:
        if one.role not in skipped:
            layers = pair.source.modules[one.source].layer, pair.target.modules[one.target].layer
            if layers not in by_layers:
                src, tgt = map(_attention, pair, layers)
                cosines = np.asarray(circuit_cosines(src, tgt, stream))
                match = best_match(cosines)
                by_layers[layers] = match, float(cosines[match.T].mean())
            match, cosine = by_layers[layers]
            match = mean_over_groups(match, *pair.head_counts(one.role))
            found[one.target] = HeadMatch(jnp.asarray(match, jnp.float32), jnp.asarray(cosine, jnp.float32))
    return found


def _attention(base: BaseModel, layer: int) -> AttentionWeights:
    names = _names(layer)
    q, k, v, o = (jnp.asarray(base.weight(name)).astype(jnp.float32) for name in names)
    base.release()
    if base.modules[names[0]].role == "qg_proj":  # rows of queries and of gates in turn
        q = q.reshape(base.dims.heads, 2, base.dims.head_dim, -1)[:, 0].reshape(-1, q.shape[1])
    return AttentionWeights(q, k, v, o, base.dims.heads, base.dims.kv_heads)


def _names(layer: int) -> list[str]:
    return [module_name(layer, role) for role in ATTENTION]


@jax.jit
def circuit_cosines(src: AttentionWeights, tgt: AttentionWeights, stream: jax.Array) -> jax.Array:
    """Compute the cosine of [M'Q'K M, M'V'O'M] of each source head with [Q'K, V'O'] of each target head.

    Key and value heads are repeated for the query heads that they serve. No H x H matrix is formed for a head:
    the inner product of Q_1'K_1 and Q_2'K_2 is the sum of (Q_1 Q_2') * (K_1 K_2'). `stream` is M (H_src, H_tgt), which
    maps rows of the source's residual stream to those of the target; the cosines are (N_src, N_tgt).
    """
    carried = AttentionWeights(
        dot(src.q, stream), dot(src.k, stream), dot(src.v, stream), dot(stream.T, src.o), src.heads, src.kv_heads
    )
    own_src, own_tgt = (jnp.diagonal(_products(side, side)) for side in (carried, tgt))
    sizes = jnp.sqrt(jnp.maximum(own_src, 0))[:, None] * jnp.sqrt(jnp.maximum(own_tgt, 0))
    return jnp.where(sizes > 0, _products(carried, tgt) / jnp.where(sizes > 0, sizes, 1), 0)


def best_match(cosines: np.ndarray) -> np.ndarray:
    """Pair heads one to one so that the sum of their cosines (N_src, N_tgt) is largest; bool (N_tgt, N_src)."""
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
