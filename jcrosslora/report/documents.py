"""The files of a moved adapter: its recipe, its report and its model card (README.md), without local paths."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from huggingface_hub import ModelCardData

from jcrosslora.adapter.folder import CARD
from jcrosslora.adapter.origin import other_model
from jcrosslora.adapter.records import AdapterOrigin
from jcrosslora.checkpoint.hub import is_on_hub, local_names, public_name, publish
from jcrosslora.maps.moved import none_if_nan
from jcrosslora.methods import Method
from jcrosslora.report.fit import fit_sentences
from jcrosslora.report.recipe import RECIPE, SERVED, repeat_command
from jcrosslora.report.record import REPORT, Totals, TransferReport
from jcrosslora.report.table import diagnostics_title, effect_rows, judge, role_rows
from jcrosslora.report.usage import usage
from jcrosslora.utils.picking import pick_evenly
from jcrosslora.utils.texts import markdown_code, markdown_prose, markdown_text

PAGE = "report.html"  # made from the folder later
_OWN = "# The method is not one of jcrosslora: look at the code of its module, then name that with --allow-module.\n"
_LOOKS = 10  # points of a fit's curve that the card shows
_EXAMPLES = "Some of the completions, prompts and answers written by the source with the original adapter:"
_EFFECT = (
    "How the original update changes the source and the moved one the target, over the same positions of the same "
    "texts: the divergence from the base without it (mean and standard deviation over texts), and the negative "
    "log-likelihood of the text, in nats."
)
_LICENCE = (
    "The licences of the source adapter, of the source base model and of the target base model all apply to this "
    "adapter."
)


def complete(report: TransferReport, method: Method) -> TransferReport:
    """Fill in the verdict, the recipe and the totals, which follow from the method and the other fields."""
    totals = Totals(none_if_nan(report.kept), none_if_nan(report.left_behind))
    recipe = "".join(f"{name} = {_toml(value)}\n" for name, value in _settings(report, method).items())
    return msgspec.structs.replace(report, verdict=judge(report, method), recipe_toml=recipe, totals=totals)


def published(report: TransferReport, **settings: str) -> TransferReport:
    """Return a report, as `complete` returned it, without local paths.

    `settings` (out, profile, dtype) replace the recipe's defaults for a transfer in memory.
    """
    shown, target = publish(report, replacements(report)), report.target
    return msgspec.structs.replace(
        shown,
        recipe_toml=with_settings(report, **settings).recipe_toml,
        source=msgspec.structs.replace(shown.source, name=_source_name(report), ref=public_name(report.source.ref)),
        target=msgspec.structs.replace(shown.target, name=public_name(target.name), ref=public_name(target.ref)),
    )


def with_settings(report: TransferReport, **settings: str) -> TransferReport:
    """Return a report whose recipe has these settings; they replace settings with the same names."""
    named = {line.partition(" = ")[0]: line for line in report.recipe_toml.splitlines(keepends=True)}
    named |= {name: f"{name} = {_toml(value)}\n" for name, value in settings.items()}
    return msgspec.structs.replace(report, recipe_toml="".join(named.values()))


def documents(report: TransferReport, profile: str) -> dict[str, str]:
    """Return the texts saved with a moved adapter, by file name; `report` comes from `published`."""
    command, filled = repeat_command(report.recipe_toml)
    head = f"# How this adapter was made. Run it again{filled}:\n# {command}\n"
    head += _OWN if ":" in report.recipe.method else ""
    return {CARD: model_card(report, profile), REPORT: report_text(report), RECIPE: head + report.recipe_toml}


def report_text(report: TransferReport) -> str:
    """Return the content of `transfer_report.json`."""
    return json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n"


def provenance(report: TransferReport) -> dict[str, str]:
    """Return the origin of an adapter for its safetensors header; `report` comes from `published`."""
    data = report.to_json()
    parts = {f"jcrosslora.{name}": json.dumps(data[name]) for name in ("recipe", "source", "target", "adapter")}
    return {"jcrosslora.version": report.version, **parts}


def _source_name(report: TransferReport) -> str | None:
    """Return the hub id of the base that the adapter names, else the public name of the source.

    The hub id is ignored if it names another model than the source. It is preferred because the `general.name` of a
    GGUF file often differs from the name of the repository.
    """
    stated, name = report.adapter.base_name, report.source.name
    same = is_on_hub(stated) and (name is None or other_model(stated or "", name) is None)
    return stated if same else public_name(name)


def replacements(report: TransferReport) -> dict[str, str]:
    """Return the public name of each local path in a report, by path."""
    ends = report.source, report.target
    files = report.adapter.name, report.recipe.prompts, report.recipe.examples
    return local_names(*files, *(end.ref for end in ends), *(end.name for end in ends))


def _settings(report: TransferReport, method: Method) -> dict[str, Any]:
    """Return what `jcrosslora transfer --recipe` reads; hyper-parameters only if they differ from the defaults."""
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
        "alpha": report.adapter.alpha,
        "dtype": "float32",
        "profile": "portable",
        "seed": recipe.seed,
        "prompts": public_name(recipe.prompts),
        "examples": public_name(recipe.examples),
        "probe_count": recipe.probe_count,
        "adapter_revision": report.adapter.revision,
        "source_revision": report.source.revision,
        "target_revision": report.target.revision,
        "target_id": report.target.name if is_on_hub(report.target.name) else None,
    }
    if SERVED in settings:  # the server has the adapter
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
        return str(value).lower() if isinstance(value, bool) else str(value)
    # TOML basic strings allow every escape that JSON writes except surrogate pairs, hence ensure_ascii=False.
    # Characters that do not print are escaped too: TOML forbids a raw DEL, and others act on the text after them.
    text = json.dumps(value, ensure_ascii=False)
    return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in text)


def model_card(report: TransferReport, profile: str = "portable") -> str:
    """Return the text of the card, with the front matter that the hub reads; `report` comes from `published`.

    The target goes into the front matter if it is a hub id. The hub refuses a local name there, so that appears in the
    text only. `profile` is the file format of the adapter.
    """
    name, base = public_name(report.adapter.name) or "adapter", report.target.name
    library = "peft" if profile in ("portable", "peft") else profile
    chosen = f", chosen because {markdown_text(report.choice)}" if report.choice else ""
    sections = [
        _front_matter(base, library, report.adapter),
        f"# {markdown_code(name)} moved to {markdown_code(base or 'another base model')}",
        "This LoRA adapter was not trained on its base model. jcrosslora moved it there from another base, without "
        f"the data that it was trained on, by the method {markdown_code(report.recipe.method)}{chosen}.",
        f"**What to expect:** {markdown_prose(report.verdict.text)}",
        f"## Use\n\n{usage(report.target, profile)}",
        *(f"## {title}\n\n{text}" for title, text in _sections(report) if text),
        f"## Licence\n\n{_LICENCE}",
    ]
    return "\n\n".join(sections) + "\n"


def _sections(report: TransferReport) -> Iterator[tuple[str, str]]:
    """Yield the title and the text of each section; the caller leaves out empty ones."""
    yield "Base models", _bases(report)
    command, filled = repeat_command(report.recipe_toml)
    again = f"The same is in `{RECIPE}`. Run it again{filled}{_module(report.recipe.method)}:"
    yield "Recipe", f"```toml\n{report.recipe_toml.strip()}\n```\n\n{again}\n\n```sh\n{command}\n```"
    yield diagnostics_title(report), _markdown(role_rows(report)) if report.rows else ""
    yield "Fit", "\n\n".join(filter(None, _fit(report)))
    yield "Added", _sentence(report.added)
    ranks = report.rank_sentence if report.fit is not None or report.added else None
    truncation = report.truncation and f"the update was truncated to {report.truncation.sentence}"
    yield "Rank", " ".join(filter(None, (_sentence(ranks), _sentence(truncation))))
    yield "Embedding and output head", _listed([row.sentence for row in report.tokens])
    yield "Effect on text", "" if report.effect is None else f"{_EFFECT}\n\n{_markdown(effect_rows(report.effect))}"
    yield "Not moved", _left(report)
    yield "Warnings", _listed(report.warnings)


def _fit(report: TransferReport) -> Iterator[str]:
    """Yield the facts of the fit, its curve, and some of its completions."""
    if report.fit is not None:
        yield " ".join(map(_sentence, fit_sentences(report.fit)))
    if report.curve:
        looks = pick_evenly(report.curve, _LOOKS)
        rows = [(f"{used:,}", "-" if found is None else f"{found:.3f}") for used, found in looks]
        yield _markdown([{"completions used": used, "divergence": found} for used, found in rows])
    if report.examples:
        yield f"{_EXAMPLES}\n\n" + "\n".join(f"- {markdown_code(text)}" for text in report.examples)


def without_examples(card: str) -> str:
    """Remove the completions that `model_card` put into a card."""
    return re.sub(rf"{re.escape(_EXAMPLES)}\n\n(?:- .*\n)+\n?", "", card)


def _front_matter(base: str | None, library: str, adapter: AdapterOrigin) -> str:
    on_the_hub = is_on_hub(base)
    data = ModelCardData(
        base_model=base if on_the_hub else None,
        base_model_relation="adapter" if on_the_hub else None,
        library_name=library,
        license=adapter.licence,
        license_name=adapter.licence_name,
        license_link=adapter.licence_link,
        pipeline_tag="text-generation",
        tags=[*([f"base_model:adapter:{base}"] if on_the_hub else []), "lora", "jcrosslora"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _module(method: str) -> str:
    """Return what the command needs for a user's method; "" for others."""
    module, _, own = method.partition(":")
    return f", with `--allow-module {module}` once you have looked at the code of that module" if own else ""


def _bases(report: TransferReport) -> str:
    ends = {"source": report.source, "target": report.target}
    columns = "name", "revision", "digest"
    return _markdown(
        [{"": side} | {name: getattr(base, name) or "-" for name in columns} for side, base in ends.items()]
    )


def _left(report: TransferReport) -> str:
    left = report.unmapped_sources
    rows = [{"source module": item.source, "share of the update's energy": f"{item.share:.2%}"} for item in left]
    return "These source modules feed no module of the target.\n\n" + _markdown(rows) if rows else ""


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row[column] for column in head] for row in rows)]
    return "\n".join("| " + " | ".join(markdown_text(cell) for cell in line) + " |" for line in lines)


def _listed(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {markdown_text(sentence)}" for sentence in sentences)


def _sentence(text: str | None) -> str:
    """Return a text with a capital and a full stop; "" for None or ""."""
    plain = markdown_text(text) if text else ""
    return f"{plain[:1].upper()}{plain[1:]}." if plain else ""
