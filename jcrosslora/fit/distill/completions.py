"""Completions to fit to: answers to given prompts, or to prompts that the base writes in templates its adapter knows.

Text that begins anywhere shows little of an adapter that was trained on the answers to prompts. So the base is led to
where prompts end: it writes one in each of the common templates, and answers it. Which templates the adapter knows
shows in how much it changes the predictions of its base where the answer begins.
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import jax
import numpy as np

from jcrosslora.decoder import Generator
from jcrosslora.errors import MethodError
from jcrosslora.fit.distill.settings import FEWEST_COMPLETIONS, DistillSettings
from jcrosslora.fit.distill.template_choice import judge_templates, known_templates
from jcrosslora.fit.distill.templates import TEMPLATES, Completion, PromptTemplate
from jcrosslora.utils.progress import Track, track

PILOT = 6  # completions in each template, which show which templates the adapter knows
# First words of prompts, asking and telling.
_OPENERS = (
    *("What", "Which", "How", "Why", "When", "Where", "Who", "If", "A", "The", "In", "Which of the following"),
    *("Explain", "Describe", "Write", "Name", "Give", "List"),
)
# A full stop inside a number or a name has no space behind it; the others are those of Chinese, Japanese and Hindi.
_SENTENCE_END = re.compile(r"[?!]|\.(?=\s|$)|[\uff1f\uff01\u3002\u0964]")
_FEWEST_WORDS = 4  # of a prompt
_PROMPT_TOKENS, _PROMPT_TEMPERATURE = 32, 0.7
_LONGEST_PROMPT = 64  # tokens


@dataclass(frozen=True, eq=False)
class Completions:
    """The completions of a fit, and where they come from, for reports."""

    items: list[Completion]
    description: str


def answer_given(
    generator: Generator, prompts: Sequence[str], settings: DistillSettings, seed: int, *, progress: bool = False
) -> Completions:
    """Answer the user's prompts, each as often as it takes to make `settings.completions`.

    Only the last 64 tokens of a prompt are used: the fit works in rows of 96, answer included. Where there are more
    prompts than answers are wanted, the first ones are used.

    Raises:
        MethodError: the base answers too few of them, or there is only one.
        AdapterError: with the adapter the base's predictions are not finite.
    """
    given = [Completion(_shortened(generator, prompt)) for prompt in prompts]
    found: list[Completion] = []
    with _bar(settings.completions, progress) as bar:
        for turn in range(max(1, -(-settings.completions // len(given)))):
            part = given[: settings.completions - turn * len(given)]
            found += _answer(generator, part, settings, seed + turn, bar)
    used = f"the first {settings.completions} of " if len(given) > settings.completions else ""
    _check_enough(found, generator)
    return Completions(found, f"{len(found)} answers to {used}{len(given)} given prompts")


def write_completions(
    generator: Generator, settings: DistillSettings, seed: int, *, progress: bool = False
) -> Completions:
    """Write prompts and answers in the templates that the adapter knows, which a pilot in all templates shows.

    Raises:
        MethodError: the base writes no prompts, or no answers.
        AdapterError: with the adapter the base's predictions are not finite.
    """
    with _bar(2 * (PILOT * len(TEMPLATES) + settings.completions), progress) as bar:
        pilot = write_pilot(generator, settings, seed, bar=bar)
        known = known_templates(*judge_templates(generator, pilot, settings.answer_tokens))
        found = [item for item in pilot if item.template in known]
        missing = max(0, settings.completions - len(found)) if known else 0
        bar.total = bar.done + 2 * missing
        if missing:
            shares = np.array_split(np.arange(missing), len(known))
            templates = [template for template, share in zip(known, shares, strict=True) for _ in share]
            prompts = _write_prompts(generator, templates, seed + 1, bar)
            found += _answer(generator, prompts, settings, seed + 1, bar)
    # Shuffled, so that a part of them comes from all templates.
    order = np.random.default_rng(seed).permutation(len(found))[: settings.completions]
    found = [found[place] for place in order]
    _check_enough(found, generator)
    names = ", ".join(repr(template.name) for template in known)
    return Completions(found, f"{len(found)} completions that it wrote itself in templates that begin {names}")


def write_pilot(
    generator: Generator, settings: DistillSettings, seed: int, each: int = PILOT, *, bar: Track | None = None
) -> list[Completion]:
    """Write prompts and answers in all of `TEMPLATES`, at most `each` in each."""
    templates = [template for template in TEMPLATES for _ in range(each)]
    found = _answer(generator, _write_prompts(generator, templates, seed, bar), settings, seed, bar)
    return [item for item in found if item.answer.strip()]


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
    openers = rng.permutation(np.arange(len(templates)) % len(_OPENERS))
    starts = [template.before + _OPENERS[opener] for template, opener in zip(templates, openers, strict=True)]
    key = jax.random.key(seed)
    written = generator.continue_texts(starts, _PROMPT_TOKENS, _PROMPT_TEMPERATURE, key, bar=bar)
    found = []
    for template, start, text in zip(templates, starts, written, strict=True):
        end = first_sentence(text)
        sentence = (start + end).removeprefix(template.before)
        if end and len(sentence.split()) >= _FEWEST_WORDS:
            found.append(Completion(template.wrap(sentence), template=template))
    return found


def _answer(
    generator: Generator, prompts: Sequence[Completion], settings: DistillSettings, seed: int, bar: Track | None
) -> list[Completion]:
    """Add answers to prompts; leave out prompts that get none."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    texts = [item.prompt for item in prompts]
    written = generator.continue_texts(texts, settings.answer_tokens, settings.answer_temperature, key, bar=bar)
    return [Completion(item.prompt, text, item.template) for item, text in zip(prompts, written, strict=True) if text]


def _shortened(generator: Generator, prompt: str) -> str:
    ids = generator.tokenizer.encode(prompt).ids
    if len(ids) <= _LONGEST_PROMPT:
        return prompt
    # With the special tokens that the prompt names: they tell a chat model where an answer begins.
    return generator.tokenizer.backend.decode(ids[-_LONGEST_PROMPT:].tolist(), skip_special_tokens=False)


def _check_enough(found: list[Completion], generator: Generator) -> None:
    different = len({item.prompt for item in found})
    if len(found) >= FEWEST_COMPLETIONS and different > 1:
        return
    # No step is fitted on the prompts that are held out, and at least one is.
    few = len(found) < FEWEST_COMPLETIONS
    came = f"{len(found)} prompts, {FEWEST_COMPLETIONS}" if few else "one and the same prompt, 2 different ones"
    msg = (
        f"{generator.name} with the adapter answered {came} are wanted: "
        "give more prompts with --probe-text, or use another method"
    )
    raise MethodError(msg)


def _bar(texts: int, progress: bool) -> AbstractContextManager[Track]:
    return track(texts, "write completions", "texts", show=progress)
