"""Measure how often a search finds the right adapter, and how well a shelf answers next to its base and adapters."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import load_adapter
from jcrosslora.adapter.records import left_out
from jcrosslora.checkpoint import load_tokenizer
from jcrosslora.checkpoint.hub import public_names
from jcrosslora.decoder import load_model
from jcrosslora.decoder.model import RUN
from jcrosslora.errors import UsageError
from jcrosslora.evaluate import Answers, Example, Interval, Question, Scores, answer, intervals, lift_recovered, score
from jcrosslora.evaluate.examples import as_completion
from jcrosslora.shelf.composition import Composed, Composition, find_composition
from jcrosslora.shelf.retrieval import Retrieved
from jcrosslora.shelf.shelf import Shelf, named
from jcrosslora.text import Completion

ALONE = "the base alone"
_FIGURE = "nll_per_char"
_TOP = 3


@dataclass(frozen=True)
class Accuracy:
    """The figures of one way to search, shares of prompts with 95% intervals.

    Attributes:
        top1: an adapter of the task has the best score.
        top3: one is among the three best.
        answered: the best accepted adapter is of the task; the other prompts get the base alone or another adapter.
        false: prompts of no adapter's task that get one anyway; None without such prompts.
    """

    top1: Interval
    top3: Interval
    answered: Interval
    false: Interval | None


def accuracy(found: Retrieved, wanted: Sequence[Collection[str]]) -> Accuracy:
    """Judge a search of P prompts.

    `wanted` are for each prompt the adapters of its task; none if the base alone is right.

    Raises:
        UsageError: another number of prompts, no prompt with an adapter, or a name that is not on the shelf.
    """
    if unknown := {name for names in wanted for name in names} - set(found.names):
        raise UsageError(f"the shelf has no adapter {min(unknown)!r}; `jcrosslora shelf list` names all")
    if len(wanted) != len(found.scores) or not any(wanted):
        msg = f"{len(wanted)} labels, {sum(map(bool, wanted))} with an adapter, for {len(found.scores)} prompts: "
        raise UsageError(msg + "expected one for each, and an adapter for some")
    right = np.array([[name in names for name in found.names] for names in wanted], bool)
    used: np.ndarray = found.weights() > 0
    known = np.any(right, axis=1)
    hit = np.take_along_axis(right, found.ranked(_TOP), axis=1)
    figures = np.stack([hit[:, 0], hit.any(axis=1), (right & used).any(axis=1)]).astype(np.float64)[:, known]
    false = np.any(used, axis=1)[~known].astype(np.float64)
    top1, top3, answered = intervals(figures)
    return Accuracy(top1, top3, answered, intervals(false[None])[0] if len(false) else None)


@dataclass(frozen=True, eq=False)
class Judged:
    """A shelf in an evaluation.

    Attributes:
        figures: of the base, the shelf, and the named adapters, in this order.
        chosen: for how many examples each adapter was used; `ALONE` counts the answers of the base alone.
        kept: for each named adapter the share of its gain in the likelihood of right answers that the shelf also
            brings; None for an adapter without a gain that the examples show.
        not_scored: what of the adapters takes no part, one sentence each.
        notes: what else the reader should know, one sentence each.
    """

    figures: Answers | Scores
    chosen: Mapping[str, int]
    kept: Mapping[str, Interval | None]
    not_scored: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the facts that the figures do not contain, as JSON data."""
        kept = {name: one and {"value": one.value, "low": one.low, "high": one.high} for name, one in self.kept.items()}
        return {"chosen": dict(self.chosen), "kept": kept, "notes": list(self.notes)}

    def lines(self) -> list[str]:
        """Describe which adapters were used, and the share of the named ones' gains that is kept."""
        used = ", ".join(f"{name} {count:,}" for name, count in self.chosen.items())
        kept = [
            f"{name} gains nothing over the base that these examples show"
            if one is None
            else f"share of {name}'s gain in the likelihood of right answers: {one.value:.3f} [{one.low:.3f}, "
            f"{one.high:.3f}]"
            for name, one in self.kept.items()
        ]
        return [f"used by the shelf: {used}", *kept, *(f"note: {one}" for one in self.notes)]


