"""Completions to fit to: answers to given prompts, or to prompts that the base writes in templates its adapter knows.

Text that begins anywhere shows little of an adapter that was trained on the answers to prompts. So the base is led to
where prompts end: it writes one in each of the common templates, and answers it. Which templates the adapter knows
shows in how much it changes the predictions of its base where the answer begins.
"""

import math
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import jax
import numpy as np

from jcrosslora.decoder import Generator, Written
from jcrosslora.decoder.generate import LONGEST
from jcrosslora.errors import MethodError
from jcrosslora.fit.distill.settings import FEWEST_COMPLETIONS, DistillSettings
from jcrosslora.fit.distill.template_choice import judge_templates, known_templates
from jcrosslora.fit.distill.templates import PromptTemplate, templates_of
from jcrosslora.text import Completion, Prompt
from jcrosslora.text.reading import prompt_ids
from jcrosslora.utils.progress import Track, track

PILOT = 6  # completions in each template, which show which templates the adapter knows, and how long answers are
# First words of prompts, asking and telling.
_OPENERS = (
    *("What", "Which", "How", "Why", "When", "Where", "Who", "If", "A", "The", "In", "Which of the following"),
    *("Explain", "Describe", "Write", "Name", "Give", "List"),
)
# A full stop inside a number or a name has no space behind it; the others are those of Chinese, Japanese and Hindi.
_SENTENCE_END = re.compile(r"[?!]|\.(?=\s|$)|[\uff1f\uff01\u3002\u0964]")
_FEWEST_WORDS = 4  # of a prompt
_PROMPT_TOKENS, _PROMPT_TEMPERATURE = 32, 0.7
JUDGED_TOKENS = 12  # of an answer, in the choice of templates
# Answers of which most have not ended after the first number of tokens are looked at again up to the second, a few of
# them; of those that do not end there either only the beginning is used.
PILOT_TOKENS, MOST_TOKENS, _ENDLESS_TOKENS = 64, 512, 16
_LENGTH_PILOT, _LONG_PILOT = 24, 8  # prompts that are answered to learn how long answers are
_PERCENTILE = 95


@dataclass(frozen=True, eq=False)
class Completions:
    """The completions of a fit.

    Attributes:
        items: the completions.
        description: where they come from, for reports.
        more: writes others like them: the source with its adapter, how many, a seed, prompts that are not to be used,
            and who answers.
    """

    items: list[Completion]
    description: str
    more: Callable[[Generator, int, int, Collection[Prompt], Generator], list[Completion]]


