"""The files beside a moved adapter: its recipe, its report and its model card, without local paths."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from jcrosslora.adapter.folder import CARD
from jcrosslora.checkpoint.hub import is_hub_id, local_names, public_name, publish
from jcrosslora.methods import Method
from jcrosslora.report.card import model_card
from jcrosslora.report.record import REPORT, Totals, TransferReport, defined
from jcrosslora.report.verdict import judge

SERVED = "source_model"  # the setting that says that a server was asked
RECIPE = "recipe.toml"
PAGE = "report.html"  # which is made from a folder afterwards
_HEAD = """# How this adapter was made. Run it again with: jcrosslora transfer --recipe recipe.toml
# Local files are given by name only: add ADAPTER, --source, --target and --probe-text with your own paths, and
# --source-url where a server is asked.
"""
_OWN = "# The method is not one of jcrosslora: look at the code of its module, then name that with --allow-module.\n"


def complete(report: TransferReport, method: Method) -> TransferReport:
    """Fill in what follows from the other fields of a report and from the method: verdict, recipe and totals."""
    totals = Totals(defined(report.kept), defined(report.left_behind))
    recipe = "".join(f"{name} = {_toml(value)}\n" for name, value in _settings(report, method).items())
    return msgspec.structs.replace(report, verdict=judge(report, method), recipe_toml=recipe, totals=totals)


def published(report: TransferReport, **settings: str) -> TransferReport:
    """Return a report without local paths.

    Args:
        report: as `complete` returns it.
        settings: of the recipe, where they differ from those of a transfer in memory: out, profile, dtype.
    """
    shown = publish(report, replacements(report))
    named = {line.partition(" = ")[0]: line for line in report.recipe_toml.splitlines(keepends=True)}
    named |= {name: f"{name} = {_toml(value)}\n" for name, value in settings.items()}
    return msgspec.structs.replace(
        shown,
        recipe_toml="".join(named.values()),
        source=msgspec.structs.replace(shown.source, name=source_name(report), ref=public_name(report.source.ref)),
        target=msgspec.structs.replace(
            shown.target, name=public_name(report.target.name), ref=public_name(report.target.ref)
        ),
    )


def documents(report: TransferReport, profile: str) -> dict[str, str]:
    """Return the files that go beside a moved adapter, by name.

    Args:
        report: as `published` returns it.
        profile: file format of the adapter.
    """
    head = _HEAD + (_OWN if ":" in report.recipe.method else "")
    return {CARD: model_card(report, profile), REPORT: report_text(report), RECIPE: head + report.recipe_toml}


def report_text(report: TransferReport) -> str:
    """Return the content of `transfer_report.json`."""
    return json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n"


def provenance(report: TransferReport) -> dict[str, str]:
    """Return the origin of an adapter for the header of its safetensors file, which holds strings only.

    Args:
        report: as `published` returns it.
    """
    data = report.to_json()
    parts = {f"jcrosslora.{name}": json.dumps(data[name]) for name in ("recipe", "source", "target", "adapter")}
    return {"jcrosslora.version": report.version, **parts}


def source_name(report: TransferReport) -> str | None:
    """Return the name of the source base: the hub id that the adapter's own configuration states, else the file's.

    The `general.name` of a GGUF file is set at training, and often differs from the name of the repository.
    """
    stated = report.adapter.base_name
    return stated if stated and is_hub_id(stated) and not Path(stated).exists() else public_name(report.source.name)


def replacements(report: TransferReport) -> dict[str, str]:
    """Return the local paths in a report with their public names."""
    ends = report.source, report.target
    return local_names(
        report.adapter.name, report.recipe.probe_text, *(end.ref for end in ends), *(end.name for end in ends)
    )


def _settings(report: TransferReport, method: Method) -> dict[str, Any]:
    """Return what `jcrosslora transfer --recipe` reads; only what differs from the defaults."""
    recipe = report.recipe
    settings = {
        "adapter": public_name(report.adapter.name),
        "source": public_name(report.source.ref),
        **report.asked,
        "target": public_name(report.target.ref),
        "out": "moved",
        "method": recipe.method,
        **_changed(recipe.settings, method),
        "depth": recipe.depth,
        "calibrate": report.calibration,
        "scale": None if report.scale == 1 else report.scale,
        "out_rank": report.out_rank,
        "adapter_rank": report.adapter.rank_limit,
        "dtype": "float32",
        "profile": "portable",
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
    return {name: value for name, value in settings.items() if value is not None}


def _changed(settings: Mapping[str, Any], method: Method) -> dict[str, Any]:
    """Return the hyper-parameters that differ from the defaults, and the truncation rank."""
    stated = {field.name: (getattr(method, field.name), field.default) for field in dataclasses.fields(method)}
    shown = {name: value for name, (value, default) in stated.items() if value != default}
    return shown | ({"svd_rank": settings["svd_rank"]} if "svd_rank" in settings else {})


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if not isinstance(value, str):
        return str(value)
    # TOML basic strings allow every escape that JSON writes except surrogate pairs, hence ensure_ascii=False. What does
    # not print is escaped all the same: a raw DEL they do not allow, and others act on the text behind them.
    text = json.dumps(value, ensure_ascii=False)
    return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in text)
