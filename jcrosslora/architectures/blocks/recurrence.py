"""Linear recurrences with a decay, in chunks: state-space models (Mamba 2) and the gated delta rule.

Both keep a matrix S in place of keys and values, and a token t changes and reads it:

    S_t = exp(g_t) S_(t-1) + k_t u_t',    y_t = S_t' q_t

In Mamba 2 (arXiv 2405.21060) u_t is the value v_t. By the gated delta rule (arXiv 2412.06464) it is
beta_t (v_t - exp(g_t) S_(t-1)' k_t): what the state already answers to the key is subtracted. The tokens of a chunk are
computed together with matrix products, chunks one after the other. All numbers are float32.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from jcrosslora.architectures.ops import einsum

CHUNK = 64


def decaying_recurrence(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    decay: jax.Array,
    state: jax.Array,
    beta: jax.Array | None = None,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Run the recurrence of one head over T tokens.

    A token with a decay and a key (or a beta) of 0 leaves the state as it is.

    Args:
        queries: float32 (T, N).
        keys: float32 (T, N).
        values: float32 (T, P).
        decay: float32 (T,), g, at most 0.
        state: float32 (N, P) before the first token.
        beta: float32 (T,) for the delta rule, else None.
        chunk: tokens computed together, static.

    Returns:
        (T, P), and the state after the last token.
    """
    length = len(queries)
    size = min(chunk, length)

    def cut(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, -length % size), *((0, 0),) * (x.ndim - 1))).reshape(-1, size, *x.shape[1:])

    parts = jax.tree.map(cut, (queries, keys, values, decay, beta))
    state, out = lax.scan(_chunk, state, parts)
    return out.reshape(-1, values.shape[1])[:length], state


def _chunk(state: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    queries, keys, values, decay, beta = part
    total = jnp.cumsum(decay)
    between = total[:, None] - total[None, :]  # from token s (columns) to token t (rows)
    lower = jnp.tril(jnp.ones(between.shape, bool))
    # Masked before exp, which is infinite above the diagonal.
    weights = jnp.exp(jnp.where(lower, between, -jnp.inf))
    since = jnp.exp(total)[:, None]
    written = values if beta is None else _corrected(state, keys, values, weights, since, beta[:, None])
    scores = einsum("tn,sn->ts", queries, keys) * weights
    out = einsum("tn,np->tp", queries * since, state) + einsum("ts,sp->tp", scores, written)
    left = jnp.exp(total[-1] - total)[:, None]
    return since[-1] * state + einsum("tn,tp->np", keys * left, written), out


def _corrected(
    state: jax.Array, keys: jax.Array, values: jax.Array, weights: jax.Array, since: jax.Array, beta: jax.Array
) -> jax.Array:
    """Return u (T, P) of a chunk by the delta rule.

    u_t depends on all earlier u_s of the chunk: (I + tril(beta k k' weights, -1)) u = beta (v - decayed state' k).
    """
    answered = einsum("tn,np->tp", keys * since, state)
    # Solved rather than inverted by powers, whose entries grow until float32 has no digits left.
    system = beta * einsum("tn,sn->ts", keys, keys) * weights
    return solve_triangular(system, beta * (values - answered), lower=True, unit_diagonal=True)


def grouped_recurrence(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    decay: jax.Array,
    state: jax.Array,
    beta: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Run the recurrence of H heads, of which H / G consecutive ones share their queries and keys.

    Args:
        queries: float32 (T, G, N).
        keys: float32 (T, G, N).
        values: float32 (T, H, P).
        decay: float32 (T, H).
        state: float32 (H, N, P).
        beta: float32 (T, H), or None.

    Returns:
        (T, H, P), and the state after the last token.
    """
    groups = queries.shape[1]

    def split(x: jax.Array, axis: int) -> jax.Array:
        return x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])

    betas = None if beta is None else split(beta, 1)
    # Products of queries and keys, which are outside the inner vmap, are made once a group.
    of_group = jax.vmap(decaying_recurrence, (None, None, 1, 1, 0, 1), (1, 0))
    of_all = jax.vmap(of_group, (1, 1, 1, 1, 0, 1), (1, 0))
    out, state_after = of_all(queries, keys, split(values, 1), split(decay, 1), split(state, 0), betas)
    return out.reshape(values.shape), state_after.reshape(state.shape)
