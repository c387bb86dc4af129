"""Judge a fit by its facts, and put them into words.

The level depends mainly on how many of the source's answers to held-out prompts the target reproduces. The limits are
shares of these answers; docs/record/settings-study.md (`What a level means`) says how they were chosen.
"""

import math
from collections.abc import Iterator

from jcrosslora.distill.facts import FitFacts
from jcrosslora.distill.settings import ENOUGH, MOST_GIVEN
from jcrosslora.report.record import Level, Verdict

# In the recorded fits, a share above the second limit means at least half of the source's right answers, and a share
# below the first at most a quarter.
_UNUSABLE, _WORKS = 0.15, 0.35
_FEWEST = 6  # held-out answers; with five, not even 0 reproduced ones put `high` below the first limit
_MEASURE = "measure right answers with `jcrosslora evaluate`"
_BEGINNINGS: dict[Level, str] = {
    "works": "it probably works",
    "partly": "it works in part",
    "unusable": "it is probably unusable",
    "unknown": "not measured",
}


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Return Wilson's interval of one standard error for a share, which exceeds the low end with 84% probability."""
    middle, spread = successes + 0.5, math.sqrt(successes * (trials - successes) / max(1, trials) + 0.25)
    return (middle - spread) / (trials + 1), (middle + spread) / (trials + 1)


def fit_level(facts: FitFacts) -> Level:
    """Return the level of a fitted update.

    Prompts that the source made up may differ much from the adapter's task, so answers to them alone never show that a
    fit from zero works.
    """
    low, high = interval(facts.agreed, facts.held_out)
    if facts.held_out < _FEWEST:
        return "unknown"
    if high < _UNUSABLE:
        return "unusable"
    return "works" if low >= _WORKS and (facts.on_top or not _made_up(facts)) else "partly"


def fit_verdict(facts: FitFacts) -> Verdict:
    """Return the verdict on a fitted update, with its numbers and what to do next."""
    level, count = fit_level(facts), facts.held_out
    made_up = "answers to prompts that it made up" if _made_up(facts) else "held-out answers"
    kind = "answers to prompts that the adapter learnt" if facts.own else made_up
    share = f"it reproduces {facts.agreed:,} of the source's {count:,} {kind}" if count else "no prompt was held out"
    few = ", too few to tell" if 0 < count < _FEWEST else ""
    helping = [] if level == "works" else list(remedies(facts))
    advice = [*helping, *([] if level == "unusable" else [_MEASURE])]
    return Verdict(level, "; ".join((f"{_BEGINNINGS[level]}: {share}{few}", *advice)))


def remedies(facts: FitFacts) -> Iterator[str]:
    """Yield ways to improve a fit, in the imperative, the most useful first; nothing if no fact is known."""
    if facts.done < 1:
        yield f"let the fit end (it was stopped after {facts.done:.0%})"
    if facts.planned < facts.usual:
        yield f"leave out --completions ({facts.planned:,} were asked for, the default is {facts.usual:,})"
    if _made_up(facts):
        yield "give prompts of the adapter's task with --prompts (twenty help a lot)"
    elif facts.own:
        yield "see whether the prompts that it wrote are those of its job; if not, give others with --prompts"
    elif facts.answers and facts.given < ENOUGH:
        yield f"give more prompts (there were {facts.given:,}, and up to {MOST_GIVEN:,} are used)"
    elif facts.answers:
        yield "see whether the source answers well with the adapter"


def fit_sentences(facts: FitFacts) -> Iterator[str]:
    """Yield sentences without full stops: what the update was fitted to, how, and what it reproduces."""
    if facts.answers:
        yield _answers(facts)
    if facts.steps:
        yield _steps(facts)
    if facts.divergence is not None and facts.divergence_before is not None:
        agreed = f"the target writes {facts.agreed:,} of the source's {facts.held_out:,} answers"
        before = f" ({facts.agreed_before:,} of {facts.held_out:,} before the fit), and"
        figures = f"{facts.divergence_before:.3g} to {facts.divergence:.3g} nats"
        yield (
            f"on held-out prompts {f'{agreed}{before} ' if facts.held_out else ''}"
            f"the divergence from the teacher went from {figures}"
        )
    if facts.note:
        yield facts.note


def _made_up(facts: FitFacts) -> bool:
    """Return whether no prompt came from the user, and none is known to be of the adapter's task."""
    return facts.answers > 0 and facts.given + facts.examples + facts.own == 0


def _answers(facts: FitFacts) -> str:
    ended = f"{facts.ended:,} ended"
    cut = f", {facts.cut:,} were cut where they are complete" if facts.cut else ""
    wrote = f"the source wrote {facts.answers:,} answers of at most {facts.answer_tokens:,} tokens ({ended}{cut})"
    if facts.templates:
        to = f"{wrote} to {facts.written:,} prompts that it made up, in {', '.join(facts.templates)}"
        return f"{to}; {facts.requests:,} answers are of the likely task, {facts.job}" if facts.requests else to
    if facts.own:
        own = f"{wrote} to {facts.own:,} prompts, which the adapter wrote itself, from {facts.opening}"
        return own if facts.gain is None else f"{own}; it knows them: gain {facts.gain:.2g} nats a token"
    first = f"the first {facts.answered:,} of {facts.given:,} given"
    parts = (
        (facts.answered, first if facts.answered < facts.given else f"{facts.answered:,} given"),
        (facts.labelled, f"{facts.labelled:,} labelled"),
        (facts.written, f"{facts.written:,} that a base wrote like them"),
    )
    shown = [text for count, text in parts if count]
    total = facts.answered + facts.labelled + facts.written
    prompts = f"{total:,} prompts: {' and '.join(shown)}" if shown[1:] else f"{''.join(shown)} prompts"
    long = f"; {facts.shortened:,} of the given ones were shortened to their last tokens" if facts.shortened else ""
    return f"{wrote} to {prompts}{long}"


def _steps(facts: FitFacts) -> str:
    more = f", {facts.examples:,} labelled examples among them" if facts.examples else ""
    later = f", then to {facts.later:,} more answers" if facts.later else ""
    later += f", of which the target wrote {facts.later_target:,}" if facts.later_target else ""
    end = f"; it was stopped after {facts.done:.0%}" if facts.done < 1 else ""
    end += f"; the weights were divided over {facts.devices:,} devices" if facts.devices > 1 else ""
    return (
        f"the update was fitted in {facts.steps:,} steps to {facts.predictions:,} predictions over "
        f"{facts.tokens:,} shared tokens{more}{later}{end}"
    )
