"""From base models to arrays on the device: stacks of weights, and the moments of the shared vocabulary."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import CheckpointError
from jcrosslora.linalg import dot, spread
from jcrosslora.methods import Vocabulary

# Fewer shared tokens than this give correlations no better than guesses.
FEWEST_TOKENS = 32
_TOKENS_AT_ONCE = 4096


def load_stack(base: BaseModel, names: Sequence[str]) -> jax.Array:
    """The weights of several modules of equal shape, (L', O, I) float32, spread over all local devices.

    L' is len(names) rounded up to a multiple of the device count; the surplus repeats the last module. Weights go
    to the device in their stored dtype and are widened there.

    Raises:
        CheckpointError: a weight holds NaN or infinity.
    """
    weights = [base.weight(name) for name in names]
    surplus = -len(names) % jax.local_device_count()
    stack, found = _widen(spread(np.stack(weights + weights[-1:] * surplus)))
    finite = np.asarray(found)
    base.release()
    if not finite.all():
        name = names[min(int(np.argmin(finite)), len(names) - 1)]
        msg = f"{base.ref}: the weight of {name} holds NaN or infinity; the file is damaged, download it again"
        raise CheckpointError(msg)
    return stack


@jax.jit
def _widen(stack: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(L, O, I) in float32, and (L,) whether all of it is finite."""
    stack = stack.astype(jnp.float32)
    return stack, jnp.isfinite(stack).all(axis=(1, 2))


def shared_ids(source: BaseModel, target: BaseModel) -> tuple[tuple[np.ndarray, np.ndarray] | None, str]:
    """Ids (V,) in source and target of the tokens that both have: those that stand for the same bytes.

    Returns:
        The ids in the order of the tokens' bytes, or None with the reason.
    """
    vocabulary_src, vocabulary_tgt = source.vocabulary(), target.vocabulary()
    for base, vocabulary in ((source, vocabulary_src), (target, vocabulary_tgt)):
        if vocabulary.tokens is None:
            return None, f"{base.ref}: {vocabulary.reason}"
    assert vocabulary_src.tokens is not None
    assert vocabulary_tgt.tokens is not None
    shared = sorted(vocabulary_src.tokens.keys() & vocabulary_tgt.tokens.keys())
    if len(shared) < FEWEST_TOKENS:
        return None, f"the two vocabularies share {len(shared)} tokens, fewer than {FEWEST_TOKENS}"
    ids_src = np.array([vocabulary_src.tokens[token] for token in shared])
    ids_tgt = np.array([vocabulary_tgt.tokens[token] for token in shared])
    return (ids_src, ids_tgt), ""


def shared_vocabulary(source: BaseModel, target: BaseModel) -> tuple[Vocabulary | None, str]:
    """Centred second moments of both embedding tables over the tokens that both bases have.

    Only the rows of these tokens are read, a few thousand at a time.

    Returns:
        The moments, or None with the reason.
    """
    ids, reason = shared_ids(source, target)
    return (None, reason) if ids is None else (_moments(source, target, *ids), "")


def _moments(source: BaseModel, target: BaseModel, ids_src: np.ndarray, ids_tgt: np.ndarray) -> Vocabulary:
    count = len(ids_src)

    def rows(part: slice) -> tuple[jax.Array, jax.Array]:
        ids = (source, ids_src[part]), (target, ids_tgt[part])
        src, tgt = (jnp.asarray(base.rows(base.embedding_name, own)) for base, own in ids)
        return src, tgt

    parts = [slice(start, start + _TOKENS_AT_ONCE) for start in range(0, count, _TOKENS_AT_ONCE)]
    # Second moments around a nearby centre lose no digits when the true mean is taken off at the end.
    centre_src, centre_tgt = (x.mean(axis=0) for x in rows(parts[0]))
    totals = None
    for part in parts:
        src, tgt = rows(part)
        sums = _sums(src - centre_src, tgt - centre_tgt)
        totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
    source.release()
    target.release()
    assert totals is not None
    if not bool(jnp.isfinite(totals[2]).all()):
        msg = f"the embedding table of {source.ref} or {target.ref} holds NaN or infinity; download the file again"
        raise CheckpointError(msg)
    mean_src, mean_tgt = totals[0] / count, totals[1] / count
    return Vocabulary(
        cross=totals[2] / count - jnp.outer(mean_src, mean_tgt),
        gram_src=totals[3] / count - jnp.outer(mean_src, mean_src),
        gram_tgt=totals[4] / count - jnp.outer(mean_tgt, mean_tgt),
        count=count,
        mean_src=centre_src + mean_src,
        mean_tgt=centre_tgt + mean_tgt,
    )


@jax.jit
def _sums(x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
    return x.sum(axis=0), y.sum(axis=0), dot(x.T, y), dot(x.T, x), dot(y.T, y)
