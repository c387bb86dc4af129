"""Figures and answers as JSON data, as a table for the terminal, and as an HTML page that loads nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jcrosslora.checkpoint.hub import public_name, public_names
from jcrosslora.errors import UsageError
from jcrosslora.evaluate.answers import Answers
from jcrosslora.evaluate.bootstrap import Interval, word_of
from jcrosslora.evaluate.score import Scores
from jcrosslora.text.completion import prompt_text
from jcrosslora.utils.picking import from_start
from jcrosslora.utils.texts import html_page, html_table, html_text, visible

TITLES = {
    "exact": "exact match",
    "json": "equal JSON",
    "chrf": "chrF, 0 to 100",
    "rouge_l": "ROUGE-L",
    "ended": "answers ended",
    "nll_per_char": "nats a character",
}
_TITLES_OF_CHOICES = {
    "accuracy": "accuracy",
    "accuracy_norm": "accuracy per character",
    "nll_per_char": "nats per character",
    "nll_pooled": "the same, pooled",
}
# The system colours of `color-scheme` are light or dark as the reader has set it.
_STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { margin: 1.5rem auto; max-width: 110rem; padding: 0 1rem; background: Canvas; color: CanvasText; }
.wide { overflow-x: auto; }
.answers { border-collapse: collapse; width: 100%; }
.answers th, .answers td { text-align: left; vertical-align: top; padding: .4rem .7rem; min-width: 12rem;
  border-bottom: 1px solid rgba(128, 128, 128, .35); }
.answers th:first-child, .answers td:first-child { min-width: 0; color: GrayText; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; overflow-y: auto; }
.mark { display: inline-block; margin: .2rem .3rem 0 0; padding: 0 .4rem; border-radius: .3rem; border: 1px solid;
  font-size: .85em; }
.right { color: light-dark(#1b6e20, #81c784); }
.cut { color: light-dark(#8a5200, #ffb74d); }
"""
_LABEL = 20  # columns for a model's name before its answer


def scores_json(scores: Scores, not_scored: Sequence[str] = (), *, trained: str | None = None) -> dict[str, Any]:
    """Return the figures of questions with choices: what `evaluate --json` prints, and `report` reads.

    `not_scored` lists, in sentences, the parts of adapters that the figures leave out. `trained` names the adapter that
    was trained on the base; the others get the share of its gain that they recover.

    Raises:
        UsageError: no adapter has this name.
    """
    return {
        "questions": len(scores.answers),
        "models": _models(scores, trained),
        "not_scored": list(not_scored),
        **_trained(scores, trained),
    }


def answers_json(
    answers: Answers, not_scored: Sequence[str] = (), *, show: int = 0, trained: str | None = None
) -> dict[str, Any]:
    """Return the figures of written answers, and some of the answers.

    `show` is the number of examples, evenly spread, to return with the answers of all models; for the other arguments
    see `scores_json`.

    Raises:
        UsageError: no adapter is named `trained`.
    """
    found = {
        "examples": len(answers.examples),
        "max_new_tokens": answers.max_new_tokens,
        "models": _models(answers, trained),
        "not_scored": list(not_scored),
        **_trained(answers, trained),
    }
    shown = from_start(range(len(answers.examples)), show)
    return found | ({"answers": [_example(answers, index) for index in shown]} if show else {})


def print_scores(scores: Scores, console: Console) -> None:
    """Print each figure of each model with its interval, and its difference to the base as a figure and a word."""
    console.print(f"{len(scores.answers)} questions, 95% intervals", highlight=False)
    for index, (name, rows) in enumerate(figure_rows(scores)):
        # Names have a line each, for the figures to fit 80 columns.
        console.print(Text(name, style="bold"), soft_wrap=True)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("", min_width=max(map(len, _TITLES_OF_CHOICES.values())))
        table.add_column("value", justify="right", min_width=len("0.000 [0.000, 0.000]"))
        table.add_column("minus base" if index else "", justify="right")
        table.add_column("")
        for row in rows:
            table.add_row(*map(Text, (row.figure, row.value, row.minus_base, row.word)))
        console.print(table)


