"""SGLang, main branch in September 2026: python/sglang/srt/lora; use_rslora is its issue #40835."""

# ruff: noqa: D103 - the sentence that a rule returns is its documentation.

from jcrosslora.adapter.engines.facts import AdapterFacts
from jcrosslora.adapter.engines.module_names import same_modules
from jcrosslora.adapter.engines.rules import (
    Engine,
    no_parts_between_factors,
    note_mixers,
    note_pickle,
    only_plain_lora,
    only_tensors,
    overriding_modules,
)
from jcrosslora.adapter.names import ending

_ALL = ("all-linear", "all")


def listed_targets(facts: AdapterFacts) -> str | None:
    targets = facts.config.get("target_modules")
    listed = isinstance(targets, list) or targets in _ALL
    return None if listed else f"target_modules is {str(targets)[:60]!r}, it takes a list of names: list their endings"


def no_patterns(facts: AdapterFacts) -> str | None:
    return "it refuses ranks or alphas that differ between modules" if overriding_modules(facts) else None


def no_rslora(facts: AdapterFacts) -> str | None:
    wrong = facts.config.get("use_rslora") and facts.config.get("r") != 1
    return "it ignores use_rslora: the update would be sqrt(r) too weak, without an error" if wrong else None


def note_all_targets(facts: AdapterFacts) -> str | None:
    stated = facts.config.get("target_modules")
    return f"older releases need --lora-target-modules beside target_modules {stated!r}" if stated in _ALL else None


def note_unlisted_targets(facts: AdapterFacts) -> str | None:
    stated = facts.config.get("target_modules")
    listed = {ending(str(name)) for name in stated} if isinstance(stated, list) else set()
    missing = sorted({ending(module) for module in facts.factors("A")} - listed) if isinstance(stated, list) else []
    return f"it needs --lora-target-modules with {', '.join(missing)}, named by target_parameters" if missing else None


def note_tensors(facts: AdapterFacts) -> str | None:
    other = only_tensors("A", "B", "embedding")(facts)
    return f"{other}; whether it is read is not known" if other else None


SGLANG = Engine(
    "SGLang",
    (
        *(only_plain_lora(), listed_targets, no_parts_between_factors, no_patterns, no_rslora),
        same_modules("and would not be applied"),  # it looks for the number of the layer and the ending
    ),
    (note_pickle, note_all_targets, note_unlisted_targets, note_tensors, note_mixers),
)
