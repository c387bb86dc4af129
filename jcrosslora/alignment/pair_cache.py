"""What is kept of the alignment of two bases: its transport, group by group, and what leads to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

import jax.numpy as jnp

from jcrosslora.alignment.factor_cache import FactorCache, describe
from jcrosslora.alignment.group_arrays import AGREEMENT_FIELDS, MAP_FIELDS, arrays_of, facts_of, group_of
from jcrosslora.alignment.transport import TransportGroup
from jcrosslora.cache.keys import digest_of, numerics_key, tokenizer_key, weights_key
from jcrosslora.cache.store import Cache
from jcrosslora.checkpoint import BaseModel
from jcrosslora.evidence.records import Vocabulary

if TYPE_CHECKING:
    from jcrosslora.lineage.pairing import Pair
    from jcrosslora.methods import Method

_MOMENTS = ("cross", "gram_src", "gram_tgt", "mean_src", "mean_tgt")


class PairCache:
    """The entries of one pair of bases.

    Attributes:
        source: factors of the source.
        target: factors of the target.
    """

    def __init__(self, cache: Cache, source: BaseModel, target: BaseModel):
        """Look after a pair; reads the weight files for their digests, if these are not remembered."""
        self._cache, self._bases = cache, (source, target)
        self._weights = tuple(weights_key(base, cache.digests) for base in self._bases)
        self._numerics = numerics_key()
        self.source, self.target = (
            FactorCache(cache, base.name, key) for base, key in zip(self._bases, self._weights, strict=True)
        )

    @cached_property
    def _texts(self) -> tuple[str, ...]:
        """Keys of weights and tokenizers: of all that can be made from the vocabularies or from texts."""
        return (*self._weights, *(tokenizer_key(base) for base in self._bases))

    def shared_tokens(self) -> int | None:
        """How many tokens the vocabularies share; None if that is not known."""
        facts = self._cache.facts("vocabulary", self._vocabulary_key)
        return None if facts is None else facts["count"]

    def vocabulary(self) -> Vocabulary | None:
        """The moments of the shared vocabulary as `shared_vocabulary` gives them; None if they are not kept."""
        loaded = self._cache.load("vocabulary", self._vocabulary_key)
        if loaded is None:
            return None
        return Vocabulary(count=loaded.facts["count"], **{name: jnp.asarray(loaded.arrays[name]) for name in _MOMENTS})

    def keep_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Keep the moments of the shared vocabulary."""
        arrays = {name: getattr(vocabulary, name) for name in _MOMENTS}
        what = f"{vocabulary.count} tokens, {self._names}"
        self._cache.save("vocabulary", self._vocabulary_key, what, arrays, {"count": vocabulary.count})

    def layers(self, probes: str, compute: Callable[[], Sequence[int | None]]) -> tuple[int | None, ...]:
        """The layers that are alike on texts, for each target layer the source's.

        Args:
            probes: digest of the texts.
            compute: finds the layers if they are not kept.
        """
        key = digest_of(self._texts, self._numerics, probes)
        facts = self._cache.facts("depth", key)
        if facts is not None:
            return tuple(facts["layers"])
        layers = tuple(None if layer is None else int(layer) for layer in compute())
        self._cache.save("depth", key, f"layers that are alike, {self._names}", {}, {"layers": list(layers)})
        return layers

    def transport(
        self, method: Method, rank: int, seed: int, whitening: float, probes: str | None, pairs: Sequence[Pair]
    ) -> GroupCache:
        """The transport of this pair by one method.

        Args:
            method: which.
            rank: the truncation rank asked for.
            seed: of the random control.
            whitening: see `align`.
            probes: digest of the texts that the maps are made from, None for methods without.
            pairs: all that are aligned together.
        """
        reads_texts = method.needs_sign_anchor or method.embeddings or method.activations
        bases = self._texts if reads_texts else self._weights
        # Sums over texts, and heads, are made for all pairs at one go, so that all of them may decide the last digits.
        together = _stated(pairs) if method.activations or method.embeddings else None
        key = digest_of(bases, self._numerics, method.name, rank, seed, whitening, probes, together)
        return GroupCache(self._cache, key, f"{method.name}, rank {rank}, {self._names}")

    @property
    def _names(self) -> str:
        return " to ".join(base.name for base in self._bases)

    @property
    def _vocabulary_key(self) -> str:
        return digest_of(self._texts, self._numerics)


class GroupCache:
    """The groups of one transport, each an entry of its own, so that memory is bounded by a group."""

    def __init__(self, cache: Cache, key: str, what: str):
        """Look after one transport; see `PairCache.transport`."""
        self._cache, self._key, self._what = cache, key, what

    def find(self, chunks: Sequence[tuple[Pair, ...]]) -> Iterator[TransportGroup | None]:
        """The groups of these pairs, one after the other; None in the place of one that is not kept.

        While one is used the next is read: two are in memory.
        """
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self._load, chunks[0])
            for following in [*chunks[1:], None]:
                group = ahead.result()
                if following is not None:
                    ahead = pool.submit(self._load, following)
                yield group

    def _load(self, pairs: tuple[Pair, ...]) -> TransportGroup | None:
        loaded = self._cache.load("transport", self._group_key(pairs))
        if loaded is None:
            return None
        return group_of(pairs, loaded.arrays, loaded.facts)

    def keep(self, group: TransportGroup) -> None:
        """Keep a group."""
        what = f"{self._what}, {describe([pair.target for pair in group.pairs])}"
        self._cache.save("transport", self._group_key(group.pairs), what, arrays_of(group), facts_of(group))

    def _group_key(self, pairs: Sequence[Pair]) -> str:
        return digest_of(self._key, _stated(pairs), MAP_FIELDS, AGREEMENT_FIELDS)


def _stated(pairs: Sequence[Pair]) -> list[tuple[str, str, str]]:
    return [(pair.target, pair.source, pair.role) for pair in pairs]
