"""The request writer: a base without an adapter writes requests about topics, and requests similar to given ones.

It also writes prompts similar to the user's: it keeps their common beginning and end, and writes a new line in between.
A few hundred prompts do not cover all that an adapter can do: of 77 kinds of request, 200 prompts hold some only once
or not at all.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import numpy as np

from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.decoder.prompt_batches import writing_cost
from jcrosslora.distill.sources import Source, Writer
from jcrosslora.distill.task_search.answers import ScoredAnswer, best_of, distinct
from jcrosslora.distill.task_search.kinds import KINDS, JobKind
from jcrosslora.distill.task_search.topics import choose_topics, doubted_subjects, is_about, parts_of, topic_of
from jcrosslora.distill.templates import compare
from jcrosslora.text import Completion, Prompt
from jcrosslora.utils.cost import TEXT, Cost
from jcrosslora.utils.progress import Track

T = TypeVar("T")
_SHOWN = 6  # requests shown before each new one
_SHARED = 6  # new texts that follow the same requests, which are read once for all of them
_REQUEST, _TEMPERATURE = 40, 0.8  # tokens of a usual request
_LONGER = 1.5  # a new request may have this many times the tokens of the longest one shown
_FEWEST_WORDS = 3  # of a request
_EXAMPLES = 12  # best requests, which are shown to the writer
_FEWEST_FITTING = 6  # with this many requests answered as meant, no others are shown
_SHOWN_INPUTS = 2  # shown before one that a writer is chosen by
_PREDICTED_TOKENS = 48  # of that one, at most
SIMILAR = "similar"
FEWEST, _GIVEN_SHOWN = 8, 8  # fewest different prompts, and how many are shown before each new one
_LONGEST_LINE, _PERCENTILE = 128, 95  # of what differs
_SINGLE_LINES = 0.9  # share of prompts in which that is a single line


def choose_writer(source: Source, target: Source, shared: dict[Any, Any] | None = None) -> Writer:
    """Choose the base that writes requests: the one that predicts the inputs of `KINDS` better, in nats a character.

    The better language model writes the better requests; usually that is the newer one, the target. Each input follows
    others of its kind, as in the prompts of the writer. The choice holds for all adapters of a pair, and is kept in
    `shared`.
    """
    known = {} if shared is None else shared
    if choose_writer not in known:
        known[choose_writer] = _nats(target) < _nats(source)
    return target if known[choose_writer] else source.alone()


def _nats(source: Source) -> float:
    """Measure the mean NLL of the inputs under the base, in nats a character."""
    size = _SHOWN_INPUTS + 1
    lists = [kind.inputs[first : first + size] for kind in KINDS for first in range(0, len(kind.inputs), size)]
    items = [Completion(_listed([*shown, ""]), f" {last}") for *shown, last in lists]
    tokens = [len(source.tokenizer.encode(item.answer, special=False).ids) for item in items]
    nll = compare(source, items, _PREDICTED_TOKENS).base_nll
    return float(np.dot(nll, tokens) / sum(len(item.answer) for item in items))


@dataclass(frozen=True, eq=False)
class SearchState:
    """What the search has learned about the requests of an adapter.

    Attributes:
        about: input -> its topic, "" for an input without one.
        examples: the best requests, which the writer sees together with the examples of the kind.
        heard: (input, answer) of further answers with topics; the input is "" if there is none.
    """

    kind: JobKind
    answered: Sequence[ScoredAnswer]
    about: Mapping[str, str]
    examples: Sequence[ScoredAnswer] = ()
    heard: Sequence[tuple[str, str]] = ()


def write_inputs(base: Writer, known: SearchState, count: int, seed: int, bar: Track | None = None) -> dict[str, str]:
    """Write at most `count` inputs about topics of the adapter's answers; without topics, inputs like the examples.

    Inputs written like other inputs drift away from the adapter's task, because the adapter answers anything. The
    topics of its answers stay closer to the task. They come from the better half of the answers, and from answers that
    are about the topic of their request.

    Returns input -> topic, "" for an input without one. The bar advances by one for each requested input.
    """
    kind, answered = known.kind, known.answered
    told = dict.fromkeys([*best_of(answered, -(-len(answered) // 2)), *_fitting(kind, answered, known.about)])
    parts = parts_of([*known.heard, *_asked(kind, list(told))])
    shown = [*kind.examples, *_asked(kind, known.examples)]
    named = [(text, topic_of(own)) for (text, _), own in zip(shown, parts_of(shown), strict=True) if own]
    doubted = doubted_subjects(_asked(kind, answered), known.about)
    chosen = choose_topics(parts, count, seed, doubted) if named else []
    if chosen:
        return ask_about(base, chosen, named, seed, bar)
    return dict.fromkeys(resemble(base, [text for text, _ in shown], count, seed, bar), "")


def choose_examples(kind: JobKind, answered: Sequence[ScoredAnswer], about: Mapping[str, str]) -> list[ScoredAnswer]:
    """Take the best requests; if there are several whose answer is about the requested topic, only these."""
    fitting = _fitting(kind, answered, about)
    return best_of(fitting if len(fitting) >= _FEWEST_FITTING else answered, _EXAMPLES)


def _fitting(kind: JobKind, answered: Sequence[ScoredAnswer], about: Mapping[str, str]) -> list[ScoredAnswer]:
    """Keep requests whose answer is about their topic."""
    asked = zip(answered, _asked(kind, answered), strict=True)
    return [one for one, (text, answer) in asked if is_about(answer, about.get(text, ""))]


def _asked(kind: JobKind, answered: Sequence[ScoredAnswer]) -> list[tuple[str, str]]:
    return [(kind.input_of(one.text), one.item.answer) for one in answered]


def requests_cost(count: int) -> Cost:
    """Count the writing of requests after examples, which are read once for every `_SHARED` requests."""
    return writing_cost(count, _REQUEST, TEXT * (1 + 2 / _SHARED))


def ask_about(
    base: Writer, topics: Sequence[str], examples: Sequence[tuple[str, str]], seed: int, bar: Track | None = None
) -> dict[str, str]:
    """Write a request about each topic, after one or more examples of requests with topics.

    Returns request -> topic. The bar advances by one for each topic.
    """
    behind = _behind(examples, [("", topic) for topic in topics], seed, _SHOWN)
    prompts = ["\n\n".join(f"Topic: {topic}\nRequest: {text}" for text, topic in pairs).rstrip() for pairs in behind]
    written = write_lines(base, prompts, [request for request, _ in examples], seed, bar)
    return {text: topics[index] for index, text in written}


def resemble(base: Writer, requests: Sequence[str], count: int, seed: int, bar: Track | None = None) -> list[str]:
    """Write at most `count` requests similar to one or more given ones, each a single line."""
    return [text for _, text in write_lines(base, list_prompts(requests, count, seed), requests, seed, bar)]


def list_prompts(requests: Sequence[str], count: int, seed: int, shown: int = _SHOWN) -> list[str]:
    """Make prompts for requests like given ones: each lists up to `shown` of them, in random order."""
    return [_listed(texts) for texts in _behind(requests, [""] * count, seed, shown)]


def write_lines(
    base: Writer, prompts: Sequence[str], known: Sequence[str], seed: int, bar: Track | None, tokens: int | None = None
) -> list[tuple[int, str]]:
    """Continue prompts; return the whole lines that are no near-duplicates, with the indices of their prompts.

    A line is compared with the others and with known requests. `tokens` limits its length; None allows 1.5 times the
    longest known request. The bar advances by one for each prompt.
    """
    if tokens is None:
        longest = max(len(base.tokenizer.encode(request, special=False).ids) for request in known)
        tokens = math.ceil(_LONGER * longest)
    written = base.write(prompts, tokens, _TEMPERATURE, jax.random.key(seed), bar=bar)
    found = [
        (index, one.text.strip().split("\n", 1)[0])
        for index, one in enumerate(written)
        if one.ended or "\n" in one.text.lstrip()  # a line that was cut off lacks its end
    ]
    long = [(index, line) for index, line in found if len(line.split()) >= _FEWEST_WORDS]
    return [long[index] for index in distinct([line for _, line in long], known)]


def _listed(requests: Sequence[str]) -> str:
    """List requests for a base to continue: the last one is empty."""
    return "\n\n".join(f"Request: {text}" for text in requests).rstrip()


def _behind(items: Sequence[T], lasts: Sequence[T], seed: int, shown: int) -> list[list[T]]:
    """Put some items before each last one; every `_SHARED` last ones get the same items in the same order."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(items))[:shown] for _ in range(-(-len(lasts) // _SHARED))]
    return [[*(items[place] for place in orders[index // _SHARED]), last] for index, last in enumerate(lasts)]


@dataclass(frozen=True)
class SharedForm:
    """The common parts of given prompts, and the lines that differ.

    Attributes:
        prompts: the given ones, without duplicates.
        before, after: the common beginning and end of all prompts; for conversations, of their last messages.
        differing: the line in between, for each prompt with a single one there.
        tokens: the most tokens of such a line.
    """

    prompts: tuple[Prompt, ...]
    before: str
    after: str
    differing: tuple[str, ...]
    tokens: int

    def write(self, base: Writer, count: int, seed: int, bar: Track | None = None) -> list[Completion]:
        """Write at most `count` prompts of this form that resemble the given ones, without near-duplicates."""
        if not count:
            return []
        listed = list_prompts(self.differing, count, seed, _GIVEN_SHOWN)
        lines = [text for _, text in write_lines(base, listed, self.differing, seed, bar, self.tokens)]
        places = np.random.default_rng(seed).integers(len(self.prompts), size=len(lines))
        return [
            Completion(_with_content(self.prompts[place], f"{self.before}{line}{self.after}"), origin=SIMILAR)
            for line, place in zip(lines, places, strict=True)
        ]


def find_form(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> SharedForm | None:
    """Find what prompts have in common; the tokenizer belongs to the base that will write others.

    Returns None for fewer than eight different prompts, and unless nearly all of them differ in one line of at most 128
    tokens: a small base cannot write longer ones.
    """
    given = tuple(dict.fromkeys(prompts))
    contents = [prompt if isinstance(prompt, str) else prompt[-1].content for prompt in given]
    if len(set(contents)) < FEWEST:
        return None
    before = _common_start(contents)
    after = _common_start([content[len(before) :][::-1] for content in contents])[::-1]
    between = [content[len(before) : len(content) - len(after)] for content in contents]
    lines = [text for text in between if text.strip() and "\n" not in text]
    lengths = [len(tokenizer.encode(line, special=False).ids) for line in lines]
    usual = math.ceil(np.percentile(lengths, _PERCENTILE)) if lengths else 0
    if len(lines) < max(FEWEST, _SINGLE_LINES * len(given)) or usual > _LONGEST_LINE:
        return None
    return SharedForm(given, before, after, tuple(lines), usual + 1)


def _common_start(texts: Sequence[str]) -> str:
    """Return what all texts begin with, up to a space or the end of a line, so that no word is cut."""
    common = os.path.commonprefix(texts)  # noqa: RUF071
    return common[: max(common.rfind(mark) for mark in " \n") + 1]


def _with_content(prompt: Prompt, content: str) -> Prompt:
    return content if isinstance(prompt, str) else (*prompt[:-1], replace(prompt[-1], content=content))
