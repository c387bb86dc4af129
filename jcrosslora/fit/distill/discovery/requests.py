"""Requests that the base writes: such as would be answered by given texts, and such as resemble given ones."""

import re
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jcrosslora.fit.distill.discovery.near_duplicates import distinct, overlap, pieces
from jcrosslora.sources.protocol import Writer
from jcrosslora.utils.progress import Track

# Answers and the requests behind them, of jobs that models are often trained for. They show the base what is wanted.
EXAMPLES = (
    ("Le chat dort sur la chaise.", "Translate the sentence to French: The cat is asleep on the chair."),
    ("negative", "Say whether the review is positive or negative: The food was cold and nobody said sorry."),
    ('{"name": "Anna Keller", "age": 34}', "Convert the text to JSON: Anna Keller is 34 years old."),
    ("SELECT name FROM users WHERE age > 30;", "Write the question in SQL: Which users are older than 30?"),
    (
        "The bridge stays closed until May.",
        "Summarise: The city says that repairs of the bridge will take until May.",
    ),
    ("Could you please send me the report?", "Make the message polite: Send me the report."),
    ("Lisbon", "Answer the question in one word: What is the capital of Portugal?"),
    ("<b>Note:</b> The shop is closed.", "Format the text as HTML: Note: The shop is closed."),
    ("oats, milk, honey", "List the ingredients in the recipe: Cook the oats in milk and add honey."),
    ("The dogs were barking all night.", "Put the sentence into the past tense: The dogs are barking all night."),
    ("sports", "Classify the headline: The home team wins the cup."),
    (
        "The Blue Bar by the river serves fish.",
        "Write a sentence from the data: name Blue Bar, food fish, near river",
    ),
    ("def double(x): return 2 * x", "Write the function in Python: Double a number."),
    ("She went to school yesterday.", "Correct the sentence: She go to school yesterday."),
)
_SHOTS = 3  # examples in front of each request that is to be written
REQUEST, _TEMPERATURE = 40, 0.8  # tokens of a request
_FEWEST_WORDS, _MOST_CHARACTERS = 3, 200  # of a request, and of an answer that is shown
_COPIED = 0.5  # share of a request


def back_translate(base: Writer, answers: Sequence[str], count: int, seed: int, bar: Track | None = None) -> list[str]:
    """Write requests that would be answered by given texts.

    Args:
        base: without the adapter.
        answers: at least one; they take turns, the first ones first.
        count: the most requests.
        seed: of the sampling.
        bar: advances by one for each.
    """
    rng = np.random.default_rng(seed)

    def prompt(place: int) -> str:
        answer = _one_line(answers[place % len(answers)])
        shuffled = [EXAMPLES[index] for index in rng.permutation(len(EXAMPLES))]
        # The base does to the last answer what was done to the one before it, which therefore looks like it.
        nearest = max(shuffled, key=lambda example: _likeness(example[0], answer))
        others = [example for example in shuffled if example is not nearest]
        pairs = [*others[: _SHOTS - 1], nearest, (answer, "")]
        return "\n\n".join(f"Answer: {answer}\nRequest: {request}" for answer, request in pairs).rstrip()

    found = _write(base, prompt, count, seed, bar, [request for _, request in EXAMPLES])
    told = frozenset[str]().union(*map(pieces, answers))
    # A request that is made of pieces of the answers was copied from them.
    return [text for text in found if len(pieces(text) & told) <= _COPIED * len(pieces(text))]


def _likeness(first: str, second: str) -> float:
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
    shown: int = _SHOTS,
    tokens: int = REQUEST,
) -> list[str]:
    """Write requests like given ones.

    Args:
        base: without the adapter.
        requests: at least one, each a single line.
        count: the most requests.
        seed: of the sampling.
        bar: advances by one for each.
        shown: how many of the given ones stand in front of each.
        tokens: the most tokens of a request.
    """
    rng = np.random.default_rng(seed)

    def prompt(_: int) -> str:
        chosen = [requests[index] for index in rng.permutation(len(requests))[:shown]]
        return "\n\n".join(f"Request: {request}" for request in [*chosen, ""]).rstrip()

    return _write(base, prompt, count, seed, bar, requests, tokens)


def _write(
    base: Writer,
    prompt: Callable[[int], str],
    count: int,
    seed: int,
    bar: Track | None,
    known: Sequence[str],
    tokens: int = REQUEST,
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
