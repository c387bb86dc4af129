"""A pair of bases with the facts that several stages share."""

from __future__ import annotations

from functools import cached_property

from jcrosslora.cache import Cache
from jcrosslora.checkpoint import BaseModel
from jcrosslora.evidence.pair_cache import PairCache
from jcrosslora.evidence.records import Vocabulary
from jcrosslora.evidence.shared_vocabulary import shared_vocabulary
from jcrosslora.lineage import Structure, find_structure


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
