"""llama.cpp, main branch in 2026: convert_lora_to_gguf.py and src/llama-adapter.cpp."""

# ruff: noqa: D103 - the sentence that a rule returns is its documentation.

from jcrosslora.adapter.engines.facts import AdapterFacts
from jcrosslora.adapter.engines.module_names import same_gguf_names, same_modules
from jcrosslora.adapter.engines.rules import (
    Engine,
    alpha_over_rank,
    note_mixers,
    note_pickle,
    only_plain_lora,
    only_tensors,
)
from jcrosslora.adapter.kinds.config_tables import ALORA
from jcrosslora.adapter.names import TensorName
from jcrosslora.adapter.read_gguf import TYPE
from jcrosslora.checkpoint.families import FAMILIES
from jcrosslora.checkpoint.gguf_metadata import ARCHITECTURES
from jcrosslora.checkpoint.gguf_names import architecture
from jcrosslora.checkpoint.wrapped import text_module_name

# Endings of modules, in files of PEFT and in its own, whose LoRA it loads and does not add, as runs of it show.
_BESIDE_LATENTS = (
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "attn_q_a.weight", "attn_q_b.weight", "attn_kv_a_mqa.weight"),
    *("fc1_latent_proj", "fc2_latent_proj", "ffn_latent_down.weight", "ffn_latent_up.weight"),
)
# The same in models with latent attention.
_QUERIES = ("q_proj", "attn_q.weight")


def note_convert(facts: AdapterFacts) -> str | None:
    del facts
    return "write it with `jcrosslora export --profile gguf`, or convert it with convert_lora_to_gguf.py"


def no_norms(facts: AdapterFacts) -> str | None:
    norms = [tensor.key for tensor in facts.tensors if _is_norm(tensor)]
    return f"it loads the file without its trained norms ({norms[0]!r})" if norms else None


def no_latents(facts: AdapterFacts) -> str | None:
    family = FAMILIES.get(facts.family or ARCHITECTURES.get(str(facts.config.get("general.architecture")), ""))
    ends = _BESIDE_LATENTS if family is None or family.latent is None else (*_BESIDE_LATENTS, *_QUERIES)
    found = [module for module in facts.factors("A") if module.endswith(ends)]
    return (
        f"it loads the LoRA of {len(found)} modules beside latents and does not add it ({found[0]})" if found else None
    )


def no_tied_embedding(facts: AdapterFacts) -> str | None:
    if facts.tied is False or not any(tensor.kind == "embedding" for tensor in facts.tensors):
        return None
    ends = "it aborts on the LoRA of an embedding that is the output head too"
    return ends if facts.tied else f"{ends}: check with --base whether this one is"


def no_tied_head(facts: AdapterFacts) -> str | None:
    has = facts.tied is True and _has_head(facts)
    return "the LoRA of an output head that the base ties to its embedding is refused" if has else None


def note_head(facts: AdapterFacts) -> str | None:
    has = facts.tied is None and _has_head(facts)
    return "the LoRA of the output head is refused if the base ties that to its embedding" if has else None


def _is_norm(tensor: TensorName) -> bool:
    return tensor.kind not in "AB" and "norm" in tensor.module


def _has_head(facts: AdapterFacts) -> bool:
    return any(text_module_name(module) in ("lm_head", "output.weight") for module in facts.factors("A"))


def type_is_lora(facts: AdapterFacts) -> str | None:
    stated = facts.config.get(TYPE)
    return None if stated == "lora" else f"{TYPE} is {str(stated)[:60]!r}, it reads 'lora' alone"


def same_architecture(facts: AdapterFacts) -> str | None:
    arch, base = facts.config.get("general.architecture"), facts.base
    known = {architecture(facts.family or "", has) for has in ((False, True) if base is None else (base.has_experts,))}
    if None in known or arch in known:
        return None
    wanted = " or ".join(sorted(map(repr, known)))
    return f"the adapter is for bases of architecture {str(arch)[:60]!r}, this one is {wanted}"


_TENSORS = (no_norms, no_latents, no_tied_embedding, no_tied_head)
GGUF_RULES = (
    type_is_lora,
    only_tensors("A", "B", "embedding", skipped=_is_norm),
    same_architecture,
    same_gguf_names,
    *_TENSORS,
)
OF_PEFT = Engine(
    "llama.cpp",
    (
        only_plain_lora(ALORA),
        only_tensors("A", "B", "embedding", "copy", skipped=_is_norm),
        alpha_over_rank,
        *_TENSORS,
        same_modules("which its converter refuses"),
    ),
    (note_pickle, note_convert, note_head, note_mixers),
)
OF_GGUF = Engine("llama.cpp", GGUF_RULES, (note_head,), form="GGUF")
