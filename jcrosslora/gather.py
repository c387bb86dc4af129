"""From base models to arrays on the device: stacks of weights, and the moments of the shared vocabulary."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import TypeVar

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
# Weights of both bases in a group, in bytes as float32. While one group is aligned the next is read: two of them bound
# memory, whatever the model's size.
GROUP_BYTES = 96 * 2**20
T = TypeVar("T")
# Of the rows of both sides, and of their products.
_Sums = tuple[jax.Array, ...]


def bounded_groups(items: Sequence[T], key: Callable[[T], Hashable], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Items of one key at a time, in groups as even as can be.

    Args:
        items: modules or pairs of them.
        key: of an item; those of one key can be stacked.
        size: bytes of an item, the same for all of one key. A group has `GROUP_BYTES` of them at most.
    """
    alike: dict[Hashable, list[T]] = {}
    for item in items:
        alike.setdefault(key(item), []).append(item)
    for same in alike.values():
        most = max(jax.device_count(), GROUP_BYTES // size(same[0]))  # a device without an item would repeat another's
        for part in np.array_split(np.arange(len(same)), -(-len(same) // most)):
            yield [same[place] for place in part]


def load_stack(base: BaseModel, names: Sequence[str]) -> jax.Array:
    """The weights of several modules of equal shape, (L', O, I) float32, spread over all local devices.

    L' is len(names) rounded up to a multiple of the device count; the surplus repeats the last module. Weights go
    to the device in their stored dtype and are widened there, unless that differs from module to module.

    Raises:
        CheckpointError: a weight holds NaN or infinity.
    """
    weights = [base.weight(name) for name in names]
    if len({weight.dtype for weight in weights}) > 1:  # numpy has no dtype that holds both float16 and bfloat16
        weights = [weight.astype(np.float32) for weight in weights]
    surplus = -len(names) % jax.local_device_count()
    stored = np.stack(weights + weights[-1:] * surplus)
    stack, found = _widen_on_host(stored) if jax.default_backend() == "cpu" else _widen(spread(stored))
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


def _widen_on_host(stack: np.ndarray) -> tuple[jax.Array, np.ndarray]:
    """As `_widen`, where the device is the host: nothing is to be compiled for it."""
    stack = stack.astype(np.float32, copy=False)
    return spread(stack), np.array([np.isfinite(w).all() for w in stack])


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
    sides = (source, ids_src), (target, ids_tgt)
    parts = [slice(start, start + _TOKENS_AT_ONCE) for start in range(0, len(ids_src), _TOKENS_AT_ONCE)]
    totals = None
    with np.errstate(over="ignore", invalid="ignore"):  # What is not finite is found in the sums.
        # Second moments around a nearby centre lose no digits when the true mean is taken off at the end.
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
    """Rows around the centre, and rows of zeros, which add nothing, up to the number that the program is made for."""
    return np.pad(rows - centre, ((0, _TOKENS_AT_ONCE - len(rows)), (0, 0)))


@jax.jit
def _add(totals: _Sums | None, x: jax.Array, y: jax.Array) -> _Sums:
    """Sums of the rows of X (N, D_src) and Y (N, D_tgt), of X'Y, X'X and Y'Y, on top of what there is."""
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
