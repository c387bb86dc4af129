"""Second moments of two embedding tables over the tokens that both bases have."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.vocabulary import shared_ids
from jcrosslora.errors import CheckpointError
from jcrosslora.linalg import dot
from jcrosslora.maps.evidence.records import Vocabulary

_TOKENS_AT_ONCE = 4096
# Sums of the rows of both sides, and of their products.
_Sums = tuple[jax.Array, ...]


def shared_vocabulary(source: BaseModel, target: BaseModel) -> tuple[Vocabulary | None, str]:
    """Compute centred second moments of both embedding tables over the tokens that both bases have.

    Only the rows of these tokens are read, a few thousand at a time.

    Returns:
        The moments, or None with the reason.
    """
    ids, reason = shared_ids(source, target)
    return (None, reason) if ids is None else (_moments(source, target, *ids), "")


def _moments(source: BaseModel, target: BaseModel, ids_src: np.ndarray, ids_tgt: np.ndarray) -> Vocabulary:
    sides = (source, ids_src), (target, ids_tgt)
    parts = [slice(start, start + _TOKENS_AT_ONCE) for start in range(0, len(ids_src), _TOKENS_AT_ONCE)]
    totals = None
    with np.errstate(over="ignore", invalid="ignore"):  # the sums are checked for non-finite numbers below
        # Second moments around a nearby centre lose no digits when the true mean is subtracted at the end.
        centres = tuple(base.rows(base.embedding_name, ids[parts[0]]).mean(axis=0) for base, ids in sides)
        for part in parts:
            rows = (base.rows(base.embedding_name, ids[part]) for base, ids in sides)
            totals = _add(totals, *map(_padded, rows, centres))
    source.release()
    target.release()
    assert totals is not None
    if not all(np.isfinite(total).all() for total in totals):
        msg = f"the embedding table of {source.ref} or {target.ref} holds NaN, infinity or numbers whose squares are "
        raise CheckpointError(msg + "beyond float32; download the file again")
    return _finish(totals, *centres, len(ids_src))


def _padded(rows: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Centre rows, and pad them with zero rows, which add nothing, to the number that `_add` is compiled for."""
    return np.pad(rows - centre, ((0, _TOKENS_AT_ONCE - len(rows)), (0, 0)))


@jax.jit
def _add(totals: _Sums | None, x: jax.Array, y: jax.Array) -> _Sums:
    """Add the sums of the rows of X (N, D_src) and Y (N, D_tgt), and X'Y, X'X and Y'Y, to the totals."""
    sums = x.sum(axis=0), y.sum(axis=0), dot(x.T, y), dot(x.T, x), dot(y.T, y)
    return sums if totals is None else jax.tree.map(jnp.add, totals, sums)


@partial(jax.jit, static_argnames="count")
def _finish(totals: _Sums, centre_src: jax.Array, centre_tgt: jax.Array, count: int) -> Vocabulary:
    mean_src, mean_tgt = totals[0] / count, totals[1] / count
    return Vocabulary(
        cross=totals[2] / count - jnp.outer(mean_src, mean_tgt),
        gram_src=totals[3] / count - jnp.outer(mean_src, mean_src),
        gram_tgt=totals[4] / count - jnp.outer(mean_tgt, mean_tgt),
        count=count,
        mean_src=centre_src + mean_src,
        mean_tgt=centre_tgt + mean_tgt,
    )
