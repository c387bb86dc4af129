"""How servers differ: what they are sent beside the standard, and how base and adapter are told apart.

vLLM and SGLang serve an adapter as a model of its own, whose `parent` is the base, and tell the predictions at all
positions of a given text (`echo` with `logprobs`). llama.cpp serves one model, whose adapter a request switches on or
off (`lora`); it ignores `echo`, so it is asked for the token behind every prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from jcrosslora.distill.sources.models import ServedModel
from jcrosslora.distill.sources.served.client import Client, RefusedError
from jcrosslora.distill.sources.served.replies import Card, Cards, LoadedAdapter
from jcrosslora.errors import SourceError, suggestion

Kind = Literal["vllm", "sglang", "llamacpp", "other"]
Fields = Mapping[str, Any]

# Distributions as the model makes them: servers fill in what the model's own files or they themselves prefer.
_NEUTRAL = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
_SAMPLING: dict[Kind, dict[str, Any]] = {
    "vllm": _NEUTRAL,
    "sglang": _NEUTRAL,
    # Its cache of prompts takes no heed of adapters: of requests side by side the base got states of the adapter.
    "llamacpp": {"samplers": ["temperature"], "cache_prompt": False},
    "other": {"top_p": 1.0},
}
_READING: dict[Kind, dict[str, Any]] = {
    "vllm": {"return_tokens_as_token_ids": True, "ignore_eos": True},
    "sglang": {"ignore_eos": True},
    "llamacpp": {},
    "other": {},
}
_LISTS: Any = Cards | list[Card]  # Together.ai has the second


@dataclass(frozen=True)
class Dialect:
    """How a server is asked.

    Attributes:
        adapted: fields of requests to the base with its adapter.
        base: those of requests to the base alone.
        base_name: the server's name of the base.
        prefixes: how many prompts a request may have.
    """

    kind: Kind
    adapted: Fields
    base: Fields
    base_name: str
    prefixes: int = 1

    def sampling(self, stops: Sequence[int]) -> dict[str, Any]:
        """Return the fields of requests that write."""
        ends = {"stop_token_ids": list(stops)} if self.kind in ("vllm", "sglang") else {}
        return {**_SAMPLING[self.kind], **ends}

    def reading(self, whole: int | None) -> dict[str, Any]:
        """Return the fields of requests that read.

        llama.cpp tells nothing where it draws the first part of a character, so it is made to draw the token `whole`,
        which is a whole character; what it tells stays.
        """
        drawn = {"logit_bias": [[whole, 100.0]]} if self.kind == "llamacpp" and whole is not None else {}
        return {**_SAMPLING[self.kind], **_READING[self.kind], **drawn}


def find_dialect(client: Client, served: ServedModel) -> Dialect:
    """Ask a server what it is, and find the base and the adapter on it.

    Raises:
        SourceError: it does not answer, does not have the models, or does not say which of them is the base.
    """
    cards = _cards(client)
    kind = _kind(cards)
    known = [name for card in cards for name in (card.id, *(card.aliases or ())) if name is not None]
    wanted = [name for name in (served.model, served.base_model) if name is not None]
    for name in wanted:
        # SGLang takes base:adapter as well.
        if known and name not in known and not (kind == "sglang" and name.partition(":")[0] in known):
            msg = (
                f"{client.url}: has no model {name!r}{suggestion(name, known)}: its models are {', '.join(known[:20])}"
            )
            raise SourceError(msg)
    if kind == "llamacpp" and served.base_model in (None, served.model):
        return _switched(client, served)
    base = served.base_model or _parent(cards, served.model)
    if base is None or base == served.model:
        msg = f"{client.url}: does not say which model is the base of {served.model}: give its name on the server with "
        raise SourceError(msg + "--source-base-model; what the adapter changes is measured against it")
    return Dialect(kind, {"model": served.model}, {"model": base}, base)


def _cards(client: Client) -> list[Card]:
    try:
        found = client.get("models", _LISTS)
    except RefusedError:  # which is no part of the standard that every server has
        return []
    return found if isinstance(found, list) else (found.data or [])


def _kind(cards: Sequence[Card]) -> Kind:
    owners = {(card.owned_by or "").lower() for card in cards}
    for kind in ("vllm", "sglang", "llamacpp"):
        if kind in owners:
            return kind
    return "other"


def _parent(cards: Sequence[Card], model: str) -> str | None:
    parent = next((card.parent for card in cards if card.id == model), None)
    return parent if parent in {card.id for card in cards} else None


def _switched(client: Client, served: ServedModel) -> Dialect:
    """Find the adapter that llama.cpp loaded: the one that is called as the model, or the only one."""
    adapters = client.get("/lora-adapters", list[LoadedAdapter])
    chosen = [one for one in adapters if served.model in _names(one)] or adapters
    if len(chosen) != 1:
        paths = ", ".join(PurePath(one.path).name for one in adapters) or "none"
        msg = f"{client.url}: one adapter was wanted, and the server has {paths}: start it with --lora adapter.gguf"
        raise SourceError(msg)

    def scaled(scale: float) -> dict[str, Any]:
        others = [{"id": one.id, "scale": 0.0} for one in adapters if one is not chosen[0]]
        return {"model": served.model, "lora": [{"id": chosen[0].id, "scale": scale}, *others]}

    return Dialect("llamacpp", scaled(1.0), scaled(0.0), f"{served.model} without its adapter", prefixes=32)


def _names(adapter: LoadedAdapter) -> tuple[str, ...]:
    path = PurePath(adapter.path)
    return str(path), path.name, path.stem, path.parent.name
