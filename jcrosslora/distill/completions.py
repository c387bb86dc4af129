"""Get the completions for a fit: the source answers given prompts, or prompts that it writes in prompt templates.

An adapter that was trained on answers to prompts has little effect on arbitrary text. So the source writes a prompt in
each common template, and answers it. The adapter was probably trained on the templates in which it changes the
predictions at the start of the answer most.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import numpy as np
from msgspec import structs

from jcrosslora.checkpoint import Tokenizer
from jcrosslora.decoder.generate import count_cut
from jcrosslora.decoder.prompt_batches import writing_cost
from jcrosslora.distill.endings import Endings, teach_end
from jcrosslora.distill.facts import FitFacts
from jcrosslora.distill.own_prompts import own_prompts_cost
from jcrosslora.distill.settings import FEWEST_COMPLETIONS, MOST_TOKENS, ROUND, End
from jcrosslora.distill.sources import Source, Writer
from jcrosslora.distill.task_search import NOTHING, AdapterProber, DiscoveredTask, find_task, search_cost
from jcrosslora.distill.task_search.request_writer import FEWEST, SIMILAR, find_form, requests_cost
from jcrosslora.distill.templates import (
    PROMPT_TOKENS,
    TEMPLATES,
    Sampler,
    comparing_cost,
    judge_templates,
    known_templates,
    templates_of,
    write_prompts,
)
from jcrosslora.errors import MethodError
from jcrosslora.text import Completion, Prompt
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.progress import Track, track

PILOT = 6  # completions in each template, which show which templates the adapter knows, and how long answers are
TEMPLATE_TOKENS = 12  # of an answer, in the choice of templates
# If most answers are unfinished after `PILOT_TOKENS`, a few are written up to `MOST_TOKENS`. If those do not end
# either, only the first `_ENDLESS_TOKENS` of answers are used.
PILOT_TOKENS, _ENDLESS_TOKENS = 64, 16
_LENGTH_PILOT, _LONG_PILOT = 24, 8  # prompts that are answered to learn how long answers are
_PERCENTILE = 95
_BEHIND = 8  # tokens, on top of another answer's length, that show whether an adapter goes on after it
_LATER = 100  # added to the seeds of further rounds
_TURNS = 2  # one turn falls short, because near-duplicates and unfinished prompts are dropped


@dataclass(frozen=True, eq=False)
class Completions:
    """The completions of a fit.

    Attributes:
        facts: what they are and where they come from.
        greedy: lets the source answer prompts at temperature 0.
        more: writes the completions of a further round, at most `ROUND`; it takes the number of the round, from 1, the
            prompts to avoid, and the model that answers.
        task: the adapter's task as the search found it; None if the user gave prompts.
    """

    items: list[Completion]
    facts: FitFacts
    greedy: Callable[[Collection[Prompt]], list[Completion]]
    more: Callable[[int, Collection[Prompt], Writer], list[Completion]]
    task: DiscoveredTask | None = None

    def with_taught_ends(self, source: Source) -> Self:
        """Cut answers where they are complete, those of further rounds too, and teach the end there."""

        def more(number: int, excluded: Collection[Prompt], answerer: Writer) -> list[Completion]:
            return [teach_end(one, trusted=answerer is source) for one in self.more(number, excluded, answerer)]

        def greedy(prompts: Collection[Prompt]) -> list[Completion]:
            return [*map(teach_end, self.greedy(prompts))]

        found = [*map(teach_end, self.items)]
        cut = sum(one.answer != other.answer for one, other in zip(found, self.items, strict=True))
        return replace(self, items=found, facts=structs.replace(self.facts, cut=cut), greedy=greedy, more=more)


def completions_cost(
    count: int,
    tokens: int | None,
    search: int,
    *,
    own: bool = False,
    prompts: int = 0,
    examples: int = 0,
    templates: int = len(TEMPLATES),
) -> Cost:
    """Count the most work that the completions before a fit take; without prompts the source writes those too.

    `tokens` limits an answer, None if the length is measured first; `search` is the number of texts per search step.
    If `own`, the adapter is asked for its own prompts first; the search follows if it knows none, and takes longer
    than writing them.
    """
    answers = writing_cost(count, tokens or PILOT_TOKENS // 2)
    if prompts or examples:
        similar = max(0, count - prompts) if prompts + examples >= FEWEST else 0
        return answers + requests_cost(similar)
    pilot, most = PILOT * templates, tokens or PILOT_TOKENS
    judged = comparing_cost(pilot * templates)  # every pilot in every template
    piloted = writing_cost(pilot, PROMPT_TOKENS) + writing_cost(pilot, most) + judged
    asked = own_prompts_cost() if own else Cost()
    return asked + piloted + search_cost(search, most) + writing_cost(count, PROMPT_TOKENS) + answers


def round_cost(tokens: int | None, prompts: int = 0) -> Cost:
    """Count the completions of a further round."""
    written = Cost() if prompts else writing_cost(ROUND, PROMPT_TOKENS)
    return written + writing_cost(ROUND, tokens or PILOT_TOKENS // 2)


def answer_given(
    source: Source,
    writer: Writer,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    *,
    labelled: Sequence[Prompt] = (),
    shared: dict[Any, Any] | None = None,
) -> Completions:
    """Answer the user's prompts; if there are fewer than `sampler.count`, also answer similar prompts.

    `writer` writes the similar prompts; if it cannot (`find_form`), prompts are answered again. What it writes is the
    same for all adapters of a pair, so it is cached in `shared`. Only the last 2,048 tokens of a prompt are used. The
    prompts are all different; if there are more than `sampler.count`, the first ones are used. `labelled` prompts,
    whose right answers are known, serve as examples for similar ones, and are answered only if there is no other.

    Raises:
        MethodError: the base answers too few of them, or there is only one.
        AdapterError: with the adapter the base's predictions are not finite.
    """
    form, every = find_form([*prompts, *labelled], writer.tokenizer), prompts or labelled
    kept: dict[Any, list[Completion]] = {} if shared is None else shared
    wanted, seed = sampler.count, sampler.seed
    further = 0 if form is None else max(0, wanted - len(prompts))

    def similar(count: int, seed: int, bar: Track | None = None) -> list[Completion]:
        if form is None:
            return []
        # Adapters differ only in the tokens that end a text.
        key = form, source.tokenizer.stops, count, seed
        if key not in kept:
            kept[key] = form.write(writer, count, seed, bar)
        elif bar is not None:
            bar.update(count)
        return list(kept[key])

    with track(wanted + further, "write completions", "texts") as bar:
        sampler = replace(sampler, tokens=sampler.tokens or _given_length(source, every, sampler))
        asked = [Completion(prompt) for prompt in prompts[:wanted]]
        asked += similar(wanted - len(asked), seed, bar)
        repeated = [Completion(every[place % len(every)]) for place in range(wanted - len(asked))]
        found = sampler.answer_both(source, asked, repeated, bar=bar)
    _check_enough(found, source)
    used = set(prompts[:wanted])

    def more(number: int, excluded: Collection[Prompt], answerer: Writer) -> list[Completion]:
        later = _LATER + number
        usable = [prompt for prompt in prompts if prompt not in excluded]
        if not usable and form is None:
            usable = [prompt for prompt in dict.fromkeys(labelled) if prompt not in excluded]
        # Those that were not answered yet come first, once each.
        waiting = [prompt for prompt in usable if prompt not in used][(number - 1) * ROUND :][:ROUND]
        missing = ROUND - len(waiting)
        again = 0 if not usable else missing if form is None else missing // 2
        rng = np.random.default_rng(seed + later)
        places = rng.permutation(np.arange(max(again, len(usable))) % max(1, len(usable)))[:again]
        asked = [Completion(prompt) for prompt in waiting]
        repeated = [Completion(usable[place]) for place in places]
        others = [one for one in similar(missing - again, seed + later) if one.prompt not in excluded]
        if answerer is source and sampler.temperature == 0:
            return sampler.answer_both(source, asked + others, repeated, later)
        # The target's answers are sampled: greedy ones would only make likelier what it writes anyway.
        return sampler.varied.answer(answerer, [*asked, *repeated, *others], later)

    answered, own = {item.prompt for item in found}, {item.prompt for item in found if item.origin == SIMILAR}
    facts = structs.replace(
        _facts(found, sampler),
        given=len(prompts),
        answered=len(answered & used),
        shortened=count_cut(source.tokenizer, prompts),
        labelled=len(answered - used - own),
        written=len(own - used),
    )
    return Completions(found, facts, partial(_greedy, source, sampler), more)


def write_completions(source: Source, writer: Writer, sampler: Sampler, search: int) -> Completions:
    """Write prompts and answers: in templates that the adapter knows, and about the task that it was trained on.

    A pilot in all templates shows which the adapter knows (`known_templates`); `find_task` finds its task, with
    `search` texts in each step, 0 for no search. The source writes the prompts of a known template, `writer` the
    others.

    Raises:
        MethodError: the base writes no prompts, or no answers.
        AdapterError: with the adapter the base's predictions are not finite.
    """
    templates, seed = templates_of(source.tokenizer), sampler.seed
    cost = completions_cost(sampler.count, sampler.tokens, search, templates=len(templates))
    with track(cost.texts, "write completions", "texts") as bar:
        pilot = write_pilot(source, sampler, bar=bar)
        known = known_templates(templates, *judge_templates(source, pilot, TEMPLATE_TOKENS))
        named = {template.name: template for template in templates}
        found = [item for item in pilot if named[item.origin] in known]
        task = NOTHING
        if search:
            task = find_task(AdapterProber(source, known, _with_most(sampler), bar), writer, found, search)
        wanted = round(task.share * sampler.count)
        found += [one.item for one in task.further[:wanted]]
        sampler = replace(sampler, tokens=sampler.tokens or _written_length(source, found, sampler))

        def asked(items: Sequence[Completion]) -> int:
            return sum(item.origin not in named for item in items)

        def write(count: int, requests: int, turn: int, bar: Track | None = None) -> list[Completion]:
            own = [known[place % len(known)] for place in range(count - requests)] if known else []
            return task.write(writer, requests, seed + turn, bar) + write_prompts(source, own, seed + turn, bar)

        for turn in range(1, _TURNS + 1):
            missing = max(0, sampler.count - len(found)) if known else 0
            bar.skip_to(bar.total - 2 * missing)
            if missing:
                lacking = max(0, wanted - asked(found))
                found += sampler.answer(source, write(missing, min(missing, lacking), turn, bar), turn, bar)
    # Shuffled, so that a part of them comes from all templates.
    order = np.random.default_rng(seed).permutation(len(found))[: sampler.count]
    found = [found[place] for place in order]
    _check_enough(found, source)

    def more(number: int, excluded: Collection[Prompt], answerer: Writer) -> list[Completion]:
        prompts = write(ROUND, round(task.share * ROUND), _LATER + number)
        asked = [one for one in prompts if one.prompt not in excluded]
        return (sampler if answerer is source else sampler.varied).answer(answerer, asked, _LATER + number)

    facts = structs.replace(
        _facts(found, sampler),
        written=len({item.prompt for item in found}),
        requests=asked(found),
        templates=tuple(template.name for template in known),
        job=task.job if asked(found) else "",
    )
    return Completions(found, facts, partial(_greedy, source, sampler), more, task)


def write_pilot(source: Source, sampler: Sampler, each: int = PILOT, *, bar: Track | None = None) -> list[Completion]:
    """Write prompts and answers in all templates, at most `each` in each."""
    wanted = [template for template in templates_of(source.tokenizer) for _ in range(each)]
    return _with_most(sampler).answer(source, write_prompts(source, wanted, sampler.seed, bar), bar=bar)


def _greedy(source: Source, sampler: Sampler, prompts: Collection[Prompt]) -> list[Completion]:
    return replace(sampler, temperature=0.0).answer(source, [Completion(prompt) for prompt in prompts])


def _with_most(sampler: Sampler) -> Sampler:
    """Bound answers whose length is not known yet."""
    return replace(sampler, tokens=sampler.tokens or PILOT_TOKENS)


def answer_length(lengths: Sequence[int], ended: Sequence[bool]) -> int | None:
    """Return the 95th percentile of answer lengths; None without answers, or if fewer than half have ended."""
    if not lengths or 2 * sum(ended) < len(ended):
        return None
    return math.ceil(np.percentile(lengths, _PERCENTILE))


def _given_length(source: Source, prompts: Sequence[Prompt], sampler: Sampler) -> int:
    """Learn from a few answers how many tokens answers take."""
    key = jax.random.fold_in(jax.random.key(sampler.seed), 2)
    few = prompts[:: max(1, len(prompts) // _LENGTH_PILOT)][:_LENGTH_PILOT]
    for count, tokens in ((_LENGTH_PILOT, PILOT_TOKENS), (_LONG_PILOT, MOST_TOKENS)):
        found = source.write(few[:count], tokens, sampler.temperature, key)
        items = [Completion(prompt, one.text, one.ended) for prompt, one in zip(few, found, strict=False)]
        learnt = _learnt_length(source.tokenizer, items, [one.tokens for one in found], sampler.end)
        if learnt is not None:
            return learnt
    return _ENDLESS_TOKENS


def _written_length(source: Source, pilot: Sequence[Completion], sampler: Sampler) -> int:
    """Learn how many tokens answers take from the answers of the pilot, or from longer ones to some of its prompts."""
    learnt = _learnt_length(source.tokenizer, pilot, _lengths(source.tokenizer, pilot), sampler.end)
    return learnt or _given_length(source, [item.prompt for item in pilot], sampler)


def _learnt_length(tokenizer: Tokenizer, items: Sequence[Completion], lengths: Sequence[int], end: End) -> int | None:
    """Return the length of answers in tokens; longer if the end is taught, because the rest shows where it is."""
    if end != "auto" or not Endings.of(items).unreliable:
        return answer_length(lengths, [item.ended for item in items])
    cut = [*map(teach_end, items)]
    learnt = answer_length(_lengths(tokenizer, cut), [item.ended for item in cut])
    return None if learnt is None else min(2 * learnt + _BEHIND, MOST_TOKENS)


def _lengths(tokenizer: Tokenizer, items: Sequence[Completion]) -> list[int]:
    return [len(tokenizer.encode(item.answer, special=False).ids) + 1 for item in items]


def _facts(found: Sequence[Completion], sampler: Sampler) -> FitFacts:
    return FitFacts(
        answers=len(found), answer_tokens=sampler.tokens or 0, ended=sum(bool(item.ended) for item in found)
    )


def _check_enough(found: list[Completion], source: Source) -> None:
    different = len({item.prompt for item in found})
    if len(found) >= FEWEST_COMPLETIONS and different > 1:
        return
    # Held-out prompts are not fitted to, and at least one is held out.
    few = len(found) < FEWEST_COMPLETIONS
    came = f"{len(found)} prompts, {FEWEST_COMPLETIONS}" if few else "one and the same prompt, 2 different ones"
    msg = f"{source.name} with the adapter answered {came} are needed: "
    raise MethodError(msg + "give more prompts with --prompts, or use another method")