def judge(
    shelf: Shelf,
    examples: Sequence[Example],
    how: str | Composition = "mixture",
    adapters: Sequence[str] = (),
    *,
    max_new_tokens: int | None = None,
    **search: Any,
) -> Judged:
    """Answer the examples of a task with the adapters that a shelf finds, and with the base and named adapters alone.

    The shelf is not told what task the examples are of.

    `Shelf.compose` explains `how` and the search, `top` and `by`; `jcrosslora.answer` explains `max_new_tokens`.

    Args:
        examples: at least one; questions with choices, of which the choices are scored, or others, which are answered
            in writing.
        adapters: names on the shelf, or other adapters of its base, for example the one of the task.

    Raises:
        UsageError: see `Shelf.compose`, `jcrosslora.answer` and `jcrosslora.score`.
        AdapterError, CheckpointError: the base or an adapter cannot be read, or its predictions are not finite.
    """
    how, base = find_composition(how), shelf.base
    opened = [named(shelf.load(ref), ref) if ref in shelf.names else load_adapter(ref, base) for ref in adapters]
    questions = [one for one in examples if isinstance(one, Question)]
    prompts = [as_completion(one).prompt for one in examples]
    loaded: dict[str, Any] = {"model": load_model(base, jnp.float32), "tokenizer": load_tokenizer(base)}
    composed, weights = shelf.compose(prompts, how, **search, **loaded)
    name = f"shelf ({how.name})"
    if questions:
        figures = _with_scores(score(base, questions, opened, **loaded), questions, composed, weights, name)
        values = figures.by_question(_FIGURE)
    else:
        answers = answer(base, examples, opened, max_new_tokens=max_new_tokens, **loaded)
        figures = _with_answers(answers, composed, weights, name)
        values = figures.by_example(_FIGURE)
    used = Counter(name for row in weights for name, weight in zip(composed.names, row, strict=True) if weight)
    alone = int((~weights.any(axis=1)).sum())
    chosen = dict(used.most_common()) | ({ALONE: alone} if alone else {})
    names = public_names(one.info.name for one in opened)
    kept = {one: _kept(*values[[0, 1, row]]) for row, one in enumerate(names, 2)}
    unused = [f"{one.info.name}: {text}" for one in composed.adapters for text in one.info.ignored]
    unused += [
        f"{name}: {text}"
        for name, one in zip(names, opened, strict=True)
        for text in left_out(one, RUN, "it is run without it")
    ]
    return Judged(figures, chosen, kept, tuple(dict.fromkeys(unused)), tuple(composed.other_templates()))


def _with_answers(found: Answers, composed: Composed, weights: np.ndarray, name: str) -> Answers:
    """Insert the answers of a composition after those of the base; `weights` are float32 (n, N), a row an example."""
    prompts = [one.prompt for one in found.examples]
    written = composed.write(prompts, weights=weights, max_new_tokens=found.max_new_tokens)
    nll = -composed.score(found.examples, weights=weights)
    return replace(
        found,
        names=_second(found.names, name),
        written=_second(found.written, tuple(written)),
        nll=np.insert(found.nll, 1, nll, axis=0),
    )


def _with_scores(
    found: Scores, questions: Sequence[Question], composed: Composed, weights: np.ndarray, name: str
) -> Scores:
    """Insert the scores of a composition after those of the base; as `_with_answers`, for questions with choices."""
    choices = [
        (row, column, Completion(question.prompt, f" {choice}", ended=False))
        for row, question in enumerate(questions)
        for column, choice in enumerate(question.choices)
    ]
    rows, columns, completions = zip(*choices, strict=True)
    log_probs = np.full(found.log_probs.shape[1:], np.nan)
    log_probs[rows, columns] = composed.score(completions, weights=weights[list(rows)])
    return replace(found, names=_second(found.names, name), log_probs=np.insert(found.log_probs, 1, log_probs, axis=0))


def _second(names: tuple, name: object) -> tuple:
    return (*names[:1], name, *names[1:])


def _kept(base: Any, shelf: Any, adapter: Any) -> Interval | None:
    try:
        return lift_recovered(base, shelf, adapter)
    except UsageError:  # the gain of the adapter is not distinguishable from none
        return None
