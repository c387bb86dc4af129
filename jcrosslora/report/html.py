"""The result of a transfer in a notebook: the verdict, the diagnostics by role, and the texts of the fit."""

from __future__ import annotations

from collections.abc import Sequence

from jcrosslora.checkpoint.hub import public_name, publish
from jcrosslora.report.public_names import replacements
from jcrosslora.report.record import TransferReport, spread
from jcrosslora.report.table import role_rows
from jcrosslora.report.verdict import verdict
from jcrosslora.utils.texts import html_table, html_text

_TEXTS = 5  # shown, evenly spread
_GOOD, _BAD, _OPEN = "#2e7d32", "#c62828", "#b26a00"
_COLOURS = {"aligned": _GOOD, "weak": _OPEN, "unknown": _OPEN, "control": _OPEN}


def result_html(report: TransferReport, texts: Sequence[str]) -> str:
    """Return the result of a transfer as inline HTML with all text escaped.

    Args:
        report: the report of the transfer.
        texts: the texts of the fit; a few are shown.
    """
    found = verdict(report)
    title = (
        f"{public_name(report.adapter.name)}: {public_name(report.source.name)} to {public_name(report.target.name)}"
    )
    colour = _COLOURS.get(found.level, _BAD)
    sentences = [f"Method {report.recipe.method}" + (f", because {report.choice}" if report.choice else "") + "."]
    sentences += [f"{sentence[:1].upper()}{sentence[1:]}." for sentence in (report.fitted, report.added) if sentence]
    parts = [
        f"<b>{html_text(title)}</b>",
        f'<div style="border-left:4px solid {colour};padding:2px 8px;margin:6px 0">'
        f"<b>{html_text(found.level)}</b>: {html_text(found.text)}</div>",
        *(f"<div>{html_text(sentence)}</div>" for sentence in sentences),
        html_table(role_rows(report), "Diagnostics"),
        html_table(report.effect.rows(), "Effect on text") if report.effect is not None else "",
        _listed("Warnings", report.warnings),
        _listed("Text that it was made on", spread(texts, _TEXTS)),
    ]
    return publish(f"<div>{''.join(parts)}</div>", replacements(report))


def _listed(title: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    lines = "".join(f'<li style="white-space:pre-wrap">{html_text(item)}</li>' for item in items)
    return f"<details><summary>{html_text(title)} ({len(items)})</summary><ul>{lines}</ul></details>"
