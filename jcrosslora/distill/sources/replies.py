"""The replies of servers as checked types, and the differences between kinds of servers.

vLLM and SGLang serve an adapter as a separate model, whose `parent` is the base, and return the predictions at all
positions of a given text (`echo` with `logprobs`). llama.cpp serves one model, whose adapter a request switches on or
off (`lora`); it ignores `echo`, so each prefix is a separate request for the next token.
"""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal, NamedTuple, get_args

import msgspec

from jcrosslora.distill.sources import ServedModel
from jcrosslora.distill.sources.client import Client, DamagedError, RefusedError, read_reply
from jcrosslora.distill.sources.predictions import Index, LogProbs
from jcrosslora.errors import SourceError, suggestion

Kind = Literal["vllm", "sglang", "llamacpp", "other"]
Fields = Mapping[str, Any]
# The model's unchanged distribution: servers fill in their own defaults or those of the model's files.
_NEUTRAL = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
# Fields for a kind of server: in each request, and in those that read predictions.
FIELDS: dict[Kind, tuple[dict[str, Any], dict[str, Any]]] = {
    "vllm": (_NEUTRAL, {"return_tokens_as_token_ids": True, "ignore_eos": True}),
    "sglang": (_NEUTRAL, {"ignore_eos": True}),
    # Its prompt cache ignores adapters: with concurrent requests the base got cached states of the adapter.
    "llamacpp": ({"samplers": ["temperature"], "cache_prompt": False}, {}),
    "other": ({"top_p": 1.0}, {}),
}


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
            msg = f"choices have the indices {[choice.index for choice in found][:40]}, expected 0 to {prompts - 1}"
            raise DamagedError(msg)
        return found


class Card(msgspec.Struct, frozen=True):
    """A model of a server. vLLM and SGLang name its base as the parent."""

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
    except RefusedError:  # not every server has the list
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
    """Find the adapter that llama.cpp loaded: the one named like the model, or the only one."""
    adapters = client.ask("/lora-adapters", lambda content: read_reply(content, list[LoadedAdapter]))
    paths = [PurePath(one.path) for one in adapters]
    named = [served.model in (str(path), path.name, path.stem, path.parent.name) for path in paths]
    chosen = [one for one, fits in zip(adapters, named, strict=True) if fits] or adapters
    if len(chosen) != 1:
        had = ", ".join(path.name for path in paths) or "none"
        msg = f"{client.url}: expected one adapter, and the server has {had}: start it with --lora adapter.gguf"
        raise SourceError(msg)

    def scaled(scale: float) -> dict[str, Any]:
        scales = [{"id": one.id, "scale": scale if one is chosen[0] else 0.0} for one in adapters]
        return {"model": served.model, "lora": scales}

    return Dialect("llamacpp", f"{served.model} without its adapter", scaled(1.0), scaled(0.0))
