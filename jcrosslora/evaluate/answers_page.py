"""A page with the figures of answers and all answers side by side, which needs nothing but itself."""

from jcrosslora.checkpoint.hub import public_name
from jcrosslora.evaluate.answers import Answers
from jcrosslora.evaluate.answers_table import figure_rows, labels, marks, summary
from jcrosslora.text.completion import prompt_text
from jcrosslora.utils.texts import html_table, html_text

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
# A page that was made of texts of others loads nothing and runs nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def answers_page(answers: Answers) -> str:
    """Return a whole HTML page: the figures of each model, and a row for each example with all answers to it.

    All texts are escaped. The page loads nothing, holds no script, and is light or dark as the reader's system is.
    """
    names = labels(answers)
    title = html_text(f"Answers of {public_name(answers.names[0])}, alone and with adapters")
    figures = [
        {
            "model": "" if place else name,
            "figure": row.figure,
            "value": row.value,
            "minus base": row.minus_base,
            "": row.word,
        }
        for name, (_, rows) in zip(names, figure_rows(answers), strict=True)
        for place, row in enumerate(rows)
    ]
    heads = ["", "prompt", "right answer", *names]
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>",
        *(f"<p>{html_text(line)}</p>" for line in summary(answers)),
        f'<div class="wide">{html_table(figures)}</div>',
        '<h2>Side by side</h2>\n<div class="wide"><table class="answers">',
        f"<thead><tr>{''.join(f'<th>{html_text(head)}</th>' for head in heads)}</tr></thead>\n<tbody>",
        *(_row(answers, example) for example in range(len(answers.examples))),
        "</tbody></table></div>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


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
