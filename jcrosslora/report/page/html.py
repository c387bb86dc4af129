"""The page: one HTML file that needs nothing but itself."""

from __future__ import annotations

from jcrosslora.report.page.contents import Contents
from jcrosslora.report.page.headline import headline
from jcrosslora.report.page.pictures import Picture, caption, pictures
from jcrosslora.report.page.sections import (
    answers_section,
    figures_section,
    missing,
    recipe_section,
    text_section,
    warnings_section,
)
from jcrosslora.report.page.theme import POLICY, STYLE
from jcrosslora.utils.texts import html_text


def report_page(contents: Contents) -> str:
    """Return the whole page; the same contents give the same bytes.

    All texts are escaped. The page loads nothing, holds no script, and is light or dark as the reader's system is.

    Raises:
        UsageError: matplotlib is not installed.
    """
    title = html_text(_title(contents))
    drawn = {picture.name: _figure(picture, contents) for picture in pictures(contents)}
    evaluation, moved = contents.evaluation, contents.moved
    body = [
        f"<h1>{title}</h1>",
        _introduction(contents),
        _verdict(contents),
        drawn.get("bars", ""),
        "" if evaluation is None else answers_section(evaluation),
        _grid(text_section(contents), drawn.get("curve", "")),
        _grid(drawn.get("layers", ""), drawn.get("heat", "")),
        warnings_section(contents),
        "" if evaluation is None else figures_section(evaluation),
        "" if moved is None else recipe_section(moved),
        _missing(contents),
    ]
    head = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
    ]
    return "\n".join([*head, *filter(None, body), "</main>\n</body>\n</html>\n"])


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
    reasons = "".join(f"<li>{html_text(reason)}</li>" for reason in found.reasons)
    listed = f"<ul>{reasons}</ul>" if reasons else ""
    return f'<div class="verdict {found.tone}"><p><b>{found.word}.</b> {html_text(found.sentence)}</p>{listed}</div>'


def _figure(picture: Picture, contents: Contents) -> str:
    words, key = caption(picture.name, contents)
    entries = "".join(
        f'<div><span class="key" style="background:var(--{colour})"></span>{html_text(meaning)}</div>'
        for colour, meaning in key
    )
    below = f"<figcaption>{entries}<p>{html_text(words)}</p></figcaption>"
    return f"<section><h2>{picture.title}</h2><figure>{picture.svg()}{below}</figure></section>"


def _grid(*parts: str) -> str:
    return f'<div class="grid">{"".join(parts)}</div>' if any(parts) else ""


def _missing(contents: Contents) -> str:
    items = "".join(f"<li>{html_text(sentence)}</li>" for sentence in missing(contents))
    return f'<section><h2>Not on this page</h2><ul class="muted">{items}</ul></section>' if items else ""
