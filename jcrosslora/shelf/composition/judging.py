"""Put a composition beside a base and its adapters in an evaluation: its answers, or its scores of choices."""

from collections.abc import Sequence

import numpy as np

from jcrosslora.evaluate import Answers, Question, Scores
from jcrosslora.shelf.composition.composed import Composed
from jcrosslora.text import Completion


def with_answers(found: Answers, composed: Composed, weights: np.ndarray, name: str) -> Answers:
    """Add the answers of a composition behind those of the base.

    Args:
        found: of the base and any adapters to n examples.
        composed: of the same base.
        weights: float32 (n, N), of the composition's adapters for each example.
        name: of the composition.

    Raises:
        UsageError: see `Composed.write`.
        AdapterError: predictions are not finite.
    """
    prompts = [one.prompt for one in found.examples]
    written = composed.write(prompts, weights=weights, max_new_tokens=found.max_new_tokens)
    nll = -composed.score(found.examples, weights=weights)
    return Answers(
        _second(found.names, name),
        found.examples,
        _second(found.written, tuple(written)),
        np.insert(found.nll, 1, nll, axis=0),
        found.max_new_tokens,
    )


def with_scores(
    found: Scores, questions: Sequence[Question], composed: Composed, weights: np.ndarray, name: str
) -> Scores:
    """Add the scores of a composition behind those of the base; as `with_answers`, of n questions with choices."""
    choices = [
        (place, column, Completion(question.prompt, f" {choice}", ended=False))
        for place, question in enumerate(questions)
        for column, choice in enumerate(question.choices)
    ]
    rows, columns, completions = zip(*choices, strict=True)
    log_probs = np.full(found.log_probs.shape[1:], np.nan)
    log_probs[list(rows), list(columns)] = composed.score(list(completions), weights=weights[list(rows)])
    return Scores(
        _second(found.names, name),
        np.insert(found.log_probs, 1, log_probs, axis=0),
        found.characters,
        found.tokens,
        found.answers,
    )


def _second(names: tuple, name: object) -> tuple:
    return (*names[:1], name, *names[1:])