def print_answers(answers: Answers, console: Console, *, show: int = 0) -> None:
    """Print the figures of each model in 80 columns.

    `show` is the number of examples, evenly spread, to print with all answers to them.
    """
    for line in summary(answers):
        console.print(line, highlight=False, markup=False)
    for name, rows in figure_rows(answers):
        table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
        for title in ("figure", "value", "minus base", ""):
            table.add_column(title, justify="right" if title in ("value", "minus base") else "left", overflow="fold")
        for row in rows:
            table.add_row(row.figure, Text(row.value), Text(row.minus_base), row.word)
        console.print()
        console.print(Text(visible(name), "bold"))
        console.print(table)
    for example in from_start(range(len(answers.examples)), show):
        console.print(f"\nexample {example + 1:,}", highlight=False, markup=False, style="bold")
        console.print(_side_by_side(answers, example))


def answers_page(answers: Answers) -> str:
    """Return a whole HTML page: the figures of each model, and a row for each example with all answers to it.

    All texts are escaped. The page loads nothing, holds no script, and is light or dark as the reader's system is.
    """
    names = labels(answers)
    title = html_text(f"Answers of {public_name(answers.names[0])}, alone and with adapters")
    figures = [
        {
            "model": "" if index else name,
            "figure": row.figure,
            "value": row.value,
            "minus base": row.minus_base,
            "": row.word,
        }
        for name, (_, rows) in zip(names, figure_rows(answers), strict=True)
        for index, row in enumerate(rows)
    ]
    heads = ["", "prompt", "right answer", *names]
    parts = [
        f"<h1>{title}</h1>",
        *(f"<p>{html_text(line)}</p>" for line in summary(answers)),
        f'<div class="wide">{html_table(figures)}</div>',
        '<h2>Side by side</h2>\n<div class="wide"><table class="answers">',
        f"<thead><tr>{''.join(f'<th>{html_text(head)}</th>' for head in heads)}</tr></thead>\n<tbody>",
        *(_row(answers, example) for example in range(len(answers.examples))),
        "</tbody></table></div>",
    ]
    return html_page(title, _STYLE, parts)


def _trained(found: Scores | Answers, trained: str | None) -> dict[str, str]:
    return {} if trained is None else {"trained": public_names(found.names)[place_of(found.names, trained)]}


def _models(scores: Scores | Answers, trained: str | None) -> list[dict[str, Any]]:
    """Return every figure of every model with its interval, its difference to the base, and its lift."""
    oracle = None if trained is None else place_of(scores.names, trained)
    models: list[dict[str, Any]] = [{"name": name} for name in public_names(scores.names)]
    for figure in scores.figures:
        found = zip(models, scores.bootstrap(figure), scores.differences(figure), strict=True)
        for index, (model, value, difference) in enumerate(found):
            model[figure] = asdict(value) | ({"minus_base": asdict(difference)} if index else {})
        for model, share in zip(models, [] if oracle is None else lifts(scores, figure, oracle), strict=False):
            model[figure] |= {} if share is None else {"lift": asdict(share)}
    return models


def _example(answers: Answers, index: int) -> dict[str, Any]:
    """Return an example with the answer of each model."""
    written = [
        {"name": name, "text": texts[index], "ended": bool(ended[index]), "exact": bool(exact[index])}
        for name, texts, ended, exact in zip(
            public_names(answers.names), answers.texts, answers.ended, answers.by_example("exact"), strict=True
        )
    ]
    prompt = prompt_text(answers.examples[index].prompt)
    return {"example": index + 1, "prompt": prompt, "right": list(answers.references[index]), "written": written}


def lifts(found: Scores | Answers, figure: str, trained: int) -> list[Interval | None]:
    """Compute each model's share of the trained adapter's gain; None for the base, that adapter, or without a gain.

    `trained` is the index of the adapter that was trained on this base, 1 or more.
    """
    return [_lift(found, figure, index, trained) for index in range(len(found.names))]


def lift_lines(found: Scores | Answers, trained: int) -> list[str]:
    """Describe the shares of each adapter in a line."""
    shares = {figure: lifts(found, figure, trained) for figure in found.figures}
    return [
        _line(name, {figure: of[index] for figure, of in shares.items()})
        for index, name in enumerate(found.names)
        if index not in (0, trained)
    ]


def place_of(names: Sequence[str], trained: str) -> int:
    """Return the index of the trained adapter among the models.

    Raises:
        UsageError: no adapter has this name.
    """
    if trained not in names[1:]:
        raise UsageError(
            f"trained adapter {trained!r} is not among the evaluated: expected one of {', '.join(names[1:]) or 'none'}"
        )
    return names.index(trained, 1)


