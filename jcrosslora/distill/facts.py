"""The facts of a fit as numbers; `jcrosslora.report.fit` judges them and puts them into words."""

from typing import Annotated

import msgspec

# Bounded, so that a damaged report cannot hold numbers that no fit has.
Count = Annotated[int, msgspec.Meta(ge=0, le=10**15)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Nats = Annotated[float, msgspec.Meta(ge=-1e12, le=1e12)]


class FitFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What an update was fitted to, how far the fit went, and what it reproduces.

    Prompts are counted once however often they are answered; answers are those before the fit, held-out ones included.

    Attributes:
        given: prompts of the user.
        answered: given prompts that the source answered.
        shortened: given prompts that were truncated to their end.
        own: prompts that the adapter wrote as it had learnt them; `opening` is where they begin, and `gain` what it
            adds to the log-likelihood of their tokens, nats a token.
        labelled: prompts of labelled examples that the source answered, for lack of others.
        written: prompts that a model wrote and the source answered.
        requests: answers to prompts that the task search wrote.
        templates: prompt templates, where no prompts were given.
        job: the likely task that the search found.
        answers: texts that the source wrote.
        planned: texts that the settings asked for.
        usual: texts by default for these prompts.
        answer_tokens: the most tokens of an answer.
        ended: answers that the source ended.
        cut: answers that were cut where they are complete, to teach the end.
        later: texts written during the fit; the target wrote `later_target` of them.
        examples: labelled examples.
        predictions: of the first round, compared over `tokens` shared tokens.
        steps: gradient steps.
        done: share of the planned fit; below 1 if it was stopped.
        on_top: whether the fit began from a mapped update, not from zero.
        devices: over which the weights were divided.
        held_out: greedy answers of the source to held-out prompts.
        agreed_before: how many of these the target writes before the fit.
        agreed: the same with the update that was kept.
        divergence_before: from the teacher, nats a position of held-out completions.
        divergence: the same with the update that was kept.
        note: what else there is to know, a sentence without a full stop.
    """

    given: Count = 0
    answered: Count = 0
    shortened: Count = 0
    own: Count = 0
    opening: str = ""
    gain: Nats | None = None
    labelled: Count = 0
    written: Count = 0
    requests: Count = 0
    templates: tuple[str, ...] = ()
    job: str = ""
    answers: Count = 0
    planned: Count = 0
    usual: Count = 0
    answer_tokens: Count = 0
    ended: Count = 0
    cut: Count = 0
    later: Count = 0
    later_target: Count = 0
    examples: Count = 0
    predictions: Count = 0
    tokens: Count = 0
    steps: Count = 0
    done: Share = 1.0
    on_top: bool = False
    devices: Count = 1
    held_out: Count = 0
    agreed_before: Count = 0
    agreed: Count = 0
    divergence_before: Nats | None = None
    divergence: Nats | None = None
    note: str = ""
