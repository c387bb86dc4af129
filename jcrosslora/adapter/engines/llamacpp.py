"""llama.cpp, main branch in 2026: convert_lora_to_gguf.py and src/llama-adapter.cpp."""

# ruff: noqa: D103 - the sentence that a rule returns is its documentation.

from jcrosslora.adapter.engines.facts import AdapterFacts
from jcrosslora.adapter.engines.rules import Engine, alpha_over_rank, note_pickle, only_plain_lora, only_tensors
from jcrosslora.adapter.kinds.config_tables import ALORA
from jcrosslora.adapter.read_gguf import TYPE
from jcrosslora.checkpoint.gguf_names import architecture
from jcrosslora.checkpoint.wrapped import text_module_name


def note_convert(facts: AdapterFacts) -> str | None:
    del facts
    return "write it with `jcrosslora export --profile gguf`, or convert it with convert_lora_to_gguf.py"


def note_head(facts: AdapterFacts) -> str | None:
    has = any(text_module_name(module) == "lm_head" for module in facts.factors("A"))
    return "the LoRA of lm_head is refused if the base ties it to the embedding" if has else None


def type_is_lora(facts: AdapterFacts) -> str | None:
    stated = facts.config.get(TYPE)
    return None if stated == "lora" else f"{TYPE} is {str(stated)[:60]!r}, it reads 'lora' alone"


def same_architecture(facts: AdapterFacts) -> str | None:
    arch, wanted = facts.config.get("general.architecture"), architecture(facts.family or "")
    other = wanted is not None and wanted != arch
    return f"the adapter is for bases of architecture {str(arch)[:60]!r}, this one is {wanted!r}" if other else None


GGUF_RULES = (type_is_lora, only_tensors("A", "B", "embedding", norms=True), same_architecture)
OF_PEFT = Engine(
    "llama.cpp",
    (only_plain_lora(ALORA), only_tensors("A", "B", "embedding", "copy", norms=True), alpha_over_rank),
    (note_pickle, note_convert, note_head),
)
OF_GGUF = Engine("llama.cpp", GGUF_RULES, form="GGUF")
