"""Predictions in a server's answers: which token an entry stands for, in both forms that servers use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jcrosslora.checkpoint.vocabulary import Vocabulary
from jcrosslora.decoder.generate import UNFINISHED

_BY_ID = "token_id:"  # how vLLM names tokens where it is asked for ids
_NOTHING = -9000.0  # vLLM writes -9999 for minus infinity


@dataclass(frozen=True)
class Entry:
    """A token of an answer.

    Attributes:
        token: its id, None if its name stands for none.
        log_prob: of it; None for the first token of a text.
        top: id -> log-probability of the likeliest tokens in its place.
        unnamed: the highest log-probability of those whose names stand for none, -inf where all do.
    """

    token: int | None
    log_prob: float | None
    top: dict[int, float]
    unnamed: float = -math.inf

    def pack(self) -> list[Any]:
        """Return the entry as a JSON value."""
        unnamed = None if math.isinf(self.unnamed) else self.unnamed
        return [self.token, self.log_prob, list(self.top.items()), unnamed]

    @classmethod
    def unpack(cls, packed: list[Any]) -> Entry:
        """Make an entry of what `pack` returns, before or after it was written as JSON."""
        token, log_prob, top, unnamed = packed
        return cls(token, log_prob, dict(top), -math.inf if unnamed is None else unnamed)


class TokenNames:
    """Ids of tokens by the names that a server gives to them."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ids = {**vocabulary.special, **(vocabulary.tokens or {})}

    @property
    def whole(self) -> int | None:
        """The id of a token that is a whole character of one byte; None if there is none."""
        found = (self._ids.get(bytes([byte])) for byte in (*b"ae. ", *range(0x21, 0x7F)))
        return next((index for index in found if index is not None), None)

    def entries(self, log_probs: Mapping[str, Any]) -> list[Entry]:
        """Read the `logprobs` of a choice.

        It is either {"tokens", "token_logprobs", "top_logprobs": [{name: log-probability}]}, as completions have it, or
        {"content": [{"token", "logprob", "top_logprobs": [...]}]}, as chats and llama.cpp have it.

        Raises:
            KeyError, TypeError, ValueError: it is neither.
        """
        if isinstance(log_probs.get("content"), list):
            return [self._entry(one) for one in log_probs["content"]]
        rows = zip(log_probs["tokens"], log_probs["token_logprobs"], log_probs["top_logprobs"], strict=True)
        return [
            Entry(self.find(name), _number(value), *self._top((key, None, each) for key, each in (top or {}).items()))
            for name, value, top in rows
        ]

    def find(self, name: Any, raw: Any = None) -> int | None:
        """Return the id of a token by its name and, if the server tells them, its bytes; None if there is none."""
        if isinstance(name, str) and name.startswith(_BY_ID):
            return int(name.removeprefix(_BY_ID))
        if isinstance(raw, list) and raw:
            return self._ids.get(bytes(raw))
        # Bytes that are no whole character become the same mark in every such token.
        return None if not isinstance(name, str) or UNFINISHED in name else self._ids.get(name.encode())

    def _entry(self, one: Mapping[str, Any]) -> Entry:
        top = self._top(
            (each["id"] if "id" in each else each["token"], each.get("bytes"), each["logprob"])
            for each in one["top_logprobs"]
        )
        return Entry(
            self._identify(one["id"] if "id" in one else one["token"], one.get("bytes")), _number(one["logprob"]), *top
        )

    def _identify(self, name: Any, raw: Any) -> int | None:
        return name if type(name) is int else self.find(name, raw)

    def _top(self, entries: Iterable[tuple[Any, Any, Any]]) -> tuple[dict[int, float], float]:
        found: dict[int, float] = {}
        unnamed = -math.inf
        for name, raw, value in entries:
            index, number = self._identify(name, raw), _number(value)
            if number is not None and index is None:
                unnamed = max(unnamed, number)
            elif number is not None and index is not None:
                found[index] = max(number, found.get(index, number))
        return found, unnamed


def _number(value: Any) -> float | None:
    """Return a log-probability; None where there is none, or where it says minus infinity."""
    if value is None:
        return None
    number = float(value)
    if number != number or number > 1e-3:
        msg = f"a log-probability is {value!r}"
        raise ValueError(msg)
    return None if number < _NOTHING else min(number, 0.0)
