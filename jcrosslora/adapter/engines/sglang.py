"""SGLang, main branch in September 2026: python/sglang/srt/lora; use_rslora is its issue #40835."""

# ruff: noqa: D103 - the sentence that a rule returns is its documentation.

from jcrosslora.adapter.engines.facts import AdapterFacts
from jcrosslora.adapter.engines.rules import (
    Engine,
    no_parts_between_factors,
    note_pickle,
    only_plain_lora,
    only_tensors,
    overriding_modules,
)


def no_patterns(facts: AdapterFacts) -> str | None:
    return "it refuses ranks or alphas that differ between modules" if overriding_modules(facts) else None


def no_rslora(facts: AdapterFacts) -> str | None:
    wrong = facts.config.get("use_rslora") and facts.config.get("r") != 1
    return "it ignores use_rslora: the update would be sqrt(r) too weak, without an error" if wrong else None


def note_tensors(facts: AdapterFacts) -> str | None:
    other = only_tensors("A", "B", "embedding")(facts)
    return f"{other}; whether it is read is not known" if other else None


SGLANG = Engine(
    "SGLang", (only_plain_lora(), no_parts_between_factors, no_patterns, no_rslora), (note_pickle, note_tensors)
)
