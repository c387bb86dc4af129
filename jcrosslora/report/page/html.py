"""The page: one self-contained HTML file, section by section; and the result in a notebook.

The style sheet `data/report.css` makes it light or dark like the reader's system, one column on a phone, and light in
print.
"""

from collections.abc import Iterable, Sequence
from importlib.resources import files

from jcrosslora.adapter.records import AdapterOrigin
from jcrosslora.checkpoint.hub import public_name, publish
from jcrosslora.report.documents import replacements
from jcrosslora.report.fit import fit_sentences
from jcrosslora.report.page.charts import Picture, pictures
from jcrosslora.report.page.contents import Contents, Evaluation, Example, Model, Written
from jcrosslora.report.page.headline import FIGURES, headline, present
from jcrosslora.report.page.next_steps import Step, next_steps, where
from jcrosslora.report.recipe import RECIPE, repeat_command
from jcrosslora.report.record import Base, TransferReport, shorten
from jcrosslora.report.table import diagnostics_title, effect_rows, role_rows
from jcrosslora.utils.picking import pick_evenly
from jcrosslora.utils.texts import html_page, html_prose, html_table, html_text

_SHOWN = 10
_TEXTS = 5  # shown in a notebook, evenly spread
_GOOD, _MIDDLING = "#2e7d32", "#b26a00"
_COLOURS = {"works": _GOOD, "aligned": _GOOD, **dict.fromkeys(("partly", "weak", "unknown", "control"), _MIDDLING)}
_BOX = "white-space:pre-wrap;overflow-wrap:anywhere;max-height:14rem;overflow-y:auto;margin:6px 0"  # style of texts
_LONGEST = 4000  # characters of a text
_ROOM = 300_000  # characters of all texts together, so that many adapters do not make a large page
# Answers of random and other adapters would tell a newcomer no more than the bars do.
_PARTS = ("base", "moved", "trained")
_TITLES = {"base": "before", "moved": "after"}
_ITS_OWN = (
    "The source wrote all of this text itself, with the original adapter. Do the texts look like the adapter's job? If "
    "they do not, give prompts of that job by `--prompts`."
)
_SHARE = "share of the trained adapter's gain"


def report_page(contents: Contents) -> str:
    """Return the whole page; the same contents give the same bytes.

    All texts are escaped. The page loads nothing and holds no script. Raises UsageError if the recipe is not TOML, or
    if there is a picture and matplotlib is not installed.
    """
    title = html_text(_title(contents))
    drawn = {picture.name: _drawn(picture) for picture in pictures(contents)}
    style = (files("jcrosslora") / "data" / "report.css").read_text(encoding="utf-8")
    evaluation, moved = contents.evaluation, contents.moved
    steps = [_step(contents, step) for step in next_steps(contents)]
    body = [
        f"<h1>{title}</h1>",
        _introduction(contents),
        _verdict(contents),
        _section("Next step", "".join(steps[:1])),
        drawn.get("bars", ""),
        "" if evaluation is None else answers_section(evaluation),
        _grid(_text_section(contents), drawn.get("curve", "")),
        _warnings_section(contents),
        "" if evaluation is None else _figures_section(evaluation),
        "" if moved is None else _recipe_section(moved),
        _section("Other steps", "".join(steps[1:])),
    ]
    return html_page(title, f"\n{style}", ["<main>", *filter(None, body), "</main>"])


def result_html(report: TransferReport, texts: Sequence[str]) -> str:
    """Return the result of a transfer for a notebook: all text is escaped, and local paths are replaced.

    It shows up to five of `texts`, which are the texts of the fit.
    """
    found, names = report.verdict, (public_name(one.name) for one in (report.adapter, report.source, report.target))
    facts = () if report.fit is None else fit_sentences(report.fit)
    sentences = [f"{sentence[:1].upper()}{sentence[1:]}." for sentence in (*facts, report.added) if sentence]
    parts = [
        f"<b>{html_text('{}: {} to {}'.format(*names))}</b>",
        f'<div style="border-left:4px solid {_COLOURS.get(found.level, "#c62828")};padding:2px 8px;margin:6px 0">'
        f"<b>{html_text(found.level)}</b>: {html_prose(found.text)}</div>",
        *(f"<div>{html_prose(sentence)}</div>" for sentence in (_method(report), *sentences)),
        html_table(role_rows(report, full=False), diagnostics_title(report)),
        html_table(effect_rows(report.effect), "Effect on text") if report.effect is not None else "",
        _details("Warnings", map(html_prose, report.warnings)),
        _details(
            "Text that it was made on", [html_text(shorten(text, _LONGEST)) for text in pick_evenly(texts, _TEXTS)]
        ),
    ]
    return publish(f"<div>{''.join(parts)}</div>", replacements(report))


