"""The replies of servers as checked types, a cache of answers, and the differences between servers.

vLLM and SGLang serve an adapter as a separate model, whose `parent` is the base, and return the predictions at all
positions of a given text (`echo` with `logprobs`). llama.cpp serves one model, whose adapter a request switches on or
off (`lora`); it ignores `echo`, so each prefix is a separate request for the next token.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec

from jcrosslora.distill.sources import ServedModel
from jcrosslora.distill.sources.client import Client, DamagedError, RefusedError, read_reply
from jcrosslora.errors import SourceError, suggestion
from jcrosslora.utils.digests import digest_of
from jcrosslora.utils.files import write_whole
from jcrosslora.utils.unfinished import remove_unchanged

T = TypeVar("T")
LogProb = Annotated[float, msgspec.Meta(le=1e-3)]  # rounding makes log-probabilities of sure tokens positive
Index = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Byte = Annotated[int, msgspec.Meta(ge=0, lt=256)]
_NOTHING = -9000.0  # vLLM writes -9999 for minus infinity, llama.cpp the lowest float
_SAMPLE = "sample.json"


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
    """A token of a text, and the likeliest ones in its place."""

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
            raise DamagedError(f"tokens, token_logprobs and top_logprobs have {sizes} entries, wanted as many of each")
        rows = zip(self.tokens or (), self.token_logprobs, self.top_logprobs, strict=True)
        return [
            Position(token, value, top_logprobs=[Likely(*pair) for pair in (top or {}).items()])
            for token, value, top in rows
        ]


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


_LISTS: Any = Cards | list[Card]  # Together.ai has the second


class LoadedAdapter(msgspec.Struct, frozen=True):
    """An adapter that llama.cpp loaded."""

    id: Index
    path: str = ""


class Answers:
    """A cache of the answers of one model on one server, off without a folder. Disk errors are ignored."""

    def __init__(self, parent: Path | None, identity: Any) -> None:
        """Use the folder of a model, named by a JSON value, below `parent`, the folder of all models, or None."""
        self._folder = None if parent is None else parent / digest_of(identity)[:24]
        if parent is not None and self._folder is not None:
            remove_unchanged(parent, self._folder)

    def renew(self, sample: T, is_of: Callable[[T], bool]) -> None:
        """Drop all answers of another model under the same name.

        `sample` holds the model's answers to fixed requests; `is_of` decides whether an earlier sample is of this
        model.
        """
        if self._folder is None:
            return
        kept = self._read(self._folder / _SAMPLE, type(sample))
        if kept is not None and is_of(kept):
            return
        with suppress(OSError):
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / _SAMPLE, msgspec.json.encode(sample))

    def find(self, key: str, kind: type[T]) -> T | None:
        """Return an answer of a type; None if there is none."""
        return None if self._folder is None else self._read(_path(self._folder, key), kind)

    def keep(self, key: str, answer: Any) -> None:
        """Keep an answer."""
        if self._folder is None:
            return
        with suppress(OSError):
            path = _path(self._folder, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, msgspec.json.encode(answer))

    @staticmethod
    def _read(path: Path, kind: type[T]) -> T | None:
        with suppress(OSError, DamagedError):
            return read_reply(path.read_bytes(), kind)
        return None


def _path(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key[2:24]}.json"


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


@dataclass(frozen=True)
class Dialect:
    """How to query a kind of server: request fields for the base with its adapter, and for the base alone.

    The name is the server's for the base; a request may have as many prompts as `prefixes`.
    """

    kind: Kind
    adapted: Fields
    base: Fields
    base_name: str
    prefixes: int = 1

    def sampling(self, stops: Sequence[int]) -> dict[str, Any]:
        """Return the fields of requests that write."""
        ends = {"stop_token_ids": list(stops)} if self.kind in ("vllm", "sglang") else {}
        return _FIELDS[self.kind][0] | ends

    def reading(self, whole: int | None) -> dict[str, Any]:
        """Return the fields of requests that read.

        llama.cpp tells nothing where it draws the first part of a character, so it is made to draw the token `whole`,
        which is a whole character; what it tells stays.
        """
        drawn = {"logit_bias": [[whole, 100.0]]} if self.kind == "llamacpp" and whole is not None else {}
        always, reading = _FIELDS[self.kind]
        return always | reading | drawn


def find_dialect(client: Client, served: ServedModel) -> Dialect:
    """Ask a server what it is, and find the base and the adapter on it.

    Raises SourceError if it does not answer, does not have the models, or does not say which of them is the base.
    """
    try:
        listed = client.get("models", _LISTS)
    except RefusedError:  # the list is no part of the standard that every server has
        listed = []
    cards = listed if isinstance(listed, list) else (listed.data or [])
    owners = {(card.owned_by or "").lower() for card in cards}
    found = [one for one in get_args(Kind) if one in owners]
    kind: Kind = found[0] if found else "other"
    known = [name for card in cards for name in (card.id, *(card.aliases or ())) if name is not None]
    wanted = [name for name in (served.model, served.base_model) if name is not None]
    for name in wanted:
        # SGLang takes base:adapter as well.
        if known and name not in known and not (kind == "sglang" and name.partition(":")[0] in known):
            msg = f"{client.url}: has no model {name!r}{suggestion(name, known)}: its models are "
            raise SourceError(msg + ", ".join(known[:20]))
    if kind == "llamacpp" and served.base_model in (None, served.model):
        return _switched(client, served)
    parent = next((card.parent for card in cards if card.id == served.model), None)
    base = served.base_model or (parent if parent in {card.id for card in cards} else None)
    if base is None or base == served.model:
        msg = f"{client.url}: does not say which model is the base of {served.model}: give its name on the server with "
        raise SourceError(msg + "--source-base-model; what the adapter changes is measured against it")
    return Dialect(kind, {"model": served.model}, {"model": base}, base)


def _switched(client: Client, served: ServedModel) -> Dialect:
    """Find the adapter that llama.cpp loaded: the one that is called as the model, or the only one."""
    adapters = client.get("/lora-adapters", list[LoadedAdapter])
    paths = [PurePath(one.path) for one in adapters]
    named = [served.model in (str(path), path.name, path.stem, path.parent.name) for path in paths]
    chosen = [one for one, fits in zip(adapters, named, strict=True) if fits] or adapters
    if len(chosen) != 1:
        had = ", ".join(path.name for path in paths) or "none"
        msg = f"{client.url}: one adapter was wanted, and the server has {had}: start it with --lora adapter.gguf"
        raise SourceError(msg)

    def scaled(scale: float) -> dict[str, Any]:
        others = [{"id": one.id, "scale": 0.0} for one in adapters if one is not chosen[0]]
        return {"model": served.model, "lora": [{"id": chosen[0].id, "scale": scale}, *others]}

    return Dialect("llamacpp", scaled(1.0), scaled(0.0), f"{served.model} without its adapter", prefixes=32)
