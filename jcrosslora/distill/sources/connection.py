"""Query a completion server by token ids: generate text, and predict the next token at given positions."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Self, TypeVar

import msgspec
import numpy as np

from jcrosslora.checkpoint import Tokenizer
from jcrosslora.decoder.generate import UNFINISHED
from jcrosslora.distill.sources.client import Answers, Client, DamagedError, RefusedError, read_reply
from jcrosslora.distill.sources.predictions import Entry, LogProbs, TokenNames, TopTokens, divergence
from jcrosslora.distill.sources.replies import FIELDS, Completion, Dialect, Fields
from jcrosslora.errors import SourceError
from jcrosslora.utils.digests import digest_of

T = TypeVar("T")
_PREFIXES = 32  # in one request to llama.cpp
_WRITTEN = 4  # tokens that are written to check the tokenizer
_FEWEST_KNOWN = 0.5  # least share of a text's tokens whose names have to match a token
TEXTS = (
    "Question: Which of the two is larger, the sun or the moon?\nAnswer:",
    "The old man walked down to the harbour, where the boats lay in the morning light, and",
    "def mean(values):\n    total = 0\n    for value in values:\n        total +=",
    "Translate into French: Good morning, how are you?\nFrench:",
)
_PLACES = 5  # the last of each text
_LEAST, _TIMES = 3e-4, 10.0  # nats; times the measured noise, which depends on what runs at a time


class Connection:
    """Requests of a fit to a server; `stops` are ids of the tokens that end a text."""

    def __init__(
        self, client: Client, dialect: Dialect, names: TokenNames, stops: Sequence[int], top: int, answers: Answers
    ) -> None:
        """Use a server; `top` is the number of likeliest tokens to request."""
        self.dialect, self.answers, self.map = dialect, answers, client.map
        self.asked = min(top, names.size)
        self.told: list[int] = []  # how many likeliest tokens it returned at each place so far
        self._client, self._names, self._top = client, names, top
        always, reading = FIELDS[dialect.kind]
        ends = {"stop_token_ids": list(stops)} if dialect.kind in ("vllm", "sglang") else {}
        self._writing, self._reading = always | ends, always | reading
        # llama.cpp returns nothing if it samples the first part of a character, so it is made to sample a whole one;
        # what it returns for the others stays.
        whole = names.whole if dialect.kind == "llamacpp" else None
        self._drawn = {} if whole is None else {"logit_bias": [[whole, 100.0]]}
        self._at_once = _PREFIXES if dialect.kind == "llamacpp" else 1
        self._echoes: bool | None = False if dialect.kind == "llamacpp" else None

    def write(self, side: Fields, ids: np.ndarray, tokens: int, temperature: float, seed: int) -> tuple[str, bool]:
        """Return the text that follows the tokens, and whether the model ended it."""
        fields = {"prompt": ids.tolist(), "max_tokens": tokens, "temperature": temperature, "seed": seed}

        def check(answer: Completion) -> tuple[str, bool]:
            (choice,) = answer.of(1)
            if choice.finish_reason not in ("stop", "length"):
                raise DamagedError(f"finish_reason is {choice.finish_reason!r:.40}, expected stop or length")
            return choice.text, choice.finish_reason == "stop"

        return self._asked("write", {**side, **self._writing, **fields}, tuple[str, bool], check)

    def predict(self, side: Fields, ids: np.ndarray, places: Sequence[int]) -> list[TopTokens]:
        """Return a model's next-token predictions in a text (T,) at some indices, at least one, ascending."""
        return [entry.known() for entry in self.read(side, ids, places)]

    def read(self, side: Fields, ids: np.ndarray, places: Sequence[int], *, keep: bool = True) -> list[Entry]:
        """Return predictions as `predict` does, in the form that the server gave.

        `keep` says whether to reuse a cached answer of an earlier run, and to cache this one.
        """
        if self._echoes is not False:
            text = ids[: places[-1] + 1]
            try:
                found = self._entries(side, [text], keep, echo=True)
            except RefusedError:
                if self._echoes:
                    raise
                found = []
            self._echoes = bool(found)
            if found:
                # The text's tokens are known, whatever their names; after them comes a sampled one.
                own = [msgspec.structs.replace(one, token=int(token)) for one, token in zip(found, text, strict=False)]
                return [self._likeliest([*own, found[-1]][place + 1]) for place in places]
        prompts = [ids[: place + 1] for place in places]
        parts = [prompts[start : start + self._at_once] for start in range(0, len(prompts), self._at_once)]
        return [self._likeliest(entry) for part in parts for entry in self._entries(side, part, keep)]

    def check_tokenizer(self, side: Fields, ids: np.ndarray, decode: Callable[[Sequence[int]], str]) -> None:
        """Let a model write a few tokens; raise SourceError if this tokenizer decodes them to a different text."""
        fields = {"prompt": ids.tolist(), "max_tokens": _WRITTEN, "temperature": 0.0, "logprobs": 1}

        def check(answer: Completion) -> tuple[str, list[int | None]]:
            (choice,) = answer.of(1)
            return choice.text, [one.token for one in self._names.entries(choice.logprobs or LogProbs())]

        text, tokens = self._complete({**side, **self._reading, **fields}, check)
        known = [token for token in tokens if token is not None]
        found = decode([*ids.tolist(), *known])[len(decode(ids.tolist())) :]
        whole = known and len(known) == len(tokens) and UNFINISHED not in text + found
        if whole and found.split() != text.split():
            msg = f"{self._client.url}: writes {text[:40]!r} where its tokens are {found[:40]!r} to the tokenizer: "
            raise SourceError(msg + "check that --source-tokenizer is that of the model")

    def _entries(self, side: Fields, prompts: list[np.ndarray], keep: bool, *, echo: bool = False) -> list[Entry]:
        """Request the token after each prompt; with `echo`, all tokens of one prompt, [] if the server cannot."""
        lists = [prompt.tolist() for prompt in prompts]
        # At temperature 1 all servers define log-probabilities in the same way.
        fields = {"max_tokens": 1, "temperature": 1.0, "logprobs": self._top} | ({"echo": True} if echo else {})
        body = {**side, **self._reading, **self._drawn, **fields, "prompt": lists if self._at_once > 1 else lists[0]}

        def check(answer: Completion) -> list[Entry]:
            found = [self._names.entries(choice.logprobs or LogProbs()) for choice in answer.of(len(prompts))]
            if not all(found):
                msg = f"{self._client.url}: answers without log-probabilities, which a fit learns from: use a server "
                raise SourceError(msg + "that has them (vLLM, SGLang, llama.cpp), or give --source with the weights")
            return self._echoed(found[0], lists[0]) if echo else [entries[0] for entries in found]

        return self._asked("read", body, list[Entry], check, keep)

    def _echoed(self, entries: list[Entry], ids: list[int]) -> list[Entry]:
        """Check that an answer has the tokens of a text and one more; return [] if it has only the last."""
        if len(entries) == 1 < len(ids):
            return []
        if len(entries) != len(ids) + 1:
            raise DamagedError(f"{len(entries)} log-probabilities for a text of {len(ids)} tokens and one behind it")
        known = [(one.token, token) for one, token in zip(entries, ids, strict=False) if one.token is not None]
        if any(token != sent for token, sent in known) or len(known) < _FEWEST_KNOWN * len(ids):
            msg = f"{self._client.url}: names other tokens than it was sent: check that --source-tokenizer is that of "
            raise SourceError(msg + "the model; names of sentencepiece tokens are ambiguous but by vLLM and llama.cpp")
        return entries

    def _likeliest(self, entry: Entry) -> Entry:
        """Keep the likeliest tokens: vLLM appends the sampled one, which would become the bound of others."""
        top = dict(sorted(entry.top.items(), key=lambda pair: -pair[1])[: self._top])
        if not top:
            msg = f"{self._client.url}: gives no log-probabilities of tokens of this tokenizer: check that "
            raise SourceError(msg + "--source-tokenizer is that of the model, and the number of --source-top-logprobs")
        self.told.append(len(top))
        return msgspec.structs.replace(entry, top=top)

    def _asked(
        self, kind: str, body: dict[str, Any], form: type[T], check: Callable[[Completion], T], keep: bool = True
    ) -> T:
        digest = digest_of(kind, body)
        key = f"{digest[:2]}/{digest[2:24]}"
        found = self.answers.find(key, form) if keep else None
        if found is None:
            found = self._complete(body, check)
            if keep:
                self.answers.keep(key, found)
        return found

    def _complete(self, body: dict[str, Any], check: Callable[[Completion], T]) -> T:
        return self._client.ask("completions", lambda content: check(read_reply(content, Completion)), body)


