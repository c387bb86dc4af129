"""The likeliest tokens at a position, and bounds for all others.

A server returns the probabilities of k tokens. The others together have 1 minus their sum, and each has at most the
probability of the last of the k.
"""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Self

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from jcrosslora.checkpoint.vocabulary import Vocabulary
from jcrosslora.decoder.generate import UNFINISHED
from jcrosslora.distill.sources.client import DamagedError

LogProb = Annotated[float, msgspec.Meta(le=1e-3)]  # rounding makes log-probabilities of sure tokens positive
Index = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Byte = Annotated[int, msgspec.Meta(ge=0, lt=256)]
_NOTHING = -9000.0  # vLLM writes -9999 for minus infinity, llama.cpp the lowest float
_LEAST = 1e-9  # of the rest of the mass, which rounding may make negative
_BY_ID = "token_id:"  # how vLLM names tokens if it is asked for ids
_SPARE = 4096  # embedding rows beyond the tokenizer's tokens; DeepSeek's 2,385 are the most seen
_MOST_MASS = 1.02  # log-probabilities that were rounded to half precision sum to 1 within 1 %


@dataclass(frozen=True, eq=False)
class TopTokens:
    """Known tokens of a prediction: the k likeliest, and the next token of a given text if the server returns it.

    Attributes:
        ids: int32 (K,), each once.
        log_probs: float64 (K,), of the whole vocabulary, in nats.
        bound: a token that is not among them has at most this log-probability.
    """

    ids: np.ndarray
    log_probs: np.ndarray
    bound: float

    @classmethod
    def of(cls, top: dict[int, float], unnamed: float, told: tuple[int, float] | None = None) -> Self:
        """Take the likeliest tokens, id -> log-probability, at least one, and one more, `told`, if it is given.

        `unnamed` is the highest log-probability that the server gave under a name that matches no token, else -inf.
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
        """Return a token's log-probability, or its upper bound if it is not known."""
        found = np.flatnonzero(self.ids == token)
        return float(self.log_probs[found[0]]) if found.size else min(self.bound, float(np.log(self.rest)))


def divergence(one: TopTokens, other: TopTokens) -> float:
    """Estimate KL(one || other) in nats: exact if all tokens are known, otherwise usually too small.

    The sum runs over the tokens that either side knows, with all others as one. A token that one side does not know
    gets its upper bound there, but no more than an equal share of the remaining mass.
    """
    ids = np.union1d(one.ids, other.ids)
    p, q = _over(one, ids), _over(other, ids)
    return float(np.sum(p * (np.log(p) - np.log(q)) - p + q))


def _over(top: TopTokens, ids: np.ndarray) -> np.ndarray:
    """Return the probabilities of tokens and, last, of all others: float64 (len(ids) + 1,)."""
    found = np.zeros(len(ids) + 1)
    found[np.searchsorted(ids, top.ids)] = np.exp(top.log_probs)
    unknown = np.flatnonzero(~np.isin(ids, top.ids))
    found[unknown] = min(np.exp(top.bound), top.rest / (len(unknown) + 1))
    found[-1] = max(_LEAST, top.rest - found[unknown].sum())
    return np.maximum(found, np.finfo(np.float64).tiny)


@jax.jit
def spread(known: jax.Array, rest: jax.Array, bound: jax.Array, own: jax.Array) -> jax.Array:
    """Fill in unknown log-probabilities: distribute the remaining mass in proportion to another model's probabilities.

    A model fitted to the result learns the total of the rest, and keeps its own proportions inside it.

    Args:
        known: float32 (P, C), -inf for unknown columns.
        rest: float32 (P,), log of the total probability of all unknown tokens.
        bound: float32 (P,), upper bound of the log-probability of an unknown column.
        own: float32 (P, C), log-probabilities of the other model.
    """
    unknown = jnp.isneginf(known)
    others = jnp.where(unknown, own, -jnp.inf)
    total = jax.nn.logsumexp(others, axis=-1, keepdims=True)
    shares = others - jnp.where(jnp.isneginf(total), 0, total)
    filled = jnp.where(unknown, jnp.minimum(rest[:, None] + shares, bound[:, None]), known)
    return jax.nn.log_softmax(filled, axis=-1)


class Likely(msgspec.Struct, frozen=True):
    """A token with its log-probability; llama.cpp adds its id, chats its bytes."""

    token: str
    logprob: LogProb | None
    id: Index | None = None
    bytes: list[_Byte] | None = None

    @property
    def value(self) -> float | None:
        """The log-probability; None where there is none, or where it says minus infinity."""
        return None if self.logprob is None or self.logprob < _NOTHING else min(self.logprob, 0.0)


class Position(Likely, frozen=True, kw_only=True):
    """A token of a text, and the likeliest ones at its position."""

    top_logprobs: list[Likely]


