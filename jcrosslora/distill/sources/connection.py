"""Query a completion server by token ids: generate text, and predict the next token at given positions."""

import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import msgspec
import numpy as np

from jcrosslora.decoder.generate import UNFINISHED
from jcrosslora.distill.sources.client import Client, DamagedError, RefusedError
from jcrosslora.distill.sources.predictions import Entry, TokenNames, TopTokens, divergence
from jcrosslora.distill.sources.replies import Answers, Choice, Completion, Dialect, Fields, Index, LogProb, LogProbs
from jcrosslora.errors import SourceError
from jcrosslora.utils.digests import digest_of

T = TypeVar("T")
_PATH = "completions"
_WRITTEN = 4  # tokens that are written to check the tokenizer
_FEWEST_KNOWN = 0.5  # of the tokens of a text, the share whose names have to be understood
TEXTS = (
    "Question: Which of the two is larger, the sun or the moon?\nAnswer:",
    "The old man walked down to the harbour, where the boats lay in the morning light, and",
    "def mean(values):\n    total = 0\n    for value in values:\n        total +=",
    "Translate into French: Good morning, how are you?\nFrench:",
)
_PLACES = 5  # the last of each text
_LEAST, _TIMES = 3e-4, 10.0  # nats; of the noise that was measured, since what runs at a time changes it
_Seen = list[tuple[dict[Index, LogProb], LogProb]]


class Connection:
    """Requests of a fit to a server; `stops` are ids of the tokens that end a text."""

    def __init__(
        self, client: Client, dialect: Dialect, names: TokenNames, stops: Sequence[int], top: int, answers: Answers
    ) -> None:
        """Use a server; `top` is the number of likeliest tokens that it is asked for."""
        self.dialect, self.stops, self.map = dialect, tuple(stops), client.map
        self._client, self._names, self._top, self._answers = client, names, top, answers
        self._told: Counter[int] = Counter()
        self._counting = threading.Lock()
        self._echoes: bool | None = False if dialect.kind == "llamacpp" else None

    @property
    def told(self) -> Counter[int]:
        """How many likeliest tokens the server told so far -> at how many places."""
        with self._counting:
            return Counter(self._told)

    @property
    def asked(self) -> int:
        """How many likeliest tokens it is asked for, and there are."""
        return min(self._top, self._names.size)

    def write(self, side: Fields, ids: np.ndarray, tokens: int, temperature: float, seed: int) -> tuple[str, bool]:
        """Return the text behind tokens, and whether the model ended it."""
        fields = {"prompt": ids.tolist(), "max_tokens": tokens, "temperature": temperature, "seed": seed}
        body = {**side, **self.dialect.sampling(self.stops), **fields}

        def check(answer: Completion) -> tuple[str, bool]:
            (choice,) = answer.of(1)
            if choice.finish_reason not in ("stop", "length"):
                raise DamagedError(f"finish_reason is {choice.finish_reason!r:.40}, wanted stop or length")
            return choice.text, choice.finish_reason == "stop"

        return self._asked("write", body, tuple[str, bool], check)

    def predict(self, side: Fields, ids: np.ndarray, places: Sequence[int], *, keep: bool = True) -> list[TopTokens]:
        """Return a model's next-token predictions in a text (T,) at some indices, at least one, ascending.

        `keep` says whether to reuse a cached answer of an earlier run, and to cache this one.
        """
        if self._echoes is not False:
            try:
                found = self._by_echo(side, ids[: places[-1] + 1], keep)
            except RefusedError:
                if self._echoes:
                    raise
                found = None
            self._echoes = found is not None
            if found is not None:
                # The tokens of the text are known, whatever they are called; behind it stands one that was drawn.
                told = [*ids[1 : places[-1] + 1].tolist(), None]
                return [self._top_of(found[place + 1], told[place]) for place in places]
        return self._by_prefix(side, ids, places, keep)

    def check_tokenizer(self, side: Fields, ids: np.ndarray, decode: Callable[[Sequence[int]], str]) -> None:
        """Let a model write a few tokens; raise SourceError if this tokenizer decodes them to a different text."""
        fields = {"prompt": ids.tolist(), "max_tokens": _WRITTEN, "temperature": 0.0, "logprobs": 1}
        body = {**side, **self.dialect.reading(None), **fields}

        def check(answer: Completion) -> tuple[str, list[int | None]]:
            (choice,) = answer.of(1)
            return choice.text, [one.token for one in self._names.entries(choice.logprobs or LogProbs())]

        text, tokens = self._client.post(_PATH, body, Completion, check)
        known = [token for token in tokens if token is not None]
        found = decode([*ids.tolist(), *known])[len(decode(ids.tolist())) :]
        whole = known and len(known) == len(tokens) and UNFINISHED not in text + found
        if whole and found.split() != text.split():
            msg = f"{self._client.url}: writes {text[:40]!r} where its tokens are {found[:40]!r} to the tokenizer: "
            raise SourceError(msg + "check that --source-tokenizer is that of the model")

    def _by_echo(self, side: Fields, ids: np.ndarray, keep: bool) -> list[Entry] | None:
        """Read a whole text at once: an entry for each token and the next one; None if the server does not echo."""
        body = self._reading(side, ids.tolist()) | {"echo": True}

        def check(answer: Completion) -> list[Entry]:
            (choice,) = answer.of(1)
            entries = self._entries(choice)
            if len(entries) == 1 < len(ids):
                return []
            if len(entries) != len(ids) + 1:
                msg = f"{len(entries)} log-probabilities for a text of {len(ids)} tokens and one behind it"
                raise DamagedError(msg)
            told = [(one.token, int(token)) for one, token in zip(entries, ids, strict=False)]
            known = [pair for pair in told if pair[0] is not None]
            if any(token != sent for token, sent in known) or len(known) < _FEWEST_KNOWN * len(told):
                msg = f"{self._client.url}: names other tokens than it was sent: check that --source-tokenizer is "
                msg += "that of the model; names of sentencepiece tokens are ambiguous but by vLLM and llama.cpp"
                raise SourceError(msg)
            return entries

        return self._asked("read", body, list[Entry], check, keep) or None

    def _by_prefix(self, side: Fields, ids: np.ndarray, places: Sequence[int], keep: bool) -> list[TopTokens]:
        """Ask for the token behind each prefix."""
        found: list[TopTokens] = []
        size = self.dialect.prefixes
        for start in range(0, len(places), size):
            prompts = [ids[: place + 1].tolist() for place in places[start : start + size]]
            body = self._reading(side, prompts if size > 1 else prompts[0])

            def check(answer: Completion, count: int = len(prompts)) -> list[Entry]:
                return [self._entries(choice)[0] for choice in answer.of(count)]

            found += [self._top_of(entry, None) for entry in self._asked("read", body, list[Entry], check, keep)]
        return found

    def _reading(self, side: Fields, prompt: Any) -> dict[str, Any]:
        # At temperature 1 all servers define log-probabilities in the same way.
        fields = {"prompt": prompt, "max_tokens": 1, "temperature": 1.0, "logprobs": self._top}
        return {**side, **self.dialect.reading(self._names.whole), **fields}

    def _entries(self, choice: Choice) -> list[Entry]:
        entries = self._names.entries(choice.logprobs or LogProbs())
        if not entries:
            msg = f"{self._client.url}: answers without log-probabilities, which a fit learns from: use a server that "
            raise SourceError(msg + "has them (vLLM, SGLang, llama.cpp), or give --source with the weights")
        return entries

    def _top_of(self, entry: Entry, token: int | None) -> TopTokens:
        token = entry.token if token is None else token
        # vLLM puts the token that was drawn behind the likeliest, which would make it the bound of all others.
        top = dict(sorted(entry.top.items(), key=lambda pair: -pair[1])[: self._top])
        if not top:
            msg = f"{self._client.url}: gives no log-probabilities of tokens of this tokenizer: check that "
            raise SourceError(msg + "--source-tokenizer is that of the model, and the number of --source-top-logprobs")
        with self._counting:
            self._told[len(top)] += 1
        told = None if token is None or entry.log_prob is None else (token, entry.log_prob)
        return TopTokens.of(top, -math.inf if entry.unnamed is None else entry.unnamed, told)

    def _asked(
        self, kind: str, body: dict[str, Any], form: type[T], check: Callable[[Completion], T], keep: bool = True
    ) -> T:
        key = digest_of(kind, body)
        found = self._answers.find(key, form) if keep else None
        if found is None:
            found = self._client.post(_PATH, body, Completion, check)
            if keep:
                self._answers.keep(key, found)
        return found


