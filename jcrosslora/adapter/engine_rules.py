"""What engines ask of an adapter, one small function for each rule: a sentence where it does not hold, else None.

The rules were read in the engines' sources (vLLM's lora/peft_helper.py, SGLang's srt/lora, llama.cpp's
convert_lora_to_gguf.py and src/llama-adapter.cpp, mlx_lm's tuner/utils.py, Ollama's convert/convert.go); engines
change, so a verdict is a forecast, not a test run.
"""

# ruff: noqa: D103 - the sentence that a rule returns says what it checks.

from collections.abc import Callable

from jcrosslora.adapter.facts import AdapterFacts
from jcrosslora.adapter.kinds.refused import KNOWN_TYPES
from jcrosslora.adapter.kinds.variants import VARIANTS
from jcrosslora.adapter.names import PREFIX, text_module_name
from jcrosslora.adapter.patterns import module_alpha, module_rank
from jcrosslora.adapter.read_gguf import INVOCATION, TYPE
from jcrosslora.checkpoint.gguf_names import architecture

Rule = Callable[[AdapterFacts], str | None]


def known_type(facts: AdapterFacts) -> str | None:
    return None if facts.peft_type in KNOWN_TYPES else f"peft_type {facts.config.get('peft_type')!r} is not known"


def prefix(facts: AdapterFacts) -> str | None:
    bare = [key for key in facts.shapes if not key.startswith("base_model.")]
    return f"tensor names must start with {PREFIX!r}, {bare[0]!r} does not" if bare else None


def own_parts(facts: AdapterFacts) -> str | None:
    """Without an error peft leaves out what stands between lora_A and lora_B in files of these two kinds."""
    other = [tensor.key for tensor in facts.tensors if tensor.kind in ("latent", "lora_gate")]
    return f"only LoRA-XS's or BeamLoRA's own repository reads tensor {other[0]!r}" if other else None


def plain_lora(*supported: str) -> Rule:
    def rule(facts: AdapterFacts) -> str | None:
        if facts.peft_type != "LORA":
            return f"it reads only LoRA, this is {facts.peft_type or 'of no type'}"
        kinds = [kind for kind, applies in VARIANTS.items() if applies(facts.config) and kind not in supported]
        return f"it reads only plain LoRA, this is {', '.join(kinds)}" if kinds else None

    return rule


def required_keys(facts: AdapterFacts) -> str | None:
    missing = [key for key in ("r", "lora_alpha", "target_modules") if not facts.config.get(key)]
    return f"the configuration lacks {', '.join(missing)}" if missing else None


def no_bias(facts: AdapterFacts) -> str | None:
    bias = facts.config.get("bias") or "none"
    return None if bias == "none" else f"bias {bias!r} is not supported"


def saved_modules(facts: AdapterFacts) -> str | None:
    saved = facts.config.get("modules_to_save") or []
    other = [name for name in (saved if isinstance(saved, list) else [saved]) if name not in ("classifier", "score")]
    return f"modules_to_save {', '.join(map(str, other))} is not supported" if other else None


def only_tensors(*kinds: str, norms: bool = False) -> Rule:
    def rule(facts: AdapterFacts) -> str | None:
        other = [t for t in facts.tensors if t.kind not in kinds and not (norms and "norm" in t.module)]
        return f"tensor {other[0].key!r} is not one of a LoRA ({len(other)} such tensors)" if other else None

    return rule


def _largest_rank(facts: AdapterFacts) -> int:
    ranks = [shape[0] for shape in facts.factors("A").values()]
    if facts.pickle and facts.peft_type == "LORA":
        ranks = [int(facts.config["r"]), *map(int, (facts.config.get("rank_pattern") or {}).values())]
    return max(ranks, default=0)


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_rank(facts: AdapterFacts) -> str | None:
    rank = _largest_rank(facts)
    return f"rank {rank} is above {VLLM_RANKS[-1]}, the largest it takes" if rank > VLLM_RANKS[-1] else None


def vllm_rank_flag(facts: AdapterFacts) -> str | None:
    rank = _largest_rank(facts)
    enough = next((size for size in VLLM_RANKS if size >= rank), None)
    return f"rank {rank} needs --max-lora-rank {enough}" if enough and rank > 16 else None


def _overrides(facts: AdapterFacts) -> list[str]:
    """Modules whose rank or alpha is not the common one."""
    if facts.peft_type != "LORA":
        return []
    common = facts.config["r"], facts.config["lora_alpha"]
    return [
        module
        for module in facts.factors("A")
        if (module_rank(facts.config, module), module_alpha(facts.config, module)) != common
    ]


def vllm_patterns(facts: AdapterFacts) -> str | None:
    return "older releases read one scale for all modules and apply this one wrongly" if _overrides(facts) else None


def vllm_embedding(facts: AdapterFacts) -> str | None:
    has = any(tensor.kind == "embedding" for tensor in facts.tensors)
    return "the LoRA of the embedding must have the base's vocabulary size" if has else None


def sglang_patterns(facts: AdapterFacts) -> str | None:
    return "it refuses ranks or alphas that differ between modules" if _overrides(facts) else None


def sglang_rslora(facts: AdapterFacts) -> str | None:
    wrong = facts.config.get("use_rslora") and facts.config.get("r") != 1
    return "it ignores use_rslora: the update would be sqrt(r) too weak, without an error" if wrong else None


