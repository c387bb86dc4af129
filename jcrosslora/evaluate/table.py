"""A table of scores for the terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jcrosslora.evaluate.bootstrap import Interval
from jcrosslora.evaluate.scores import FIGURES, Scores

_TITLES = {
    "accuracy": "accuracy",
    "accuracy_norm": "accuracy per character",
    "nll_per_char": "nats per character",
    "nll_pooled": "nats per character, pooled",
}
_LOWER_IS_BETTER = ("nll_per_char", "nll_pooled")


def print_scores(scores: Scores, console: Console) -> None:
    """Print each figure of each model with its interval, and its difference to the base as a figure and a word."""
    found = {figure: (scores.bootstrap(figure), scores.differences(figure)) for figure in FIGURES}
    table = Table(title=f"{len(scores.answers)} questions, 95% intervals", title_justify="left")
    for name in ("model", "figure", "value", "minus base", ""):
        table.add_column(name, justify="right" if name in ("value", "minus base") else "left", overflow="fold")
    for index, name in enumerate(scores.names):
        for figure in FIGURES:
            value, difference = found[figure][0][index], found[figure][1][index]
            word = word_of(figure, difference) if index else ""
            shown = _text(difference, "+") if index else ""
            label = escape(name) if figure == FIGURES[0] else ""
            table.add_row(label, _TITLES[figure], _text(value), shown, word)
        table.add_section()
    console.print(table)


def word_of(figure: str, difference: Interval) -> str:
    """Name a difference to the base: better, worse, or no difference where its interval includes 0."""
    if not difference.excludes(0):
        return "no difference"
    return "better" if (difference.value < 0) == (figure in _LOWER_IS_BETTER) else "worse"


def _text(found: Interval, sign: str = "") -> str:
    return f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]".replace("[", "\\[")