class Fingerprint(msgspec.Struct, frozen=True):
    """Predictions on the texts without and with the adapter.

    They are the likeliest tokens at each position with their log-probabilities, and a bound for the others. The noise
    is the mean divergence between answers to identical requests, in nats.
    """

    plain: _Seen
    adapted: _Seen
    noise: float

    @classmethod
    def take(cls, connection: Connection, encode: Callable[[str], np.ndarray]) -> Self:
        """Ask for both models twice."""
        texts = [(ids, range(max(0, len(ids) - _PLACES), len(ids))) for ids in map(encode, TEXTS)]
        sides = (connection.dialect.base, connection.dialect.adapted)
        calls = [(side, *text) for _ in range(2) for side in sides for text in texts]
        found = connection.map(lambda call: connection.predict(*call, keep=False), calls)
        size = len(texts)
        plain, adapted, *again = (_seen(found[start : start + size]) for start in range(0, len(found), size))
        return cls(plain, adapted, (_apart(plain, again[0]) + _apart(adapted, again[1])) / 2)

    @property
    def change(self) -> float:
        """Mean divergence between the predictions with and without the adapter, in nats."""
        return _apart(self.adapted, self.plain)

    @property
    def acts(self) -> bool:
        """Whether the adapter changes more than noise does."""
        return self.change > self._limit

    def is_of(self, other: Self) -> bool:
        """Whether another run saw the same base and adapter, up to the noise."""
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
