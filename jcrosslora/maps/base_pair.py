"""A pair of bases, with the facts that several stages need: structure, shared vocabulary, cache keys."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.architectures.blocks import EMBEDDING
from jcrosslora.checkpoint import shared_ids
from jcrosslora.checkpoint.base import weights_key
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.checkpoint.tokenizer import tokenizer_key
from jcrosslora.errors import CheckpointError
from jcrosslora.linalg import dot
from jcrosslora.maps.evidence import Vocabulary
from jcrosslora.relation import ChannelScales, Structure, find_channel_scales, find_structure, has_other_gains
from jcrosslora.relation.bases import Bases, TokenNames, compare_token_names
from jcrosslora.utils.cache import Cache
from jcrosslora.utils.digests import digest_of, numerics_key

_KIND = "vocabulary"  # of entries in the cache
_FIELDS = ("cross", "gram_src", "gram_tgt")
_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class BasePair(Bases):
    """The source and the target of transfers. Facts about the pair are computed on first use, then kept.

    Attributes:
        store: the disk cache for factors and transports; None disables it.
    """

    store: Cache | None = None

    @cached_property
    def names(self) -> str:
        """Return the names of both bases as cache listings show them."""
        return f"{public_name(self.source.name)} to {public_name(self.target.name)}"

    @cached_property
    def weights(self) -> tuple[str, ...]:
        """Return the digests of both bases' weights; files are read unless the cache remembers their digests."""
        assert self.store is not None
        return tuple(weights_key(base, self.store.digests) for base in self)

    def key(self, *parts: object, tokenizers: bool) -> str:
        """Digest everything that a cache entry depends on.

        `parts` are JSON values that identify it; `tokenizers` says whether it depends on the tokenizers too.
        """
        return digest_of((*self.weights, *self._tokenizers) if tokenizers else self.weights, numerics_key(), *parts)

    @cached_property
    def _tokenizers(self) -> tuple[str, ...]:
        return tuple(map(tokenizer_key, self))

    @cached_property
    def structure(self) -> tuple[Structure | None, str]:
        """Return the source part that each target part corresponds to and "", or None and the reason."""
        return find_structure(self.source, self.target)

    @cached_property
    def channels(self) -> ChannelScales | None:
        """Return the scales of channels by which the target differs; None if there are none."""
        known = self.structure[0] if "structure" in self.__dict__ else None  # the structure has the scales
        return find_channel_scales(self.source, self.target) if known is None else known.scales

    @cached_property
    def has_other_gains(self) -> bool:
        """Whether the norms of the two bases differ by more than the scales of channels."""
        return has_other_gains(self.source, self.target, self.channels)

    @cached_property
    def token_names(self) -> TokenNames | None:
        """How the tokens at equal ids differ; None if none differ or the ids cannot be compared."""
        return compare_token_names(self.source, self.target)

    @cached_property
    def shared_tokens(self) -> tuple[int, str]:
        """Return the number of tokens that both bases have, or 0 and the reason."""
        facts = None if self.store is None else self.store.facts(_KIND, self.key(tokenizers=True))
        if facts is not None:
            return facts["count"], ""
        found, reason = self.vocabulary
        return (0, reason) if found is None else (found.count, "")

    @cached_property
    def vocabulary(self) -> tuple[Vocabulary | None, str]:
        """Return the centred second moments of both embeddings over the tokens that both bases have, and "".

        Only the rows of these tokens are read, a few thousand at a time. If there are no moments, return None and the
        reason. Raises CheckpointError if a row is not finite.
        """
        loaded = None if self.store is None else self.store.load(_KIND, self.key(tokenizers=True))
        if loaded is not None:
            moments: dict[str, Any] = {name: loaded.arrays[name] for name in _FIELDS}
            return Vocabulary(count=loaded.facts["count"], **moments), ""
        ids, reason = shared_ids(self.source, self.target)
        if ids is None:
            return None, reason
        found = self._moments(*ids)
        if self.store is not None:
            arrays = {name: getattr(found, name) for name in _FIELDS}
            what = f"{found.count} tokens, {self.names}"
            self.store.save(_KIND, self.key(tokenizers=True), what, arrays, {"count": found.count})
        return found, ""

    def _moments(self, ids_src: np.ndarray, ids_tgt: np.ndarray) -> Vocabulary:
        sides, count = ((self.source, ids_src), (self.target, ids_tgt)), len(ids_src)
        parts = [slice(start, start + _TOKENS_AT_ONCE) for start in range(0, count, _TOKENS_AT_ONCE)]
        on_cpu, totals = jax.default_backend() == "cpu", None
        with np.errstate(over="ignore", invalid="ignore"):  # the sums are checked for non-finite numbers below
            # Around a nearby centre, second moments lose no digits when the true mean is subtracted at the end.
            centres = [base.rows(EMBEDDING, ids[parts[0]]).mean(axis=0) for base, ids in sides]
            for part in parts:
                read = [base.rows(EMBEDDING, ids[part]) for base, ids in sides]
                rows = [one - centre for one, centre in zip(read, centres, strict=True)]
                # On a CPU numpy multiplies, which needs no compilation.
                sums = _sums(*(rows if on_cpu else map(jnp.asarray, rows)))
                totals = sums if totals is None else [total + one for total, one in zip(totals, sums, strict=True)]
            assert totals is not None
            means: list[Any] = [np.asarray(total) / count for total in totals]
            mean_src, mean_tgt, cross, gram_src, gram_tgt = means
        self.release()
        if not all(np.isfinite(total).all() for total in totals):
            msg = f"the embedding table of {self.source.ref} or {self.target.ref} holds NaN, infinity or numbers whose "
            raise CheckpointError(msg + "squares are beyond float32; download the file again")
        return Vocabulary(
            cross=cross - mean_src[:, None] * mean_tgt,
            gram_src=gram_src - mean_src[:, None] * mean_src,
            gram_tgt=gram_tgt - mean_tgt[:, None] * mean_tgt,
            count=count,
        )


def _sums(x: Any, y: Any) -> list[Any]:
    """Return the sums of the rows of X (N, D_src) and Y (N, D_tgt), and X'Y, X'X and Y'Y."""
    return [x.sum(axis=0), y.sum(axis=0), dot(x.T, y), dot(x.T, x), dot(y.T, y)]
