"""Examples on the page: the prompt, the right answer, and what the target writes before and after."""

from __future__ import annotations

from jcrosslora.report.page.evaluation import Evaluation, Example, Model, Written
from jcrosslora.report.record import cut
from jcrosslora.utils.texts import html_text

_SHOWN = 10
_LONGEST = 4000  # characters of a text
_ROOM = 300_000  # characters of all texts, for the page to stay small where many adapters were evaluated
# A random or another adapter answers a newcomer's question no better than the bars do.
_PARTS = ("base", "moved", "trained")
_TITLES = {"base": "before", "moved": "after"}


def answers_section(evaluation: Evaluation) -> str:
    """Return up to ten examples, evenly spread over those that the evaluation holds; "" if it holds none."""
    every = evaluation.examples
    count = min(_SHOWN, len(every))
    if not count:
        return ""
    chosen = [every[at * len(every) // count] for at in range(count)]
    named = any(model.part == "moved" for model in evaluation.models)
    columns = [place for place, model in enumerate(evaluation.models) if not named or model.part in _PARTS]
    longest = min(_LONGEST, _ROOM // (count * (len(columns) + 2)))
    cards = "".join(_card(evaluation, example, columns, longest) for example in chosen)
    return f"<section><h2>Before and after, {_number(count)}</h2>{cards}</section>"


def _number(count: int) -> str:
    return "one example" if count == 1 else f"{count} examples"


def _card(evaluation: Evaluation, example: Example, columns: list[int], longest: int) -> str:
    parts = [_part("right answer", " or ".join(example.right), longest)]
    parts += [_answer(evaluation.models[place], example.written[place], longest) for place in columns]
    asked = _part("prompt", example.prompt, longest)
    return f'<div class="example"><div class="texts">{asked}</div><div class="texts">{"".join(parts)}</div></div>'


def _answer(model: Model, written: Written, longest: int) -> str:
    marks = ['<span class="mark right">exact</span>'] if written.exact else []
    marks += [] if written.ended else ['<span class="mark cut">not ended</span>']
    return _part(_TITLES.get(model.part, model.title), written.text, longest, " ".join(marks))


def _part(title: str, text: str, longest: int, marks: str = "") -> str:
    shown = html_text(cut(text, longest)) or '<span class="muted">(nothing)</span>'
    return f'<div><div class="muted">{html_text(title)} {marks}</div><div class="text">{shown}</div></div>'
