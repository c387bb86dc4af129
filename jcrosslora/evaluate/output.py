"""Figures and answers as JSON data: what `jcrosslora evaluate --json` prints, and `jcrosslora report` reads."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jcrosslora.checkpoint.hub import public_names
from jcrosslora.evaluate.answers import Answers
from jcrosslora.evaluate.answers_table import spread
from jcrosslora.evaluate.lifts import lifts, place_of
from jcrosslora.evaluate.scores import FIGURES, Scores
from jcrosslora.text.completion import prompt_text


def scores_json(scores: Scores, not_scored: Sequence[str] = (), *, trained: str | None = None) -> dict[str, Any]:
    """Return the figures of questions with choices.

    Args:
        scores: of a base and its adapters.
        not_scored: what of the adapters is not part of the figures, one sentence each.
        trained: name of the adapter that was trained on the base, for the share of its gain that the others bring.

    Raises:
        UsageError: no adapter has this name.
    """
    return {
        "questions": len(scores.answers),
        "models": _models(scores, FIGURES, trained),
        "not_scored": list(not_scored),
        **_trained(scores, trained),
    }


def answers_json(
    answers: Answers, not_scored: Sequence[str] = (), *, show: int = 0, trained: str | None = None
) -> dict[str, Any]:
    """Return the figures of answers in writing, and some of the answers.

    Args:
        answers: of a base and its adapters.
        not_scored: what of the adapters is not part of the figures, one sentence each.
        show: number of examples to return with the answers of all models, evenly spread.
        trained: see `scores_json`.

    Raises:
        UsageError: no adapter has the name of the trained one.
    """
    found = {
        "examples": len(answers.examples),
        "max_new_tokens": answers.max_new_tokens,
        "models": _models(answers, answers.figures, trained),
        "not_scored": list(not_scored),
        **_trained(answers, trained),
    }
    return found | ({"answers": [_example(answers, place) for place in spread(answers, show)]} if show else {})


def _trained(found: Scores | Answers, trained: str | None) -> dict[str, str]:
    return {} if trained is None else {"trained": public_names(found.names)[place_of(found.names, trained)]}


def _models(scores: Scores | Answers, figures: Sequence[str], trained: str | None) -> list[dict[str, Any]]:
    """Give every figure of every model with its interval, its difference to the base, and its share of a gain."""
    oracle = None if trained is None else place_of(scores.names, trained)
    models: list[dict[str, Any]] = [{"name": name} for name in public_names(scores.names)]
    for figure in figures:
        found = zip(models, scores.bootstrap(figure), scores.differences(figure), strict=True)
        for place, (model, value, difference) in enumerate(found):
            model[figure] = asdict(value) | ({"minus_base": asdict(difference)} if place else {})
        for model, share in zip(models, [] if oracle is None else lifts(scores, figure, oracle), strict=False):
            model[figure] |= {} if share is None else {"lift": asdict(share)}
    return models


def _example(answers: Answers, place: int) -> dict[str, Any]:
    """Give an example with the answer of each model."""
    written = [
        {"name": name, "text": texts[place], "ended": bool(ended[place]), "exact": bool(exact[place])}
        for name, texts, ended, exact in zip(
            public_names(answers.names), answers.texts, answers.ended, answers.by_example("exact"), strict=True
        )
    ]
    prompt = prompt_text(answers.examples[place].prompt)
    return {"example": place + 1, "prompt": prompt, "right": list(answers.references[place]), "written": written}
