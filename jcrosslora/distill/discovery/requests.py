"""Requests, or inputs of them, that a base writes: about topics, and such as resemble others."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np

from jcrosslora.decoder.prompt_batches import writing_cost
from jcrosslora.distill.discovery.near_duplicates import distinct
from jcrosslora.distill.sources.protocol import Writer
from jcrosslora.utils.cost import TEXT, Cost
from jcrosslora.utils.progress import Track

T = TypeVar("T")
_SHOWN = 6  # requests in front of each that is to be written
ALIKE = 6  # texts that are written behind the same of these, which are read once for all of them
REQUEST, _TEMPERATURE = 40, 0.8  # tokens of a request, as many as are usual
_LONGER = 1.5  # times the longest request that is shown, the tokens of a new one
_FEWEST_WORDS = 3  # of a request


def requests_cost(count: int) -> Cost:
    """Count the writing of requests behind others, which are read once for every `ALIKE` of them."""
    return writing_cost(count, REQUEST, TEXT * (1 + 2 / ALIKE))


def ask_about(
    base: Writer,
    topics: Sequence[str],
    examples: Sequence[tuple[str, str]],
    seed: int,
    bar: Track | None = None,
) -> dict[str, str]:
    """Write requests about topics.

    Args:
        base: without the adapter.
        topics: a few words for each request.
        examples: requests with their topics, at least one.
        seed: of the sampling.
        bar: advances by one for each.

    Returns:
        The topics by the requests.
    """
    orders = _orders(examples, len(topics), seed)

    def prompt(place: int) -> str:
        pairs = [*orders[place // ALIKE][:_SHOWN], ("", topics[place])]
        return "\n\n".join(f"Topic: {topic}\nRequest: {text}" for text, topic in pairs).rstrip()

    known = [request for request, _ in examples]
    written = _write(base, prompt, len(topics), seed, bar, known, _tokens(base, known))
    return {text: topics[place] for place, text in written}


def list_requests(requests: Sequence[str]) -> str:
    """List requests, for a base to go on with: the last one is empty, or a part of one."""
    return "\n\n".join(f"Request: {text}" for text in requests).rstrip()


def resemble(
    base: Writer,
    requests: Sequence[str],
    count: int,
    seed: int,
    bar: Track | None = None,
    *,
    shown: int = _SHOWN,
    tokens: int | None = None,
) -> list[str]:
    """Write requests like given ones.

    Args:
        base: without the adapter.
        requests: at least one, each a single line.
        count: the most requests.
        seed: of the sampling.
        bar: advances by one for each.
        shown: how many of the given ones stand in front of each.
        tokens: the most tokens of a request; None is half as many again as the longest of the given ones has.
    """
    orders = _orders(requests, count, seed)

    def prompt(place: int) -> str:
        return list_requests([*orders[place // ALIKE][:shown], ""])

    written = _write(base, prompt, count, seed, bar, requests, tokens or _tokens(base, requests))
    return [text for _, text in written]


def _orders(items: Sequence[T], count: int, seed: int) -> list[list[T]]:
    """Shuffle items, once for every `ALIKE` of so many texts."""
    rng = np.random.default_rng(seed)
    return [[items[place] for place in rng.permutation(len(items))] for _ in range(-(-count // ALIKE))]


def _tokens(base: Writer, requests: Sequence[str]) -> int:
    """Return the most tokens of a request that is written behind these."""
    longest = max(len(base.tokenizer.encode(request, special=False).ids) for request in requests)
    return math.ceil(_LONGER * longest)


def _write(
    base: Writer,
    prompt: Callable[[int], str],
    count: int,
    seed: int,
    bar: Track | None,
    known: Sequence[str],
    tokens: int,
) -> list[tuple[int, str]]:
    """Continue prompts; keep what is a whole line and no near-duplicate of another or of a known request.

    Returns:
        Places of the prompts, with what was written behind them.
    """
    prompts = [prompt(place) for place in range(count)]
    written = base.write(prompts, tokens, _TEMPERATURE, jax.random.key(seed), bar=bar)
    found = [
        (place, one.text.strip().split("\n", 1)[0])
        for place, one in enumerate(written)
        if one.ended or "\n" in one.text.lstrip()  # a line that was cut off lacks its end
    ]
    long = [(place, line) for place, line in found if len(line.split()) >= _FEWEST_WORDS]
    return [long[place] for place in distinct([line for _, line in long], known)]
