"""The files beside a moved adapter: its recipe, its report and its model card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jcrosslora.adapter.folder import CARD
from jcrosslora.checkpoint.hub import public_name, publish
from jcrosslora.report.card import model_card
from jcrosslora.report.public_names import replacements, source_name
from jcrosslora.report.record import TransferReport
from jcrosslora.report.table import changed_settings, role_rows
from jcrosslora.report.verdict import verdict

_LOOKS = 10  # points of a fit's curve that the card shows
SERVED = "source_model"  # the setting that says that a server was asked
REPORT, RECIPE = "transfer_report.json", "recipe.toml"
PAGE = "report.html"  # which is made from a folder afterwards
_HEAD = """# How this adapter was made. Run it again with: jcrosslora transfer --recipe recipe.toml
# Local files are given by name only: add ADAPTER, --source, --target and --probe-text with your own paths, and
# --source-url where a server is asked.
"""
_OWN = "# The method is not one of jcrosslora: look at the code of its module, then name that with --allow-module.\n"


def documents(report: TransferReport, *, out: str, profile: str, dtype: str) -> dict[str, str]:
    """Return the files that go beside a moved adapter, by name. They contain no local path.

    Args:
        report: the report of the transfer.
        out: name of the folder.
        profile: file format of the adapter.
        dtype: number format of the adapter.
    """
    recipe = _recipe_of(report, out=out, profile=profile, dtype=dtype)
    data = {"verdict": dataclasses.asdict(verdict(report)), "recipe_toml": recipe, **published(report)}
    head = _HEAD + (_OWN if ":" in report.recipe.method else "")
    return {
        CARD: card_text(report, recipe, profile),
        REPORT: json.dumps(data, indent=2, allow_nan=False) + "\n",
        RECIPE: head + recipe,
    }


def published(report: TransferReport) -> dict[str, Any]:
    """Return a report as JSON data without local paths."""
    data = publish(report.to_json(), replacements(report))
    for side, name in (("source", source_name(report)), ("target", public_name(report.target.name))):
        data[side]["name"] = name
        data[side]["ref"] = public_name(getattr(report, side).ref)
    return data


def _recipe_of(report: TransferReport, *, out: str, profile: str, dtype: str) -> str:
    """Return the transfer as TOML for `jcrosslora transfer --recipe`; only what differs from the defaults."""
    recipe = report.recipe
    settings = {
        "adapter": public_name(report.adapter.name),
        "source": public_name(report.source.ref),
        **report.asked,
        "target": public_name(report.target.ref),
        "out": out,
        "method": recipe.method,
        **changed_settings(report),
        "depth": recipe.depth,
        "calibrate": report.calibration,
        "scale": None if report.scale == 1 else report.scale,
        "out_rank": report.out_rank,
        "adapter_rank": report.adapter.rank_limit,
        "dtype": dtype,
        "profile": profile,
        "seed": recipe.seed,
        "probe_text": public_name(recipe.probe_text),
        "probe_count": recipe.probe_count,
        "adapter_revision": report.adapter.revision,
        "source_revision": report.source.revision,
        "target_revision": report.target.revision,
        "target_name": public_name(report.target.name),
    }
    if SERVED in settings:  # which has its own adapter
        settings |= {"adapter": None, "source": None}
    return "".join(f"{key} = {_toml(value)}\n" for key, value in settings.items() if value is not None)


def card_text(report: TransferReport, recipe: str, profile: str = "portable") -> str:
    """Return the model card of a moved adapter, without local paths."""
    stated = dict(
        library="peft" if profile in ("portable", "peft") else profile,
        licence=report.adapter.licence,
        licence_name=report.adapter.licence_name,
        licence_link=report.adapter.licence_link,
        base_name=public_name(report.target.name),
        source_adapter=public_name(report.adapter.name) or "adapter",
        method=report.recipe.method,
        recipe=recipe,
        bases={
            "source": (source_name(report), report.source.revision, report.source.digest),
            "target": (public_name(report.target.name), report.target.revision, report.target.digest),
        },
        verdict=verdict(report).text,
        table=role_rows(report),
        dropped=[(item.source, f"{item.share:.2%}") for item in report.unmapped_sources],
        notes=report.warnings,
        tokens=[row.sentence for row in report.tokens],
        choice=report.choice,
        effect=() if report.effect is None else report.effect.rows(),
        fitted=report.fitted,
        curve=_spread(report.curve, _LOOKS),
        examples=report.examples,
        added=report.added,
        ranks=report.rank_sentence if report.fitted or report.added else None,
        truncation=None if report.truncation is None else report.truncation.sentence,
    )
    # Before anything is escaped, which would hide a path.
    return model_card(**publish(stated, replacements(report)))


def _spread(curve: Sequence[tuple[int, float]], count: int) -> list[tuple[int, float]]:
    """Take at most `count` points of a curve, evenly spread, its ends among them."""
    places = np.unique(np.linspace(0, len(curve) - 1, count).round().astype(int)) if curve else []
    return [curve[place] for place in places]


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if not isinstance(value, str):
        return str(value)
    # TOML basic strings allow every escape that JSON writes except surrogate pairs, hence ensure_ascii=False. What does
    # not print is escaped all the same: a raw DEL they do not allow, and others act on the text behind them.
    text = json.dumps(value, ensure_ascii=False)
    return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in text)
