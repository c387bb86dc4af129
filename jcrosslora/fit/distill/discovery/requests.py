"""Requests, or inputs of them, that a base writes: such as given texts would answer, and such as resemble others."""

import math
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np

from jcrosslora.fit.distill.discovery.near_duplicates import distinct, overlap, pieces
from jcrosslora.sources.protocol import Writer
from jcrosslora.utils.progress import Track

T = TypeVar("T")
_SHOTS, _SHOWN = 3, 6  # answers with requests, and requests, in front of each that is to be written
ALIKE = 6  # texts that are written behind the same of these, which are read once for all of them
REQUEST, _TEMPERATURE = 40, 0.8  # tokens of a request, as many as are usual
_LONGER = 1.5  # times the longest request that is shown, the tokens of a new one
_FEWEST_WORDS, _MOST_CHARACTERS = 3, 200  # of a request, and of an answer that is shown
_COPIED, _RUN = 0.5, 16  # share of a request that is copied, in runs of so many characters


def back_translate(
    base: Writer,
    answers: Sequence[str],
    examples: Sequence[tuple[str, str]],
    count: int,
    seed: int,
    bar: Track | None = None,
) -> list[str]:
    """Write inputs that would be answered by given texts.

    Args:
        base: without the adapter.
        answers: at least one; they take turns, the first ones first.
        examples: inputs with answers, at least one.
        count: the most requests.
        seed: of the sampling.
        bar: advances by one for each.
    """
    texts = [_one_line(answers[place % len(answers)]) for place in range(count)]
    shown = _shots(texts, examples, seed)

    def prompt(place: int) -> str:
        pairs = [*shown[place], ("", texts[place])]
        return "\n\n".join(f"Answer: {_one_line(answer)}\nRequest: {text}" for text, answer in pairs).rstrip()

    known = [request for request, _ in examples]
    found = _write(base, prompt, count, seed, bar, known, _tokens(base, known))
    told = frozenset[str]().union(*(pieces(answer, _RUN) for answer in answers))
    # A name stands in both, but a request that is made of long runs of the answers was copied from them.
    return [text for text in found if len(pieces(text, _RUN) & told) <= _COPIED * len(pieces(text, _RUN))]


def list_requests(requests: Sequence[str]) -> str:
    """List requests, for a base to go on with: the last one is empty, or a part of one."""
    return "\n\n".join(f"Request: {text}" for text in requests).rstrip()


def likeness(first: str, second: str) -> float:
    """Compare what two texts look like: their marks, and where letters and digits stand among them."""
    shapes = (re.sub(r"\d+", "0", re.sub(r"[^\W\d_]+", "a", text)) for text in (first, second))
    return overlap(*(pieces(shape, 3) for shape in shapes))


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

    return _write(base, prompt, count, seed, bar, requests, tokens or _tokens(base, requests))


def _shots(answers: Sequence[str], examples: Sequence[tuple[str, str]], seed: int) -> list[list[tuple[str, str]]]:
    """Choose examples to stand in front of each answer, those of `ALIKE` answers the same if they can be.

    The base does to an answer what was done to the one before it, which is therefore the one that looks like it; where
    several do alike, they take turns.
    """
    (shuffled,) = _orders(examples, 1, seed)
    found: dict[tuple[str, str], list[int]] = {}
    for place, answer in enumerate(answers):
        scores = [likeness(known, answer) for _, known in shuffled]
        alike = [one for one, score in zip(shuffled, scores, strict=True) if score == max(scores)]
        found.setdefault(alike[place // ALIKE % len(alike)], []).append(place)
    shots: dict[int, list[tuple[str, str]]] = {}
    for last, places in found.items():
        orders = _orders([one for one in examples if one is not last], len(places), seed)
        for number, place in enumerate(places):
            shots[place] = [*orders[number // ALIKE][: _SHOTS - 1], last]
    return [shots[place] for place in range(len(answers))]


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
) -> list[str]:
    """Continue prompts; keep what is a whole line and no near-duplicate of another or of a known request."""
    prompts = [prompt(place) for place in range(count)]
    written = base.write(prompts, tokens, _TEMPERATURE, jax.random.key(seed), bar=bar)
    # A line that was cut off lacks its end.
    whole = [one.text.strip().split("\n", 1)[0] for one in written if one.ended or "\n" in one.text.lstrip()]
    found = [line for line in whole if len(line.split()) >= _FEWEST_WORDS]
    return [found[place] for place in distinct(found, known)]


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_MOST_CHARACTERS]
