"""The cache entries of a pair of bases: keys of both, their factors, and the moments of the shared vocabulary."""

from functools import cached_property

import jax.numpy as jnp

from jcrosslora.cache import Cache
from jcrosslora.cache.keys import digest_of, numerics_key, tokenizer_key, weights_key
from jcrosslora.checkpoint import BaseModel
from jcrosslora.evidence.factor_cache import FactorCache
from jcrosslora.evidence.records import Vocabulary

_MOMENTS = ("cross", "gram_src", "gram_tgt", "mean_src", "mean_tgt")


class PairCache:
    """The entries of one pair of bases.

    Attributes:
        store: the cache.
        source: factors of the source.
        target: factors of the target.
        names: of both bases, for people.
    """

    def __init__(self, store: Cache, source: BaseModel, target: BaseModel) -> None:
        """Read the weight files for their digests, unless these are remembered."""
        self.store, self._bases = store, (source, target)
        self.names = f"{source.name} to {target.name}"
        self._weights = tuple(weights_key(base, store.digests) for base in self._bases)
        self._numerics = numerics_key()
        self.source, self.target = (
            FactorCache(store, base.name, key) for base, key in zip(self._bases, self._weights, strict=True)
        )

    def key(self, *parts: object, tokenizers: bool) -> str:
        """Digest what an entry of the pair follows from.

        Args:
            parts: JSON values.
            tokenizers: whether the entry depends on the tokenizers, and not on the weights alone.
        """
        return digest_of(self._texts if tokenizers else self._weights, self._numerics, *parts)

    def shared_tokens(self) -> int | None:
        """Return how many tokens the vocabularies share; None if that is not known."""
        facts = self.store.facts("vocabulary", self.key(tokenizers=True))
        return None if facts is None else facts["count"]

    def vocabulary(self) -> Vocabulary | None:
        """Return the moments of the shared vocabulary; None if they are not kept."""
        loaded = self.store.load("vocabulary", self.key(tokenizers=True))
        if loaded is None:
            return None
        return Vocabulary(count=loaded.facts["count"], **{name: jnp.asarray(loaded.arrays[name]) for name in _MOMENTS})

    def keep_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Keep the moments of the shared vocabulary."""
        arrays = {name: getattr(vocabulary, name) for name in _MOMENTS}
        what = f"{vocabulary.count} tokens, {self.names}"
        self.store.save("vocabulary", self.key(tokenizers=True), what, arrays, {"count": vocabulary.count})

    @cached_property
    def _texts(self) -> tuple[str, ...]:
        """Keys of weights and tokenizers."""
        return (*self._weights, *(tokenizer_key(base) for base in self._bases))
