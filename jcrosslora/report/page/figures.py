"""How the page names and writes the figures of an evaluation."""

from dataclasses import dataclass

from jcrosslora.evaluate.answers_table import TITLES
from jcrosslora.evaluate.bootstrap import Interval
from jcrosslora.evaluate.scores import Direction
from jcrosslora.report.page.evaluation import Evaluation, Figure


@dataclass(frozen=True)
class Shown:
    """A figure as the page shows it.

    Attributes:
        title: for a newcomer.
        top: the largest value that it can have; None where there is none.
        lower: whether a lower value is better.
    """

    title: str
    top: float | None = 1.0
    lower: bool = False

    def text(self, value: float, sign: str = "") -> str:
        """Write a value of the figure."""
        return f"{value:{sign}.{1 if self.top == 100 else 3}f}"

    def interval(self, found: Figure | Interval, sign: str = "") -> str:
        """Write a value with its interval."""
        return f"{self.text(found.value, sign)} [{self.text(found.low, sign)}, {self.text(found.high, sign)}]"


# In the order in which the page shows them.
FIGURES = {
    "accuracy": Shown("share of right choices"),
    "accuracy_norm": Shown("share of right choices, long and short ones alike"),
    "json": Shown(f"share of right answers ({TITLES['json']})"),
    "exact": Shown(f"share of right answers ({TITLES['exact']})"),
    "chrf": Shown(f"likeness to the right answer ({TITLES['chrf']})", top=100),
    "rouge_l": Shown(f"likeness to the right answer ({TITLES['rouge_l']})"),
    "ended": Shown("share of answers that come to an end"),
    "nll_per_char": Shown("surprise at the right answer (nats a character)", top=None, lower=True),
    "nll_pooled": Shown("the same, long answers weigh more", top=None, lower=True),
}
_RIGHT = "accuracy", "json", "exact"
_JOB = (*_RIGHT, "chrf")
_LIKELY = "nll_per_char", "nll_pooled"
_MAIN = (*_JOB, "nll_per_char")


def present(evaluation: Evaluation) -> list[str]:
    """Name the figures that every model has."""
    return [name for name in FIGURES if all(name in model.figures for model in evaluation.models)]


def main_figures(evaluation: Evaluation) -> list[str]:
    """Name those that the picture shows; one that does not apply is not there."""
    found = present(evaluation)
    return [name for name in found if name in _MAIN and not (name == "exact" and "json" in found)]


def job_figure(evaluation: Evaluation) -> str | None:
    """Name the figure of how well the task is done: the first that counts, of right answers or of their likeness.

    Exact answers say nothing of a task with many good ones, where even a trained adapter gives none, or none is exact.
    """
    found = [name for name in _JOB if name in present(evaluation)]
    trained = evaluation.of_part("trained")

    def counts(name: str) -> bool:
        if trained is not None:
            return trained.direction(name) is Direction.BETTER
        return any(model.figures[name].value > 0 for model in evaluation.models)

    return next(filter(counts, found), found[0] if found else None)


def is_count(name: str) -> bool:
    """Tell whether a figure is a share of right answers."""
    return name in _RIGHT


def likelihood_figure(evaluation: Evaluation) -> str | None:
    """Name the figure of how likely the right answers are."""
    return next((name for name in _LIKELY if name in present(evaluation)), None)


def gain_share(evaluation: Evaluation, name: str) -> float | None:
    """Return the moved adapter's gain in a figure over the trained one's: (base - moved) / (base - trained).

    Returns:
        None where one of them was not evaluated, or the trained adapter is not better than the base.
    """
    moved, trained = evaluation.of_part("moved"), evaluation.of_part("trained")
    if moved is None or trained is None or trained.direction(name) is not Direction.BETTER:
        return None
    base, own, full = (model.figures[name].value for model in (evaluation.models[0], moved, trained))
    return (base - own) / (base - full)


def gain_text(evaluation: Evaluation, name: str) -> str:
    """Write that share, with its interval where the evaluation has one; "" where there is none, or a loss."""
    moved, share = evaluation.of_part("moved"), gain_share(evaluation, name)
    if moved is None or share is None or moved.direction(name) is Direction.WORSE:
        return ""
    lift = moved.figures[name].lift
    return _percent(share) + ("" if lift is None else f" [{_percent(lift.low)}, {_percent(lift.high)}]")


def beyond_random(evaluation: Evaluation, name: str) -> bool:
    """Tell whether the moved adapter does better in a figure than a random one; True where none was evaluated.

    It does where the random one is not better than the base, or where their intervals do not overlap.
    """
    moved, random = evaluation.of_part("moved"), evaluation.of_part("random")
    if moved is None or random is None or random.direction(name) is not Direction.BETTER:
        return True
    own, other = moved.figures[name], random.figures[name]
    return own.high < other.low if FIGURES[name].lower else own.low > other.high


def _percent(share: float) -> str:
    return f"{round(100 * share)}%"  # an integer, which has no -0