def answer_given(
    generator: Generator, prompts: Sequence[Prompt], settings: DistillSettings, seed: int, *, progress: bool = False
) -> Completions:
    """Answer the user's prompts, each as often as it takes to make those that are written at first.

    Only the last 2,048 tokens of a prompt are used. Where there are more prompts than answers are wanted, the first
    ones are used.

    Raises:
        MethodError: the base answers too few of them, or there is only one.
        AdapterError: with the adapter the base's predictions are not finite.
    """
    found: list[Completion] = []
    with _bar(settings.rounds[0], progress) as bar:
        tokens = settings.answer_tokens or _given_length(generator, prompts, settings.answer_temperature, seed)
        for turn in range(max(1, -(-settings.rounds[0] // len(prompts)))):
            part = [Completion(prompt) for prompt in prompts[: settings.rounds[0] - turn * len(prompts)]]
            found += _answer(generator, part, tokens, settings.answer_temperature, seed + turn, bar)
    used = f"the first {settings.rounds[0]} of " if len(prompts) > settings.rounds[0] else ""
    _check_enough(found, generator)
    long = sum(len(prompt_ids(generator.tokenizer, prompt)) > LONGEST for prompt in prompts)
    cut = f", of which {long} are cut to their last {LONGEST:,} tokens" if long else ""

    def more(
        _: Generator, count: int, seed: int, excluded: Collection[Prompt], answerer: Generator
    ) -> list[Completion]:
        usable = [prompt for prompt in dict.fromkeys(prompts) if prompt not in excluded]
        places = np.random.default_rng(seed).permutation(np.arange(max(count, len(usable))) % len(usable))[:count]
        part = [Completion(usable[place]) for place in places]
        return _answer(answerer, part, tokens, settings.answer_temperature, seed, None)

    description = f"{len(found)} answers{_ended(found, tokens)} to {used}{len(prompts)} given prompts{cut}"
    return Completions(found, description, more)


def write_completions(
    generator: Generator, settings: DistillSettings, seed: int, *, progress: bool = False
) -> Completions:
    """Write prompts and answers in the templates that the adapter knows, which a pilot in all templates shows.

    Raises:
        MethodError: the base writes no prompts, or no answers.
        AdapterError: with the adapter the base's predictions are not finite.
    """
    templates = templates_of(generator.tokenizer)
    with _bar(2 * (PILOT * len(templates) + settings.rounds[0]), progress) as bar:
        pilot = write_pilot(generator, settings, seed, bar=bar)
        known = known_templates(templates, *judge_templates(generator, pilot, JUDGED_TOKENS))
        names = {template.name for template in known}
        found = [item for item in pilot if item.origin in names]
        tokens = settings.answer_tokens or _written_length(generator, found, settings.answer_temperature, seed)
        missing = max(0, settings.rounds[0] - len(found)) if known else 0
        bar.total = bar.done + 2 * missing
        if missing:
            shares = np.array_split(np.arange(missing), len(known))
            wanted = [template for template, share in zip(known, shares, strict=True) for _ in share]
            prompts = _write_prompts(generator, wanted, seed + 1, bar)
            found += _answer(generator, prompts, tokens, settings.answer_temperature, seed + 1, bar)
    # Shuffled, so that a part of them comes from all templates.
    order = np.random.default_rng(seed).permutation(len(found))[: settings.rounds[0]]
    found = [found[place] for place in order]
    _check_enough(found, generator)
    where = ", ".join(template.name for template in known)

    def more(
        generator: Generator, count: int, seed: int, excluded: Collection[Prompt], answerer: Generator
    ) -> list[Completion]:
        wanted = [known[place % len(known)] for place in range(count)]
        prompts = [item for item in _write_prompts(generator, wanted, seed, None) if item.prompt not in excluded]
        return _answer(answerer, prompts, tokens, settings.answer_temperature, seed, None)

    description = f"{len(found)} completions{_ended(found, tokens)} that it wrote itself, in {where}"
    return Completions(found, description, more)


def write_pilot(
    generator: Generator, settings: DistillSettings, seed: int, each: int = PILOT, *, bar: Track | None = None
) -> list[Completion]:
    """Write prompts and answers in all templates, at most `each` in each."""
    wanted = [template for template in templates_of(generator.tokenizer) for _ in range(each)]
    prompts, tokens = _write_prompts(generator, wanted, seed, bar), settings.answer_tokens or PILOT_TOKENS
    return _answer(generator, prompts, tokens, settings.answer_temperature, seed, bar)


def answer_length(lengths: Sequence[int], ended: Sequence[bool]) -> int | None:
    """Find the 95th percentile of the lengths of answers.

    Args:
        lengths: tokens of each answer.
        ended: whether each has ended.

    Returns:
        None if fewer than half of them have ended.
    """
    if not lengths or 2 * sum(ended) < len(ended):
        return None
    return math.ceil(np.percentile(lengths, _PERCENTILE))


def _given_length(generator: Generator, prompts: Sequence[Prompt], temperature: float, seed: int) -> int:
    """Learn from a few answers how many tokens answers take."""
    key = jax.random.fold_in(jax.random.key(seed), 2)
    few = prompts[:: max(1, len(prompts) // _LENGTH_PILOT)][:_LENGTH_PILOT]
    for count, tokens in ((_LENGTH_PILOT, PILOT_TOKENS), (_LONG_PILOT, MOST_TOKENS)):
        found = generator.write(few[:count], tokens, temperature, key)
        learnt = answer_length([one.tokens for one in found], [one.ended for one in found])
        if learnt is not None:
            return learnt
    return _ENDLESS_TOKENS


def _written_length(generator: Generator, pilot: Sequence[Completion], temperature: float, seed: int) -> int:
    """Learn how many tokens answers take from the answers of the pilot, or from longer ones to some of its prompts."""
    lengths = [len(generator.tokenizer.encode(item.answer, special=False).ids) + 1 for item in pilot]
    learnt = answer_length(lengths, [item.ended for item in pilot])
    return learnt or _given_length(generator, [item.prompt for item in pilot], temperature, seed)


def first_sentence(text: str) -> str:
    """Return the first sentence with the mark that ends it, if the first line has one; else nothing."""
    line = text.split("\n", 1)[0]
    found = _SENTENCE_END.search(line)
    return line[: found.end()] if found else ""


def _write_prompts(
    generator: Generator, templates: Sequence[PromptTemplate], seed: int, bar: Track | None
) -> list[Completion]:
    """Write a prompt of one sentence for each template; leave out those that are too short or not finished."""
    rng = np.random.default_rng(seed)
    openers = [_OPENERS[place] for place in rng.permutation(np.arange(len(templates)) % len(_OPENERS))]
    starts = [template.before + opener for template, opener in zip(templates, openers, strict=True)]
    written = generator.write(starts, _PROMPT_TOKENS, _PROMPT_TEMPERATURE, jax.random.key(seed), bar=bar)
    found = []
    for template, opener, one in zip(templates, openers, written, strict=True):
        # A turn that the base itself ended is a whole prompt.
        end = first_sentence(one.text) or (one.text.split("\n", 1)[0] if one.ended else "")
        if end and len((opener + end).split()) >= _FEWEST_WORDS:
            found.append(Completion(template.wrap(opener + end), origin=template.name))
    return found


def _answer(
    generator: Generator, prompts: Sequence[Completion], tokens: int, temperature: float, seed: int, bar: Track | None
) -> list[Completion]:
    """Add answers to prompts; leave out prompts that get none."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    written = generator.write([item.prompt for item in prompts], tokens, temperature, key, bar=bar)
    return [_answered(item, one) for item, one in zip(prompts, written, strict=True) if one.text.strip()]


def _answered(prompt: Completion, written: Written) -> Completion:
    return Completion(prompt.prompt, written.text, written.ended, prompt.origin)


def _ended(found: Sequence[Completion], tokens: int) -> str:
    share = sum(item.ended for item in found) / max(1, len(found))
    return f" of at most {tokens} tokens ({share:.0%} ended)"


def _check_enough(found: list[Completion], generator: Generator) -> None:
    different = len({item.prompt for item in found})
    if len(found) >= FEWEST_COMPLETIONS and different > 1:
        return
    # No step is fitted on the prompts that are held out, and at least one is.
    few = len(found) < FEWEST_COMPLETIONS
    came = f"{len(found)} prompts, {FEWEST_COMPLETIONS}" if few else "one and the same prompt, 2 different ones"
    msg = f"{generator.name} with the adapter answered {came} are wanted: "
    raise MethodError(msg + "give more prompts with --probe-text, or use another method")


def _bar(texts: int, progress: bool) -> AbstractContextManager[Track]:
    return track(texts, "write completions", "texts", show=progress)
