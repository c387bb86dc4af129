"""The verdict of the page in one sentence, and the figures behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jcrosslora.report.page.contents import Contents
from jcrosslora.report.page.evaluation import Evaluation, Model
from jcrosslora.report.page.figures import FIGURES, gain_share, likelihood_figure, present, right_figure

_HALF = 0.5  # of a trained adapter's gain in right answers

Tone = Literal["good", "mixed", "bad", "open"]

# What `jcrosslora.report.verdict` expects of an adapter that nobody has measured yet.
_EXPECTED: dict[str, tuple[Tone, str, str]] = {
    "aligned": ("open", "Not measured yet", "The adapter was moved, and an effect is to be expected."),
    "weak": ("mixed", "Not measured yet", "The adapter was moved, and little effect is to be expected."),
    "chance": ("bad", "Probably without effect", "The two models have too little in common for this method."),
    "lost": ("bad", "Probably without effect", "Nearly nothing of the adapter's update was left after the move."),
    "ineffective": ("bad", "Without effect", "The moved adapter changes far less than the original does."),
    "destructive": ("bad", "Harmful", "The moved adapter damages the model: do not use it."),
    "unknown": ("open", "Not known", "Whether the move worked cannot be told from the two models."),
    "control": ("open", "A control", "This adapter is random on purpose, to compare with: it should have no effect."),
}


@dataclass(frozen=True)
class Headline:
    """The verdict.

    Attributes:
        tone: decides the colour.
        word: the verdict in a word or two.
        sentence: the verdict in a sentence.
        reasons: the figures or the reasons behind it, one sentence each.
    """

    tone: Tone
    word: str
    sentence: str
    reasons: tuple[str, ...]


def headline(contents: Contents) -> Headline:
    """Judge by what was measured; where nothing was, by what the transfer expects."""
    evaluation = contents.evaluation
    model = None if evaluation is None else evaluation.of_part("moved")
    if evaluation is not None and model is not None:
        return _measured(evaluation, model)
    if contents.moved is not None:
        found = contents.moved.verdict
        tone, word, sentence = _EXPECTED.get(found.level, ("open", "Not measured yet", "The adapter was moved."))
        return Headline(tone, word, sentence, (f"{found.text[:1].upper()}{found.text[1:]}.",))
    return Headline("open", "Not said", "Which of the adapters is the moved one was not said.", ())


def _measured(evaluation: Evaluation, model: Model) -> Headline:
    right, likely = right_figure(evaluation), likelihood_figure(evaluation)
    words = {name: model.word(name) for name in (right, likely) if name is not None}
    reasons = tuple(filter(None, (_counted(evaluation, model, right), _likelihood(evaluation, model, likely))))
    task = f"On this task, {evaluation.count:,} {'question' if evaluation.count == 1 else 'questions'},"
    if "worse" in words.values():
        if "better" in words.values():
            return Headline(
                "mixed", "Mixed", f"{task} the moved adapter helps in one way and harms in another.", reasons
            )
        return Headline("bad", "It harms", f"{task} the model answers worse with the moved adapter.", reasons)
    if right is not None and words[right] == "better":
        share = gain_share(evaluation, right)
        if share is not None and share < _HALF:
            sentence = f"{task} the model answers better with the moved adapter, but a trained adapter gains far more."
            return Headline("mixed", "It works in part", sentence, reasons)
        return Headline("good", "It works", f"{task} the model answers better with the moved adapter.", reasons)
    if likely is not None and words[likely] == "better":
        sentence = f"{task} the right answers become more likely with the moved adapter, but no clear gain in how many "
        return Headline("mixed", "It works in part", f"{sentence}are right can be seen.", reasons)
    helped = [name for name in present(evaluation) if model.word(name) == "better"]
    if helped:
        sentence = f"{task} the answers come closer to the right ones, but no clear gain in how many are right can be "
        return Headline("mixed", "It works in part", f"{sentence}seen.", reasons)
    sentence = f"{task} no difference between the model with and without the moved adapter can be seen."
    return Headline("bad", "No effect seen", sentence, reasons)


def _counted(evaluation: Evaluation, model: Model, name: str | None) -> str:
    if name is None:
        return ""
    count = evaluation.count
    parts = {
        "without an adapter": evaluation.models[0],
        "with the moved adapter": model,
        "with an adapter trained on this model": evaluation.of_part("trained"),
        "with a random adapter": evaluation.of_part("random"),
    }
    told = [f"{round(one.figures[name].value * count):,} {where}" for where, one in parts.items() if one is not None]
    return f"Right answers, of {count:,}: {', '.join(told)}."


def _likelihood(evaluation: Evaluation, model: Model, name: str | None) -> str:
    if name is None:
        return ""
    shown, base = FIGURES[name], evaluation.models[0].figures[name]
    found = model.figures[name]
    sentence = f"Surprise at the right answers (lower is better): {shown.text(base.value)} without an adapter, "
    sentence += f"{shown.text(found.value)} with the moved one"
    share = gain_share(evaluation, name)
    return sentence + ("." if share is None else f", which is {share:.0%} of what a trained adapter gains.")