def _lift(found: Scores | Answers, figure: str, index: int, trained: int) -> Interval | None:
    if index in (0, trained):
        return None
    try:
        return found.lift(figure, index, trained)
    except UsageError:  # the trained adapter gains nothing beyond the interval
        return None


def _line(name: str, shares: dict[str, Interval | None]) -> str:
    told = [f"{figure} {one.value:.2f} [{one.low:.2f}, {one.high:.2f}]" for figure, one in shares.items() if one]
    return (
        f"{name}, share of the trained adapter's gain: {', '.join(told) or 'not defined, as that gains nothing sure'}"
    )


@dataclass(frozen=True)
class FigureRow:
    """A figure of one model as text."""

    figure: str
    value: str
    minus_base: str  # "" for the base
    word: str  # of that difference, e.g. "better"


@lru_cache(maxsize=1)  # the intervals take seconds, and the table and the page show the same ones
def figure_rows(found: Scores | Answers) -> list[tuple[str, list[FigureRow]]]:
    """Format each figure of each model, with the model's name."""
    titles = _TITLES_OF_CHOICES if isinstance(found, Scores) else TITLES
    models: list[tuple[str, list[FigureRow]]] = [(name, []) for name in found.names]
    for figure in found.figures:
        count = found.values(figure).shape[1]
        for index, (value, change) in enumerate(zip(found.bootstrap(figure), found.differences(figure), strict=True)):
            others = (_text(figure, change, "+"), word_of(figure, change, count)) if index else ("", "")
            models[index][1].append(FigureRow(titles[figure], _text(figure, value), *others))
    return models


def summary(answers: Answers) -> list[str]:
    """Describe the figures, and say if no answer ended."""
    count = len(answers.examples)
    lines = [
        f"{count:,} {'example' if count == 1 else 'examples'}, answers of at most {answers.max_new_tokens} tokens, "
        "95% intervals"
    ]
    if not answers.ended.any():
        lines.append(
            "No answer ended, so exact match and equal JSON count none: allow more tokens, or train it to emit EOS."
        )
    return lines


def marks(answers: Answers, model: int, example: int) -> list[str]:
    """Return the marks of an answer: "exact", "equal JSON", "not ended"."""
    found = [
        TITLES[figure].removesuffix(" match")
        for figure in ("exact", "json")
        if figure in answers.figures and answers.by_example(figure)[model, example]
    ]
    return [*found, *([] if answers.written[model][example].ended else ["not ended"])]


def labels(answers: Answers) -> list[str]:
    """Return short names of the models: "base", and the adapters without their folders."""
    return public_names(["base", *answers.names[1:]])


def _side_by_side(answers: Answers, example: int) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(max_width=_LABEL, overflow="fold", style="bold")
    table.add_column(overflow="fold")
    for label, text, marked in _lines(answers, example):
        table.add_row(Text(visible(label)), Text(visible(text)).append(f"  [{marked}]" if marked else "", "italic"))
    return table


def _lines(answers: Answers, example: int) -> Iterator[tuple[str, str, str]]:
    yield "prompt", prompt_text(answers.examples[example].prompt), ""
    for index, text in enumerate(answers.references[example]):
        yield "" if index else "right answer", text, ""
    for model, name in enumerate(labels(answers)):
        yield name, answers.texts[model][example], ", ".join(marks(answers, model, example))


def _text(figure: str, found: Interval, sign: str = "") -> str:
    digits = 1 if figure == "chrf" else 3
    return f"{found.value:{sign}.{digits}f} [{found.low:{sign}.{digits}f}, {found.high:{sign}.{digits}f}]"


def _row(answers: Answers, example: int) -> str:
    right = "".join(map(_shown, answers.references[example]))
    cells = [str(example + 1), _shown(prompt_text(answers.examples[example].prompt)), right]
    for model, row in enumerate(answers.texts):
        cells.append(_shown(row[example]) + "".join(map(_mark, marks(answers, model, example))))
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _shown(text: str) -> str:
    return f'<div class="text">{html_text(text)}</div>'


def _mark(name: str) -> str:
    return f'<span class="mark {"cut" if name == "not ended" else "right"}">{html_text(name)}</span>'
