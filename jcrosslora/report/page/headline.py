"""The figures of an evaluation, their names and formats, and the verdict of the page."""

from dataclasses import dataclass, replace
from typing import Literal

from jcrosslora.evaluate import Direction, Interval
from jcrosslora.evaluate.bootstrap import FEWEST
from jcrosslora.evaluate.output import TITLES
from jcrosslora.report.page.contents import Contents, Evaluation, Figure, Model
from jcrosslora.report.record import Level

_HALF = 0.5  # of a trained adapter's gain in right answers

Tone = Literal["good", "mixed", "bad", "open"]

# The verdict by the level from `jcrosslora.report.table`, for an adapter without an evaluation.
_EXPECTED: dict[Level, tuple[Tone, str, str]] = {
    "works": ("good", "Probably works", "The moved adapter repeats many of the original's answers."),
    "partly": ("mixed", "Works in part", "The moved adapter repeats some of the original's answers."),
    "unusable": ("bad", "Probably unusable", "The moved adapter repeats hardly any of the original's answers."),
    "aligned": ("open", "Not measured yet", "The adapter was moved, and it will probably work."),
    "weak": ("mixed", "Not measured yet", "The adapter was moved, and little effect is to be expected."),
    "chance": ("bad", "Probably without effect", "The two models have too little in common for this method."),
    "lost": ("bad", "Probably without effect", "Nearly nothing of the adapter's update was left after the move."),
    "ineffective": ("bad", "Without effect", "The moved adapter changes far less than the original does."),
    "destructive": ("bad", "Harmful", "The moved adapter damages the model: do not use it."),
    "unknown": ("open", "Not known", "Nothing was measured that tells whether the move worked."),
    "control": ("open", "A control", "This adapter is random on purpose, to compare with: it should have no effect."),
}


@dataclass(frozen=True)
class Shown:
    """A figure as the page shows it, with a title for a newcomer."""

    title: str
    top: float | None = 1.0  # the largest possible value
    lower: bool = False  # whether a lower value is better

    def text(self, value: float, sign: str = "") -> str:
        """Return a value of the figure as text."""
        return f"{value:{sign}.{1 if self.top == 100 else 3}f}"

    def interval(self, found: Figure | Interval, sign: str = "") -> str:
        """Return a value with its interval as text."""
        return f"{self.text(found.value, sign)} [{self.text(found.low, sign)}, {self.text(found.high, sign)}]"


# In the order in which the page shows them.
FIGURES = {
    "accuracy": Shown("share of right choices"),
    "accuracy_norm": Shown("share of right choices, normalised by length"),
    "json": Shown(f"share of right answers ({TITLES['json']})"),
    "exact": Shown(f"share of right answers ({TITLES['exact']})"),
    "chrf": Shown(f"similarity to the right answer ({TITLES['chrf']})", top=100),
    "rouge_l": Shown(f"similarity to the right answer ({TITLES['rouge_l']})"),
    "ended": Shown("share of answers that end"),
    "nll_per_char": Shown("surprise at the right answer (nats a character)", top=None, lower=True),
    "nll_pooled": Shown("the same, long answers weigh more", top=None, lower=True),
}
_RIGHT = "accuracy", "json", "exact"  # counts of right answers, as shares
_JOB = (*_RIGHT, "chrf")
_LIKELY = "nll_per_char", "nll_pooled"  # how likely the right answers are
_MAIN = (*_JOB, "nll_per_char")


def present(evaluation: Evaluation) -> list[str]:
    """Return the names of the figures that every model has."""
    return [name for name in FIGURES if all(name in model.figures for model in evaluation.models)]


def main_figures(evaluation: Evaluation) -> list[str]:
    """Return the names of the figures that the picture shows."""
    found = present(evaluation)
    return [name for name in found if name in _MAIN and not (name == "exact" and "json" in found)]


def _job_figure(evaluation: Evaluation) -> str | None:
    """Return the name of the figure that says how well the task is done, of right answers or of similarity.

    It is the first useful one, or else the first present one. With a trained adapter, a figure is useful if training
    raises it, and right answers also if the moved adapter changes their number; without one, if any model is above 0.
    """
    found = [name for name in _JOB if name in present(evaluation)]
    trained, moved = evaluation.of_part("trained"), evaluation.of_part("moved")

    def counts(name: str) -> bool:
        if trained is not None:
            changed = moved is not None and moved.direction(name) in (Direction.BETTER, Direction.WORSE)
            return trained.direction(name) is Direction.BETTER or (name in _RIGHT and changed)
        return any(model.figures[name].value > 0 for model in evaluation.models)

    return next(filter(counts, found), found[0] if found else None)


def gain_share(evaluation: Evaluation, name: str) -> float | None:
    """Return the moved adapter's gain in a figure over the trained one's: (base - moved) / (base - trained).

    None if one of them was not evaluated, or the trained adapter is not better than the base.
    """
    moved, trained = evaluation.of_part("moved"), evaluation.of_part("trained")
    if moved is None or trained is None or trained.direction(name) is not Direction.BETTER:
        return None
    base, own, full = (model.figures[name].value for model in (evaluation.models[0], moved, trained))
    return (base - own) / (base - full)


def _beyond_random(evaluation: Evaluation, name: str) -> bool:
    """Return whether the moved adapter does better in a figure than a random one; True if none was evaluated.

    It does if the random one is not better than the base, or if their intervals do not overlap.
    """
    moved, random = evaluation.of_part("moved"), evaluation.of_part("random")
    if moved is None or random is None or random.direction(name) is not Direction.BETTER:
        return True
    own, other = moved.figures[name], random.figures[name]
    return own.high < other.low if FIGURES[name].lower else own.low > other.high


