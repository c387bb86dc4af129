"""How well a shelf answers a task: beside the base alone, and beside the adapters that belong to the task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jcrosslora.adapter import load_adapter
from jcrosslora.adapter.ignored import left_out
from jcrosslora.checkpoint.hub import public_names
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import load_params
from jcrosslora.decoder.adapters import RUN
from jcrosslora.errors import UsageError
from jcrosslora.evaluate import Answers, Example, Interval, Question, Scores, answer, lift_recovered, score
from jcrosslora.evaluate.examples import as_completion
from jcrosslora.shelf.composing import named
from jcrosslora.shelf.composition import Composition
from jcrosslora.shelf.composition.judging import with_answers, with_scores
from jcrosslora.shelf.composition.registry import find_composition
from jcrosslora.shelf.shelf import Shelf

ALONE = "the base alone"
FIGURE = "nll_per_char"


@dataclass(frozen=True, eq=False)
class Judged:
    """A shelf in an evaluation.

    Attributes:
        figures: of the base, the shelf, and the adapters that were named, in this order.
        chosen: for how many examples each adapter was used; `ALONE` counts those that the base answered alone.
        kept: for each adapter that was named the share of its gain in the likelihood of right answers that the shelf
            brings as well; None where the adapter has no gain that the examples show.
        not_scored: what of the adapters takes no part, one sentence each.
        notes: what else the reader should know, one sentence each.
    """

    figures: Answers | Scores
    chosen: Mapping[str, int]
    kept: Mapping[str, Interval | None]
    not_scored: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what the figures do not hold as JSON data."""
        kept = {name: one and {"value": one.value, "low": one.low, "high": one.high} for name, one in self.kept.items()}
        return {"chosen": dict(self.chosen), "kept": kept, "notes": list(self.notes)}

    def lines(self) -> list[str]:
        """Say which adapters were used, and what is kept of the named ones' gains."""
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
    top: int = 1,
    by: str | None = None,
    max_new_tokens: int | None = None,
) -> Judged:
    """Answer the examples of a task with what a shelf finds for each, and with the base and named adapters alone.

    The shelf is not told what task the examples are of.

    Args:
        shelf: whose adapters answer.
        examples: at least one; questions with choices, of which the choices are scored, or others, which are answered
            in writing.
        how: see `jcrosslora.compose`.
        adapters: names on the shelf, or other adapters of its base, such as the one that belongs to the task.
        top: at most so many adapters for an example.
        by: see `Shelf.search`.
        max_new_tokens: see `jcrosslora.answer`.

    Raises:
        UsageError: see `Shelf.compose`, `jcrosslora.answer` and `jcrosslora.score`.
        AdapterError, CheckpointError: the base or an adapter cannot be read, or its predictions are not finite.
    """
    how, base = find_composition(how), shelf.base
    own = [named(shelf.load(ref), ref) if ref in shelf.names else load_adapter(ref, base) for ref in adapters]
    questions = [one for one in examples if isinstance(one, Question)]
    prompts = [as_completion(one).prompt for one in examples]
    loaded: dict[str, Any] = {"params": load_params(base, jnp.float32), "tokenizer": load_tokenizer(base)}
    composed, weights = shelf.compose(prompts, how, top=top, by=by, **loaded)
    name = f"shelf ({how.name})"
    figures: Answers | Scores
    if questions:
        scores = score(base, questions, own, **loaded)
        figures = with_scores(scores, questions, composed, weights, name)
        values = figures.by_question(FIGURE)
    else:
        answers = answer(base, examples, own, max_new_tokens=max_new_tokens, **loaded)
        figures = with_answers(answers, composed, weights, name)
        values = figures.by_example(FIGURE)
    used = Counter(name for row in weights for name, weight in zip(composed.names, row, strict=True) if weight)
    alone = int((~weights.any(axis=1)).sum())
    chosen = dict(used.most_common()) | ({ALONE: alone} if alone else {})
    names = public_names(one.info.name for one in own)
    kept = {one: _kept(*values[[0, 1, place]]) for place, one in enumerate(names, 2)}
    unused = [f"{one.info.name}: {text}" for one in composed.adapters for text in one.info.ignored]
    unused += [
        f"{name}: {text}"
        for name, one in zip(names, own, strict=True)
        for text in left_out(one, RUN, "it is run without it")
    ]
    return Judged(figures, chosen, kept, tuple(dict.fromkeys(unused)), tuple(composed.other_templates()))


def _kept(base: Any, shelf: Any, own: Any) -> Interval | None:
    try:
        return lift_recovered(base, shelf, own)
    except UsageError:  # the gain of the adapter is not distinguishable from none
        return None
