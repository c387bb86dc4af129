"""Rules of the engines that read GGUF: llama.cpp and Ollama.

llama.cpp, main branch in 2026: convert_lora_to_gguf.py and src/llama-adapter.cpp.
Ollama, main branch in August 2026: convert/convert.go.
"""

# ruff: noqa: D103 - the sentence that a rule returns is its documentation.

from jcrosslora.adapter.config import ALORA
from jcrosslora.adapter.engines.facts import AdapterFacts
from jcrosslora.adapter.engines.rules import (
    Engine,
    alpha_over_rank,
    note_mixers,
    note_pickle,
    only_plain_lora,
    only_tensors,
    same_gguf_names,
    same_modules,
)
from jcrosslora.adapter.gguf import INVOCATION, TYPE
from jcrosslora.adapter.names import TensorName, ending
from jcrosslora.architectures.blocks import LatentAttention
from jcrosslora.architectures.families import FAMILIES
from jcrosslora.checkpoint.gguf_header import ARCHITECTURES
from jcrosslora.checkpoint.gguf_tensors import architecture
from jcrosslora.checkpoint.wrapped import text_module_name

# Endings of modules, in files of PEFT and in GGUF, whose LoRA llama.cpp loads but does not add, as runs of it show.
_LATENTS = (
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "attn_q_a.weight", "attn_q_b.weight", "attn_kv_a_mqa.weight"),
    *("fc1_latent_proj", "fc2_latent_proj", "ffn_latent_down.weight", "ffn_latent_up.weight"),
)
# The same in models with latent attention.
_QUERIES = ("q_proj", "attn_q.weight")


def _is_norm(tensor: TensorName) -> bool:
    return tensor.kind not in "AB" and "norm" in tensor.module


def _has_head(facts: AdapterFacts) -> bool:
    return any(text_module_name(module) in ("lm_head", "output.weight") for module in facts.factors("A"))


def note_convert(facts: AdapterFacts) -> str | None:
    del facts
    return "write it with `jcrosslora export --profile gguf`, or convert it with convert_lora_to_gguf.py"


def no_norms(facts: AdapterFacts) -> str | None:
    norms = [tensor.key for tensor in facts.tensors if _is_norm(tensor)]
    return f"it loads the file without its trained norms ({norms[0]!r})" if norms else None


def no_latents(facts: AdapterFacts) -> str | None:
    family = FAMILIES.get(facts.family or ARCHITECTURES.get(str(facts.config.get("general.architecture")), ""))
    ends = _LATENTS if family is None or LatentAttention not in family.blocks else (*_LATENTS, *_QUERIES)
    found = [module for module in facts.factors("A") if module.endswith(ends)]
    what = f"it loads the LoRA of {len(found)} modules beside latents and does not add it"
    return f"{what} ({found[0]})" if found else None


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
_OF_GGUF = (type_is_lora, only_tensors("A", "B", "embedding", skipped=_is_norm), same_architecture, same_gguf_names)
_OF_PEFT = (only_plain_lora(ALORA), only_tensors("A", "B", "embedding", "copy", skipped=_is_norm), alpha_over_rank)

_OLLAMA_FAMILIES = ("llama", "gemma2")
_OLLAMA_ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def of_its_families(facts: AdapterFacts) -> str | None:
    if facts.family is None or facts.family in _OLLAMA_FAMILIES:
        return None
    return f"it takes adapters of {' and '.join(_OLLAMA_FAMILIES)} bases, this is for {facts.family}"


def note_families(facts: AdapterFacts) -> str | None:
    known = f"only for {' and '.join(_OLLAMA_FAMILIES)} bases; the family of this base was not given"
    return known if facts.family is None else None


def whole_alpha(facts: AdapterFacts) -> str | None:
    alpha = facts.config.get("lora_alpha")
    fits = isinstance(alpha, int) and 0 <= alpha < 2**32
    return None if fits else f"lora_alpha {alpha!r} is not a whole number of 32 bits"


def known_roles(facts: AdapterFacts) -> str | None:
    known = _OLLAMA_ROLES
    other = [tensor for tensor in facts.tensors if tensor.kind not in "AB" or ending(tensor.module) not in known]
    return f"tensor {other[0].key!r} is not of {', '.join(known)}" if other else None


def rank_below_width(facts: AdapterFacts) -> str | None:
    wide = [module for module, shape in facts.factors("A").items() if len(shape) == 2 and shape[0] >= shape[1]]
    return f"the rank of {wide[0]} is not below its width, so its tensors would be transposed" if wide else None


def always_active(facts: AdapterFacts) -> str | None:
    stated = INVOCATION in facts.config
    return "it does not know the invocation tokens (aLoRA): the adapter would always be active" if stated else None


def note_own_engine(facts: AdapterFacts) -> str | None:
    del facts
    return "not for bases that its own engine runs, which knows no adapters (loras are not yet implemented)"


GGUF_ENGINES = (
    Engine(
        "llama.cpp",
        (*_OF_PEFT, *_TENSORS, same_modules("which its converter refuses")),
        (note_pickle, note_convert, note_head, note_mixers),
    ),
    Engine("llama.cpp", (*_OF_GGUF, *_TENSORS), (note_head,), form="GGUF"),
    Engine(
        "Ollama",
        (only_plain_lora(), of_its_families, whole_alpha, known_roles, rank_below_width, alpha_over_rank),
        (note_pickle, note_families),
    ),
    Engine("Ollama", (*_OF_GGUF, *_TENSORS, always_active), (note_own_engine,), form="GGUF"),
)
