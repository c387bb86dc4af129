"""What is written beside a moved adapter: the recipe that made it, and its model card."""

import dataclasses
import json

from jcrosslora.report.card import model_card
from jcrosslora.report.record import TransferReport
from jcrosslora.report.table import changed_settings, role_rows
from jcrosslora.report.verdict import verdict


def recipe_of(report: TransferReport, *, out: str, profile: str, dtype: str) -> str:
    """The transfer as TOML that `jcrosslora transfer --recipe` reads back; only what differs from the defaults."""
    recipe = report.recipe
    settings = {
        "adapter": report.adapter.name,
        "source": report.source.ref,
        "target": report.target.ref,
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
        "probe_text": recipe.probe_text,
        "probe_count": recipe.probe_count,
        "adapter_revision": report.adapter.revision,
        "source_revision": report.source.revision,
        "target_revision": report.target.revision,
        "target_name": report.target.name,
    }
    return "".join(f"{key} = {_toml(value)}\n" for key, value in settings.items() if value is not None)


def report_json(report: TransferReport, recipe: str) -> str:
    """The content of `transfer_report.json`."""
    data = {"verdict": dataclasses.asdict(verdict(report)), "recipe_toml": recipe, **report.to_json()}
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def card_text(report: TransferReport, recipe: str, profile: str = "portable") -> str:
    """The model card of a moved adapter."""
    return model_card(
        library="peft" if profile in ("portable", "peft") else profile,
        base_name=report.target.name,
        source_adapter=report.adapter.name,
        method=report.recipe.method,
        recipe=recipe,
        bases={
            "source": (report.source.name, report.source.revision, report.source.digest),
            "target": (report.target.name, report.target.revision, report.target.digest),
        },
        verdict=verdict(report).text,
        table=role_rows(report),
        dropped=[(item.source, f"{item.share:.2%}") for item in report.unmapped_sources],
        notes=report.warnings,
        tokens=[row.sentence for row in report.tokens],
        choice=report.choice,
        effect=() if report.effect is None else report.effect.rows(),
        fitted=report.fitted,
        added=report.added,
        cut=None if report.truncation is None else report.truncation.sentence,
    )


def _toml(value: str | float) -> str:
    # A TOML basic string takes every escape that JSON writes, apart from surrogate pairs: keep those as they are.
    # It does not take a DEL, which JSON leaves.
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)
    return text.replace("\x7f", "\\u007f")
