"""The page's account of how the adapter was made: text, warnings, recipe, bases and versions."""

from __future__ import annotations

from collections.abc import Sequence

from jcrosslora.evaluate.bootstrap import Interval
from jcrosslora.report.page.contents import Contents
from jcrosslora.report.page.evaluation import Evaluation
from jcrosslora.report.page.figures import FIGURES, Shown, present
from jcrosslora.report.page.moved import Base, Moved
from jcrosslora.report.record import cut
from jcrosslora.utils.texts import html_table, html_text

_ITS_OWN = (
    "The source wrote all of this text itself, with the original adapter. Do the texts look like the adapter's job? If "
    "they do not, give prompts of that job by --probe-text."
)

_SHARE = "share of the trained adapter's gain"


def text_section(contents: Contents) -> str:
    """Return what text the update was fitted on, or what the method looked at instead; "" without a transfer."""
    moved = contents.moved
    if moved is None:
        return ""
    lines = [f"Method {moved.recipe.method}" + (f", because {moved.choice}" if moved.choice else "") + "."]
    lines += [f"The update was {moved.fitted}."] if moved.fitted else []
    lines += [f"Added: {moved.added}."] if moved.added else []
    if not moved.fitted:
        lines.append("No update was fitted: the original one was carried over by formulas.")
    if moved.wrote_prompts:
        lines.append(_ITS_OWN)
    elif moved.recipe.probes != "none":
        lines.append(f"Text that the models were run on: {moved.recipe.probes}. It is not shown.")
    texts = moved.examples or [cut(text) for text in contents.texts]
    shown = "".join(f'<li class="text">{html_text(text)}</li>' for text in texts)
    return _section("What was it made from?", f"{_lines(lines)}{f'<ul>{shown}</ul>' if shown else ''}")


def warnings_section(contents: Contents) -> str:
    """Return what to know before use; "" if there is nothing."""
    moved, evaluation = contents.moved, contents.evaluation
    lines = [] if moved is None else list(moved.warnings)
    if moved is not None and moved.unmapped_targets:
        lines.append(f"{len(moved.unmapped_targets):,} modules of the target got no update.")
    if moved is not None and moved.effect is not None and isinstance(told := moved.effect.get("sentence"), str):
        lines.append(f"Checked at the end of the move: {told}.")
    if evaluation is not None:
        lines += [f"Not part of the figures: {sentence}" for sentence in evaluation.not_scored]
        if evaluation.guessed and (model := evaluation.of_part("moved")) is not None:
            lines.append(f"The answers are those of the adapter {model.name}, the only one evaluated: is it this one?")
        base = evaluation.models[0].name
        if moved is not None and moved.target.name is not None and base != moved.target.name:
            other = f"The answers are those of {base}, and the adapter was moved to {moved.target.name}"
            lines.append(f"{other}: are they the same model?")
    items = "".join(f"<li>{html_text(line)}</li>" for line in lines)
    return _section("Good to know", f"<ul>{items}</ul>") if items else ""


def figures_section(evaluation: Evaluation) -> str:
    """Return a table of every figure with its interval and its difference to the base, whose word says if it counts."""
    rows = [
        {
            "model": model.title,
            "figure": FIGURES[name].title,
            "value [95% interval]": FIGURES[name].interval(model.figures[name]),
            "minus the base": _change(FIGURES[name], model.figures[name].minus_base),
            "": model.direction(name) or "",
            **(
                {}
                if (lift := model.figures[name].lift) is None
                else {_SHARE: f"{lift.value:.2f} [{lift.low:.2f}, {lift.high:.2f}]"}
            ),
        }
        for model in evaluation.models
        for name in present(evaluation)
    ]
    names = [f"{model.title}: {model.name}" for model in evaluation.models if model.title != model.name]
    table = f'<div class="wide">{html_table(rows)}</div>'
    return _section("All figures", f'{table}<p class="muted">{html_text("; ".join(names))}</p>')


def recipe_section(moved: Moved) -> str:
    """Return the recipe, the bases and the version."""
    ranks = sorted(set(moved.ranks.values()))
    facts = [
        ("adapter", _named(moved.adapter)),
        ("source", _named(moved.source)),
        ("target", _named(moved.target)),
        ("method", moved.recipe.method),
        ("rank", " to ".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))) if ranks else "none"),
        ("jcrosslora", moved.version),
    ]
    listed = "".join(f"<dt>{title}</dt><dd>{html_text(text)}</dd>" for title, text in facts)
    again = "<p>The same as recipe.toml; make the adapter again with jcrosslora transfer --recipe recipe.toml.</p>"
    return _section("Recipe and versions", f"<dl>{listed}</dl><pre>{html_text(moved.recipe_toml.strip())}</pre>{again}")


def _change(shown: Shown, change: Interval | None) -> str:
    return "" if change is None else shown.interval(change, "+")


def _named(base: Base) -> str:
    parts = [base.name or "not named", f"revision {base.revision}" if base.revision else "", base.digest or ""]
    return ", ".join(filter(None, parts))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _lines(lines: Sequence[str]) -> str:
    return "".join(f"<p>{html_text(line)}</p>" for line in lines)
