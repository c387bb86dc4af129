"""Rules of the engines that read safetensors: PEFT, vLLM, SGLang and MLX.

PEFT: peft 0.21 (2026).
vLLM, main branch in September 2026: vllm/lora/peft_helper.py, lora_model.py and the choices of --max-lora-rank.
Releases with a `bias_enabled` in peft_helper.py read no rank_pattern and no alpha_pattern.
SGLang, main branch in September 2026: python/sglang/srt/lora; use_rslora is its issue #40835.
MLX, mlx-lm 0.32 (2026): mlx_lm/tuner/utils.py.
"""

# ruff: noqa: D103 - the sentence that a rule returns is its documentation.

from jcrosslora.adapter.config import ALORA, DORA, KNOWN_TYPES, RANDOM_PISSA, is_variant
from jcrosslora.adapter.engines.facts import AdapterFacts
from jcrosslora.adapter.engines.rules import (
    Engine,
    no_parts_between_factors,
    note_mixers,
    note_pickle,
    only_plain_lora,
    only_tensors,
    overriding_modules,
    same_mlx_names,
    same_modules,
    same_names,
)
from jcrosslora.adapter.names import PREFIX, ending, is_of_experts
from jcrosslora.adapter.patterns import is_by_weight, is_taken
from jcrosslora.checkpoint.wrapped import TEXT


def known_type(facts: AdapterFacts) -> str | None:
    return None if facts.peft_type in KNOWN_TYPES else f"peft_type {facts.config.get('peft_type')!r} is not known"


def has_prefix(facts: AdapterFacts) -> str | None:
    bare = [key for key in facts.shapes if not key.startswith("base_model.")]
    return f"tensor names must start with {PREFIX!r}, {bare[0]!r} does not" if bare else None


def no_random_init(facts: AdapterFacts) -> str | None:
    why = "it draws the random SVD of pissa_niter_N anew, and so changes the base in another way"
    return why if is_variant(facts.config, RANDOM_PISSA) else None


def named_by_weight(facts: AdapterFacts) -> str | None:
    lost = [name for name in facts.factors("A") if is_taken(facts.family, name) and not is_of_experts(name)]
    lost = [name for name in lost if not is_by_weight(facts.config, name)]
    why = "it takes gate_proj, up_proj and down_proj in target_modules for experts, and loses the factors of"
    cure = "write the adapter again with `jcrosslora export --base`"
    return f"{why} {lost[0]} ({len(lost)} such modules): {cure}" if lost else None


def plain_parameters(facts: AdapterFacts) -> str | None:
    kinds = [kind for kind in (DORA, ALORA) if is_variant(facts.config, kind)]
    return f"it knows no {kinds[0]} of target_parameters" if kinds and facts.config.get("target_parameters") else None


def note_changed_base(facts: AdapterFacts) -> str | None:
    init = str(facts.config.get("init_lora_weights")).lower()
    changes = init.startswith(("pissa", "olora", "corda", "loftq"))
    return f"init_lora_weights {init} changes the base weights when the adapter is loaded" if changes else None


_PEFT_RULES = (known_type, has_prefix, no_parts_between_factors, no_random_init, named_by_weight, plain_parameters)

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_DEFAULT_RANK = 16  # of --max-lora-rank


def required_keys(facts: AdapterFacts) -> str | None:
    missing = [key for key in ("r", "lora_alpha", "target_modules") if facts.config.get(key) in (None, "")]
    return f"the configuration lacks {', '.join(missing)}" if missing else None


def no_bias(facts: AdapterFacts) -> str | None:
    bias = facts.config.get("bias") or "none"
    return None if bias == "none" else f"bias {bias!r} is not supported"


def saved_modules(facts: AdapterFacts) -> str | None:
    saved = facts.config.get("modules_to_save") or []
    other = [name for name in (saved if isinstance(saved, list) else [saved]) if name not in ("classifier", "score")]
    return f"modules_to_save {', '.join(map(str, other))} is not supported" if other else None


def _largest_rank(facts: AdapterFacts) -> int:
    ranks = [shape[0] for shape in facts.factors("A").values()]
    if facts.pickle and facts.peft_type == "LORA":
        ranks = [int(facts.config["r"]), *map(int, (facts.config.get("rank_pattern") or {}).values())]
    return max(ranks, default=0)


def supported_rank(facts: AdapterFacts) -> str | None:
    rank = _largest_rank(facts)
    return f"rank {rank} is above {VLLM_RANKS[-1]}, the largest it takes" if rank > VLLM_RANKS[-1] else None


