"""Query a completion server by token ids: generate text, and predict the next token at given positions.

vLLM and SGLang serve an adapter as a separate model, whose `parent` is the base, and return the predictions at all
positions of a given text (`echo` with `logprobs`). llama.cpp serves one model, whose adapter a request switches on or
off (`lora`); it ignores `echo`, so each prefix is a separate request for the next token.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import msgspec
import numpy as np

from jcrosslora.decoder.generate import UNFINISHED
from jcrosslora.distill.sources import ServedModel
from jcrosslora.distill.sources.client import Answers, Client, DamagedError, RefusedError, read_reply
from jcrosslora.distill.sources.predictions import Entry, Index, LogProbs, TokenNames, TopTokens
from jcrosslora.errors import SourceError, suggestion
from jcrosslora.utils.digests import digest_of

T = TypeVar("T")
Kind = Literal["vllm", "sglang", "llamacpp", "other"]
Fields = Mapping[str, Any]
# Distributions as the model makes them: servers fill in what the model's own files or they themselves prefer.
_NEUTRAL = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
# What a kind of server is sent in each request, and in those that read.
_FIELDS: dict[Kind, tuple[dict[str, Any], dict[str, Any]]] = {
    "vllm": (_NEUTRAL, {"return_tokens_as_token_ids": True, "ignore_eos": True}),
    "sglang": (_NEUTRAL, {"ignore_eos": True}),
    # Its prompt cache ignores adapters: with concurrent requests the base got cached states of the adapter.
    "llamacpp": ({"samplers": ["temperature"], "cache_prompt": False}, {}),
    "other": ({"top_p": 1.0}, {}),
}
_PREFIXES = 32  # in one request to llama.cpp
_WRITTEN = 4  # tokens that are written to check the tokenizer
_FEWEST_KNOWN = 0.5  # of the tokens of a text, the share whose names have to be understood


class Choice(msgspec.Struct, frozen=True):
    """The answer to one prompt."""

    text: str
    index: Index = 0
    finish_reason: str | None = None
    logprobs: LogProbs | None = None


class Completion(msgspec.Struct, frozen=True):
    """The answer to a request with one prompt or several."""

    choices: list[Choice]

    def of(self, prompts: int) -> list[Choice]:
        """Return the answers in the order of the prompts; raise DamagedError if there is not one for each."""
        found = sorted(self.choices, key=lambda choice: choice.index)
        if [choice.index for choice in found] != list(range(prompts)):
            msg = f"choices have the indices {[choice.index for choice in found][:40]}, wanted 0 to {prompts - 1}"
            raise DamagedError(msg)
        return found


class Card(msgspec.Struct, frozen=True):
    """A model of a server. vLLM and SGLang tell its base as the parent."""

    id: str | None = None
    aliases: list[str] | None = None
    owned_by: str | None = None
    parent: str | None = None


class Cards(msgspec.Struct, frozen=True):
    """The models of a server."""

    data: list[Card] | None = None


class LoadedAdapter(msgspec.Struct, frozen=True):
    """An adapter that llama.cpp loaded."""

    id: Index
    path: str = ""


class Dialect(NamedTuple):
    """A kind of server: its name of the base, and the fields of requests for the base with its adapter and alone."""

    kind: Kind
    base_name: str
    adapted: Fields
    base: Fields


def find_dialect(client: Client, served: ServedModel) -> Dialect:
    """Ask a server what it is, and find the base and the adapter on it.

    Raises SourceError if it does not answer, does not have the models, or does not say which of them is the base.
    """
    lists: Any = Cards | list[Card]  # Together.ai has the second
    try:
        listed = client.ask("models", lambda content: read_reply(content, lists))
    except RefusedError:  # the list is no part of the standard that every server has
        listed = []
    cards = listed if isinstance(listed, list) else (listed.data or [])
    owners = {(card.owned_by or "").lower() for card in cards}
    kind: Kind = next((one for one in get_args(Kind) if one in owners), "other")
    known = [name for card in cards for name in (card.id, *(card.aliases or ())) if name is not None]
    for name in (served.model, served.base_model or served.model):
        # SGLang takes base:adapter as well.
        if known and name not in known and not (kind == "sglang" and name.partition(":")[0] in known):
            msg = f"{client.url}: has no model {name!r}{suggestion(name, known)}: its models are "
            raise SourceError(msg + ", ".join(known[:20]))
    if kind == "llamacpp" and served.base_model in (None, served.model):
        return _switched(client, served)
    parent = next((card.parent for card in cards if card.id == served.model), None)
    base = served.base_model or (parent if parent in known else None)
    if base is None or base == served.model:
        msg = f"{client.url}: does not say which model is the base of {served.model}: give its name on the server with "
        raise SourceError(msg + "--source-base-model; what the adapter changes is measured against it")
    return Dialect(kind, base, {"model": served.model}, {"model": base})


def _switched(client: Client, served: ServedModel) -> Dialect:
    """Find the adapter that llama.cpp loaded: the one that is called as the model, or the only one."""
    adapters = client.ask("/lora-adapters", lambda content: read_reply(content, list[LoadedAdapter]))
    paths = [PurePath(one.path) for one in adapters]
    named = [served.model in (str(path), path.name, path.stem, path.parent.name) for path in paths]
    chosen = [one for one, fits in zip(adapters, named, strict=True) if fits] or adapters
    if len(chosen) != 1:
        had = ", ".join(path.name for path in paths) or "none"
        msg = f"{client.url}: one adapter was wanted, and the server has {had}: start it with --lora adapter.gguf"
        raise SourceError(msg)

    def scaled(scale: float) -> dict[str, Any]:
        scales = [{"id": one.id, "scale": scale if one is chosen[0] else 0.0} for one in adapters]
        return {"model": served.model, "lora": scales}

    return Dialect("llamacpp", f"{served.model} without its adapter", scaled(1.0), scaled(0.0))


class Connection:
    """Requests of a fit to a server; `stops` are ids of the tokens that end a text."""

    def __init__(
        self, client: Client, dialect: Dialect, names: TokenNames, stops: Sequence[int], top: int, answers: Answers
    ) -> None:
        """Use a server; `top` is the number of likeliest tokens that it is asked for."""
        self.dialect, self.map = dialect, client.map
        self.asked = min(top, names.size)
        self.told: list[int] = []  # how many likeliest tokens it told at each place so far
        self._client, self._names, self._top, self._answers = client, names, top, answers
        always, reading = _FIELDS[dialect.kind]
        ends = {"stop_token_ids": list(stops)} if dialect.kind in ("vllm", "sglang") else {}
        self._writing, self._reading = always | ends, always | reading
        # llama.cpp tells nothing where it draws the first part of a character, so it is made to draw a whole one; what
        # it tells of the others stays.
        whole = names.whole if dialect.kind == "llamacpp" else None
        self._drawn = {} if whole is None else {"logit_bias": [[whole, 100.0]]}
        self._at_once = _PREFIXES if dialect.kind == "llamacpp" else 1
        self._echoes: bool | None = False if dialect.kind == "llamacpp" else None

    def write(self, side: Fields, ids: np.ndarray, tokens: int, temperature: float, seed: int) -> tuple[str, bool]:
        """Return the text behind tokens, and whether the model ended it."""
        fields = {"prompt": ids.tolist(), "max_tokens": tokens, "temperature": temperature, "seed": seed}

        def check(answer: Completion) -> tuple[str, bool]:
            (choice,) = answer.of(1)
            if choice.finish_reason not in ("stop", "length"):
                raise DamagedError(f"finish_reason is {choice.finish_reason!r:.40}, wanted stop or length")
            return choice.text, choice.finish_reason == "stop"

        return self._asked("write", {**side, **self._writing, **fields}, tuple[str, bool], check)

    def predict(self, side: Fields, ids: np.ndarray, places: Sequence[int]) -> list[TopTokens]:
        """Return a model's next-token predictions in a text (T,) at some indices, at least one, ascending."""
        return [entry.known() for entry in self.read(side, ids, places)]

    def read(self, side: Fields, ids: np.ndarray, places: Sequence[int], *, keep: bool = True) -> list[Entry]:
        """Return predictions as `predict` does, as the server told them.

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
                # The tokens of the text are known, whatever they are called; behind it stands one that was drawn.
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
        """Ask for the token behind each prompt; or of one prompt for all tokens, none if the server does not echo."""
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
        """Check that an answer has the tokens of a text and one more; return nothing if it has the last alone."""
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
        """Keep the likeliest tokens: vLLM puts the drawn one behind them, which would make it the bound of others."""
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
        found = self._answers.find(key, form) if keep else None
        if found is None:
            found = self._complete(body, check)
            if keep:
                self._answers.keep(key, found)
        return found

    def _complete(self, body: dict[str, Any], check: Callable[[Completion], T]) -> T:
        return self._client.ask("completions", lambda content: check(read_reply(content, Completion)), body)
