"""Figures and answers as JSON data, and the shares of a trained adapter's gain that the other adapters bring."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jcrosslora.checkpoint.hub import public_names
from jcrosslora.errors import UsageError
from jcrosslora.evaluate.answers import Answers
from jcrosslora.evaluate.answers_shown import spread
from jcrosslora.evaluate.bootstrap import Interval
from jcrosslora.evaluate.score import FIGURES, Scores
from jcrosslora.text.completion import prompt_text


def scores_json(scores: Scores, not_scored: Sequence[str] = (), *, trained: str | None = None) -> dict[str, Any]:
    """Return the figures of questions with choices: what `evaluate --json` prints, and `report` reads.

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


def lifts(found: Scores | Answers, figure: str, trained: int) -> list[Interval | None]:
    """Compute the share of each model of an evaluation; None for base and trained one, and where that gains nothing.

    Args:
        found: a base and its adapters.
        figure: one of the evaluation.
        trained: place of the adapter that was trained on this base, 1 or more.
    """
    return [_lift(found, figure, place, trained) for place in range(len(found.names))]


def lift_lines(found: Scores | Answers, trained: int) -> list[str]:
    """Say the shares of each adapter in a line."""
    figures = found.figures if isinstance(found, Answers) else FIGURES
    shares = {figure: lifts(found, figure, trained) for figure in figures}
    return [
        _line(name, {figure: of[place] for figure, of in shares.items()})
        for place, name in enumerate(found.names)
        if place not in (0, trained)
    ]


def place_of(names: Sequence[str], trained: str) -> int:
    """Find the trained adapter among the models of an evaluation.

    Raises:
        UsageError: no adapter has this name.
    """
    if trained not in names[1:]:
        msg = (
            f"trained adapter {trained!r} is not among those evaluated: wanted one of {', '.join(names[1:]) or 'none'}"
        )
        raise UsageError(msg)
    return names.index(trained, 1)


def _lift(found: Scores | Answers, figure: str, place: int, trained: int) -> Interval | None:
    if place in (0, trained):
        return None
    try:
        return found.lift(figure, place, trained)
    except UsageError:  # the trained adapter gains nothing beyond the interval
        return None


def _line(name: str, shares: dict[str, Interval | None]) -> str:
    told = [f"{figure} {one.value:.2f} [{one.low:.2f}, {one.high:.2f}]" for figure, one in shares.items() if one]
    return (
        f"{name}, share of the trained adapter's gain: {', '.join(told) or 'not defined, as that gains nothing sure'}"
    )
