"""What an adapter was trained to say: the first tokens with its change amplified, the rest as it comes.

Few prompts lead an adapter that was trained on one instruction to its job. With its change amplified it begins to speak
as it was trained wherever a text begins, but a whole text that is written so falls to pieces. Behind such a beginning
the adapter goes on by itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax

from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.decoder.prompt_batches import writing_cost
from jcrosslora.distill.discovery.near_duplicates import distinct
from jcrosslora.distill.discovery.scores import score
from jcrosslora.distill.sources.protocol import Source, Writer
from jcrosslora.distill.template_choice import compare, comparing_cost
from jcrosslora.distill.templates import PromptTemplate
from jcrosslora.text import Completion
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.progress import Track

# Strengths, each with the tokens that are amplified: the stronger, the sooner a text falls to pieces.
OPENINGS, _PLAUSIBLE = ((2.0, 8), (4.0, 4)), 1e-3
ANSWER = 32  # tokens of a whole answer
_JUDGED = 8  # tokens of an opening


def starts(tokenizer: Tokenizer, templates: Sequence[PromptTemplate], requests: Sequence[str], count: int) -> list[str]:
    """List places where a text may begin, as many as asked for; none if there is neither a template nor a BOS.

    They are: answers behind requests, or behind none where these are used up, and a request, in each of the templates
    in turn; a text.
    """
    asked = iter(requests)

    def every() -> Iterator[str]:
        while templates or tokenizer.bos is not None:
            for template in templates:
                yield from (template.before + next(asked, "") + template.after for _ in range(3))
                # Where nothing stands in front there is no token to go on from, unless one begins every text.
                if template.before or tokenizer.bos is not None:
                    yield template.before
            if tokenizer.bos is not None:
                yield ""

    return [start for start, _ in zip(every(), range(count), strict=False)]


def harvest(source: Source, starts: Sequence[str], seed: int, bar: Track | None = None) -> list[Completion]:
    """Let the adapter speak from each start, once with each of `OPENINGS`.

    Args:
        source: the base, with the adapter.
        starts: texts to go on from.
        seed: of the sampling.
        bar: advances by three for each start.

    Returns:
        What it says there, the best first (see `score`), without near-duplicates.
    """
    key, opened = jax.random.key(seed), []
    for number, (strength, tokens) in enumerate(OPENINGS):
        loud = amplify(source, strength)
        written = loud.write(starts, tokens, 1.0, jax.random.fold_in(key, number), bar=bar)
        opened += [Completion(start, one.text) for start, one in zip(starts, written, strict=True) if one.text.strip()]
    # Only the better half is worth going on with.
    begun = _ranked(source, opened, _JUDGED)[: len(starts)]
    rest = source.write([item.text for item in begun], ANSWER - _JUDGED, 1.0, jax.random.fold_in(key, 9), bar=bar)
    whole = [replace(item, answer=item.answer + one.text) for item, one in zip(begun, rest, strict=True)]
    ranked = _ranked(source, whole, ANSWER)
    return [ranked[place] for place in distinct([item.answer for item in ranked])]


def harvest_cost(starts: int) -> Cost:
    """Count `harvest`; what is amplified is written by the source with its adapter and without."""
    begun = [writing_cost(starts, tokens) + comparing_cost(starts) for _, tokens in OPENINGS]
    alone = [replace(writing_cost(starts, tokens), texts=0) for _, tokens in OPENINGS]
    return sum([*begun, *alone], writing_cost(starts, ANSWER - _JUDGED) + comparing_cost(starts))


def amplify(source: Source, strength: float) -> Writer:
    """Amplify the change of the adapter, among tokens that are not noise."""
    return source.amplified(strength, _PLAUSIBLE)


def _ranked(source: Source, items: Sequence[Completion], tokens: int) -> list[Completion]:
    if not items:
        return []
    found = compare(source, items, tokens)
    figures = score(found.change, found.base_nll)
    return [items[place] for place in (-figures).argsort(kind="stable").tolist()]