def _title(contents: Contents) -> str:
    moved = contents.moved
    if moved is None:
        return f"Adapters of {contents.evaluation.models[0].name}" if contents.evaluation else contents.name
    return f"{moved.adapter.name or 'Adapter'}, moved to {moved.target.name or 'another model'}"


def _introduction(contents: Contents) -> str:
    moved = contents.moved
    if moved is None:
        return '<p class="muted">An adapter is a small file that changes what a model does.</p>'
    source, target = moved.source.name or "one model", moved.target.name or "another model"
    words = "An adapter is a small file that changes what a model does, and fits only the model that it was trained "
    words += f"on. This one was trained on {source} (the source). It was moved to {target} (the target), without the "
    words += "data that it was trained on."
    return f'<p class="muted">{html_text(words)}</p>'


def _verdict(contents: Contents) -> str:
    found = headline(contents)
    sentence = f"<p><b>{found.word}.</b> {html_prose(found.sentence)}</p>"
    return f'<div class="verdict {found.tone}">{sentence}{_list(found.reasons)}</div>'


def _step(contents: Contents, step: Step) -> str:
    place = where(contents, step)
    below = f'<p class="muted">{html_prose(place)}</p>' if place else ""
    return f"<p>{html_prose(step.sentence)}</p>{_shell(*step.commands)}{below}"


def _shell(*commands: str) -> str:
    """Return commands to paste, each in a block, so that a wrapped command does not look like two."""
    return f"<pre>{''.join(f'<code>{html_text(command)}</code>' for command in commands)}</pre>" if commands else ""


def _drawn(picture: Picture) -> str:
    entries = "".join(
        f'<div><span class="key" style="background:var(--{colour})"></span>{html_text(meaning)}</div>'
        for colour, meaning in picture.key
    )
    below = f"<figcaption>{entries}<p>{html_text(picture.words)}</p></figcaption>"
    return _section(picture.title, f"<figure>{picture.svg()}{below}</figure>")


def _grid(*parts: str) -> str:
    return f'<div class="grid">{"".join(parts)}</div>' if any(parts) else ""


