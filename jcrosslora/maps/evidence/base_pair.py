"""A pair of bases with the facts that several stages share, and the cache entries of the pair."""

from __future__ import annotations

from functools import cached_property

import jax.numpy as jnp

from jcrosslora.cache import Cache
from jcrosslora.cache.keys import digest_of, numerics_key, tokenizer_key, weights_key
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.maps.evidence.factor_cache import FactorCache
from jcrosslora.maps.evidence.records import Vocabulary
from jcrosslora.maps.evidence.shared_vocabulary import shared_vocabulary
from jcrosslora.relation import Structure, find_structure


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


_MOMENTS = ("cross", "gram_src", "gram_tgt", "mean_src", "mean_tgt")


class PairCache:
    """The entries of one pair of bases.

    Attributes:
        store: the cache.
        source: factors of the source.
        target: factors of the target.
        names: the names of both bases, shown in listings.
    """

    def __init__(self, store: Cache, source: BaseModel, target: BaseModel) -> None:
        """Digest both bases; weight files are read unless their digests are remembered."""
        self.store, self._bases = store, (source, target)
        self.names = f"{public_name(source.name)} to {public_name(target.name)}"
        self._weights = tuple(weights_key(base, store.digests) for base in self._bases)
        self._numerics = numerics_key()
        self.source, self.target = (
            FactorCache(store, public_name(base.name) or base.name, key)
            for base, key in zip(self._bases, self._weights, strict=True)
        )

    def key(self, *parts: object, tokenizers: bool) -> str:
        """Digest everything that an entry of the pair depends on.

        Args:
            parts: JSON values that identify the entry.
            tokenizers: whether the entry depends on the tokenizers as well as on the weights.
        """
        return digest_of(self._with_tokenizers if tokenizers else self._weights, self._numerics, *parts)

    def shared_tokens(self) -> int | None:
        """Return the cached number of tokens that the vocabularies share, or None."""
        facts = self.store.facts("vocabulary", self.key(tokenizers=True))
        return None if facts is None else facts["count"]

    def vocabulary(self) -> Vocabulary | None:
        """Return the cached moments of the shared vocabulary, or None."""
        loaded = self.store.load("vocabulary", self.key(tokenizers=True))
        if loaded is None:
            return None
        return Vocabulary(count=loaded.facts["count"], **{name: jnp.asarray(loaded.arrays[name]) for name in _MOMENTS})

    def keep_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Store the moments of the shared vocabulary."""
        arrays = {name: getattr(vocabulary, name) for name in _MOMENTS}
        what = f"{vocabulary.count} tokens, {self.names}"
        self.store.save("vocabulary", self.key(tokenizers=True), what, arrays, {"count": vocabulary.count})

    @cached_property
    def _with_tokenizers(self) -> tuple[str, ...]:
        """Return the keys of weights and tokenizers."""
        return (*self._weights, *(tokenizer_key(base) for base in self._bases))
