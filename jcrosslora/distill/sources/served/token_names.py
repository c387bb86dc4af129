"""Predictions in a server's answers: which tokens they are of, and whether they can be probabilities."""

from __future__ import annotations

import math
import re

import msgspec

from jcrosslora.checkpoint.vocabulary import Vocabulary
from jcrosslora.decoder.generate import UNFINISHED
from jcrosslora.distill.sources.served.replies import DamagedError, Index, Likely, LogProb, LogProbs, Position

_BY_ID = "token_id:"  # how vLLM names tokens where it is asked for ids
_SPARE = 4096  # rows of an embedding behind the tokens of its tokenizer; DeepSeek's 2,385 are the most seen
_MOST_MASS = 1.02  # log-probabilities that were rounded to half precision sum to 1 within 1 %


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A token of an answer.

    Attributes:
        token: its id, None if its name stands for none.
        log_prob: of it; None for the first token of a text.
        top: id -> log-probability of the likeliest tokens in its place.
        unnamed: the highest log-probability of those whose names stand for none; None if there are none.
    """

    token: Index | None
    log_prob: LogProb | None
    top: dict[Index, LogProb]
    unnamed: LogProb | None = None


class TokenNames:
    """Ids of tokens by the names that a server gives to them."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ids = {**vocabulary.special, **(vocabulary.tokens or {})}
        self.size = max(self._ids.values(), default=-1) + 1

    @property
    def whole(self) -> int | None:
        """The id of a token that is a whole character of one byte; None if there is none."""
        found = (self._ids.get(bytes([byte])) for byte in (*b"ae. ", *range(0x21, 0x7F)))
        return next((index for index in found if index is not None), None)

    def entries(self, log_probs: LogProbs) -> list[Entry]:
        """Find the tokens in the `logprobs` of a choice.

        Raises:
            DamagedError: an id is out of range, or probabilities sum to more than 1.
        """
        return [self._entry(one) for one in log_probs.positions()]

    def _entry(self, one: Position) -> Entry:
        _check_mass(one)
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
        """Return the id of a token by what the server tells of it; None if that stands for none."""
        if one.id is not None:
            return self._checked(one.id)
        if one.token.startswith(_BY_ID):
            if re.fullmatch("[0-9]{1,19}", number := one.token.removeprefix(_BY_ID)) is None:
                msg = f"a token is called {one.token[:40]!r}, wanted {_BY_ID} with a number"
                raise DamagedError(msg)
            return self._checked(int(number))
        if one.bytes:
            return self._ids.get(bytes(one.bytes))
        # Bytes that are no whole character become the same mark in every such token.
        return None if UNFINISHED in one.token else self._ids.get(one.token.encode())

    def _checked(self, index: int) -> int:
        if index >= self.size + _SPARE:
            msg = f"a token has the id {index}, and the tokenizer {self.size} tokens: check that --source-tokenizer is "
            raise DamagedError(msg + "that of the model")
        return index


def _check_mass(one: Position) -> None:
    """Check that the probabilities in the place of a token sum to 1 at most, with its own, which may be among them."""
    shares: dict[tuple[int | None, str], float] = {}
    for each in (*one.top_logprobs, one):
        if each.value is not None:
            name = each.id, each.token
            shares[name] = max(math.exp(each.value), shares.get(name, 0.0))
    if (mass := sum(shares.values())) > _MOST_MASS:
        msg = f"top_logprobs in the place of {one.token[:20]!r} stand for probabilities that sum to {mass:.4g}"
        raise DamagedError(msg + ", wanted 1 at most")