def answers_section(evaluation: Evaluation) -> str:
    """Return up to ten evenly spaced examples of the evaluation; "" if it has none."""
    every = evaluation.examples
    count = min(_SHOWN, len(every))
    if not count:
        return ""
    chosen = [every[at * len(every) // count] for at in range(count)]
    named = any(model.part == "moved" for model in evaluation.models)
    columns = [place for place, model in enumerate(evaluation.models) if not named or model.part in _PARTS]
    longest = min(_LONGEST, _ROOM // (count * (len(columns) + 2)))
    cards = "".join(_card(evaluation, example, columns, longest) for example in chosen)
    return _section(f"Before and after, {'one example' if count == 1 else f'{count} examples'}", cards)


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
    shown = html_text(shorten(text, longest)) or '<span class="muted">(nothing)</span>'
    return f'<div><div class="muted">{html_text(title)} {marks}</div><div class="text">{shown}</div></div>'


def _text_section(contents: Contents) -> str:
    """Return the section on how the update was made, and from which text; "" without a transfer."""
    moved = contents.moved
    if moved is None:
        return ""
    lines = [_method(moved)]
    facts = () if moved.fit is None else fit_sentences(moved.fit)
    lines += [f"{sentence[:1].upper()}{sentence[1:]}." for sentence in facts]
    lines += [f"Added: {moved.added}."] if moved.added else []
    if moved.fit is None:
        lines.append("No update was fitted: the original one was carried over by formulas.")
    if moved.wrote_prompts:
        lines.append(_ITS_OWN)
    elif moved.recipe.probes != "none":
        lines.append(f"Text that the models were run on: {moved.recipe.probes}. It is not shown.")
    said = "".join(f"<p>{html_prose(line)}</p>" for line in lines)
    texts = (shorten(text, _LONGEST) for text in moved.examples or contents.texts)
    shown = "".join(f'<div class="text boxed">{html_text(text)}</div>' for text in texts)
    return _section("What was it made from?", said + (f'<div class="all">{shown}</div>' if shown else ""))


def _warnings_section(contents: Contents) -> str:
    """Return the warnings; "" if there are none."""
    moved, evaluation = contents.moved, contents.evaluation
    lines = [] if moved is None else list(moved.warnings)
    if moved is not None and moved.unmapped_targets:
        lines.append(f"{len(moved.unmapped_targets):,} modules of the target got no update.")
    if moved is not None and moved.effect is not None:
        lines.append(f"Checked at the end of the move: {moved.effect.sentence}.")
    if evaluation is not None:
        lines += [f"Not part of the figures: {sentence}" for sentence in evaluation.not_scored]
        if evaluation.guessed and (model := evaluation.of_part("moved")) is not None:
            which = f"{model.name}, the only one that is neither trained nor random"
            lines.append(f"The answers are those of the adapter {which}: is it this one?")
        base = evaluation.models[0].name
        target = None if moved is None else moved.target
        if target is not None and evaluation.digest is not None and target.digest is not None:
            if evaluation.digest != target.digest:
                other = f"The answers are those of {base}, whose weights are not those of {target.name}"
                lines.append(f"{other}, to which the adapter was moved.")
        elif target is not None and target.name is not None and base != target.name:
            other = f"The answers are those of {base}, and the adapter was moved to {target.name}"
            lines.append(f"{other}: are they the same model?")
    return _section("Good to know", _list(lines))


def _figures_section(evaluation: Evaluation) -> str:
    """Return a table of all figures: interval, difference to the base, and whether that is clear."""
    rows = [_figure(model, name) for model in evaluation.models for name in present(evaluation)]
    names = [f"{model.title}: {model.name}" for model in evaluation.models if model.title != model.name]
    table = f'<div class="wide">{html_table(rows)}</div>'
    return _section("All figures", f'{table}<p class="muted">{html_text("; ".join(names))}</p>')


def _figure(model: Model, name: str) -> dict[str, str]:
    shown, figure = FIGURES[name], model.figures[name]
    change, lift = figure.minus_base, figure.lift
    return {
        "model": model.title,
        "figure": shown.title,
        "value [95% interval]": shown.interval(figure),
        "minus the base": "" if change is None else shown.interval(change, "+"),
        "": model.direction(name) or "",
        **({} if lift is None else {_SHARE: f"{lift.value:.2f} [{lift.low:.2f}, {lift.high:.2f}]"}),
    }


def _recipe_section(moved: TransferReport) -> str:
    """Return the recipe, the bases and the version."""
    facts = [
        ("adapter", _named(moved.adapter)),
        ("source", _named(moved.source)),
        ("target", _named(moved.target)),
        ("method", moved.recipe.method),
        ("rank", " to ".join(map(str, moved.rank_range)) or "none"),
        ("jcrosslora", moved.version),
    ]
    listed = "".join(f"<dt>{title}</dt><dd>{html_text(text)}</dd>" for title, text in facts)
    command, filled = repeat_command(moved.recipe_toml)
    again = f"<p>The same as <code>{RECIPE}</code>. Make the adapter again{filled}:</p>{_shell(command)}"
    return _section("Recipe and versions", f"<dl>{listed}</dl><pre>{html_text(moved.recipe_toml.strip())}</pre>{again}")


def _named(base: Base | AdapterOrigin) -> str:
    parts = [base.name or "not named", f"revision {base.revision}" if base.revision else "", base.digest or ""]
    return ", ".join(filter(None, parts))


def _method(report: TransferReport) -> str:
    return f"Method `{report.recipe.method}`{f', because {report.choice}' if report.choice else ''}."


def _details(title: str, items: Iterable[str]) -> str:
    """Return a section that opens on a click, with each item in a scrolling box; "" without items."""
    boxes = [f'<div style="{_BOX}">{item}</div>' for item in items]
    return f"<details><summary>{title} ({len(boxes)})</summary>{''.join(boxes)}</details>" if boxes else ""


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _list(sentences: Iterable[str]) -> str:
    """Return an HTML list; "" without sentences."""
    lines = "".join(f"<li>{html_prose(sentence)}</li>" for sentence in sentences)
    return f"<ul>{lines}</ul>" if lines else ""
