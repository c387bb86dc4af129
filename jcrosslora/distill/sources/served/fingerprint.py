"""What a server predicts on fixed texts, with the adapter and without: whether it acts, and whether it is another one.

Servers do not repeat themselves: with bfloat16, a batch of another shape moved the predictions of SmolLM2-135M on these
texts by 7e-5 nats on average and 4e-4 at most. The demo's adapter moves them by 0.7, and by 5e-4 at 3 % of its scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from jcrosslora.distill.sources.served.connection import Connection
from jcrosslora.distill.sources.served.replies import Index, LogProb
from jcrosslora.distill.sources.served.top_tokens import TopTokens, divergence

TEXTS = (
    "Question: Which of the two is larger, the sun or the moon?\nAnswer:",
    "The old man walked down to the harbour, where the boats lay in the morning light, and",
    "def mean(values):\n    total = 0\n    for value in values:\n        total +=",
    "Translate into French: Good morning, how are you?\nFrench:",
)
_PLACES = 5  # the last of each text
_LEAST, _TIMES = 3e-4, 10.0  # nats; of the noise that was measured, since what runs at a time changes it

_Seen = list[tuple[dict[Index, LogProb], LogProb]]


class Fingerprint(msgspec.Struct, frozen=True):
    """Predictions on the texts.

    Attributes:
        plain: of the base: the likeliest tokens of each place with their log-probabilities, and the bound of others.
        adapted: of the base with its adapter.
        noise: mean divergence of answers to the same question, in nats.
    """

    plain: _Seen
    adapted: _Seen
    noise: float

    @classmethod
    def take(cls, connection: Connection, encode: Callable[[str], np.ndarray]) -> Fingerprint:
        """Ask for both models twice.

        Args:
            connection: to the server.
            encode: splits a text into tokens.
        """
        texts = [(ids, range(max(0, len(ids) - _PLACES), len(ids))) for ids in map(encode, TEXTS)]
        sides = (connection.dialect.base, connection.dialect.adapted)
        calls = [(side, *text) for _ in range(2) for side in sides for text in texts]
        found = connection.map(lambda call: connection.predict(*call, keep=False), calls)
        size = len(texts)
        plain, adapted, *again = (_seen(found[start : start + size]) for start in range(0, len(found), size))
        return cls(plain, adapted, (_apart(plain, again[0]) + _apart(adapted, again[1])) / 2)

    @property
    def change(self) -> float:
        """Mean divergence of what is predicted with the adapter from what is predicted without, in nats."""
        return _apart(self.adapted, self.plain)

    @property
    def acts(self) -> bool:
        """Whether the adapter changes more than noise does."""
        return self.change > self._limit

    def is_of(self, other: Fingerprint) -> bool:
        """Whether another run met the same base and adapter, as far as noise allows to say."""
        pairs = (self.plain, other.plain), (self.adapted, other.adapted)
        return all(len(a) == len(b) and _apart(a, b) <= self._limit for a, b in pairs)

    @property
    def _limit(self) -> float:
        return max(_LEAST, _TIMES * self.noise)


def _seen(texts: Sequence[Sequence[TopTokens]]) -> _Seen:
    """Take the likeliest tokens; one below the bound was drawn, or stands in the text."""
    found: _Seen = []
    for top in (top for text in texts for top in text):
        least = min(top.bound, float(top.log_probs.max()))
        pairs = zip(top.ids.tolist(), top.log_probs.tolist(), strict=True)
        found.append(({index: value for index, value in pairs if value >= least}, top.bound))
    return found


def _apart(ones: _Seen, others: _Seen) -> float:
    pairs = zip(ones, others, strict=True)
    return float(np.mean([divergence(TopTokens.of(*one), TopTokens.of(*other)) for one, other in pairs]))
