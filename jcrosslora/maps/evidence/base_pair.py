"""A pair of bases with the facts that several stages share: structure, shared vocabulary, cache entries."""

from __future__ import annotations

from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.architectures.names import EMBEDDING
from jcrosslora.cache import Cache
from jcrosslora.cache.keys import digest_of, numerics_key, tokenizer_key, weights_key
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.checkpoint.vocabulary import shared_ids
from jcrosslora.errors import CheckpointError
from jcrosslora.linalg import dot
from jcrosslora.maps.evidence.records import Vocabulary
from jcrosslora.relation import Structure, find_structure

_FIELDS = ("cross", "gram_src", "gram_tgt", "mean_src", "mean_tgt")
_TOKENS_AT_ONCE = 4096
# Sums of the rows of both sides, and of their products.
_Sums = tuple[jax.Array, ...]


class BasePair:
    """The source and the target of transfers. Facts about the pair are computed on first use and kept.

    Attributes:
        source: the base that adapters come from.
        target: the base that they are moved to.
        store: the disk cache for factors and transports; None disables it.
    """

    def __init__(self, source: BaseModel, target: BaseModel, store: Cache | None = None) -> None:
        self.source, self.target, self.store = source, target, store

    @cached_property
    def cache(self) -> PairCache | None:
        """Return the cache entries of the pair. The first use reads the weight files to digest them."""
        return None if self.store is None else PairCache(self.store, self.source, self.target)

    @cached_property
    def structure(self) -> tuple[Structure | None, str]:
        """Return which parts of the target are parts of the source, or None and the reason."""
        return find_structure(self.source, self.target)

    @cached_property
    def shared_tokens(self) -> tuple[int, str]:
        """Return the number of tokens that both bases have, or 0 and the reason."""
        count = None if self.cache is None else self.cache.shared_tokens()
        if count is not None:
            return count, ""
        found, reason = self.vocabulary
        return (0, reason) if found is None else (found.count, "")

    @cached_property
    def vocabulary(self) -> tuple[Vocabulary | None, str]:
        """Return the moments of the shared vocabulary, or None and the reason."""
        kept = None if self.cache is None else self.cache.vocabulary()
        if kept is not None:
            return kept, ""
        found, reason = shared_vocabulary(self.source, self.target)
        if self.cache is not None and found is not None:
            self.cache.keep_vocabulary(found)
        return found, reason


class PairCache:
    """The cache entries of one pair of bases.

    Attributes:
        store: the cache.
        weights: digests of the weights of the source and of the target.
        names: the names of both bases, shown in listings.
    """

    def __init__(self, store: Cache, source: BaseModel, target: BaseModel) -> None:
        """Digest both bases; weight files are read unless their digests are remembered."""
        self.store, self._bases = store, (source, target)
        self.names = f"{public_name(source.name)} to {public_name(target.name)}"
        self.weights = tuple(weights_key(base, store.digests) for base in self._bases)
        self._numerics = numerics_key()

    def key(self, *parts: object, tokenizers: bool) -> str:
        """Digest everything that an entry of the pair depends on.

        `parts` are JSON values that identify it; `tokenizers` says whether it depends on them as well as on the
        weights.
        """
        return digest_of(self._with_tokenizers if tokenizers else self.weights, self._numerics, *parts)

    def shared_tokens(self) -> int | None:
        """Return the cached number of tokens that the vocabularies share, or None."""
        facts = self.store.facts("vocabulary", self.key(tokenizers=True))
        return None if facts is None else facts["count"]

    def vocabulary(self) -> Vocabulary | None:
        """Return the cached moments of the shared vocabulary, or None."""
        loaded = self.store.load("vocabulary", self.key(tokenizers=True))
        if loaded is None:
            return None
        return Vocabulary(count=loaded.facts["count"], **{name: jnp.asarray(loaded.arrays[name]) for name in _FIELDS})

    def keep_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Store the moments of the shared vocabulary."""
        arrays = {name: getattr(vocabulary, name) for name in _FIELDS}
        what = f"{vocabulary.count} tokens, {self.names}"
        self.store.save("vocabulary", self.key(tokenizers=True), what, arrays, {"count": vocabulary.count})

    @cached_property
    def _with_tokenizers(self) -> tuple[str, ...]:
        """Return the keys of weights and tokenizers."""
        return (*self.weights, *(tokenizer_key(base) for base in self._bases))


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
        centres = tuple(base.rows(EMBEDDING, ids[parts[0]]).mean(axis=0) for base, ids in sides)
        for part in parts:
            rows = (base.rows(EMBEDDING, ids[part]) for base, ids in sides)
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