def sglang_tensors(facts: AdapterFacts) -> str | None:
    other = only_tensors("A", "B", "embedding")(facts)
    return f"{other}; whether it is read is not known" if other else None


def alpha_over_rank(facts: AdapterFacts) -> str | None:
    """An engine that knows one alpha and takes the rank from the tensor: right unless PEFT's scale is another."""
    if facts.peft_type != "LORA":
        return None
    alpha, ranks = facts.config["lora_alpha"], {module: shape[0] for module, shape in facts.factors("A").items()}
    wrong = [module for module, scale in facts.scales().items() if abs(alpha / ranks[module] / scale - 1) > 1e-6]
    if not wrong:
        return None
    return f"it scales by lora_alpha / rank alone: wrong for {len(wrong)} of {len(ranks)} modules ({wrong[0]})"


def llamacpp_convert(facts: AdapterFacts) -> str | None:
    del facts
    return "write it with `jcrosslora export --profile gguf`, or convert it with convert_lora_to_gguf.py"


def llamacpp_head(facts: AdapterFacts) -> str | None:
    has = any(text_module_name(module) == "lm_head" for module in facts.factors("A"))
    return "the LoRA of lm_head is refused where the base ties it to the embedding" if has else None


_OLLAMA_FAMILIES = ("llama", "gemma2")
_OLLAMA_ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def ollama_family(facts: AdapterFacts) -> str | None:
    if facts.family is None or facts.family in _OLLAMA_FAMILIES:
        return None
    return f"it takes adapters of {' and '.join(_OLLAMA_FAMILIES)} bases, this is for {facts.family}"


def ollama_family_note(facts: AdapterFacts) -> str | None:
    known = f"only for {' and '.join(_OLLAMA_FAMILIES)} bases; the family of this base was not given"
    return known if facts.family is None else None


def ollama_alpha(facts: AdapterFacts) -> str | None:
    alpha = facts.config.get("lora_alpha")
    fits = isinstance(alpha, int) and 0 <= alpha < 2**32
    return None if fits else f"lora_alpha {alpha!r} is not a whole number of 32 bits"


def ollama_names(facts: AdapterFacts) -> str | None:
    other = [t for t in facts.tensors if t.kind not in "AB" or t.module.rpartition(".")[2] not in _OLLAMA_ROLES]
    return f"tensor {other[0].key!r} is not of {', '.join(_OLLAMA_ROLES)}" if other else None


def ollama_rank(facts: AdapterFacts) -> str | None:
    wide = [module for module, shape in facts.factors("A").items() if len(shape) == 2 and shape[0] >= shape[1]]
    return f"rank of {wide[0]} is not below its width, so its tensors would be turned round" if wide else None


def pickle(facts: AdapterFacts) -> str | None:
    return (
        "the weights are a pickle (adapter_model.bin); their names and shapes were not checked"
        if facts.pickle
        else None
    )


def changes_base(facts: AdapterFacts) -> str | None:
    init = str(facts.config.get("init_lora_weights")).lower()
    changes = init.startswith(("pissa", "olora", "corda", "loftq"))
    return f"init_lora_weights {init} changes the base weights when the adapter is loaded" if changes else None


def _whole_model(facts: AdapterFacts) -> bool:
    return facts.config.get("fine_tune_type") == "full"


def mlx_config(facts: AdapterFacts) -> str | None:
    parameters = facts.config.get("lora_parameters")
    keys = parameters if isinstance(parameters, dict) else {}
    missing = [key for key in ("rank", "scale") if key not in keys]
    wrong = missing and not _whole_model(facts)
    return f"lora_parameters of the configuration lacks {' and '.join(missing)}" if wrong else None


def mlx_names(facts: AdapterFacts) -> str | None:
    other = [key for key in facts.shapes if not key.endswith((".lora_a", ".lora_b", ".m"))]
    return f"tensor {other[0]!r} is not a lora_a or lora_b" if other and not _whole_model(facts) else None


def mlx_rank(facts: AdapterFacts) -> str | None:
    if mlx_config(facts) or _whole_model(facts):
        return None
    rank, sides = facts.config["lora_parameters"]["rank"], {".lora_a": -1, ".lora_b": 0}
    other = [
        key
        for key, shape in facts.shapes.items()
        for suffix, axis in sides.items()
        if key.endswith(suffix) and len(shape) == 2 and shape[axis] != rank
    ]
    return f"tensor {other[0]!r} is not of rank {str(rank)[:20]}, which the configuration states" if other else None


def gguf_lora(facts: AdapterFacts) -> str | None:
    stated = facts.config.get(TYPE)
    return None if stated == "lora" else f"{TYPE} is {str(stated)[:60]!r}, it reads 'lora' alone"


def gguf_family(facts: AdapterFacts) -> str | None:
    arch, wanted = facts.config.get("general.architecture"), architecture(facts.family or "")
    other = wanted is not None and wanted != arch
    return f"the adapter is for bases of architecture {str(arch)[:60]!r}, this one is {wanted!r}" if other else None


def gguf_always_acts(facts: AdapterFacts) -> str | None:
    return "it does not know the invocation tokens (aLoRA) and would always act" if INVOCATION in facts.config else None


def ollama_engine(facts: AdapterFacts) -> str | None:
    del facts
    return "not for bases that its own engine runs, which knows no adapters (loras are not yet implemented)"
