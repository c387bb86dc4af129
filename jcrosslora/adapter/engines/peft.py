"""peft 0.21 (2026)."""

# ruff: noqa: D103 - the sentence that a rule returns is its documentation.

from jcrosslora.adapter.engines.facts import AdapterFacts
from jcrosslora.adapter.engines.module_names import same_names
from jcrosslora.adapter.engines.rules import Engine, no_parts_between_factors, note_pickle
from jcrosslora.adapter.kinds.config_tables import KNOWN_TYPES
from jcrosslora.adapter.names import PREFIX


def known_type(facts: AdapterFacts) -> str | None:
    return None if facts.peft_type in KNOWN_TYPES else f"peft_type {facts.config.get('peft_type')!r} is not known"


def prefix(facts: AdapterFacts) -> str | None:
    bare = [key for key in facts.shapes if not key.startswith("base_model.")]
    return f"tensor names must start with {PREFIX!r}, {bare[0]!r} does not" if bare else None


def note_changed_base(facts: AdapterFacts) -> str | None:
    init = str(facts.config.get("init_lora_weights")).lower()
    changes = init.startswith(("pissa", "olora", "corda", "loftq"))
    return f"init_lora_weights {init} changes the base weights when the adapter is loaded" if changes else None


PEFT = Engine("PEFT", (known_type, prefix, no_parts_between_factors, same_names()), (note_pickle, note_changed_base))
