"""peft 0.21 (2026)."""

# ruff: noqa: D103 - the sentence that a rule returns is its documentation.

from jcrosslora.adapter.engines.facts import AdapterFacts
from jcrosslora.adapter.engines.module_names import same_names
from jcrosslora.adapter.engines.rules import Engine, no_parts_between_factors, note_pickle
from jcrosslora.adapter.expert_names import is_of_experts
from jcrosslora.adapter.kinds.config_tables import ALORA, DORA, KNOWN_TYPES, RANDOM_PISSA, VARIANTS
from jcrosslora.adapter.names import PREFIX
from jcrosslora.adapter.weight_targets import is_by_weight, is_taken


def known_type(facts: AdapterFacts) -> str | None:
    return None if facts.peft_type in KNOWN_TYPES else f"peft_type {facts.config.get('peft_type')!r} is not known"


def prefix(facts: AdapterFacts) -> str | None:
    bare = [key for key in facts.shapes if not key.startswith("base_model.")]
    return f"tensor names must start with {PREFIX!r}, {bare[0]!r} does not" if bare else None


def no_random_init(facts: AdapterFacts) -> str | None:
    random = VARIANTS[RANDOM_PISSA](facts.config)
    return "it draws the random SVD of pissa_niter_N anew, and so changes the base in another way" if random else None


def named_by_weight(facts: AdapterFacts) -> str | None:
    lost = [name for name in facts.factors("A") if is_taken(facts.family, name) and not is_of_experts(name)]
    lost = [name for name in lost if not is_by_weight(facts.config, name)]
    why = "it takes gate_proj, up_proj and down_proj in target_modules for experts, and loses the factors of"
    cure = "write the adapter again with `jcrosslora export --base`"
    return f"{why} {lost[0]} ({len(lost)} such modules): {cure}" if lost else None


def plain_parameters(facts: AdapterFacts) -> str | None:
    kinds = [kind for kind in (DORA, ALORA) if VARIANTS[kind](facts.config)]
    return f"it knows no {kinds[0]} of target_parameters" if kinds and facts.config.get("target_parameters") else None


def note_changed_base(facts: AdapterFacts) -> str | None:
    init = str(facts.config.get("init_lora_weights")).lower()
    changes = init.startswith(("pissa", "olora", "corda", "loftq"))
    return f"init_lora_weights {init} changes the base weights when the adapter is loaded" if changes else None


PEFT = Engine(
    "PEFT",
    (
        *(known_type, prefix, no_parts_between_factors, no_random_init, named_by_weight, plain_parameters),
        same_names(),
    ),
    (note_pickle, note_changed_base),
)
