"""Completions to fit to: answers to given prompts, or to prompts that the base writes in templates its adapter knows.

Text that begins anywhere shows little of an adapter that was trained on the answers to prompts. So the base is led to
where prompts end: it writes one in each of the common templates, and answers it. Which templates the adapter knows
shows in how much it changes the predictions of its base where the answer begins.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jcrosslora.decoder.prompt_batches import LONGEST, writing_cost
from jcrosslora.distill.pilot import (
    answer_prompts,
    comparing_cost,
    judge_templates,
    known_templates,
    prompts_cost,
    write_prompts,
)
from jcrosslora.distill.settings import FEWEST_COMPLETIONS, MOST_TOKENS, ROUND, DistillSettings
from jcrosslora.distill.sources.protocol import Source, Writer
from jcrosslora.distill.task_search import (
    FEWEST,
    NOTHING,
    SIMILAR,
    FoundTask,
    Questioner,
    find_form,
    find_task,
    requests_cost,
    search_cost,
)
from jcrosslora.distill.templates import TEMPLATES, templates_of
from jcrosslora.errors import MethodError
from jcrosslora.text import Completion, Prompt
from jcrosslora.text.reading import prompt_ids
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.progress import Track, track

PILOT = 6  # completions in each template, which show which templates the adapter knows, and how long answers are
JUDGED_TOKENS = 12  # of an answer, in the choice of templates
# Answers of which most have not ended after the first number of tokens are looked at again up to the second, a few of
# them; of those that do not end there either only the beginning is used.
PILOT_TOKENS, _ENDLESS_TOKENS = 64, 16
_LENGTH_PILOT, _LONG_PILOT = 24, 8  # prompts that are answered to learn how long answers are
_PERCENTILE = 95
_LATER = 100  # added to the seeds of further rounds
_TURNS = 2  # near-duplicates and prompts that were not finished are left out, so that one turn falls short


@dataclass(frozen=True, eq=False)
class Completions:
    """The completions of a fit.

    Attributes:
        description: where they come from, for reports.
        more: writes those of a further round, at most `ROUND`; it takes which round, from 1, prompts that are not to be
            used, and who answers.
        task: what the search found out about the adapter; None where the user gave prompts.
    """

    items: list[Completion]
    description: str
    more: Callable[[int, Collection[Prompt], Writer], list[Completion]]
    task: FoundTask | None = None


def completions_cost(settings: DistillSettings, prompts: int = 0, *, templates: int = len(TEMPLATES)) -> Cost:
    """Count the completions that are written before a fit, at most; without `prompts` the source writes prompts too."""
    count = settings.rounds[0]
    answers = writing_cost(count, expected_tokens(settings))
    if prompts:
        similar = count - prompts if FEWEST <= prompts < count else 0
        return answers + requests_cost(similar)
    pilot, tokens = PILOT * templates, settings.answer_tokens or PILOT_TOKENS
    judged = comparing_cost(pilot * templates)  # every pilot in every template
    piloted = prompts_cost(pilot) + writing_cost(pilot, tokens) + judged
    return piloted + search_cost(settings, tokens) + prompts_cost(count) + answers


def round_cost(settings: DistillSettings, prompts: int = 0) -> Cost:
    """Count the completions of a further round."""
    written = Cost() if prompts else prompts_cost(ROUND)
    return written + writing_cost(ROUND, expected_tokens(settings))


def expected_tokens(settings: DistillSettings) -> int:
    """Return the tokens of an answer, as far as they are known before some are written."""
    return settings.answer_tokens or PILOT_TOKENS // 2


def answer_given(
    source: Source,
    writer: Writer,
    prompts: Sequence[Prompt],
    settings: DistillSettings,
    seed: int,
    *,
    shared: dict[Any, Any] | None = None,
) -> Completions:
    """Answer the user's prompts, and prompts like them where more answers are wanted than there are prompts.

    `writer` writes prompts like them; where it cannot (`find_form`) the prompts are answered again. What it writes is
    the same for all adapters of a pair, so it is looked for in `shared`, and added. Only the last 2,048 tokens of a
    prompt are used. Where there are more prompts than answers are wanted, the first ones are used.

    Raises:
        MethodError: the base answers too few of them, or there is only one.
        AdapterError: with the adapter the base's predictions are not finite.
    """
    form = find_form(prompts, writer.tokenizer)
    kept: dict[Any, list[Completion]] = {} if shared is None else shared
    wanted, temperature = settings.rounds[0], settings.answer_temperature
    further = 0 if form is None else max(0, wanted - len(prompts))

    def similar(count: int, seed: int, bar: Track | None = None) -> list[Completion]:
        if form is None:
            return []
        # The tokens that end a text are all that differs between adapters.
        key = form, source.tokenizer.stops, count, seed
        if key not in kept:
            kept[key] = form.write(writer, count, seed, bar)
        elif bar is not None:
            bar.update(count)
        return list(kept[key])

    with track(wanted + further, "write completions", "texts") as bar:
        tokens = settings.answer_tokens or _given_length(source, prompts, temperature, seed)
        asked = [Completion(prompt) for prompt in prompts[:wanted]]
        asked += similar(wanted - len(asked), seed, bar)
        asked += [Completion(prompts[place % len(prompts)]) for place in range(wanted - len(asked))]
        found = answer_prompts(source, asked, tokens, temperature, seed, bar)
    _check_enough(found, source)
    used = set(prompts[:wanted])
    first = f"the first {wanted} of " if len(prompts) > wanted else ""
    long = sum(len(prompt_ids(source.tokenizer, prompt)) > LONGEST for prompt in prompts)
    cut = f", of which {long} are cut to their last {LONGEST:,} tokens" if long else ""

    def more(number: int, excluded: Collection[Prompt], answerer: Writer) -> list[Completion]:
        later = _LATER + seed + number
        usable = [prompt for prompt in dict.fromkeys(prompts) if prompt not in excluded]
        # Those that were not answered yet come first, once each.
        waiting = [prompt for prompt in usable if prompt not in used][(number - 1) * ROUND :][:ROUND]
        missing = ROUND - len(waiting)
        again = missing if form is None else missing // 2
        places = np.random.default_rng(later).permutation(np.arange(max(again, len(usable))) % len(usable))[:again]
        asked = [Completion(prompt) for prompt in [*waiting, *(usable[place] for place in places)]]
        return answer_prompts(answerer, asked + similar(missing - again, later), tokens, temperature, later, None)

    description = f"{len(found)} answers{_ended(found, tokens)} to {first}{len(prompts)} given prompts{cut}"
    own = sum(item.origin == SIMILAR for item in found)
    description += f", {own} of them to others like these that a base wrote" if own else ""
    return Completions(found, description, more)


def write_completions(source: Source, writer: Writer, settings: DistillSettings, seed: int) -> Completions:
    """Write prompts and answers, in the templates that the adapter knows, and to ask for what it was trained to say.

    A pilot in all templates shows which the adapter knows (`known_templates`); what it was trained to say shows where
    its change is amplified (`find_task`). The source writes the prompts of a known template, `writer` the others.

    Raises:
        MethodError: the base writes no prompts, or no answers.
        AdapterError: with the adapter the base's predictions are not finite.
    """
    templates = templates_of(source.tokenizer)
    cost = completions_cost(settings, templates=len(templates))
    with track(cost.texts, "write completions", "texts") as bar:
        pilot = write_pilot(source, settings, seed, bar=bar)
        known = known_templates(templates, *judge_templates(source, pilot, JUDGED_TOKENS))
        named = {template.name: template for template in templates}
        found = [item for item in pilot if named[item.origin] in known]
        task = NOTHING
        if settings.discovery:
            tokens = settings.answer_tokens or PILOT_TOKENS
            task = find_task(Questioner(source, known, settings, tokens, seed, bar), writer, found)
        wanted = round(task.share * settings.rounds[0])
        found += [one.item for one in task.further[:wanted]]
        tokens = settings.answer_tokens or _written_length(source, found, settings.answer_temperature, seed)

        def asked(items: Sequence[Completion]) -> int:
            return sum(item.origin not in named for item in items)

        def write(count: int, requests: int, seed: int, bar: Track | None = None) -> list[Completion]:
            own = [known[place % len(known)] for place in range(count - requests)] if known else []
            return task.write(writer, requests, seed, bar) + write_prompts(source, own, seed, bar)

        for turn in range(1, _TURNS + 1):
            missing = max(0, settings.rounds[0] - len(found)) if known else 0
            bar.skip_to(bar.total - 2 * missing)
            if missing:
                lacking = max(0, wanted - asked(found))
                prompts = write(missing, min(missing, lacking), seed + turn, bar)
                found += answer_prompts(source, prompts, tokens, settings.answer_temperature, seed + turn, bar)
    # Shuffled, so that a part of them comes from all templates.
    order = np.random.default_rng(seed).permutation(len(found))[: settings.rounds[0]]
    found = [found[place] for place in order]
    _check_enough(found, source)

    def more(number: int, excluded: Collection[Prompt], answerer: Writer) -> list[Completion]:
        later = _LATER + seed + number
        prompts = [item for item in write(ROUND, round(task.share * ROUND), later) if item.prompt not in excluded]
        return answer_prompts(answerer, prompts, tokens, settings.answer_temperature, later, None)

    where = ", ".join(template.name for template in known)
    description = f"{len(found)} completions{_ended(found, tokens)} that it wrote itself, in {where}"
    if asked(found):
        description += f", {asked(found)} of them answers to requests found by a search (it knows best: {task.job})"
    return Completions(found, description, more, task)


def write_pilot(
    source: Source, settings: DistillSettings, seed: int, each: int = PILOT, *, bar: Track | None = None
) -> list[Completion]:
    """Write prompts and answers in all templates, at most `each` in each."""
    wanted = [template for template in templates_of(source.tokenizer) for _ in range(each)]
    prompts, tokens = write_prompts(source, wanted, seed, bar), settings.answer_tokens or PILOT_TOKENS
    return answer_prompts(source, prompts, tokens, settings.answer_temperature, seed, bar)


def answer_length(lengths: Sequence[int], ended: Sequence[bool]) -> int | None:
    """Find the 95th percentile of the lengths of answers.

    Returns:
        None if fewer than half of them have ended.
    """
    if not lengths or 2 * sum(ended) < len(ended):
        return None
    return math.ceil(np.percentile(lengths, _PERCENTILE))


def _given_length(source: Source, prompts: Sequence[Prompt], temperature: float, seed: int) -> int:
    """Learn from a few answers how many tokens answers take."""
    key = jax.random.fold_in(jax.random.key(seed), 2)
    few = prompts[:: max(1, len(prompts) // _LENGTH_PILOT)][:_LENGTH_PILOT]
    for count, tokens in ((_LENGTH_PILOT, PILOT_TOKENS), (_LONG_PILOT, MOST_TOKENS)):
        found = source.write(few[:count], tokens, temperature, key)
        learnt = answer_length([one.tokens for one in found], [one.ended for one in found])
        if learnt is not None:
            return learnt
    return _ENDLESS_TOKENS


def _written_length(source: Source, pilot: Sequence[Completion], temperature: float, seed: int) -> int:
    """Learn how many tokens answers take from the answers of the pilot, or from longer ones to some of its prompts."""
    lengths = [len(source.tokenizer.encode(item.answer, special=False).ids) + 1 for item in pilot]
    learnt = answer_length(lengths, [item.ended for item in pilot])
    return learnt or _given_length(source, [item.prompt for item in pilot], temperature, seed)


def _ended(found: Sequence[Completion], tokens: int) -> str:
    share = sum(item.ended for item in found) / max(1, len(found))
    return f" of at most {tokens} tokens ({share:.0%} ended)"


def _check_enough(found: list[Completion], source: Source) -> None:
    different = len({item.prompt for item in found})
    if len(found) >= FEWEST_COMPLETIONS and different > 1:
        return
    # No step is fitted on the prompts that are held out, and at least one is.
    few = len(found) < FEWEST_COMPLETIONS
    came = f"{len(found)} prompts, {FEWEST_COMPLETIONS}" if few else "one and the same prompt, 2 different ones"
    msg = f"{source.name} with the adapter answered {came} are wanted: "
    raise MethodError(msg + "give more prompts with --probe-text, or use another method")
