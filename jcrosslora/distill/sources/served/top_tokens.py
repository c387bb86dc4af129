"""The likeliest tokens at a position, and what they say of the rest.

A server tells the probabilities of k tokens. The rest of the mass is known, 1 less their sum, and so is a bound of each
other token: the last of the k.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

_LEAST = 1e-9  # of the rest of the mass, which rounding may make negative


@dataclass(frozen=True, eq=False)
class TopTokens:
    """Known tokens of a prediction: the k likeliest, and the one that follows in a given text where that is told.

    Attributes:
        ids: int32 (K,), each once.
        log_probs: float64 (K,), of the whole vocabulary, in nats.
        bound: a token that is not among them has at most this log-probability.
    """

    ids: np.ndarray
    log_probs: np.ndarray
    bound: float

    @classmethod
    def of(cls, top: dict[int, float], unnamed: float, told: tuple[int, float] | None = None) -> TopTokens:
        """Take the likeliest tokens, and one more.

        Args:
            top: id -> log-probability, at least one.
            unnamed: the highest log-probability of a token that was told by a name that stands for none, else -inf.
            told: a token with its log-probability, or None.
        """
        bound = max(unnamed, min(top.values()))
        if told is not None:
            top = top | {told[0]: told[1]}
        order = sorted(top, key=lambda index: -top[index])
        return cls(np.array(order, np.int32), np.array([top[index] for index in order]), bound)

    @property
    def rest(self) -> float:
        """The probability of all tokens that are not known."""
        return max(_LEAST, 1.0 - float(np.exp(self.log_probs).sum()))

    def log_prob(self, token: int) -> float:
        """Return a token's log-probability; of one that is not known the most that it can be."""
        found = np.flatnonzero(self.ids == token)
        return float(self.log_probs[found[0]]) if found.size else min(self.bound, float(np.log(self.rest)))


def divergence(one: TopTokens, other: TopTokens) -> float:
    """Estimate KL(one || other) in nats; exact where all tokens are known, else rather too small.

    It is the divergence over the tokens that either knows and the rest as one. A token that one side does not know gets
    the most that it can have there, and no more than an equal part of what is left.
    """
    ids = np.union1d(one.ids, other.ids)
    p, q = _over(one, ids), _over(other, ids)
    return float(np.sum(p * (np.log(p) - np.log(q)) - p + q))


def _over(top: TopTokens, ids: np.ndarray) -> np.ndarray:
    """Give the probabilities of tokens and, last, of all others: float64 (len(ids) + 1,)."""
    found = np.zeros(len(ids) + 1)
    found[np.searchsorted(ids, top.ids)] = np.exp(top.log_probs)
    unknown = np.flatnonzero(~np.isin(ids, top.ids))
    found[unknown] = min(np.exp(top.bound), top.rest / (len(unknown) + 1))
    found[-1] = max(_LEAST, top.rest - found[unknown].sum())
    return np.maximum(found, np.finfo(np.float64).tiny)


@jax.jit
def spread(known: jax.Array, rest: jax.Array, bound: jax.Array, own: jax.Array) -> jax.Array:
    """Fill in log-probabilities: the rest of the mass is spread over unknown columns as another model spreads its own.

    What is then fitted to it learns the mass of the rest, and is left its own shares inside.

    Args:
        known: float32 (P, C), -inf where a column is not known.
        rest: float32 (P,), log of the probability of all that is not known.
        bound: float32 (P,), the most that a column that is not known can have.
        own: float32 (P, C), log-probabilities of the other model.

    Returns:
        float32 (P, C), normalised.
    """
    unknown = jnp.isneginf(known)
    others = jnp.where(unknown, own, -jnp.inf)
    total = jax.nn.logsumexp(others, axis=-1, keepdims=True)
    shares = others - jnp.where(jnp.isneginf(total), 0, total)
    filled = jnp.where(unknown, jnp.minimum(rest[:, None] + shares, bound[:, None]), known)
    return jax.nn.log_softmax(filled, axis=-1)