class LogProbs(msgspec.Struct, frozen=True):
    """The `logprobs` of a choice: `content`, as chats and llama.cpp have it, or three lists, as completions have it."""

    content: list[Position] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[LogProb | None] = []
    top_logprobs: list[dict[str, LogProb | None] | None] = []

    def positions(self) -> list[Position]:
        """Return the tokens of a text in either form; raise DamagedError if the lists have different lengths."""
        if self.content is not None:
            return self.content
        sizes = [len(self.tokens or ()), len(self.token_logprobs), len(self.top_logprobs)]
        if len(set(sizes)) > 1:
            raise DamagedError(
                f"tokens, token_logprobs and top_logprobs have {sizes} entries, expected as many of each"
            )
        rows = zip(self.tokens or (), self.token_logprobs, self.top_logprobs, strict=True)
        return [
            Position(token, value, top_logprobs=[Likely(*pair) for pair in (top or {}).items()])
            for token, value, top in rows
        ]


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A token of an answer.

    Attributes:
        token: its id, None if its name matches no token.
        log_prob: None for the first token of a text.
        top: id -> log-probability of the likeliest tokens at its position.
        unnamed: the highest log-probability under a name that matches no token; None if there is none.
    """

    token: Index | None
    log_prob: LogProb | None
    top: dict[Index, LogProb]
    unnamed: LogProb | None = None

    def known(self, *, own: bool = True) -> TopTokens:
        """Return the likeliest tokens, with the one of the answer itself unless `own` is False."""
        told = None if not own or self.token is None or self.log_prob is None else (self.token, self.log_prob)
        return TopTokens.of(self.top, -math.inf if self.unnamed is None else self.unnamed, told)


class TokenNames:
    """Finds token ids by the names that a server uses."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ids = {**vocabulary.special, **(vocabulary.tokens or {})}
        self.size = max(self._ids.values(), default=-1) + 1

    @property
    def whole(self) -> int | None:
        """The id of a token that is a whole character of one byte; None if there is none."""
        found = (self._ids.get(bytes([byte])) for byte in (*b"ae. ", *range(0x21, 0x7F)))
        return next((index for index in found if index is not None), None)

    def entries(self, log_probs: LogProbs) -> list[Entry]:
        """Find tokens; raise DamagedError if an id is out of range, or probabilities cannot sum to 1."""
        return [self._entry(one) for one in log_probs.positions()]

    def _entry(self, one: Position) -> Entry:
        _check_mass(one, self.size + _SPARE)
        top: dict[int, float] = {}
        unnamed: list[float] = []
        for each in one.top_logprobs:
            index, value = self._find(each), each.value
            if value is None:
                continue
            if index is None:
                unnamed.append(value)
            else:
                top[index] = max(value, top.get(index, value))
        return Entry(self._find(one), one.value, top, max(unnamed, default=None))

    def _find(self, one: Likely) -> int | None:
        """Return the id of a token that the server describes; None if no token matches."""
        if one.id is not None:
            return self._checked(one.id)
        if one.token.startswith(_BY_ID):
            if re.fullmatch("[0-9]{1,19}", number := one.token.removeprefix(_BY_ID)) is None:
                raise DamagedError(f"a token is called {one.token[:40]!r}, expected {_BY_ID} with a number")
            return self._checked(int(number))
        if one.bytes:
            return self._ids.get(bytes(one.bytes))
        # Tokens that are not whole characters all have the same mark in their names.
        return None if UNFINISHED in one.token else self._ids.get(one.token.encode())

    def _checked(self, index: int) -> int:
        if index >= self.size + _SPARE:
            msg = f"a token has the id {index}, and the tokenizer {self.size} tokens: check that --source-tokenizer is "
            raise DamagedError(msg + "that of the model")
        return index


def _check_mass(one: Position, size: int) -> None:
    """Check that the probabilities at a token's position, its own included, can sum to 1; else raise DamagedError.

    They must sum to 1 at most, and to 1 at least if all other tokens, of `size`, are as likely as the last listed. The
    second is checked only for tokens given by id: of several with one name a server may list the last.
    """
    shares: dict[tuple[int | None, str], float] = {}
    for each in (*one.top_logprobs, one):
        if each.value is not None:
            name = each.id, each.token
            shares[name] = max(math.exp(each.value), shares.get(name, 0.0))
    if (mass := sum(shares.values())) > _MOST_MASS:
        msg = f"top_logprobs in the place of {one.token[:20]!r} stand for probabilities that sum to {mass:.4g}"
        raise DamagedError(msg + ", expected 1 at most")
    # The sampled token, or the text's, may be listed in addition to the likeliest, and bounds no other.
    others = [each for each in one.top_logprobs if (each.id, each.token) != (one.id, one.token)]
    known = [each.value for each in others if each.value is not None]
    most = mass + (size - len(known)) * math.exp(min(known, default=0.0))
    if most < 1 / _MOST_MASS and all(each.id is not None or each.token.startswith(_BY_ID) for each in others):
        msg = f"top_logprobs in the place of {one.token[:20]!r} leave probabilities that sum to {most:.4g} at most, "
        raise DamagedError(msg + "expected 1: check that the server tells the model's log-probabilities as they are")
