"""Ollama, main branch in August 2026: convert/convert.go."""

# ruff: noqa: D103 - the sentence that a rule returns is its documentation.

from jcrosslora.adapter.engines.facts import AdapterFacts
from jcrosslora.adapter.engines.llamacpp import GGUF_RULES
from jcrosslora.adapter.engines.rules import Engine, alpha_over_rank, note_pickle, only_plain_lora
from jcrosslora.adapter.names import ending
from jcrosslora.adapter.read_gguf import INVOCATION

_FAMILIES = ("llama", "gemma2")
_ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def family(facts: AdapterFacts) -> str | None:
    if facts.family is None or facts.family in _FAMILIES:
        return None
    return f"it takes adapters of {' and '.join(_FAMILIES)} bases, this is for {facts.family}"


def note_family(facts: AdapterFacts) -> str | None:
    known = f"only for {' and '.join(_FAMILIES)} bases; the family of this base was not given"
    return known if facts.family is None else None


def whole_alpha(facts: AdapterFacts) -> str | None:
    alpha = facts.config.get("lora_alpha")
    fits = isinstance(alpha, int) and 0 <= alpha < 2**32
    return None if fits else f"lora_alpha {alpha!r} is not a whole number of 32 bits"


def known_roles(facts: AdapterFacts) -> str | None:
    other = [tensor for tensor in facts.tensors if tensor.kind not in "AB" or ending(tensor.module) not in _ROLES]
    return f"tensor {other[0].key!r} is not of {', '.join(_ROLES)}" if other else None


def rank_below_width(facts: AdapterFacts) -> str | None:
    wide = [module for module, shape in facts.factors("A").items() if len(shape) == 2 and shape[0] >= shape[1]]
    return f"the rank of {wide[0]} is not below its width, so its tensors would be transposed" if wide else None


def always_active(facts: AdapterFacts) -> str | None:
    stated = INVOCATION in facts.config
    return "it does not know the invocation tokens (aLoRA): the adapter would always be active" if stated else None


def note_own_engine(facts: AdapterFacts) -> str | None:
    del facts
    return "not for bases that its own engine runs, which knows no adapters (loras are not yet implemented)"


OF_PEFT = Engine(
    "Ollama",
    (only_plain_lora(), family, whole_alpha, known_roles, rank_below_width, alpha_over_rank),
    (note_pickle, note_family),
)
OF_GGUF = Engine("Ollama", (*GGUF_RULES, always_active), (note_own_engine,), form="GGUF")
