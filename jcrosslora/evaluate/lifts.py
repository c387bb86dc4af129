"""What share of a trained adapter's gain every other adapter of an evaluation brings, figure by figure."""

from collections.abc import Sequence

from jcrosslora.errors import UsageError
from jcrosslora.evaluate.answers import Answers
from jcrosslora.evaluate.bootstrap import Interval
from jcrosslora.evaluate.scores import FIGURES, Scores


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