def note_rank_flag(facts: AdapterFacts) -> str | None:
    rank = _largest_rank(facts)
    enough = next((size for size in VLLM_RANKS if size >= rank), None)
    return f"rank {rank} needs --max-lora-rank {enough}" if enough and rank > _DEFAULT_RANK else None


def note_patterns(facts: AdapterFacts) -> str | None:
    note = "older releases read one scale for all modules and apply this one wrongly"
    return note if overriding_modules(facts) else None


def note_embedding(facts: AdapterFacts) -> str | None:
    has = any(tensor.kind == "embedding" for tensor in facts.tensors)
    return "the LoRA of the embedding must have the base's vocabulary size" if has else None


# peft stores a copy of an embedding or head that is trained with LoRA; vLLM skips it.
_COPIES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_VLLM_TENSORS = only_tensors("A", "B", "embedding", skipped=lambda tensor: tensor.key.endswith(_COPIES))
_VLLM_RULES = (only_plain_lora(), required_keys, no_bias, saved_modules, _VLLM_TENSORS, supported_rank)

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
    if not isinstance(stated, list):
        return None
    missing = sorted({ending(module) for module in facts.factors("A")} - {ending(str(name)) for name in stated})
    return f"it needs --lora-target-modules with {', '.join(missing)}, named by target_parameters" if missing else None


def note_tensors(facts: AdapterFacts) -> str | None:
    other = only_tensors("A", "B", "embedding")(facts)
    return f"{other}; whether it is read is not known" if other else None


_SGLANG_RULES = (only_plain_lora(), listed_targets, no_parts_between_factors, no_patterns, no_rslora)

# Family -> part of the names of modules that its class in mlx_lm lacks, because it splits the matrices of latent
# attention or gives modules other names.
_MLX_LACKS = {
    **dict.fromkeys(("deepseek_v3", "mistral4"), ".kv_b_proj."),
    **{"lfm2_moe": ".feed_forward.w", "nemotron_h": ".mixer."},
}


def _whole_model(facts: AdapterFacts) -> bool:
    return facts.config.get("fine_tune_type") == "full"


def has_parameters(facts: AdapterFacts) -> str | None:
    stated = facts.config.get("lora_parameters")
    keys = stated if isinstance(stated, dict) else {}
    missing = [key for key in ("rank", "scale") if key not in keys]
    wrong = missing and not _whole_model(facts)
    return f"lora_parameters of the configuration lacks {' and '.join(missing)}" if wrong else None


def only_mlx_tensors(facts: AdapterFacts) -> str | None:
    other = [key for key in facts.shapes if not key.endswith((".lora_a", ".lora_b", ".m"))]
    return f"tensor {other[0]!r} is not a lora_a or lora_b" if other and not _whole_model(facts) else None


def one_rank(facts: AdapterFacts) -> str | None:
    if has_parameters(facts) or _whole_model(facts):
        return None
    rank, axes = facts.config["lora_parameters"]["rank"], {"lora_a": -1, "lora_b": 0}
    sided = [(key, shape, axes.get(key.rpartition(".")[2])) for key, shape in facts.shapes.items() if len(shape) == 2]
    other = [key for key, shape, axis in sided if axis is not None and shape[axis] != rank]
    return f"tensor {other[0]!r} is not of rank {str(rank)[:20]}, which the configuration states" if other else None


def no_lacking_modules(facts: AdapterFacts) -> str | None:
    part = _MLX_LACKS.get(facts.family or "")
    keys = [key for key in facts.shapes if part is not None and part in key]
    return f"its class has no module of the name of {keys[0]!r}, and it refuses the adapter" if keys else None


SAFETENSORS_ENGINES = (
    Engine("PEFT", (*_PEFT_RULES, same_names()), (note_pickle, note_changed_base)),
    Engine(
        "vLLM",
        (*_VLLM_RULES, same_names(f"language_model.{TEXT}")),  # the name in its own class
        (note_pickle, note_rank_flag, note_patterns, note_embedding, note_mixers),
    ),
    Engine(
        "SGLang",
        # It looks for the number of the layer and the ending.
        (*_SGLANG_RULES, same_modules("and would not be applied")),
        (note_pickle, note_all_targets, note_unlisted_targets, note_tensors, note_mixers),
    ),
    Engine(
        "MLX",
        (has_parameters, only_mlx_tensors, one_rank, no_lacking_modules, same_mlx_names),
        (note_mixers,),
        form="MLX",
    ),
)