@dataclass(frozen=True)
class Headline:
    """The verdict in a word or two and in a sentence, with its figures as sentences."""

    tone: Tone  # decides the colour
    word: str
    sentence: str
    reasons: tuple[str, ...]


def headline(contents: Contents) -> Headline:
    """Judge by the moved adapter's evaluation, else by the verdict of the transfer; add what the maps left behind."""
    found, moved = _judge(contents), contents.moved
    if moved is None or not moved.left_behind:
        return found
    held = f"{moved.left_behind:.1%} of the original update"
    left = f"Modules without a counterpart in the target held {held}, which was left behind."
    return replace(found, reasons=(*found.reasons, left))


def _judge(contents: Contents) -> Headline:
    evaluation = contents.evaluation
    model = None if evaluation is None else evaluation.of_part("moved")
    if evaluation is not None and model is not None:
        return _measured(evaluation, model)
    if contents.moved is not None:
        found = contents.moved.verdict
        tone, word, sentence = _EXPECTED[found.level]
        return Headline(tone, word, sentence, (f"{found.text[:1].upper()}{found.text[1:]}.",))
    return Headline("open", "Unknown", "The evaluation does not say which adapter is the moved one.", ())


def _measured(evaluation: Evaluation, model: Model) -> Headline:
    shown, job = present(evaluation), _job_figure(evaluation)
    likely = next((name for name in _LIKELY if name in shown), None)
    found = {name: model.direction(name) for name in (job, likely) if name is not None}
    reasons = tuple(filter(None, (_job(evaluation, model, job), _likelihood(evaluation, model, likely))))
    task = f"On this task, {evaluation.count:,} {'question' if evaluation.count == 1 else 'questions'},"

    def told(tone: Tone, word: str, sentence: str) -> Headline:
        return Headline(tone, word, f"{task} {sentence}.", reasons)

    if evaluation.count < FEWEST:
        sentence = f"no difference can be told from chance: take {FEWEST} or more, better a hundred"
        return told("open", "Too few examples", sentence)
    if not any(map(model.direction, shown)):
        sentence = "The evaluation does not say how the moved adapter differs from the model without one."
        return Headline("open", "Not known", sentence, reasons)
    if Direction.WORSE in found.values():
        if Direction.BETTER in found.values():
            return told("mixed", "Mixed", "the moved adapter helps in one way and harms in another")
        return told("bad", "It harms", "the model answers worse with the moved adapter")
    helped = [name for name in shown if model.direction(name) is Direction.BETTER]
    if not helped:
        sentence = "no difference between the model with and without the moved adapter can be seen"
        return told("bad", "No effect seen", sentence)
    if not _beyond_random(evaluation, next((name for name in (job, likely) if name in helped), helped[0])):
        sentence = "the model answers better with the moved adapter, but with a random one about as well"
        return told("bad", "No better than random", sentence)
    if job is not None and found[job] is Direction.BETTER:
        share = gain_share(evaluation, job)
        if share is not None and share < _HALF:
            sentence = "the model answers better with the moved adapter, but a trained adapter gains far more"
            return told("mixed", "It works in part", sentence)
        return told("good", "It works", "the model answers better with the moved adapter")
    seen = "the right answers become more likely with the moved adapter"
    if likely is None or found[likely] is not Direction.BETTER:
        seen = "the answers come closer to the right ones"
    better = "in how many are right" if job is None or job in _RIGHT else "in the answers themselves"
    return told("mixed", "It works in part", f"{seen}, but no clear gain {better} can be seen")


def _job(evaluation: Evaluation, model: Model, name: str | None) -> str:
    if name is None:
        return ""
    parts = {
        "without an adapter": evaluation.models[0],
        "with the moved adapter": model,
        "with an adapter trained on this model": evaluation.of_part("trained"),
        "with a random adapter": evaluation.of_part("random"),
    }
    count, shown = evaluation.count, FIGURES[name]

    def told(one: Model) -> str:
        value = one.figures[name].value
        return f"{round(value * count):,}" if name in _RIGHT else shown.text(value)

    title = f"Right answers, of {count:,}" if name in _RIGHT else f"{shown.title[:1].upper()}{shown.title[1:]}"
    listed = ", ".join(f"{told(one)} {where}" for where, one in parts.items() if one is not None)
    return f"{title}: {listed}.{_share(evaluation, name)}"


def _likelihood(evaluation: Evaluation, model: Model, name: str | None) -> str:
    if name is None:
        return ""
    before, after = (FIGURES[name].text(one.figures[name].value) for one in (evaluation.models[0], model))
    figures = f"{before} without an adapter, {after} with the moved one."
    return f"Surprise at the right answers (lower is better): {figures}{_share(evaluation, name)}"


def _share(evaluation: Evaluation, name: str) -> str:
    """Return the share of a trained adapter's gain in words; "" if there is no share, or the moved adapter is worse."""
    moved, share = evaluation.of_part("moved"), gain_share(evaluation, name)
    if moved is None or share is None or moved.direction(name) is Direction.WORSE:
        return ""
    lift = moved.figures[name].lift
    interval = "" if lift is None else f" [{_percent(lift.low)}, {_percent(lift.high)}]"
    return f" The moved one brings {_percent(share)}{interval} of what a trained adapter gains."


def _percent(share: float) -> str:
    return f"{round(100 * share)}%"  # an integer, which has no -0