class Sample(msgspec.Struct, frozen=True):
    """Predictions at fixed places, without and with the adapter, and the nats by which noise may change them."""

    plain: list[Entry]
    adapted: list[Entry]
    noise: float

    @classmethod
    def take(cls, connection: Connection, tokenizer: Tokenizer) -> Self:
        """Query both models twice."""
        ids = [tokenizer.encode(text).ids for text in TEXTS]
        sides = (connection.dialect.base, connection.dialect.adapted)
        texts = [(row, range(max(0, len(row) - _PLACES), len(row))) for row in ids]
        calls = [(side, *text) for _ in range(2) for side in sides for text in texts]
        found, size = connection.map(lambda call: connection.read(*call, keep=False), calls), len(ids)
        plain, adapted, *again = ([*chain(*found[start : start + size])] for start in range(0, len(found), size))
        noise = (apart(plain, again[0]) + apart(adapted, again[1])) / 2
        return cls(plain, adapted, max(_LEAST, _TIMES * noise))

    def is_of(self, other: Self) -> bool:
        """Whether another run saw the same base and adapter, up to the noise."""
        pairs = (self.plain, other.plain), (self.adapted, other.adapted)
        return all(len(a) == len(b) and apart(a, b) <= self.noise for a, b in pairs)


def apart(ones: Sequence[Entry], others: Sequence[Entry]) -> float:
    """Return the mean divergence between predictions, in nats."""
    pairs = zip(ones, others, strict=True)
    return float(np.mean([divergence(one.known(own=False), other.known(own=False)) for one, other in pairs]))
